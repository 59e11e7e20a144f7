"""Element types and shapes of all values of an ONNX graph, with what sizes tell of other sizes computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from bakeout.export.tensorrt.restrictions import Shape

_Array: TypeAlias = np.ndarray[Any, Any]
# What ONNX raises where a model is not as ONNX has it: its C++ code has no classes of its own for all of it.
INVALID: Final = (onnx.checker.ValidationError, shape_inference.InferenceError, RuntimeError, TypeError, ValueError)
# By which sizes are made of sizes. None makes many values of few.
_COMPUTED: Final = frozenset(
    ("Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
)
_MAX_VALUES: Final = 64
# What ONNX's evaluator and numpy raise where a node does not fit what it is given.
_IMPOSSIBLE: Final = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Each finds the sizes that wait for those of the one before.
_MAX_ROUNDS: Final = 16


@dataclass(frozen=True)
class Scope:
    """A graph, and what is known of the values that its nodes can read; those of the graphs around it too.

    Attributes:
        graph: the model's, or one in a node.
        initializers: the names of its own.
        elements: by value, the number of the element type.
        shapes: by value.
        constants: values that are initializers or made by a Constant.
        values: of small constants.
    """

    graph: onnx.GraphProto
    initializers: tuple[str, ...]
    elements: Mapping[str, int]
    shapes: Mapping[str, Shape]
    constants: frozenset[str]
    values: Mapping[str, _Array]


def nodes_of(container: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of graphs in nodes as well."""
    for node in container.node:
        yield node
        for inner in _graphs_in(node):
            yield from nodes_of(inner)


def detached(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with an input in the place of each initializer that is external data, and no shapes but its edges'."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    external = [it for it in graph.initializer if it.data_location == TensorProto.EXTERNAL]
    inline = [it for it in graph.initializer if it.data_location != TensorProto.EXTERNAL]
    known = {it.name for it in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(it.name, it.data_type, it.dims) for it in external if it.name not in known
    )
    del graph.initializer[:]
    graph.initializer.extend(inline)
    del graph.value_info[:]
    return copy


def infer(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph of a model without functions, with the types of all values.

    Raises:
        onnx.shape_inference.InferenceError: a node is not as ONNX has it.
    """
    return shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph


def infer_at(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.GraphProto:
    """As `infer`, where the inputs have these shapes; nodes that only compute sizes have become initializers.

    Raises:
        onnx.shape_inference.InferenceError: they do not fit.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name in shapes:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                dim.dim_value = size
    for _ in range(_MAX_ROUNDS):
        graph = infer(fixed)
        if not _fold(fixed, next(scopes_of(graph))):
            break
    return graph


def scopes_of(graph: onnx.GraphProto, constants: Iterable[str] = ()) -> Iterator[Scope]:
    """An inferred graph and those in its nodes; `constants` are inputs that stand for initializers."""
    yield from _scopes(graph, Scope(graph, (), {}, {}, frozenset(constants), {}))


def _scopes(graph: onnx.GraphProto, around: Scope) -> Iterator[Scope]:
    elements, shapes, values = dict(around.elements), dict(around.shapes), dict(around.values)
    constants = set(around.constants)
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") == "tensor_type":
            elements[value.name] = tensor.elem_type
        shapes[value.name] = _shape(tensor) if tensor.HasField("shape") else None
    tensors = [(it.name, it) for it in graph.initializer]
    tensors += [
        (node.output[0], it.t)
        for node in graph.node if node.op_type == "Constant"
        for it in node.attribute if it.name == "value"
    ]  # fmt: skip
    for name, tensor in tensors:
        elements[name], shapes[name] = tensor.data_type, tuple(tensor.dims)
        if np.prod(tensor.dims, dtype=object) <= _MAX_VALUES and tensor.data_location != TensorProto.EXTERNAL:
            values[name] = numpy_helper.to_array(tensor)
    constants |= {name for name, _ in tensors} | {node.output[0] for node in graph.node if node.op_type == "Constant"}
    scope = Scope(
        graph, tuple(it.name for it in graph.initializer), elements, shapes, frozenset(constants), values
    )  # fmt: skip
    yield scope
    for node in graph.node:
        for inner in _graphs_in(node):
            yield from _scopes(inner, scope)


def _graphs_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _shape(tensor: onnx.TypeProto.Tensor) -> Shape:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)


def _fold(model: onnx.ModelProto, scope: Scope) -> bool:
    """Put initializers in the place of nodes that compute sizes of known sizes, and say whether there were any."""
    known: dict[str, _Array] = dict(scope.values)
    kept, made = [], []
    for node in model.graph.node:
        value = _computed(node, scope, known, model.opset_import)
        if value is None:
            kept.append(node)
        else:
            known[node.output[0]] = value
            made.append(numpy_helper.from_array(value, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(made)
    return bool(made)


def _computed(
    node: onnx.NodeProto, scope: Scope, known: Mapping[str, _Array], opsets: Iterable[onnx.OperatorSetIdProto]
) -> _Array | None:
    if node.op_type == "Shape":
        sizes = scope.shapes.get(node.input[0])
        places = {it.name: it.i for it in node.attribute}
        part = None if sizes is None else sizes[places.get("start", 0) : places.get("end", len(sizes))]
        return None if part is None or None in part else np.array(part, dtype=np.int64)
    given = {name: known[name] for name in node.input if name in known}
    if node.op_type not in _COMPUTED or len(given) < len({*node.input}) or not all(map(_is_size, given.values())):
        return None
    inputs = [_info(name, value) for name, value in given.items()]
    graph = helper.make_graph([node], "sizes", inputs, [onnx.ValueInfoProto(name=node.output[0])])
    try:
        with np.errstate(all="raise"):
            (value,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opsets))).run(None, given)
    except _IMPOSSIBLE:
        return None
    value = np.asarray(value)
    return value if _is_size(value) else None


def _info(name: str, value: _Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _is_size(value: _Array) -> bool:
    return value.dtype in (np.int32, np.int64) and value.size <= _MAX_VALUES
