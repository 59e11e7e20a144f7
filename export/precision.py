"""Graphs in fp32 made such in fp16 or bf16, for runtimes that compute each operator in the type that the graph says.

Let t be fp16 or bf16. Values between operators are of t or fp32; inputs and outputs of the graph stay as they are. An
operator computes in

    t       if it multiplies matrices: what makes a network slow
    fp32    if t would spoil it: normalisations, sums, phases, exponentials; see `_FP32`
    fp32    if a choice depends on it: of the k largest, of the larger. A choice from rounded values is another choice
    fp32    if it is of a SteerLatents or a ShiftActivation: it says by exactly how much a concept is weakened
    fp32    if all that it is given is in fp32 anyway: rounding first would save no arithmetic, and cost precision
    t       else

and of constants alone, in t if anything wants its result so, else in fp32. So GroupNorm with its scale, its offset and
the SiLU after it is in fp32 from the values that it reads to those that the next convolution does; the path of
residuals is in t; and the timestep is in fp32 until its embedding enters the first Linear: bf16 has no 999.

So attention is in t from its scores to what it gives: fused kernels of it take one type (TensorRT, "Fused Attention"),
and sum up the exponentials in fp32 inside, as softmax alone does. Scores are finite where those of PyTorch are, for q
is multiplied by the scale before q kᵀ; what softmax gives is at most 1.

The VAE stays in fp32 all over. In fp16 it is what makes pictures black: SDXL's decoder has activations beyond 65504
(hence `force_upcast` in its configuration), and no graph says what activations it will have. In bf16, every picture of
`shapes` is off by 1.2e-2 of its own RMS, most of a grey value of 255. It runs once for each picture, and a runtime may
compute it with TF32, whose range is that of fp32 and whose digits are those of fp16.

Weights are rounded to the nearest value of t, ties to even. In fp16 those below 2⁻¹⁴ = 6e-5 lose digits and those below
2⁻²⁵ = 3e-8 become 0, as they do in any checkpoint in fp16. The largest number of fp32 stands for infinity in masks, and
becomes the largest of t. Any other value that t does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from bakeout.editor.errors import InputError
from bakeout.editor.recipe import PRECISIONS
from bakeout.export.custom_ops import MASKED_GEGLU
from bakeout.export.graph_file import save_graph

_DTYPES: Final = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_LARGEST: Final = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: float.fromhex("0x1.fep127")}
_LARGEST_FP32: Final = float(np.finfo(np.float32).max)
_VAE: Final = ("vae_encoder", "vae_decoder")
# The first whose Conv takes bf16; the other operators here mean the same as in the opset before.
BF16_OPSET: Final = 22
_PRODUCTS: Final = frozenset({"Conv", "Gemm", "MatMul", MASKED_GEGLU})
_FP32: Final = frozenset({
    # The square of 256 is beyond fp16, and a variance is a difference of sums of many.
    "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
    # In bf16 ones add up to 256 and no further, in fp16 to 2048.
    "ReduceMean", "ReduceSum",
    # Phases go up to a thousand radians, where values of bf16 are 4 apart and of fp16 a half.
    "Sin", "Cos",
    # The exponential of 11.1 is beyond fp16; it multiplies the error of what it is given.
    "Exp", "Pow",
})  # fmt: skip
_CHOICES: Final = frozenset({"TopK", "ArgMax", "ArgMin", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})
_OTHER_FLOATS: Final = frozenset({ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Limit(NamedTuple):
    """How far what a graph gives may be from what the same graph gives in fp32.

    Attributes:
        limit: relative RMS, of each output.
        reason: why that much.
    """

    limit: float
    reason: str


# Measured with each result rounded once: on shapes, and at the size of Stable Diffusion 1.5 with random weights.
# Softmax in fp32 would change none of these figures: what it is given and what it gives is rounded either way.
TOLERANCES: Final[Mapping[str, Limit]] = {
    "fp32": Limit(
        1e-4,
        "Two runtimes that add up in another order were at most 1.5e-5 apart, in a VAE at 512 x 512 pixels; with TF32 "
        "it would be a thousandth, and the graph no longer in fp32.",
    ),
    "fp16": Limit(
        1e-2,
        "9e-4 on shapes and 1.2e-3 at full size in text encoders, 4e-4 and 1.6e-3 in UNets. A kernel that adds up "
        "products in fp16 as well, which TensorRT is free to choose, rounds several times as often.",
    ),
    "bf16": Limit(
        5e-2,
        "7e-3 on shapes and 1.1e-2 at full size in text encoders, 3e-3 and 1.4e-2 in UNets: eight times as much as in "
        "fp16, for three bits less. The same room above it as there.",
    ),
    "vae": Limit(
        5e-3,
        "In an export in fp16 or bf16, where a VAE is in fp32 but may be computed with TF32, which rounds as fp16 "
        "does: that took 1.1e-3 on shapes and 1.5e-3 at full size.",
    ),
}


def limit(precision: str, graph: str) -> float:
    """Of `TOLERANCES`, that of a graph in a folder of a precision; relative RMS."""
    return TOLERANCES["vae" if graph in _VAE and precision != "fp32" else precision].limit


def cast(model: ir.Model, precision: str, graph: str) -> None:
    """Have `model` compute in `precision`, as the module says, in place; weights are rounded when they are read.

    Names of initializers, nodes, inputs and outputs stay, and the dtypes of the latter two. A constant that is needed
    in two types is there twice, the second as NAME.fp16 or NAME.bf16; the values of casts are VALUE.fp32 and so on.

    Args:
        model: in fp32, with a value for each initializer, without subgraphs.
        precision: of `PRECISIONS`.
        graph: its name in a folder: unet, vae_decoder, ….

    Raises:
        InputError: the precision is unknown, or the graph has floating point other than fp32; when a weight is read:
            the precision does not hold it.
    """
    if precision not in PRECISIONS:
        raise InputError(f"{precision!a:.50} is no precision; choose from {', '.join(PRECISIONS)}")
    floats = _floats(model.graph)
    if precision == "fp32" or graph in _VAE:
        return
    _Rewriter(model.graph, floats, _in_low(model.graph, floats), precision).rewrite()
    if precision == "bf16":
        for imports in (model.graph.opset_imports, *(it.opset_imports for it in model.functions.values())):
            imports[""] = max(imports[""], BF16_OPSET)


def cast_file(
    source: Path, target: Path, precision: str, graph: str, then: Callable[[ir.Model], object] | None = None
) -> None:
    """Write the graph of `source` to `target` in `precision`; see `cast`. What lies beside it is read weight by weight.

    Args:
        source: a graph in fp32 of an ONNX folder.
        target: is written, with `model.onnx_data` beside it if it is large; its folder must exist.
        precision: of `PRECISIONS`.
        graph: the graph's name.
        then: called with the cast graph before it is written.

    Raises:
        InputError: see `cast`, or `source` is no graph that can be read, cast and checked.
        OSError: `target` cannot be written.
    """
    try:
        onnx.checker.check_model(source)
        model = ir.load(source)
        cast(model, precision, graph)
        if then is not None:
            then(model)
        save_graph(model, target)
    except (InputError, OSError):
        raise
    except Exception as error:  # onnx, protobuf and numpy have one for each way in which a file can be wrong
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{source} cannot be read as a graph ({reason!a:.200}); export it again") from error


def _floats(graph: ir.Graph) -> set[ir.Value]:
    """The values in fp32. Raises InputError if there is other floating point."""
    known = [*graph.inputs, *graph.initializers.values()]
    for value in known:
        if value.dtype in _OTHER_FLOATS:
            raise _not_fp32(f"{value.name} is {value.dtype}")
    floats = {value for value in known if value.dtype == ir.DataType.FLOAT}
    for node in graph:
        for place, output in enumerate(node.outputs):
            if _gives_float(node, place, floats):
                floats.add(output)
    return floats


def _gives_float(node: ir.Node, place: int, floats: set[ir.Value]) -> bool:
    made = _made_in(node)
    if made in _OTHER_FLOATS:
        raise _not_fp32(f"{node.name} gives {made}")
    if made is not None:
        return made == ir.DataType.FLOAT
    types = _types(node)
    if types is None:
        return any(it in floats for it in node.inputs)
    given, returned = types
    kind = _at(returned, place)
    return kind == "tensor(float)" or any(
        it in floats and _at(given, number) == kind for number, it in enumerate(node.inputs)
    )


def _not_fp32(what: str) -> InputError:
    return InputError(f"{what!a:.200}, and only graphs in fp32 are cast; export the graph again, in fp32")


def _made_in(node: ir.Node) -> ir.DataType | None:
    """The type that an attribute asks of the node's output; None if none does."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        return ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    return None


