"""Operations that no weight can hold, in ONNX graphs: all there, exactly, and nothing around them.

Of patches `bakeout.validate.graph_patch` tells; the rest is in text encoders. At a site S, say text_encoder.layer.9,
the nodes of an edit are named bakeout/S/..., and what the node bakeout/S/edited gives takes the place of the site's
output. Its constants are initializers, as in the Edit and rounded to float32:

    bakeout.S.shift.all, bakeout.S.shift.prompted                   sums of the shifts of such rows, taken in fp64
    bakeout.S.latents.N.encoder, encoder_bias, center, directions, strengths, neurons    of the N-th SteerLatents
    bakeout.S.blank                                                 int64: the tokens that end and pad a prompt

Of an autoencoder whose k is all of its latents there are only the encoder's rows of the neurons. `bakeout.export` is
not asked what it wrote: the nodes of an edit are cut out of the graph, and run on tokens at which a neuron is barely
among the k largest, or barely not, against what the operations mean.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.model import Model
from bakeout.editor.pipeline import load_tokenizer
from bakeout.validate.audit import MissingError, Parameter, told
from bakeout.validate.contract import contract
from bakeout.validate.graph import Graph
from bakeout.validate.graph_patch import home_of, is_fused, patch_faults
from bakeout.validate.onnx_folder import OnnxFolder
from bakeout.validate.reference import preactivations, shifted
from bakeout.validate.report.schema import Check
from bakeout.validate.tolerances import COMPONENT
from bakeout.validate.watches import has_text

_SITE = re.compile(r"(?P<component>text_encoder\w*)\.layer\.(?P<layer>\d+)(?P<inside>\.ffn2)?")
# Where tokens are those of a prompt.
_OF_PROMPTS = re.compile(r"text_encoder.*|unet.*\.attn_(key|value)")
_STATE = re.compile(r"hidden_states\.(\d+)")
_IDS = "input_ids"
# A graph that takes any number of tokens is asked for as many as the pipelines give it.
_TOKENS = 77
# Probes are random tokens of each size, and for each neuron some between one where it is among the k largest and one
# where it is not.
_SIZES, _RANDOM, _BETWEEN = (0.1, 1.0, 10.0), 256, 64
# As a part of the largest preactivation: what is nearer to the k-th largest, fp32 may put on its other side.
_NEAR = 1e-4
# Rows that are run at a time.
_BATCH = 8
# What an edit's nodes may do: the same every time, and nothing that asks how large a batch is.
_OF_EDITS = frozenset(
    ("Add", "And", "Cast", "Div", "Equal", "Gather", "Greater", "Less", "MatMul", "Mul", "Not", "Or", "ReduceMean",
     "ReduceSum", "Relu", "Slice", "Sqrt", "Sub", "TopK", "Transpose", "Unsqueeze", "Where")
)  # fmt: skip
# Sites that a summary tells.
_LISTED = 3
# What compares whole numbers or finds them, and gives such or truth values.
_FINDING = frozenset(("ArgMax", "Cast", "Concat", "Equal", "Not", "ReduceSum", "Slice", "Unsqueeze"))

Moving: TypeAlias = ShiftActivation | SteerLatents
Kept: TypeAlias = Moving | PatchActivation
# What of a prompt a value carries; see `_carried`.
_Carried = Literal["ids", "text", "edited"]


def lengths_of(operations: Sequence[Kept]) -> dict[str, int]:
    """The networks whose operations are for one number of a prompt's tokens only, with that number."""
    return {
        it.site.partition(".")[0]: len(constant)
        for it in operations
        if not isinstance(it, SteerLatents) and _OF_PROMPTS.fullmatch(it.site)
        for constant in (it.mask if isinstance(it, PatchActivation) else it.value,)
        if constant.ndim == 2
    }


def first_hidden_states(edit: Edit) -> dict[str, int]:
    """Of each text encoder that `edit` acts on, the first hidden state that all of it reaches.

    An operation at layer i reaches hidden state i + 1. Prunings are spread over layers, and count with their first.
    """
    layers: dict[str, list[int]] = defaultdict(list)
    pruned: dict[str, list[int]] = defaultdict(list)
    for it in edit.operations:
        if match := _SITE.fullmatch(it.site):
            own = pruned if isinstance(it, PatchWeightInput) else layers
            own[match["component"]].append(int(match["layer"]))
    for component, found in pruned.items():
        layers[component].append(min(found))
    return {component: max(found) + 1 for component, found in layers.items()}


