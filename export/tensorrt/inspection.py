"""What an engine is made of, by TensorRT's engine inspector, against the graph that it was built from.

The inspector's JSON is that of TensorRT 11 (its migration guide, page IEngineInspector): of each layer the tensors that
it reads and writes, with their types, and as `Metadata` the nodes that it was made of, as TensorRT's ONNX parser
writes them:

    [ONNX Layer: NAME]                       a node, or the plugin that was taken for it
    [ONNX Layer: NAME | OUTER (FUNCTION)]    a node in the body of a function, which the node OUTER calls

One layer may be of many nodes, whose entries a control character separates, and one node of several layers.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto

from bakeout.editor.errors import InputError
from bakeout.export.custom_ops import DOMAIN, MASKED_GEGLU
from bakeout.export.tensorrt import device as devices
from bakeout.export.tensorrt.engine import deserialize
from bakeout.export.tensorrt.inference import detached
from bakeout.export.tensorrt.library import logger, tensorrt
from bakeout.export.tensorrt.shapes import Profile
from bakeout.export.tensorrt.skeleton import skeleton

_PRODUCTS: Final = frozenset({"Conv", "Gemm", "MatMul", MASKED_GEGLU})
_GRAPH_FLOATS: Final = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
# The inspector's names, which its documentation does not list: those of its examples and of TensorRT's own types.
_FLOATS: Final = {
    "float": "fp32", "fp32": "fp32", "float32": "fp32", "half": "fp16", "fp16": "fp16", "float16": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip
_OTHERS: Final = frozenset({"int64", "int32", "int8", "uint8", "bool"})
_SEPARATOR: Final = re.compile("[\x1e\x1f]")
_ENTRY: Final = re.compile(r"\[ONNX Layer: (?P<names>.*)\]", re.DOTALL)
_MAX_TEXT: Final = 1 << 28


@dataclass(frozen=True)
class Inspected:
    """What an engine has.

    Attributes:
        layers: how many.
        plugins: how many of them are kernels of ours.
        doubt: why its layers could not be judged, or not all of them; empty if they were.
    """

    layers: int
    plugins: int
    doubt: str = ""


class UnknownLayersError(Exception):
    """The inspector does not describe layers in a form that is known, so nothing is known of them."""


class UnknownLayersWarning(UserWarning):
    """An engine's layers could not be judged, or not all of them."""


@dataclass(frozen=True)
class Typed:
    """The floating-point types of a graph, each of `fp32`, `fp16` and `bf16`.

    Attributes:
        values: of values that nodes give or the graph takes, by name.
        nodes: of what each node reads and writes, by its name.
        products: in which each product of matrices is computed, by the node's name.
        plugins: the names of nodes that are operators of ours.
        edges: of the graph's inputs and outputs, by name; None where it is no float.
    """

    values: Mapping[str, str]
    nodes: Mapping[str, frozenset[str]]
    products: Mapping[str, str]
    plugins: frozenset[str]
    edges: Mapping[str, str | None]


@dataclass(frozen=True)
class _Layer:
    """A layer of the engine: the names of its nodes, and its floats as (name, type)."""

    name: str
    nodes: frozenset[str]
    functions: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


def inspect(plan: Path, graph: Path, profile: Profile, device: str) -> Inspected:
    """Compare an engine with the ONNX graph that it was built from.

    Where the inspector's description is not known, that is an UnknownLayersWarning and stays a doubt: what the engine
    gives is judged in any case, and operators of ours were counted when the graph was read.

    Args:
        plan: the engine.
        graph: the graph, in the precision that the engine should compute in.
        profile: with which it was built.
        device: of torch.

    Raises:
        InputError: it does not load, or `judge` does.
    """
    library, log, stream = tensorrt(), logger(), devices.Stream(devices.torch_device(device))
    with stream.ordered():
        # The engine needs its runtime for as long as it lives.
        runtime, engine = deserialize(library, plan, log)
        inspector = engine.create_engine_inspector()
        context = engine.create_execution_context(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Without shapes the inspector leaves out what depends on them.
        ready = context is not None and context.set_optimization_profile_async(0, stream.handle)
        if not ready or not all(context.set_input_shape(name, usual) for name, (_, usual, _) in profile.items()):
            raise _wrong(f"takes no shapes of its own profile ({log.said or 'it does not say why'})")
        inspector.execution_context = context
        said, count = inspector.get_engine_information(library.LayerInformationFormat.JSON), engine.num_layers
        stream.wait()
        del inspector, context, engine, runtime
    typed = types_of(graph)
    try:
        return judge(said, typed)
    except UnknownLayersError as error:
        warnings.warn(
            f"whether all layers of {graph.parent.name} compute in the precision asked for is not known, because "
            f"TensorRT's inspector does not describe them as that of TensorRT 11 does ({error})",
            UnknownLayersWarning, stacklevel=2,
        )  # fmt: skip
        return Inspected(count, len(typed.plugins), str(error))


def types_of(path: Path) -> Typed:
    """The types of an ONNX graph. Raises InputError if it is none."""
    model = skeleton(path)
    try:
        graph = onnx.shape_inference.infer_shapes(detached(model)).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"{path} is no graph whose types agree ({error!s:.200}); export the model again") from error
    infos = (*graph.input, *graph.output, *graph.value_info)
    kinds = {it.name: it.data_type for it in model.graph.initializer}
    kinds |= {it.name: it.type.tensor_type.elem_type for it in infos}
    multiplying = [node for node in graph.node if node.op_type in _PRODUCTS]
    if unknown := [node.name for node in multiplying if not kinds.get(node.input[0])]:
        raise InputError(f"{path} does not tell from what type {unknown[0]!a:.200} is computed; export the model again")
    floats = {name: _GRAPH_FLOATS[kind] for name, kind in kinds.items() if kind in _GRAPH_FLOATS}
    stored = {it.name for it in model.graph.initializer}
    return Typed(
        values={name: kind for name, kind in floats.items() if name not in stored},
        nodes={
            node.name: frozenset(floats[it] for it in (*node.input, *node.output) if it in floats)
            for node in graph.node
        },
        products={node.name: floats[node.input[0]] for node in multiplying if node.input[0] in floats},
        plugins=frozenset(node.name for node in graph.node if node.domain == DOMAIN),
        edges={it.name: floats.get(it.name) for it in (*graph.input, *graph.output) if it.name not in stored},
    )


