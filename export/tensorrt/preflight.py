"""Whether TensorRT can make an engine of an ONNX graph, as far as that can be told without TensorRT.

Every operator, element type and shape is held against what TensorRT publishes (`bakeout.export.tensorrt.operators` and
`restrictions`), at the least, the usual and the largest shapes of a profile. No weights are read.

TensorRT's tensors have up to 8 dimensions (`nvinfer1::Dims::MAX_DIMS`). Until 10.10 none had more than 2^31 - 1
elements; since then most layers take more (release notes of 10.10 and 10.11), but not convolutions (NVIDIA's answer in
issue 4123 of NVIDIA/TensorRT), nor does our own kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx
from onnx import TensorProto, inliner

from bakeout.editor.errors import InputError
from bakeout.export import custom_ops
from bakeout.export.tensorrt.inference import INVALID, Scope, detached, infer, infer_at, nodes_of, scopes_of
from bakeout.export.tensorrt.operators import (
    ELEMENTS,
    IR_VERSIONS,
    OPERATORS,
    OPSETS,
    SOURCE,
    is_built_in,
    is_standard,
    typed_values,
)
from bakeout.export.tensorrt.restrictions import Use, restrictions_of
from bakeout.export.tensorrt.skeleton import missing_data, skeleton

if TYPE_CHECKING:
    from bakeout.export.tensorrt.shapes import Profile

_AGAIN: Final = "export the model again"
_SMALLER: Final = "draw fewer or smaller pictures at a time"
_MAX_RANK: Final = 8
_MAX_INT32: Final = 2**31 - 1
# What functions may grow to when they are put in place of their calls.
_MAX_NODES: Final = 100_000
_LIMITED: Final = ("Conv", "ConvTranspose", "DeformConv")
_ENDS: Final = ("least", "usual", "largest")


@dataclass(frozen=True)
class Finding:
    """One reason why TensorRT would not take a graph.

    Attributes:
        node: the name of the node, input, initializer or function, as it can be printed.
        op_type: the node's operator, or what else it is.
        problem: the end of a sentence that begins with the node.
        cure: how to mend it.
    """

    node: str
    op_type: str
    problem: str
    cure: str

    def __str__(self) -> str:
        return f"{self.op_type} {self.node} {self.problem}; {self.cure}"


def check(path: Path, profile: Profile | None, called: str | None = None) -> None:
    """Raise InputError, with the first finding of `preflight` and how many more there are, unless there is none.

    `called` is what to call the graph; None is by its file.
    """
    if found := preflight(path, profile):
        more = f" (and {len(found) - 1} more of its parts have a fault)" if len(found) > 1 else ""
        raise InputError(f"TensorRT does not take {called or path}{more}: {found[0]}")


def preflight(path: Path, profile: Profile | None) -> tuple[Finding, ...]:
    """What keeps TensorRT from making an engine of a graph; nothing if all that can be told without it is well.

    Args:
        path: of an ONNX file, its external data beside it.
        profile: the shapes that its inputs may have; None looks at no shapes that are dynamic.

    Raises:
        InputError: the file cannot be read, or is no ONNX graph.
    """
    model = skeleton(path)
    found = [
        *(Finding(_shown(name), "initializer", problem, _AGAIN) for name, problem in missing_data(path, model)),
        *_versions(model),
        *_functions(model),
        *_operators(model),
    ]
    if (large := _expansion(model)) is not None:
        return (*found, large)
    own = {name for node in nodes_of(model.graph) if _is_own(node) for name in (*node.input, *node.output)}
    constants = {it.name for it in model.graph.initializer}
    bare = detached(model)
    try:
        onnx.checker.check_model(bare)
        flat = inliner.inline_local_functions(bare)
        graph = infer(flat)
    except INVALID as error:
        return tuple(found) or (_invalid(path, error),)
    opset = next((it.version for it in flat.opset_import if is_standard(it.domain)), 0)
    for scope in scopes_of(graph, constants):
        found += _elements(scope)
        for node in scope.graph.node:
            found += _node(node, scope, opset)
    found += _inputs(flat, constants, profile)
    if profile is not None and not any(it.op_type == "input" for it in found):
        found += _shapes(flat, profile, own, constants)
    return tuple(dict.fromkeys(found))


def _invalid(path: Path, error: Exception) -> Finding:
    return Finding(_shown(path.name), "graph", f"is not valid ONNX ({_line(error)})", _AGAIN)


def _versions(model: onnx.ModelProto) -> Iterator[Finding]:
    if model.ir_version not in IR_VERSIONS:
        yield Finding(
            _shown(model.graph.name), "graph",
            f"has version {model.ir_version} of ONNX's format, which TensorRT does not read",
            f"write it in {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}",
        )  # fmt: skip
    for it in model.opset_import:
        if is_standard(it.domain) and it.version not in OPSETS:
            yield Finding(
                _shown(model.graph.name), "graph",
                f"is of opset {it.version}, which {SOURCE} does not read",
                f"convert it to one from {OPSETS[0]} to {OPSETS[-1]}",
            )  # fmt: skip
        elif it.domain == custom_ops.DOMAIN and it.version != custom_ops.VERSION:
            yield Finding(
                _shown(model.graph.name), "graph",
                f"has version {it.version} of the operators of {custom_ops.DOMAIN}, not {custom_ops.VERSION}", _AGAIN,
            )  # fmt: skip
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        yield Finding(_shown(name), "initializer", "is sparse, which TensorRT does not read", "write it dense")


def _functions(model: onnx.ModelProto) -> Iterator[Finding]:
    """Of functions themselves; TensorRT knows them by their name alone."""
    seen: set[str] = set()
    for function in model.functions:
        if is_built_in(function.name):
            yield Finding(
                _shown(function.name), "function",
                "has the name of an operator of TensorRT's own, which would run in its place", "give it another name",
            )  # fmt: skip
        if function.name in seen:
            yield Finding(
                _shown(function.name), "function", "is there twice, and TensorRT tells them by their name alone",
                "give each a name of its own",
            )  # fmt: skip
        seen.add(function.name)


def _expansion(model: onnx.ModelProto) -> Finding | None:
    """Of a function that calls itself, or functions with which the graph becomes too large."""
    bodies = {(it.domain, it.name): it for it in model.functions}
    calls = {
        key: [(node.domain, node.op_type) for node in nodes_of(body) if (node.domain, node.op_type) in bodies]
        for key, body in bodies.items()
    }
    sizes: dict[tuple[str, str], int] = {}
    try:
        for key in TopologicalSorter(calls).static_order():
            sizes[key] = sum(1 for _ in nodes_of(bodies[key])) + sum(sizes[it] for it in calls[key])
    except CycleError as error:
        return Finding(_shown(error.args[1][0][1]), "function", "calls itself", _AGAIN)
    if sum(sizes.get((node.domain, node.op_type), 1) for node in nodes_of(model.graph)) > _MAX_NODES:
        return Finding(_shown(model.graph.name), "graph", f"has more than {_MAX_NODES} nodes", _AGAIN)
    return None


def _operators(model: onnx.ModelProto) -> Iterator[Finding]:
    """Of nodes that TensorRT cannot read by what they are called, in the graph and in functions."""
    functions = {(it.domain, it.name): it for it in model.functions}
    for container in (model.graph, *model.functions):
        for node in nodes_of(container):
            function = functions.get((node.domain, node.op_type))
            if function is None:
                yield from _known(node)
            elif len(node.input) != len(function.input):
                yield _finding(node, "leaves out inputs of its function, which TensorRT wants whole", _AGAIN)
            elif _is_own(node):
                yield from _plugin(node)


def _known(node: onnx.NodeProto) -> Iterator[Finding]:
    if not is_standard(node.domain):
        domain = f"is of the domain {node.domain!a:.100}, which TensorRT has no operators of"
        yield _finding(node, domain, "give it a function body of standard operators")
    elif node.op_type not in OPERATORS:
        yield _finding(node, f"is no operator that {SOURCE} reads", "spell it out in others")


def _is_read(node: onnx.NodeProto) -> bool:
    return is_standard(node.domain) and node.op_type in OPERATORS


def _is_own(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (custom_ops.DOMAIN, custom_ops.MASKED_GEGLU)


def _plugin(node: onnx.NodeProto) -> Iterator[Finding]:
    """Of attributes without which TensorRT takes a node's function body, and not the plugin."""
    given = {it.name: it for it in node.attribute}
    for name, value in custom_ops.PLUGIN.items():
        attribute = given.get(name)
        if attribute is None:
            yield _finding(node, f"lacks the attribute {name}, without which its plugin is not taken", _AGAIN)
        elif attribute != onnx.helper.make_attribute(name, value):
            yield _finding(
                node, f"has an attribute {name} other than {value!r}, with which our kernel is not taken", _AGAIN
            )


