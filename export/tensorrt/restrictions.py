"""What TensorRT's parser asks of single operators besides their element types.

From the same table as `bakeout.export.tensorrt.operators`. What depends on the GPU or on values that are computed is
left to TensorRT; that a shape depends on them, `bakeout.export.tensorrt.preflight` sees.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnx

Shape: TypeAlias = tuple[int | None, ...] | None

_MAX_TOPK: Final = 3840


@dataclass(frozen=True)
class Use:
    """A node, and what is known of the values that it reads.

    Attributes:
        node: of ONNX's own domain.
        shapes: by value; a dimension that is not known is None, and so is a shape without a known rank.
        constants: the values that are initializers or made by a Constant.
        values: of small constants.
    """

    node: onnx.NodeProto
    shapes: Mapping[str, Shape]
    constants: Container[str]
    values: Mapping[str, np.ndarray[Any, Any]]

    def input(self, place: int) -> str:
        """The name of an input, empty if it is left out."""
        return self.node.input[place] if place < len(self.node.input) else ""

    def shape(self, place: int) -> Shape:
        """The shape of an input."""
        return self.shapes.get(self.input(place))

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute; text as str."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode(errors="replace") if isinstance(value, bytes) else value
        return default


# What is wrong with a node, None if nothing is.
Restriction: TypeAlias = Callable[[Use], str | None]


def restrictions_of(use: Use) -> list[str]:
    """What TensorRT does not take of a node: each the end of a sentence that begins with the node."""
    return [problem for it in _RESTRICTIONS.get(use.node.op_type, ()) if (problem := it(use)) is not None]


def _constant(place: int, name: str) -> Restriction:
    def check(use: Use) -> str | None:
        given = use.input(place)
        return f"computes its {name}, which must be a constant" if given and given not in use.constants else None

    return check


def _zero(place: int, name: str) -> Restriction:
    constant = _constant(place, name)

    def check(use: Use) -> str | None:
        value = use.values.get(use.input(place))
        nonzero = value is not None and bool(value.astype(np.float32).any())
        return f"has a {name} other than zero" if nonzero else constant(use)

    return check


def _absent(**places: int) -> Restriction:
    def check(use: Use) -> str | None:
        given = [name for name, place in places.items() if use.input(place)]
        return f"has {given[0]}, which must be left out" if given else None

    return check


def _outputs(count: int) -> Restriction:
    def check(use: Use) -> str | None:
        more = any(use.node.output[count:])
        return f"has more than {count} output, which is all that is read" if more else None

    return check


def _axes_given(use: Use) -> str | None:
    given = use.input(1) or use.attribute("axes", None) is not None
    return None if given else "has no axes, without which TensorRT before 11.5 does not read it"


def _ranks(allowed: tuple[int, ...], *places: int) -> Restriction:
    def check(use: Use) -> str | None:
        for place in places:
            shape = use.shape(place)
            if shape is not None and len(shape) not in allowed:
                return f"has an input of {len(shape)} dimensions, not {' or '.join(map(str, allowed))}"
        return None

    return check


def _attribute(name: str, *allowed: object) -> Restriction:
    """The first of those that are allowed is the operator's default."""

    def check(use: Use) -> str | None:
        value = use.attribute(name, allowed[0])
        return None if value in allowed else f"has {name} = {value!a:.50}, not {' or '.join(map(str, allowed))}"

    return check


def _without(name: str) -> Restriction:
    def check(use: Use) -> str | None:
        return None if use.attribute(name, None) is None else f"has the attribute {name}, which must be left out"

    return check


def _ones(name: str) -> Restriction:
    def check(use: Use) -> str | None:
        return None if all(it == 1 for it in use.attribute(name, ())) else f"has {name} other than 1"

    return check


def _even_pads(use: Use) -> str | None:
    pads = list(use.attribute("pads", ()))
    half = len(pads) // 2
    return None if pads[:half] == pads[half:] else "has pads that differ at the two ends of an axis"


def _one_activation(use: Use) -> str | None:
    named = list(use.attribute("activations", ()))
    half = len(named) // 2
    both = use.attribute("direction", "forward") == "bidirectional"
    return "has other activations backwards than forwards" if both and named[:half] != named[half:] else None


def _static_input(use: Use) -> str | None:
    shape = use.shape(0)
    return "has an input with a dynamic dimension" if shape is None or None in shape else None