def check_edit_in_graphs(
    target: str, base: Model, operations: Sequence[Kept], graphs: OnnxFolder, names: Mapping[Parameter, str]
) -> Check:
    """Whether the graphs have these operations, on every way to what comes after them or the pipelines read.

    Args:
        target: its name.
        base: the model that was edited.
        operations: what the graphs must hold, in the order of the Edit.
        graphs: of the target.
        names: of the base's parameters, what the target calls them.
    """
    faults: list[str] = []
    for name in ("unet", *(name for name in contract(base) if name.startswith("text_encoder"))):
        own = [it for it in operations if base.site(it.site).component == name]
        try:
            faults += _graph_faults(Graph(graphs, name, tuple(contract(base)[name].outputs)), base, own, names)
        except MissingError as missing:
            # That a graph in which there must be nothing is missing, the check of the interface says.
            faults += [str(missing)] * bool(own)
    if faults:
        summary = f"What no weight can hold is not in the graphs as it must be: {told(faults)}."
        return Check(name="edit-in-graph", target=target, verdict="fail", summary=summary)
    sites = list(dict.fromkeys(it.site for it in operations))
    listed = ", ".join(sites) if len(sites) <= _LISTED else f"{sites[0]} and {len(sites) - 1} other sites"
    summary = f"What no weight can hold is in the graphs, at {listed}, on every way to what comes after it there."
    return Check(name="edit-in-graph", target=target, verdict="pass", summary=summary)


def _graph_faults(
    graph: Graph, base: Model, operations: Sequence[Kept], names: Mapping[Parameter, str]
) -> Iterator[str]:
    patches = [it for it in operations if isinstance(it, PatchActivation)]
    by_site: dict[str, list[Moving]] = defaultdict(list)
    for it in operations:
        if not isinstance(it, PatchActivation):
            by_site[it.site].append(it)
    homes = {*map(home_of, patches), *(f"bakeout/{site}/" for site in by_site)}
    yield from (f"{graph.name} also has an edit at {home!a:.200}" for home in sorted(graph.homes - homes))
    if not operations:
        return
    if why := graph.unreadable([f"{home_of(it)}edited" for it in patches if is_fused(it, base)]):
        yield why
        return
    yield from graph.folder.hidden(graph.name)
    yield from patch_faults(graph, base, names, patches)
    if by_site:
        tokenizer = load_tokenizer(base.parts[graph.name.replace("text_encoder", "tokenizer")])
        blank = torch.tensor(sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}))
        for site, own in by_site.items():
            yield from _site_faults(graph, site, own, blank, base.site(site).d_out)


def _carried(graph: Graph, edited: str) -> dict[str, _Carried]:
    """What of the prompt each value carries, were `edited` the only one that carries what it should.

    `text` is what anything computed of the tokens that does not pass `edited`; `ids` are the tokens' numbers and
    what compares or finds them, which may choose rows of what is edited: so the row of the end mark is found.
    """
    found: dict[str, _Carried] = {_IDS: "ids", edited: "edited"}
    for node in graph.nodes:
        given = [found.get(value) for value in node.input]
        # The number of tokens says nothing of what they are.
        if not any(given) or (node.op_type == "Shape" and given == ["ids"] and _IDS in node.input):
            continue
        says = _carried_by(node, given)
        found |= {value: says for value in node.output if value not in ("", edited)}
    return found


def _carried_by(node: Any, given: Sequence[_Carried | None]) -> _Carried:
    """What a node gives that reads such values; None carries nothing of the prompt."""
    from onnx import TensorProto

    says = set(given) - {None}
    if says == {"edited"}:
        return "edited"
    if says == {"ids"}:
        made = {attribute.i for attribute in node.attribute if attribute.name == "to"}
        numbers = {TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64}
        return "ids" if node.op_type in _FINDING and made <= numbers else "text"
    # Rows of what is edited are chosen.
    chosen = {"GatherND": ["edited", "ids"], "Where": ["ids", "edited", "edited"]}.get(node.op_type)
    return "edited" if given == chosen else "text"


@dataclass(frozen=True)
class _Part:
    """The nodes of an edit at a site, the value that they read, and the one that they give in its place."""

    nodes: list[Any]
    raw: str
    edited: str


def _site_faults(graph: Graph, site: str, operations: Sequence[Moving], blank: Tensor, width: int) -> list[str]:
    faults = [
        fault
        for name, expected in _constants(site, operations, blank).items()
        for fault in graph.constant_faults(name, expected, f"bakeout/{site}/")
    ]
    blanks = f"bakeout.{site}.blank" if any(it.rows == "prompted" for it in operations) else None
    part = _part(graph, f"bakeout/{site}/", blanks)
    if isinstance(part, str):
        return [*faults, part]
    faults += _ways_around(graph, site, part)
    # With other constants it has another meaning, if any.
    return faults or list(_other_meanings(graph, site, operations, blank, part, width))