def _elements(scope: Scope) -> Iterator[Finding]:
    """Of values whose element type TensorRT has not, each at its source."""
    graph = scope.graph
    edges = {it.name for it in (*graph.input, *graph.output)}
    sources = [("input", _shown(it.name), it.name) for it in graph.input if it.name not in scope.constants]
    sources += [("initializer", _shown(name), name) for name in scope.initializers]
    sources += [(node.op_type, _name(node), name) for node in graph.node for name in node.output if name]
    for kind, shown, name in sources:
        element = scope.elements.get(name)
        if element is None:
            yield Finding(shown, kind, "is no tensor, and TensorRT has nothing else", _AGAIN)
        elif element == TensorProto.DOUBLE:
            yield Finding(shown, kind, "is of DOUBLE, which TensorRT would round to FP32", "cast it to FP32")
        elif element not in ELEMENTS:
            yield Finding(shown, kind, f"is of {_element(element)}, which TensorRT has not", "cast it to another type")
        elif element == TensorProto.UINT8 and name not in edges:
            yield Finding(
                shown, kind, "is of UINT8, which only inputs and outputs of a graph may be", "cast it to another type"
            )


def _node(node: onnx.NodeProto, scope: Scope, opset: int) -> Iterator[Finding]:
    if not _is_read(node):
        return
    taken = OPERATORS[node.op_type]
    for name in typed_values(node, opset):
        element = ELEMENTS.get(scope.elements.get(name) or 0)
        if element is not None and element not in taken:
            yield _finding(node, f"is of {element}, and TensorRT takes {', '.join(taken)}", "cast what it reads")
            break
    use = Use(node, scope.shapes, scope.constants, scope.values)
    for problem in restrictions_of(use):
        yield _finding(node, problem, "write it as TensorRT reads it")
    for attribute in node.attribute:
        for tensor in (attribute.t, *attribute.tensors):
            if tensor.data_location == TensorProto.EXTERNAL:
                yield _finding(node, "has a constant outside the file", "keep only initializers outside")