def _static_axis(use: Use) -> str | None:
    shape, axis = use.shape(0), use.attribute("axis", -1)
    known = shape is not None and -len(shape) <= axis < len(shape) and shape[axis] is not None
    return None if known else "works along a dynamic dimension"


def _iota_axes(use: Use) -> str | None:
    axes, shape = use.attribute("axes", None), use.shape(0)
    if axes is None or not use.input(2) or (shape is not None and list(axes) == list(range(len(shape)))):
        return None
    return "scales some of the axes; it must name all, in order"


def _not_training(use: Use) -> str | None:
    value = use.values.get(use.input(2))
    return "drops at random" if value is not None and bool(value.any()) else _constant(2, "training_mode")(use)


def _few(use: Use) -> str | None:
    value = use.values.get(use.input(1))
    large = value is not None and int(value.max(initial=0)) >= _MAX_TOPK
    return f"asks for {int(value.max())} elements, not less than {_MAX_TOPK}" if large and value is not None else None


def _real(use: Use) -> str | None:
    shape = use.shape(0)
    return "reads complex numbers" if shape is not None and len(shape) == 3 and shape[2] != 1 else None


def _branches(use: Use) -> list[onnx.GraphProto]:
    return [use.attribute(name, onnx.GraphProto()) for name in ("then_branch", "else_branch")]


def _own_outputs(use: Use) -> str | None:
    names = [{it.name for it in branch.output} for branch in _branches(use)]
    return "has branches with an output of one name" if names[0] & names[1] else None


def _same_ranks(use: Use) -> str | None:
    tensors = [[it.type.tensor_type for it in branch.output] for branch in _branches(use)]
    for pair in zip(*tensors, strict=False):
        if all(it.HasField("shape") for it in pair) and len({len(it.shape.dim) for it in pair}) > 1:
            return "has branches that give one output in different numbers of dimensions"
    return None


_DILATED = _ones("dilations")
_POOLED = (_ranks((4, 5), 0), _DILATED)
_AXES = (_constant(1, "axes"),)

_RESTRICTIONS: Final[Mapping[str, tuple[Restriction, ...]]] = {
    "Attention": (
        _ranks((4,), 0, 1, 2, 3),
        _absent(past_key=4, past_value=5, nonpad_kv_seqlen=6),
        _outputs(1),
        _attribute("softcap", 0.0),
        _without("qk_matmul_output_mode"),
    ),
    "AveragePool": _POOLED,
    "Constant": (_without("sparse_value"), _without("value_string"), _without("value_strings")),
    "CumSum": (_constant(1, "axis"),),
    "DeformConv": (_ranks((3, 4), 0), _even_pads),
    "DequantizeLinear": (_zero(2, "zero point"),),
    "Dropout": (_not_training,),
    "EyeLike": (_static_input,),
    "GRU": (_one_activation,),
    "GridSample": (_ranks((4,), 0),),
    "Hardmax": (_static_axis,),
    "If": (_own_outputs, _same_ranks),
    "LSTM": (_one_activation, _attribute("input_forget", 0), _attribute("layout", 0)),
    "LayerNormalization": (_outputs(1),),
    "LpPool": (_DILATED,),
    "MaxPool": (*_POOLED, _outputs(1)),
    "OneHot": (_constant(1, "depth"),),
    "QuantizeLinear": (_zero(2, "zero point"),),
    "RNN": (_one_activation,),
    **{
        f"Reduce{name}": _AXES
        for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
    "Resize": (
        _attribute("mode", "nearest", "linear"),
        _attribute(
            "coordinate_transformation_mode", "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric",
            "align_corners",
        ),
        _attribute("nearest_mode", "round_prefer_floor", "floor", "ceil", "round_prefer_ceil"),
        _attribute("keep_aspect_ratio_policy", "stretch"),
        _attribute("antialias", 0),
        _iota_axes,
    ),
    "STFT": (_constant(1, "frame_step"), _constant(2, "window"), _real),
    "ScatterND": (_attribute("reduction", "none"),),
    "Squeeze": (*_AXES, _axes_given),
    "TensorScatter": (_ranks((4,), 0, 1), _attribute("axis", -2)),
    "TopK": (_attribute("sorted", 1), _few),
    "Unsqueeze": _AXES,
}  # fmt: skip
