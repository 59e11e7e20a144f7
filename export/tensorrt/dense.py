"""Patches with their masks and values written out.

ONNX graphs of ours keep a patch as places and values, which a runtime expands when it loads the graph
(`bakeout.export.patch`). TensorRT does not promise to, and expanding them at every step would take longer than the
patch itself. Written out they take one byte and one value for each element of the mask: 46 M of each in Stable
Diffusion 1.5 at 512 x 512 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bakeout.editor.errors import InputError

Array = NDArray[Any]

# In the FFNs of Stable Diffusion 1.5 that see most tokens, a mask for pictures of 3648 x 3648 pixels.
_MAX_ELEMENTS: Final = 1 << 28


def write_out(model: ir.Model) -> None:
    """Put constants in the place of what is computed of constants alone for nodes of patches, in `model` itself.

    Raises:
        InputError: a constant is too large for any picture.
        Exception: of numpy, for constants that do not fit each other.
    """
    made: dict[ir.Value, ir.Value] = {}
    for node in [it for it in model.graph if (it.name or "").startswith("bakeout/")]:
        for place, value in enumerate(node.inputs):
            if value is None or value.producer() is None or node.op_type in _OPERATORS:
                continue
            if value not in made:
                array = _constant(value)
                if array is None:
                    continue
                dense = ir.Value(
                    name=f"{value.name}.dense", shape=ir.Shape(array.shape), const_value=ir.tensor(array),
                    type=ir.TensorType(ir.tensor(array).dtype),
                )  # fmt: skip
                model.graph.register_initializer(dense)
                made[value] = dense
            node.replace_input_with(place, made[value])
    RemoveUnusedNodesPass()(model)


def _constant(value: ir.Value | None) -> Array | None:
    """The value, where it is computed of constants by what patches are made of; else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.domain or node.op_type not in _OPERATORS:
        return None
    inputs = [_constant(it) for it in node.inputs]
    if any(it is None for it in inputs):
        return None
    return _OPERATORS[node.op_type](node.attributes, *inputs)


def _constant_of_shape(attributes: Mapping[str, ir.Attr], shape: Array) -> Array:
    value = attributes["value"].as_tensor().numpy() if "value" in attributes else np.zeros(1, np.float32)
    if (size := math.prod(shape.tolist())) > _MAX_ELEMENTS:
        raise InputError(
            f"a patch in the graph has {size} elements, more than {_MAX_ELEMENTS}; export the model again, for smaller "
            "pictures"
        )
    return np.full(tuple(shape), value[0])


def _scatter(_: Mapping[str, ir.Attr], zeros: Array, indices: Array, updates: Array) -> Array:
    scattered = zeros.copy()
    scattered[tuple(np.moveaxis(indices, -1, 0))] = updates
    return scattered


def _cast(attributes: Mapping[str, ir.Attr], given: Array) -> Array:
    return given.astype(ir.DataType(attributes["to"].as_int()).numpy())


def _unsqueeze(_: Mapping[str, ir.Attr], given: Array, axes: Array) -> Array:
    return np.expand_dims(given, tuple(axes))


def _reshape(_: Mapping[str, ir.Attr], given: Array, shape: Array) -> Array:
    return given.reshape(tuple(shape))


_OPERATORS: Final[Mapping[str, Callable[..., Array]]] = {
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Unsqueeze": _unsqueeze,
}