def _inputs(model: onnx.ModelProto, constants: Collection[str], profile: Profile | None) -> Iterator[Finding]:
    """Of inputs without a range, or with one that they cannot have."""
    inputs = {it.name: it.type.tensor_type.shape for it in model.graph.input if it.name not in constants}
    for name, shape in inputs.items():
        if any(dim.HasField("dim_value") and not 1 <= dim.dim_value <= _MAX_INT32 for dim in shape.dim):
            yield _input(name, "has a size that no tensor has", _AGAIN)
    if profile is None:
        return
    for name in profile.keys() - inputs.keys():
        yield _input(name, "is in the profile and not in the graph", "leave it out")
    named: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in inputs.items():
        dims = list(shape.dim)
        if name not in profile:
            if not all(dim.HasField("dim_value") for dim in dims):
                yield _input(
                    name, "has a dynamic size and no range in the profile", "give its least, usual and largest"
                )
            continue
        ends = profile[name]
        if len(ends) != len(_ENDS) or any(len(end) != len(dims) for end in ends):
            yield _input(name, f"has {len(dims)} dimensions in the graph and others in the profile", "give it as many")
            continue
        for place, (dim, sizes) in enumerate(zip(dims, zip(*ends, strict=True), strict=True)):
            if (problem := _range(dim, sizes)) is not None:
                yield _input(name, f"{problem} in dimension {place}", "mend its range in the profile")
            elif dim.dim_param and named.setdefault(dim.dim_param, (name, sizes))[1] != sizes:
                other = _shown(named[dim.dim_param][0])
                yield _input(
                    name, f"has another range in dimension {place} than {other}, which is of the same size",
                    "give both the same",
                )  # fmt: skip


