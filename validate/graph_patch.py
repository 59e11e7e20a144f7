"""Patches of single tokens, which no weight can hold, in ONNX graphs: exactly those, and nothing around them.

At a site S, say unet.mid.attn.0.block.0.ffn2, the nodes of a patch of the Linear's input or output are named
bakeout/S/patch.<at>/..., and what the node .../edited gives takes the place of what is patched. Its constants are

    bakeout.S.patch.<at>.indices    int64 [n]: rising, where the mask [tokens, d] or [d], flattened, is set
    bakeout.S.patch.<at>.values     float32 [n]: what is there, rounded from the Edit's value

which the other nodes expand to mask and value. At the input of an FFN's second Linear the node is a MaskedGeglu of the
domain bakeout, which reads what the first Linear gives, elsewhere a Where. `bakeout.export` is not asked what it wrote:
the constants' nodes are run, the function of the MaskedGeglu is run on numbers, and of each Linear is told from its own
weight what it reads and who reads what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from bakeout.editor.edit import PatchActivation
from bakeout.editor.model import Model
from bakeout.editor.sites import Site
from bakeout.validate.audit import MissingError, Parameter, difference
from bakeout.validate.graph import Graph
from bakeout.validate.onnx_folder import STANDARD
from bakeout.validate.tolerances import COMPONENT

_DOMAIN, _VERSION, _OPERATOR = "bakeout", 1, "MaskedGeglu"
# By these TensorRT takes a plugin in place of the function.
_ATTRIBUTES: Mapping[str, object] = {"plugin_namespace": b"bakeout", "plugin_version": b"1", "aot": 1}
# What expands constants, and what the function is made of: nothing of it can ask what it is given.
_EXPANDING = frozenset(("Cast", "ConstantOfShape", "Reshape", "ScatterND", "Unsqueeze"))
_BODY = ["Gelu", "Mul", "Split", "Where"]
_MOST_DIMENSIONS = 2
# Of the function's probes: rows, tokens, features, and sizes of what it is given.
_PROBED, _SIZES = (3, 5, 64), (0.1, 1.0, 10.0)


def is_fused(patch: PatchActivation, base: Model) -> bool:
    """Whether a graph has a patch as a part of GEGLU, and not as an operation of its own."""
    return patch.at == "input" and base.site(patch.site).kind == "ffn2"


def home_of(patch: PatchActivation) -> str:
    """What the names of its nodes begin with."""
    return f"bakeout/{patch.site}/patch.{patch.at}/"


def patch_faults(
    graph: Graph, base: Model, names: Mapping[Parameter, str], patches: Sequence[PatchActivation]
) -> Iterator[str]:
    """What is wrong with the patches in a graph of which the list of nodes tells what is computed of what.

    Args:
        graph: of one network.
        base: the model that was edited.
        names: of its parameters, what the graph calls them.
        patches: all that the graph must have.

    Raises:
        MissingError: the graph lacks what a patch is made of, or a Linear is not to be told from the rest.
    """
    parts = {home_of(it): _part(graph, it) for it in patches}
    fused = [parts[home_of(it)].last for it in patches if is_fused(it, base)]
    ours = [node for node in graph.nodes if node.domain not in STANDARD]
    if strange := [node.name for node in ours if all(node is not it for it in fused)]:
        yield f"{graph.name} has the node {strange[0]!a:.100} of another domain beside those of the edit"
    if fused:
        yield from _function_faults(graph)
    for part in parts.values():
        # With other nodes, nothing says that they may be run.
        yield from [
            *_form_faults(graph, part, fused=is_fused(part.patch, base)), *_ways_around(graph, base, names, part, parts)
        ] or _constants_faults(graph, part)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """A patch, the node that does it, and those that expand its constants."""

    patch: PatchActivation
    last: Any
    expanding: list[Any]

    @property
    def home(self) -> str:
        """What the names of the nodes begin with."""
        return home_of(self.patch)

    @property
    def constants(self) -> list[str]:
        """The mask and the value that the patch takes."""
        return list(self.last.input[1:] if self.last.op_type == _OPERATOR else self.last.input[:2])

    @property
    def raw(self) -> str:
        """What is patched."""
        return str(self.last.input[0 if self.last.op_type == _OPERATOR else 2])


def _part(graph: Graph, patch: PatchActivation) -> _Part:
    home = home_of(patch)
    last = [node for node in graph.nodes if node.name == f"{home}edited"]
    if len(last) != 1 or len(last[0].input) != 3 or len(last[0].output) != 1:
        raise MissingError(f"{graph.name} has not one node {home}edited, of three inputs and one output")
    expanding = [node for node in graph.nodes if node.name.startswith(home) and node is not last[0]]
    return _Part(patch, last[0], expanding)


def _form_faults(graph: Graph, part: _Part, *, fused: bool) -> Iterator[str]:
    """Whether the nodes are of the sorts of which patches are made, and read constants and what is patched only."""
    last = part.last
    wanted = ((_DOMAIN,), _OPERATOR) if fused else (STANDARD, "Where")
    if last.domain not in wanted[0] or last.op_type != wanted[1] or last.overload:
        yield f"{last.name} is no {wanted[1]} of the domain {wanted[0][-1]}"
    if {it.name: _value(it) for it in last.attribute} != (_ATTRIBUTES if fused else {}):
        yield f"{last.name} has other attributes than it must have"
    made = {value for node in part.expanding for value in node.output}
    for node in part.expanding:
        if node.op_type not in _EXPANDING or node.domain not in STANDARD:
            yield f"{node.name!a:.100} is a {node.op_type!a:.50}, of which no patch is made"
        elif node.op_type == "ConstantOfShape" and _elements(graph, node.input[0]) > part.patch.mask.numel():
            yield f"{node.name!a:.100} makes more than a mask has"
        if not made.union(graph.initializers).issuperset(node.input):
            yield f"{node.name!a:.100} reads what is no constant of the patch"
    for value in sorted(made):
        if others := [it for it in graph.readers[value] if not it.startswith(part.home)]:
            yield f"{others[0]!a:.100} reads {value!a:.100}, which is for {last.name}"
    if not made.issuperset(part.constants):
        yield f"{last.name} does not take its mask and value from its own constants"


def _value(attribute: Any) -> object:
    from onnx import AttributeProto

    fields = {AttributeProto.INT: attribute.i, AttributeProto.STRING: attribute.s}
    return fields.get(attribute.type)


def _elements(graph: Graph, name: str) -> float:
    """How many elements a constant shape has; infinitely many where that cannot be told."""
    if name not in graph.initializers or prod(graph.initializers[name].dims) > _MOST_DIMENSIONS:
        return inf
    sizes: list[int] = graph.folder.tensor(graph.name, name, torch.int64).tolist()
    return prod(sizes) if min(sizes, default=0) > 0 else inf


def _ways_around(
    graph: Graph, base: Model, names: Mapping[Parameter, str], part: _Part, parts: Mapping[str, _Part]
) -> Iterator[str]:
    """Whether a patch patches what it must, and all of what comes after reads only what it gives."""
    site, last = base.site(part.patch.site), part.last
    x, y = _linear(graph, names, site)
    raw: str | None = y if part.patch.at == "output" else None
    if is_fused(part.patch, base):
        before = base.site(f"{site.name.removesuffix('ffn2')}ffn1")
        around = parts.get(f"bakeout/{before.name}/patch.output/")
        raw = _linear(graph, names, before)[1] if around is None else str(around.last.output[0])
    # What other Linears read is patched for one of them only, so others may read it as well.
    if raw is not None and (part.raw != raw or graph.only_reader(raw) is not last):
        yield f"{graph.name} has a way around {last.name}: not it alone reads what it is to patch"
    if part.patch.at == "input" and (x != last.output[0] or graph.only_reader(x) is None):
        yield f"{graph.name} has a way around {last.name}: not {site.name} alone reads what it gives"


def _linear(graph: Graph, names: Mapping[Parameter, str], site: Site) -> tuple[str, str]:
    """What a Linear reads, and what it gives. Raises MissingError where its weight is used otherwise, or twice."""
    weight, bias = (names.get((site.component, f"{site.module}.{part}")) for part in ("weight", "bias"))
    transposed = _next(graph, site, str(weight), "Transpose")
    product = _next(graph, site, transposed.output[0], "MatMul")
    last = product if bias is None else _next(graph, site, product.output[0], "Add")
    if product.input[1] != transposed.output[0] or (bias is not None and graph.only_reader(bias) is not last):
        raise MissingError(f"{graph.name} does not have the Linear {site.name} as it is")
    return str(product.input[0]), str(last.output[0])


def _next(graph: Graph, site: Site, value: str, operator: str) -> Any:
    node = graph.only_reader(value)
    if node is None or node.op_type != operator or node.domain not in STANDARD or len(node.output) != 1:
        raise MissingError(f"{graph.name} does not have the Linear {site.name} once and whole: see {value!a:.100}")
    return node


def _constants_faults(graph: Graph, part: _Part) -> Iterator[str]:
    """Whether a patch's constants are the Edit's, and what its nodes make of them its mask and value."""
    patch, stem = part.patch, f"bakeout.{part.patch.site}.patch.{part.patch.at}"
    value = patch.value.float()
    constants = {"indices": patch.mask.flatten().nonzero()[:, 0], "values": value[patch.mask]}
    faults = [
        fault
        for name, expected in constants.items()
        for fault in graph.constant_faults(f"{stem}.{name}", expected, part.home)
    ]
    yield from faults
    if faults:
        return
    mask_and_value = dict(zip(part.constants, (torch.bool, torch.float32), strict=True))
    exact = {f"{stem}.{name}": constant for name, constant in constants.items()}
    found = graph.run_part(part.expanding, {}, mask_and_value, exact).run(list(mask_and_value), {})
    for name, own, expected in zip(("mask", "value"), map(torch.from_numpy, found), (patch.mask, value), strict=True):
        if not torch.equal(own, expected):
            count = int((own != expected).sum()) if own.shape == expected.shape else expected.numel()
            yield difference(f"the {name} of {part.home}", own, expected, count)


def _function_faults(graph: Graph) -> Iterator[str]:
    """Whether the graph's only function is where(M, v, a ⊙ gelu(g)) of a, g = the halves of what it is given."""
    versions = [it.version for it in graph.model.opset_import if it.domain == _DOMAIN]
    if versions != [_VERSION]:
        yield f"{graph.name} imports version {versions!a:.50} of the domain {_DOMAIN} in place of {_VERSION}"
    functions = list(graph.model.functions)
    if [(it.domain, it.name, it.overload) for it in functions] != [(_DOMAIN, _OPERATOR, "")]:
        yield f"{graph.name} has other functions than one {_OPERATOR}"
        return
    (function,) = functions
    own = sorted(node.op_type for node in function.node)
    standard = all(node.domain in STANDARD for node in function.node)
    if own != _BODY or not standard or function.attribute or function.attribute_proto:
        yield f"the function {_OPERATOR} of {graph.name} is not made of {', '.join(_BODY)} alone"
    elif wrong := _wrong_values(graph):
        yield f"the function {_OPERATOR} of {graph.name} gives something else than its definition for {wrong:,} values"