def _constants(site: str, operations: Sequence[Moving], blank: Tensor) -> dict[str, Tensor]:
    """By the name of the initializer, what it must be, float32 or int64."""
    sums: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for it in operations:
        if isinstance(it, ShiftActivation):
            name = f"bakeout.{site}.shift.{it.rows}"
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + it.value.double()
    latents = [it for it in operations if isinstance(it, SteerLatents)]
    for number, it in enumerate(latents):
        own = {name: getattr(it, name) for name in ("center", "directions", "strengths")}
        everything = it.k == len(it.encoder)
        rows = it.neurons if everything else slice(None)
        own |= {"encoder": it.encoder[rows], "encoder_bias": it.encoder_bias[rows]}
        own |= {} if everything else {"neurons": it.neurons}
        found |= {f"bakeout.{site}.latents.{number}.{name}": value for name, value in own.items()}
    if any(it.rows == "prompted" for it in operations):
        found[f"bakeout.{site}.blank"] = blank
    return {name: value.float() if value.is_floating_point() else value for name, value in {**sums, **found}.items()}


def _part(graph: Graph, home: str, blanks: str | None) -> _Part | str:
    """The part of a graph that is an edit; or, in words, why there is none that could be told from the rest.

    `blanks` is the initializer with the tokens that end and pad a prompt, where the edit is to skip empty prompts.
    """
    own = [node for node in graph.nodes if node.name.startswith(home) and not node.name.startswith(f"{home}patch.")]
    last = [node for node in own if node.name == f"{home}edited"]
    if len(last) != 1 or len(last[0].output) != 1:
        return f"{graph.name} has not one node {home}edited"
    if strange := [node.op_type for node in own if node.op_type not in _OF_EDITS]:
        return f"{home}... has a node of type {strange[0]!a:.100}, of which no edit is made"
    edited = last[0].output[0]
    made = {value for node in own for value in node.output}
    given = {value for node in own for value in node.input if value} - made - graph.initializers.keys()
    given -= {_IDS} if blanks else set()
    if len(given) != 1:
        return f"{home}... reads {len(given)} values where it is to read what the site gives"
    (raw,) = given
    for value in sorted({raw, *made} - {edited}):
        others = [it for it in graph.readers[value] if not it.startswith(home)]
        if others:
            return f"{others[0]!a:.100} reads {value!a:.100} from beside {home}edited"
    if reader := _reader_of_words(own, blanks):
        return f"{reader!a:.100} reads of a prompt more than which of its tokens are blank"
    return _Part(own, raw, edited)


def _reader_of_words(nodes: Sequence[Any], blanks: str | None) -> str | None:
    """The name of a node for which it makes a difference which words a prompt has, if there is one."""
    ids = {_IDS}
    for node in nodes:
        read = ids & set(node.input)
        if not read or (node.op_type == "Equal" and set(node.input) == {*read, blanks}):
            continue
        if node.op_type not in ("Slice", "Unsqueeze") or node.input[0] not in ids or ids & set(node.input[1:]):
            return str(node.name)
        ids |= set(node.output)
    return None


def _ways_around(graph: Graph, site: str, part: _Part) -> Iterator[str]:
    match = _SITE.fullmatch(site)
    if match is None:
        raise ValueError(f"{site} is no site of a text encoder")
    carried, reached = _carried(graph, part.edited), graph.reached_by(part.edited)
    for output in graph.outputs:
        state = _STATE.fullmatch(output)
        if state and int(state[1]) <= int(match["layer"]):
            continue
        # What a layer's second FFN gives is added to what goes past it.
        passes = output in reached if match["inside"] else carried.get(output) == "edited"
        if not passes:
            yield f"{graph.name} has a way to {output} around bakeout/{site}/edited"