def _types(node: ir.Node) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What the standard says of the types of the node's inputs and outputs; None of an operator of our own."""
    graph = node.graph
    return None if node.domain or graph is None else _standard(node.op_type, graph.opset_imports[""])


@cache
def _standard(op_type: str, opset: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    schema = onnx.defs.get_schema(op_type, opset)
    return tuple(it.type_str for it in schema.inputs), tuple(it.type_str for it in schema.outputs)


def _at(types: tuple[str, ...], place: int) -> str:
    """Of a parameter that may repeat, which is the last."""
    return types[min(place, len(types) - 1)]


def _float_inputs(node: ir.Node, floats: set[ir.Value]) -> Iterator[tuple[int, ir.Value, bool]]:
    """Places and values of the inputs in floating point whose type matters; and whether that must be fp32 always.

    It does not matter where nothing else is of it: a Cast takes anything.
    """
    types = _types(node)
    for place, value in enumerate(node.inputs):
        if value is None or value not in floats:
            continue
        if types is None:
            yield place, value, False
            continue
        given, returned = types
        kind = _at(given, place)
        others = [_at(given, it) for it in range(len(node.inputs)) if it != place]
        if kind.startswith("tensor("):
            yield place, value, True
        elif kind in (*others, *returned):
            yield place, value, False


def _in_low(graph: ir.Graph, floats: set[ir.Value]) -> dict[ir.Node, bool]:
    """Which nodes compute in fp16 or bf16, of all that compute with floating point."""
    exact = _exact(graph, floats)
    low: dict[ir.Node, bool | None] = {}
    of: dict[ir.Value, bool | None] = dict.fromkeys(graph.inputs, False)
    for node in graph:
        given = {of.get(value) for _, value, always in _float_inputs(node, floats) if not always} - {None}
        if node in exact or node.op_type in _FP32:
            low[node] = False
        elif node.op_type in _PRODUCTS:
            low[node] = True
        else:
            low[node] = any(given) if given else None
        of |= dict.fromkeys(node.outputs, low[node])
    for node in reversed(graph):
        if low[node] is None:
            wanted = {low[it] for output in node.outputs if output in floats for it in _users(output, floats)}
            low[node] = True in wanted
    return {node: bool(it) for node, it in low.items()}


def _users(value: ir.Value, floats: set[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that want the value in what they compute in."""
    for node, number in value.uses():
        if any(place == number and not always for place, _, always in _float_inputs(node, floats)):
            yield node


def _exact(graph: ir.Graph, floats: set[ir.Value]) -> set[ir.Node]:
    """The nodes of what edits text encoders, and those that choose, with all that their floating point comes from."""
    exact: set[ir.Node] = set()
    open_ = [node for node in graph if node.op_type in _CHOICES and any(it in floats for it in node.inputs)]
    while open_:
        node = open_.pop()
        exact.add(node)
        sources = (it.producer() for it in node.inputs if it in floats)
        open_ += [it for it in sources if it is not None and it not in exact]
    return exact | {node for node in graph if _is_steering(node)}


def _is_steering(node: ir.Node) -> bool:
    """See `bakeout.export.onnx` for the names of nodes; patches are a part of their network."""
    home, *path = (node.name or "").split("/")
    return home == "bakeout" and len(path) > 1 and not path[1].startswith("patch.")


class _Rewriter:
    """Gives each node what it computes in.

    Attributes:
        graph: that is rewritten.
        floats: its values in floating point.
        low: the nodes that compute in `dtype`; the rest computes in fp32.
        precision: the name of `dtype`.
        dtype: fp16 or bf16.
    """

    def __init__(self, graph: ir.Graph, floats: set[ir.Value], low: Mapping[ir.Node, bool], precision: str) -> None:
        self.graph = graph
        self.floats = floats
        self.low = low
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self._made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def rewrite(self) -> None:
        """See the class."""
        needs = [(node, [*_float_inputs(node, self.floats)]) for node in self.graph]
        for initializer in [it for it in self.graph.initializers.values() if it in self.floats]:
            self._round_weight(initializer)
        self._keep_outputs()
        for node, inputs in needs:
            for place, value, always in inputs:
                node.replace_input_with(place, self._as(value, self.low[node] and not always))
            if self.low[node]:
                self._make_low(node)

    def _round_weight(self, initializer: ir.Value) -> None:
        wanted = {self.low[it] for it in _users(initializer, self.floats)}
        tensor = initializer.const_value
        if True not in wanted or tensor is None or initializer.name is None:
            return
        rounded, shape = initializer, ir.Shape([*tensor.shape])
        if False in wanted:
            rounded = ir.Value(name=f"{initializer.name}.{self.precision}", shape=shape)
        read = partial(_round, tensor, self.precision, initializer.name)
        rounded.const_value = ir.LazyTensor(read, self.dtype, shape, name=rounded.name)
        rounded.type = ir.TensorType(self.dtype)
        if rounded is not initializer:
            self.graph.register_initializer(rounded)
        self._made[initializer, True] = rounded

    def _keep_outputs(self) -> None:
        for place, value in enumerate(self.graph.outputs):
            if self._is_low(value):
                name, value.name = value.name, f"{value.name}.{self.precision}"
                self.graph.outputs[place] = kept = self._cast(value, ir.DataType.FLOAT, name)
                kept.type, kept.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
                self._made[value, False] = kept

    def _is_low(self, value: ir.Value) -> bool:
        maker = value.producer()
        return value in self.floats and maker is not None and self.low[maker]

    def _as(self, value: ir.Value, low: bool) -> ir.Value:
        """The value in what is wanted."""
        if (value, low) not in self._made:
            same = self._is_low(value) == low
            dtype, suffix = (self.dtype, self.precision) if low else (ir.DataType.FLOAT, "fp32")
            self._made[value, low] = value if same else self._cast(value, dtype, f"{value.name}.{suffix}")
        return self._made[value, low]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str | None) -> ir.Value:
        output = ir.Value(name=name)
        node = ir.node("Cast", [value], {"to": dtype}, outputs=[output], name=f"{name}/Cast")
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        return output

    def _make_low(self, node: ir.Node) -> None:
        """Have the node say so, where it says what it gives; inferred types are of fp32."""
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", self.dtype)
        elif node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            value = ir.tensor(np.zeros(1, np.float32)) if given is None else given.as_tensor()
            node.attributes["value"] = ir.AttrTensor("value", _round(value, self.precision, node.name or ""))
        for output in node.outputs:
            if output.type is not None and output in self.floats:
                output.type = ir.TensorType(self.dtype)


def _round(tensor: ir.TensorProtocol, precision: str, name: str) -> ir.TensorProtocol:
    """Raises InputError for a value that the precision does not hold."""
    dtype = _DTYPES[precision]
    values = tensor.numpy()
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype.numpy())
    if (beyond := np.isinf(rounded) & np.isfinite(values)).any():
        large = values[beyond]
        if (np.abs(large) != _LARGEST_FP32).any():
            raise InputError(
                f"{name} has {large[np.argmax(np.abs(large))]:g}, which {precision} does not hold; take --precision "
                f"{'bf16' if precision == 'fp16' else 'fp32'}"
            )
        rounded[beyond] = np.copysign(_LARGEST[dtype], large)
    return ir.tensor(rounded)
