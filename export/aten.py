"""A program that torch.export traced, as an ONNX graph: one small function for each ATen operator.

torch's own exporter runs a program through its decompositions and then folds constants. For the UNet of `shapes` that
takes 25 s and leaves 2,000 nodes, and what was a weight is then a transposed copy under another name. This takes 0.1 s
and leaves 1,600: a parameter stays what it is, so the graph needs no values; shapes are known where PyTorch knows them;
what is constant is computed by PyTorch itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bakeout.editor.errors import InputError
from bakeout.export import custom_ops
from bakeout.kernels import ops as _registered  # noqa: F401

DTYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}
# What an operator may be given: a value of the graph, one that is known, or what is no tensor.
_Argument: TypeAlias = Any
# x ∘ this = x.
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
# Where a slice without an end ends.
_END = 2**63 - 1


def graph_from_program(program: ExportedProgram, names: Mapping[str, str], opset: int) -> ir.Graph:
    """The ONNX graph of `program`, its parameters as initializers without values.

    Args:
        program: in evaluation mode; its parameters may be fake tensors.
        names: parameter in the program → name of its initializer.
        opset: of ONNX; at least 20.

    Returns:
        Inputs and outputs in the program's order under its names, dynamic dimensions without names.

    Raises:
        InputError: the program uses an operator that has no translation here.
    """
    writer = _Writer()
    inputs: list[ir.Value] = []
    for spec, node in zip(program.graph_signature.input_specs, _placeholders(program), strict=True):
        if spec.kind is InputKind.USER_INPUT:
            writer.known[node] = _value(node.name, node.meta["val"])
            inputs.append(writer.known[node])
        elif spec.kind is InputKind.PARAMETER:
            writer.known[node] = _value(names[str(spec.target)], node.meta["val"])
            writer.parameters.append(writer.known[node])
        else:
            writer.known[node] = program.constants[str(spec.target)]
    for node in program.graph.nodes:
        if node.op == "call_function":
            writer.write(node)
    (returned,) = program.graph.find_nodes(op="output")
    outputs = [_typed(writer.known[node], node.meta["val"]) for node in returned.args[0]]
    opsets = {"": opset, **{domain: version for domain, version in writer.tape.used_opsets if version is not None}}
    return ir.Graph(
        inputs, outputs, nodes=writer.tape.nodes, opset_imports=opsets, name="main",
        initializers=[*writer.parameters, *writer.tape.initializers],
    )  # fmt: skip


def _placeholders(program: ExportedProgram) -> Sequence[Node]:
    found: Sequence[Node] = program.graph.find_nodes(op="placeholder")
    return found


def _value(name: str, like: torch.Tensor) -> ir.Value:
    return _typed(ir.Value(name=name), like)


def _typed(value: ir.Value, like: torch.Tensor) -> ir.Value:
    value.type = ir.TensorType(DTYPES[like.dtype])
    value.shape = ir.Shape([size if isinstance(size, int) else None for size in like.shape])
    return value


class _Writer:
    """The graph so far.

    Attributes:
        tape: nodes, and initializers with values.
        parameters: initializers without values.
        known: what each node of the program stands for: a value of the graph (several: a tuple), or a torch tensor.
        node: the one that is being translated.
    """

    node: Node

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self.parameters: list[ir.Value] = []
        self.known: dict[Node, _Argument] = {}
        self._constants: dict[tuple[torch.dtype, tuple[int, ...], bytes], ir.Value] = {}

    def write(self, node: Node) -> None:
        """Translate one call."""
        self.node = node
        args = torch.fx.node.map_arg(node.args, self.known.__getitem__)
        kwargs = torch.fx.node.map_arg(node.kwargs, self.known.__getitem__)
        if not any(isinstance(self.known[it], ir.Value | tuple) for it in node.all_input_nodes):
            self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return
        before = len(self.tape.nodes)
        try:
            self.known[node] = _OPERATORS[node.target](self, *args, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"this model uses {node.target} in a way that bakeout cannot export ({type(error).__name__}: "
                f"{error}); ship its diffusers folder, or report the model"
            ) from error
        self._name(self.tape.nodes[before:])

    def _name(self, nodes: Sequence[ir.Node]) -> None:
        """Nodes by the module that they are of, values by the node of the program."""
        stack = self.node.meta.get("nn_module_stack") or {"": ("", None)}
        module = list(stack.values())[-1][0]
        for number, made in enumerate(nodes):
            made.name = f"{module}/{self.node.name}/{number}.{made.op_type}"
            for place, output in enumerate(made.outputs):
                output.name = f"{self.node.name}/{number}.{place}"

    def op(self, op_type: str, *inputs: ir.Value | torch.Tensor | None, **attributes: Any) -> ir.Value:
        """A new node's output."""
        given = [self.constant(it) if isinstance(it, torch.Tensor) else it for it in inputs]
        return self.tape.op(op_type, given, attributes)

    def constant(self, value: torch.Tensor) -> ir.Value:
        """An initializer with a value; equal ones are one."""
        key = (value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if key not in self._constants:
            # Parameters have dots in their names, these have none.
            tensor = ir.tensor(value.numpy(), name=f"constant_{len(self._constants)}")
            self._constants[key] = self.tape.initializer(tensor)
        return self._constants[key]

    def integers(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def value(self, given: _Argument, dtype: torch.dtype | None = None) -> ir.Value:
        """What was given as a value of the graph; a number becomes a scalar of `dtype`."""
        if isinstance(given, ir.Value):
            return given
        return self.constant(given if isinstance(given, torch.Tensor) else torch.tensor(given, dtype=dtype))

    def shape(self, argument: int = 0) -> tuple[Any, ...]:
        """The shape of an argument of the node: ints, and torch.SymInt where it is dynamic."""
        return tuple(self._fake(argument).shape)

    def dtype(self, argument: int = 0) -> torch.dtype:
        """The dtype that the program gives an argument of the node."""
        return self._fake(argument).dtype

    def _fake(self, argument: int) -> torch.Tensor:
        fake: torch.Tensor = self.node.args[argument].meta["val"]  # type: ignore[union-attr]
        return fake


def _contiguous(_: _Writer, x: _Argument, **_memory: object) -> _Argument:
    """How values lie in memory is nothing to ONNX."""
    return x


def _dropout(_: _Writer, x: ir.Value, _share: float, train: bool) -> ir.Value:
    if train:
        raise ValueError("it drops at random")
    return x


def _checked(_: _Writer, *_args: object, **_kwargs: object) -> None:
    """What was true when the program was traced."""


def _unary(op_type: str, w: _Writer, x: ir.Value) -> ir.Value:
    return w.op(op_type, x)


def _binary(op_type: str, w: _Writer, x: _Argument, y: _Argument) -> ir.Value:
    like: list[Any] = [it.meta["val"] if isinstance(it, Node) else it for it in w.node.args]
    if any(isinstance(it, torch.SymInt) for it in like):
        raise TypeError("one side is a size")
    made: torch.dtype = w.node.meta["val"].dtype
    dtype = torch.result_type(*like) if made == torch.bool else made
    # Scales and offsets of the configuration, which usually change nothing.
    if isinstance(y, int | float) and y == _NEUTRAL.get(op_type) and dtype == w.dtype():
        return x  # type: ignore[no-any-return]
    sides = []
    for side, fake in zip((x, y), like, strict=True):
        value = w.value(side, dtype)
        cast = isinstance(fake, torch.Tensor) and fake.dtype != dtype
        sides.append(w.op("Cast", value, to=DTYPES[dtype]) if cast else value)
    return w.op(op_type, *sides)


def _integer_product(w: _Writer, x: _Argument, y: _Argument) -> ir.Value:
    return w.op("Mul", *(it if isinstance(it, ir.Value) else w.integers(it) for it in (x, y)))


def _cast(w: _Writer, x: ir.Value, *given: object, dtype: torch.dtype | None = None, **_: object) -> ir.Value:
    wanted = next((it for it in (*given, dtype) if isinstance(it, torch.dtype)), w.dtype())
    return x if wanted == w.dtype() else w.op("Cast", x, to=DTYPES[wanted])


def _square(w: _Writer, x: ir.Value) -> ir.Value:
    return w.op("Mul", x, x)


def _logical(op_type: str, w: _Writer, x: _Argument, y: _Argument) -> ir.Value:
    if w.node.meta["val"].dtype != torch.bool:
        raise TypeError("not of truth values")
    return w.op(op_type, x, y)


def _reduce(
    op_type: str, w: _Writer, x: ir.Value, axes: Sequence[int], keepdim: bool = False, *, dtype: object = None
) -> ir.Value:
    if w.node.meta["val"].dtype != w.dtype():
        raise TypeError(f"its result is of another dtype ({dtype})")
    return w.op(op_type, x, w.integers(*axes), keepdims=int(keepdim))


def _any(w: _Writer, x: ir.Value, axis: int, keepdim: bool = False) -> ir.Value:
    """By a sum of integers, as not every runtime reduces truth values."""
    count = w.op("ReduceSum", w.op("Cast", x, to=ir.DataType.INT32), w.integers(axis), keepdims=int(keepdim))
    return w.op("Cast", count, to=ir.DataType.BOOL)


def _index_select(w: _Writer, x: ir.Value, axis: int, index: _Argument) -> ir.Value:
    return w.op("Gather", x, index, axis=axis)


def _topk(w: _Writer, x: ir.Value, k: int, axis: int = -1) -> tuple[ir.Value, ...]:
    return tuple(w.tape.op_multi_out("TopK", [x, w.integers(k)], {"axis": axis}, num_outputs=2))


def _where(w: _Writer, condition: _Argument, x: _Argument, y: _Argument) -> ir.Value:
    if w.dtype(1) != w.dtype(2):
        raise TypeError("its sides are of two dtypes")
    return w.op("Where", condition, x, y)


def _silu(w: _Writer, x: ir.Value) -> ir.Value:
    return w.op("Mul", x, w.op("Sigmoid", x))


def _gelu(w: _Writer, x: ir.Value, *, approximate: str = "none") -> ir.Value:
    return w.op("Gelu", x, approximate=approximate)


def _clamp(w: _Writer, x: ir.Value, low: float | None = None, high: float | None = None) -> ir.Value:
    dtype = w.dtype()
    return w.op("Clip", x, *(None if it is None else w.value(it, dtype) for it in (low, high)))


def _linear(w: _Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    if len(w.shape()) == 2:
        return w.op("Gemm", x, weight, bias, transB=1)
    y = w.op("MatMul", x, w.op("Transpose", weight, perm=[1, 0]))
    return y if bias is None else w.op("Add", y, bias)


def _conv(
    w: _Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> ir.Value:  # fmt: skip
    return w.op("Conv",
        x, weight, bias, kernel_shape=w.shape(1)[2:], strides=stride, pads=[*padding, *padding], dilations=dilation,
        group=groups,
    )  # fmt: skip


def _group_norm(
    w: _Writer, x: ir.Value, groups: int, weight: ir.Value, bias: ir.Value, epsilon: float, _cudnn: bool = False
) -> ir.Value:
    _check_affine(weight, bias)
    channels, *sides = w.shape()[1:]
    y = w.op("InstanceNormalization",
        w.op("Reshape", x, w.integers(0, groups, -1)),
        w.constant(torch.ones(groups)), w.constant(torch.zeros(groups)), epsilon=epsilon,
    )  # fmt: skip
    y = w.op("Reshape", y, w.op("Shape", x))
    shape = w.integers(channels, *[1] * len(sides))
    return w.op("Add", w.op("Mul", y, w.op("Reshape", weight, shape)), w.op("Reshape", bias, shape))


def _layer_norm(
    w: _Writer, x: ir.Value, shape: Sequence[int], weight: ir.Value, bias: ir.Value, epsilon: float,
    _cudnn: bool = False,
) -> ir.Value:  # fmt: skip
    _check_affine(weight, bias)
    return w.op("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=epsilon)


def _check_affine(weight: ir.Value | None, bias: ir.Value | None) -> None:
    if weight is None or bias is None:
        raise TypeError("it has no weight or no bias")


def _attention(
    w: _Writer, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None = None, *, scale: float | None = None
) -> ir.Value:
    scale = float(w.shape()[-1]) ** -0.5 if scale is None else scale
    scores = w.op("MatMul", w.op("Mul", q, w.value(scale, w.dtype())), w.op("Transpose", k, perm=[0, 1, 3, 2]))
    if mask is not None:
        if w.dtype(3) == torch.bool:
            # Not minus infinity: a row that is masked all over would give NaN.
            lowest = w.value(torch.finfo(w.dtype()).min, w.dtype())
            mask = w.op("Where", mask, w.value(0.0, w.dtype()), lowest)
        scores = w.op("Add", scores, mask)
    return w.op("MatMul", w.op("Softmax", scores, axis=-1), v)


def _masked_geglu(w: _Writer, proj: ir.Value, mask: _Argument, value: _Argument) -> ir.Value:
    given = [proj, w.value(mask), w.value(value)]
    name, domain, version = custom_ops.MASKED_GEGLU, custom_ops.DOMAIN, custom_ops.VERSION
    return w.tape.op(name, given, custom_ops.PLUGIN, domain=domain, version=version)


def _embedding(w: _Writer, weight: ir.Value, index: _Argument, *_gradients: object) -> ir.Value:
    return w.op("Gather", weight, index)


def _size(w: _Writer, x: ir.Value, axis: int) -> ir.Value:
    """A symbolic size is an int64 vector of one element everywhere here."""
    return w.op("Shape", x, start=axis, end=axis + 1)


def _reshape(w: _Writer, x: ir.Value, sizes: Sequence[_Argument] = (), *_: object) -> ir.Value:
    old, new = w.shape(), tuple(w.node.meta["val"].shape)
    # Of sizes, == would compare those of the example.
    if len(old) == len(new) and all(map(_equal, old, new)):
        return x
    # For ONNX 0 is the size that x has there, and one size may be -1.
    kept = [0 if place < len(old) and not _static(size) and _equal(size, old[place]) else size
            for place, size in enumerate(new)]  # fmt: skip
    if sum(not _static(size) for size in kept) <= 1:
        return w.op("Reshape", x, w.integers(*(size if _static(size) else -1 for size in kept)))
    given = [size if _static(size) else asked for size, asked in zip(kept, sizes, strict=True)]
    return w.op("Reshape", x, _vector(w, given))


def _equal(first: Any, second: Any) -> bool:
    """Whether two sizes are equal whatever the inputs are."""
    return statically_known_true(first == second)


def _static(size: object) -> bool:
    return not isinstance(size, torch.SymInt)


def _vector(w: _Writer, sizes: Iterable[_Argument]) -> ir.Value:
    return w.op("Concat", *(it if isinstance(it, ir.Value) else w.integers(it) for it in sizes), axis=0)


def _expand(w: _Writer, x: ir.Value, sizes: Sequence[_Argument]) -> ir.Value:
    # -1 keeps a size, and so does 1 in ONNX.
    return w.op("Expand", x, _vector(w, (1 if isinstance(it, int) and it == -1 else it for it in sizes)))


def _transpose(w: _Writer, x: ir.Value, first: int, second: int) -> ir.Value:
    axes = list(range(len(w.shape())))
    axes[first], axes[second] = axes[second], axes[first]
    return w.op("Transpose", x, perm=axes)


def _permute(w: _Writer, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    return w.op("Transpose", x, perm=[axis % len(axes) for axis in axes])


def _unsqueeze(w: _Writer, x: ir.Value, axis: int) -> ir.Value:
    return w.op("Unsqueeze", x, w.integers(axis))


def _slice(
    w: _Writer, x: _Argument, axis: int = 0, start: int | None = None, end: _Argument = None, step: int = 1
) -> _Argument:
    begin, end = start or 0, _END if end is None else end
    if (begin, end, step) == (0, _END, 1):
        return x
    end = end if isinstance(end, ir.Value) else w.integers(end)
    return w.op("Slice", x, w.integers(begin), end, w.integers(axis), w.integers(step))


def _chunk(w: _Writer, x: ir.Value, count: int, axis: int = 0) -> tuple[ir.Value, ...]:
    if len(w.node.meta["val"]) != count:
        raise ValueError("it gives fewer parts than it is asked for")
    return tuple(w.tape.op_multi_out("Split", [x], {"axis": axis, "num_outputs": count}, num_outputs=count))


def _concat(w: _Writer, parts: Sequence[_Argument], axis: int = 0) -> ir.Value:
    return w.op("Concat", *parts, axis=axis)


def _pad(w: _Writer, x: ir.Value, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> ir.Value:
    if mode != "constant":
        raise ValueError(f"mode {mode}")
    # PyTorch counts axes from the last, begin and end side by side; ONNX all begins, then all ends.
    empty = [0] * (len(w.shape()) - len(pads) // 2)
    widths = w.integers(*empty, *pads[-2::-2], *empty, *pads[::-2])
    return w.op("Pad", x, widths, w.value(value or 0.0, w.dtype()))


def _upsample(w: _Writer, x: ir.Value, _size: None, scales: Sequence[float]) -> ir.Value:
    factors = w.constant(torch.tensor([1.0, 1.0, *scales]))
    return w.op(
        "Resize", x, None, factors, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def _arange(w: _Writer, end: ir.Value, **_: object) -> ir.Value:
    # Before 11.5 TensorRT does not promise to read a Squeeze without axes.
    numbers = w.op("Range", w.value(0), w.op("Squeeze", end, w.integers(0)), w.value(1))
    dtype: torch.dtype = w.node.meta["val"].dtype
    return numbers if dtype == torch.int64 else w.op("Cast", numbers, to=DTYPES[dtype])


def _argmax(w: _Writer, x: ir.Value, axis: int, keepdim: bool = False) -> ir.Value:
    return w.op("ArgMax", x, axis=axis, keepdims=int(keepdim))


def _index(w: _Writer, x: ir.Value, indices: Sequence[ir.Value]) -> ir.Value:
    """x[i, j, …] for index vectors of one length."""
    fakes: list[Any] = [None if it is None else it.meta["val"] for it in w.node.args[1]]  # type: ignore[union-attr]
    if any(it is None or it.ndim != 1 or it.dtype != torch.int64 for it in fakes):
        raise TypeError("not by vectors of integers alone")
    columns = [w.op("Unsqueeze", it, w.integers(-1)) for it in indices]
    return w.op("GatherND", x, w.op("Concat", *columns, axis=-1))


def _scatter(w: _Writer, x: _Argument, axis: int, index: ir.Value, source: _Argument) -> ir.Value:
    """Into a vector of one value, which may be as large as a layer, so that only its length is written."""
    if not isinstance(x, torch.Tensor) or x.ndim != 1 or axis != 0 or bool((x != x[0]).any()):
        raise TypeError("not into a vector of one value")
    if not isinstance(source, ir.Value):
        source = _filled(w, w.shape(2)[0], torch.tensor([source], dtype=x.dtype))
    return w.op("ScatterND", _filled(w, len(x), x[:1]), w.op("Unsqueeze", index, w.integers(-1)), source)


def _filled(w: _Writer, length: Any, value: torch.Tensor) -> ir.Value:
    if not _static(length):
        raise TypeError("its length depends on the inputs")
    return w.op("ConstantOfShape", w.integers(length), value=ir.tensor(value.numpy()))


_aten = torch.ops.aten
_own = torch.ops.bakeout
_OPERATORS: Mapping[object, Callable[..., _Argument]] = {
    operator.getitem: lambda _, values, place: values[place],
    operator.mul: _integer_product,
    _aten.__and__.Tensor: partial(_logical, "And"),
    _aten.__or__.Tensor: partial(_logical, "Or"),
    _aten._assert_tensor_metadata.default: _checked,
    _aten.add.Tensor: partial(_binary, "Add"),
    _aten.any.dim: _any,
    _aten.arange.default: _arange,
    _aten.argmax.default: _argmax,
    _aten.cat.default: _concat,
    _aten.chunk.default: _chunk,
    _aten.clamp.default: _clamp,
    _aten.concat.default: _concat,
    _aten.contiguous.default: _contiguous,
    _aten.conv2d.default: _conv,
    _aten.cos.default: partial(_unary, "Cos"),
    _aten.div.Tensor: partial(_binary, "Div"),
    _aten.dropout.default: _dropout,
    _aten.embedding.default: _embedding,
    _aten.eq.Scalar: partial(_binary, "Equal"),
    _aten.eq.Tensor: partial(_binary, "Equal"),
    _aten.exp.default: partial(_unary, "Exp"),
    _aten.expand.default: _expand,
    _aten.flatten.using_ints: _reshape,
    _aten.gelu.default: _gelu,
    _aten.group_norm.default: _group_norm,
    _aten.gt.Tensor: partial(_binary, "Greater"),
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.layer_norm.default: _layer_norm,
    _aten.le.Tensor: partial(_binary, "LessOrEqual"),
    _aten.linear.default: _linear,
    _aten.logical_not.default: partial(_unary, "Not"),
    _aten.lt.Scalar: partial(_binary, "Less"),
    _aten.lt.Tensor: partial(_binary, "Less"),
    _aten.mean.dim: partial(_reduce, "ReduceMean"),
    _aten.mul.Tensor: partial(_binary, "Mul"),
    _aten.pad.default: _pad,
    _aten.permute.default: _permute,
    _aten.relu.default: partial(_unary, "Relu"),
    _aten.reshape.default: _reshape,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.sigmoid.default: partial(_unary, "Sigmoid"),
    _aten.scatter.src: _scatter,
    _aten.scatter.value: _scatter,
    _aten.silu.default: _silu,
    _aten.sin.default: partial(_unary, "Sin"),
    _aten.slice.Tensor: _slice,
    _aten.sqrt.default: partial(_unary, "Sqrt"),
    _aten.square.default: _square,
    _aten.sub.Tensor: partial(_binary, "Sub"),
    _aten.sum.dim_IntList: partial(_reduce, "ReduceSum"),
    _aten.sym_size.int: _size,
    _aten.to.device: _cast,
    _aten.to.dtype: _cast,
    _aten.to.dtype_layout: _cast,
    _aten.topk.default: _topk,
    _aten.transpose.int: _transpose,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.upsample_nearest2d.vec: _upsample,
    _aten.view.default: _reshape,
    _aten.where.self: _where,
    _own.masked_geglu.default: _masked_geglu,
}