def _wrong_values(graph: Graph) -> int:
    from onnx import helper

    generator = torch.Generator().manual_seed(0)
    rows, tokens, width = _PROBED
    node = helper.make_node(_OPERATOR, ["proj", "mask", "value"], ["edited"], domain=_DOMAIN)
    wrong = 0
    for shape in ((tokens, width), (width,)):
        inputs = {
            "proj": (torch.float32, (None, tokens, 2 * width)),
            "mask": (torch.bool, shape),
            "value": (torch.float32, shape),
        }
        session = graph.run_part([node], inputs, {"edited": torch.float32})
        for size in _SIZES:
            proj = torch.randn(rows, tokens, 2 * width, generator=generator) * size
            mask = torch.rand(shape, generator=generator) < 0.5
            # What a value is where the mask is not set changes nothing.
            value = torch.randn(shape, generator=generator).where(mask, torch.nan)
            given = {"proj": proj.numpy(), "mask": mask.numpy(), "value": value.numpy()}
            (found,) = session.run(["edited"], given)
            wrong += _unlike_definition(torch.from_numpy(found), proj, mask, value)
    return wrong


def _unlike_definition(found: Tensor, proj: Tensor, mask: Tensor, value: Tensor) -> int:
    a, g = proj.double().chunk(2, dim=-1)
    hidden = a * g * (1 + torch.erf(g / 2**0.5)) / 2
    if found.shape != hidden.shape:
        return hidden.numel()
    near = (found.double() - hidden).abs() <= COMPONENT.limit * (a * g).abs()
    return int((~torch.where(mask, found == value, near)).sum())