def _range(dim: onnx.TensorShapeProto.Dimension, sizes: tuple[int, ...]) -> str | None:
    if dim.HasField("dim_value") and set(sizes) != {dim.dim_value}:
        return f"has {dim.dim_value} alone and not {', '.join(map(str, sizes))}"
    if list(sizes) != sorted(sizes) or sizes[0] < 1 or sizes[-1] > _MAX_INT32:
        return f"has no rising sizes ({', '.join(map(str, sizes))})"
    return None


def _shapes(
    model: onnx.ModelProto, profile: Profile, own: Collection[str], constants: Collection[str]
) -> Iterator[Finding]:
    """Of what no tensor of TensorRT can have, at any end of the profile; each node's faults at one of them only."""
    faulty: set[tuple[str, ...]] = set()
    for place, end in enumerate(_ENDS):
        try:
            graph = infer_at(model, {name: ends[place] for name, ends in profile.items()})
        except INVALID as error:
            yield Finding(
                _shown(model.graph.name), "graph", f"does not fit the {end} shapes ({_line(error)})",
                "choose another picture size, or export the model again",
            )  # fmt: skip
            continue
        for scope in scopes_of(graph, constants):
            for node in scope.graph.node:
                if tuple(node.output) not in faulty and (problem := _shape_problem(node, scope, own)) is not None:
                    faulty.add(tuple(node.output))
                    yield _finding(node, problem[0].format(end=end), problem[1])


def _shape_problem(node: onnx.NodeProto, scope: Scope, own: Collection[str]) -> tuple[str, str] | None:
    if not _is_read(node) or not all(_is_known(scope, name) for name in node.input if name):
        return None
    for name in filter(None, node.output):
        if not _is_known(scope, name):
            return "gives a shape that depends on values, which no profile holds", "give it a shape that sizes tell"
        shape = _sizes(scope, name)
        if len(shape) > _MAX_RANK:
            return f"gives {len(shape)} dimensions, and TensorRT has {_MAX_RANK}", _AGAIN
        if 0 in shape and not (shape == (0,) and scope.elements.get(name) == TensorProto.INT64):
            return "gives a tensor without elements at the {end} shapes", "choose larger pictures"
        if max(shape, default=1) > _MAX_INT32:
            return "gives a size beyond 2^31 - 1 at the {end} shapes", _SMALLER
    for name in (*node.output, *node.input):
        volume = prod(_sizes(scope, name))
        if volume > _MAX_INT32 and (node.op_type in _LIMITED or name in own):
            return f"has {volume} elements at the {{end}} shapes, more than 2^31 - 1", _SMALLER
    return None


def _is_known(scope: Scope, name: str) -> bool:
    shape = scope.shapes.get(name)
    return shape is not None and all(size is not None and size >= 0 for size in shape)


def _sizes(scope: Scope, name: str) -> tuple[int, ...]:
    return tuple(size for size in scope.shapes.get(name) or () if size is not None)


def _finding(node: onnx.NodeProto, problem: str, cure: str) -> Finding:
    return Finding(_name(node), f"{node.op_type!a:.50}"[1:-1], problem, cure)


def _input(name: str, problem: str, cure: str) -> Finding:
    return Finding(_shown(name), "input", problem, cure)


def _name(node: onnx.NodeProto) -> str:
    return _shown(node.name or next((name for name in node.output if name), ""))


def _shown(name: str) -> str:
    return f"{name!a:.150}"


def _line(error: Exception) -> str:
    return f"{str(error).strip().partition(chr(10))[0]!a:.300}"[1:-1]


def _element(element: int) -> str:
    names: Mapping[int, str] = {number: name for name, number in TensorProto.DataType.items()}
    return names.get(element, f"type {element}")