def judge(said: str, typed: Typed) -> Inspected:
    """Whether the layers compute in the types of the graph, by our kernels where it has operators of ours.

    - It has the graph's inputs and outputs, in the graph's types.
    - A tensor with the name of one of the graph is of its type, and no float is of a type that the graph has not.
    - Of each product some layer reads what it multiplies in the product's type, and in none that its nodes have not;
      where it reads that type and others, it is not known in which it multiplies.
    - Each operator of ours is one layer, and no layer is of a function's body.

    Args:
        said: by the inspector, in JSON.
        typed: the graph.

    Raises:
        InputError: it is otherwise.
        UnknownLayersError: `said` is not of the form that TensorRT 11 documents, or tells nothing of some product; of
            the rest nothing is otherwise.
    """
    layers, edges = _parsed(said)
    if not any(layer.nodes or layer.functions for layer in layers):
        raise UnknownLayersError("no layer says of what it is made")
    if edges != typed.edges:
        different = min(name for name in edges.keys() | typed.edges.keys() if edges.get(name) != typed.edges.get(name))
        raise _wrong(f"has {different!a:.100} with another type than the graph, or not at all")
    if bodies := [layer for layer in layers if any(MASKED_GEGLU in it for it in layer.functions)]:
        raise _wrong(f"has the body of {MASKED_GEGLU} as layer {bodies[0].name!a:.200}, and not our kernel")
    for name in sorted(typed.plugins):
        if (count := sum(name in layer.nodes for layer in layers)) != 1:
            raise _wrong(f"has {count} layers for our operator {name!a:.200}, where our kernel would be one")
    known = frozenset(typed.values.values()).union(*typed.nodes.values())
    for layer in layers:
        for tensor, kind in (*layer.inputs, *layer.outputs):
            if kind != typed.values.get(tensor, kind) or kind not in known:
                raise _wrong(f"has {tensor!a:.200} of layer {layer.name!a:.200} in {kind}, which the graph has not")
    unknown = []
    for name, kind in sorted(typed.products.items()):
        own = [layer for layer in layers if name in layer.nodes]
        if any(_multiplies_in(layer, kind, typed) for layer in own):
            continue
        found = sorted({of for layer in own for _, of in layer.inputs})
        if found and kind not in found:
            raise _wrong(f"computes {name!a:.200} from {' and '.join(found)}, and not in {kind}")
        unknown.append(name)
    if unknown:
        raise UnknownLayersError(
            f"of {len(typed.products)} products it does not tell in what {len(unknown)} are computed, as "
            f"{unknown[0]!a:.200}"
        )
    return Inspected(len(layers), len(typed.plugins))


def _multiplies_in(layer: _Layer, kind: str, typed: Typed) -> bool:
    read, written = ({of for _, of in tensors} for tensors in (layer.inputs, layer.outputs))
    allowed = frozenset[str]().union(*(typed.nodes.get(node, frozenset()) for node in layer.nodes))
    # Beside a node that converts, what is read may be what is not converted yet.
    return read <= allowed and kind in (read if len(allowed) == 1 else read | written)


def _parsed(said: str) -> tuple[list[_Layer], dict[str, str | None]]:
    if len(said) > _MAX_TEXT:
        raise UnknownLayersError(f"its description has {len(said)} characters")
    try:
        # TensorRT's separators are control characters, which it need not escape.
        found = json.loads(said, strict=False)
        layers = [_layer(it) for it in found["Layers"]]
        edges = {str(it["Name"]): _float(it) for it in found["I/O Tensors"]}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UnknownLayersError(f"{type(error).__name__}: {error!s:.200}") from error
    if not layers:
        raise UnknownLayersError("it has no layers")
    return layers, edges


def _layer(found: Any) -> _Layer:
    names = [entry.split(" | ") for entry in _entries(found.get("Metadata", ""))]
    # Layers that only wait for one another have none.
    inputs, outputs = (tuple(_floats(found.get(place, ()))) for place in ("Inputs", "Outputs"))
    nodes = frozenset(name for name, *around in names if not around)
    functions = tuple(it for _, *around in names for it in around)
    return _Layer(str(found["Name"]), nodes, functions, inputs, outputs)


def _entries(metadata: str) -> Iterator[str]:
    for entry in _SEPARATOR.split(metadata):
        if match := _ENTRY.fullmatch(entry.strip()):
            yield match["names"]


def _floats(tensors: Any) -> Iterator[tuple[str, str]]:
    for tensor in tensors:
        if (kind := _float(tensor)) is not None:
            yield str(tensor["Name"]), kind


def _float(tensor: Any) -> str | None:
    """The type of a tensor; None is no float. The documentation spells the field both ways."""
    given = tensor["DataType"] if "DataType" in tensor else tensor["Datatype"]
    kind = str(given).lower()
    if kind not in _FLOATS and kind not in _OTHERS:
        raise ValueError(f"there is a tensor of type {given!a:.50}")
    return _FLOATS.get(kind)


def _wrong(what: str) -> InputError:
    return InputError(
        f"TensorRT built another engine than was asked for: it {what}; export again with another --precision, and "
        "report it with the version of TensorRT"
    )