def _other_meanings(
    graph: Graph, site: str, operations: Sequence[Moving], blank: Tensor, part: _Part, width: int
) -> Iterator[str]:
    run = _runner(graph, part, width, _constants(site, operations, blank))
    tokens = lengths_of(operations).get(graph.name, _TOKENS)
    odd = _odd_rows(blank, tokens)
    y, clear = _probes(operations, width, tokens, len(odd))
    ids = torch.cat([torch.full((len(y) - len(odd), tokens), _word(blank)), odd])
    text = has_text(ids, blank)
    wrong = judged = touched = 0
    # Alone, too: the size of the batch must not choose what is done.
    batches = [slice(first, first + _BATCH) for first in range(0, len(y), _BATCH)]
    for rows in (*batches, slice(0, 1), slice(len(y) - 1, len(y))):
        found = run(y[rows], ids[rows])
        expected = shifted(operations, y[rows].double(), {"prompted": text[rows]})
        size = torch.maximum(expected.norm(dim=-1), y[rows].double().norm(dim=-1))
        near = (found.double() - expected).norm(dim=-1) <= COMPONENT.limit * size
        wrong += int((~near & clear[rows]).sum())
        judged += int(clear[rows].sum())
        if all(it.rows == "prompted" for it in operations):
            touched += int((found != y[rows])[~text[rows]].sum())
    if wrong:
        yield f"at {site} it gives something else than the edit for {wrong:,} of {judged:,} tokens"
    if touched:
        yield f"at {site} it changes {touched:,} values of empty prompts"


def _runner(
    graph: Graph, part: _Part, width: int, constants: Mapping[str, Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """What a part of a graph gives for y, float32 [batch, tokens, d], and input_ids, in ONNX Runtime on the CPU."""
    inputs = {part.raw: (torch.float32, (None, None, width)), _IDS: (torch.int64, (None, None))}
    session = graph.run_part(part.nodes, inputs, {part.edited: torch.float32}, constants)

    def run(y: Tensor, ids: Tensor) -> Tensor:
        (found,) = session.run([part.edited], {part.raw: y.numpy(), _IDS: ids.numpy()})
        return torch.from_numpy(found)

    return run


def _probes(operations: Sequence[Moving], width: int, tokens: int, odd: int) -> tuple[Tensor, Tensor]:
    """Float32 [batch, tokens, d], and bool [batch, tokens]: where no neuron is too near to the k-th largest to tell.

    The last `odd` rows are those in which latents do the most.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.cat([torch.randn(_RANDOM, width, generator=generator) * size for size in _SIZES])
    latents = [it for it in operations if isinstance(it, SteerLatents)]
    gated = [it for it in latents if it.k < len(it.encoder)]
    parts = [random, *(part for it in gated for part in _between(it, random + it.center.float()))]
    probes = torch.cat(parts)
    places = torch.arange(-(-len(probes) // tokens) * tokens) % len(probes)
    # Where latents do the most, rows that should have been skipped, or should not, are seen.
    moved = shifted([replace(it, rows="all") for it in latents], probes.double(), {}) - probes
    most = moved.norm(dim=1).topk(tokens).indices
    y = probes[torch.cat([places, most.repeat(odd)])].reshape(-1, tokens, width)
    clear = torch.ones(y.shape[:2], dtype=torch.bool)
    for it in gated:
        clear &= torch.cat([_clear(it, part) for part in y])
    return y, clear


def _between(operation: SteerLatents, random: Tensor) -> Iterator[Tensor]:
    """Of each neuron, tokens between the two random ones at which it is nearest to being the k-th largest."""
    before = preactivations(operation, random.double())
    for neuron in operation.neurons.tolist():
        rank = (before > before[:, neuron, None]).sum(1)
        inside = random[rank.where(rank < operation.k, -1).argmax()]
        outside = random[rank.where(rank >= operation.k, before.shape[1]).argmin()]
        yield torch.lerp(inside, outside, torch.linspace(0, 1, _BETWEEN)[:, None])


def _clear(operation: SteerLatents, y: Tensor) -> Tensor:
    """Of tokens [n, d], at which each neuron is beyond rounding among the k largest, or not among them: bool [1, n]."""
    before = preactivations(operation, y.double())
    last, next_one = before.topk(operation.k + 1).values[:, -2:, None].unbind(1)
    own = before[:, operation.neurons]
    apart = torch.where(own >= last, own - next_one, last - own).amin(1)
    return (apart > _NEAR * before.abs().amax(1))[None]


def _odd_rows(blank: Tensor, tokens: int) -> Tensor:
    """int64 [rows, tokens], each once: prompts of any number of words, and what is easily taken for text, or missed."""
    word, place = _word(blank), torch.arange(tokens)
    blanks = [blank[place % len(blank)], *(it.expand(tokens) for it in blank)]
    prompts = torch.where((place > 0) & (place <= place[1:, None]), word, blanks[0])
    # Text behind many end marks; the first token is no part of a prompt.
    behind, first = (torch.where(place == at, word, blanks[0]) for at in (tokens - 1, 0))
    return torch.cat([prompts, torch.stack([behind, first, *blanks])])


def _word(blank: Tensor) -> int:
    """A token that is none of them."""
    return next(it for it in range(len(blank) + 1) if it not in blank.tolist())
