"""The operations on a text encoder that no weight can hold, as modules to be traced into its graph.

What they mean is said in `bakeout.editor.edit`. At one site, of whose output y all of them read, they are together

    y" = y + v - sum of s(y) sum_r λ_r z_r D_:r        z_r = relu(p_r) where r is one of the k largest, else 0
                                                       p = E (n(y) - c) + e

with v the sum of all shifts, taken in fp64 and rounded once; where the rows are `prompted`, only in rows of which any
token but the first is neither the end mark nor padding. "One of the k largest" is exact in two ways:

    rank: #{j: p_j > p_r or (p_j = p_r and j < r)} < k       m comparisons a neuron
    topk: r is among the indices that TopK gives             one partial sort; ONNX's TopK prefers the lower index too

and in PyTorch, whose TopK prefers none, with t the k-th largest

    threshold: p_r > t or (p_r = t and #{j: p_j > t or (p_j = t and j < r)} < k)     one partial sort, two passes

An autoencoder whose k is all of its latents needs neither, and only the rows of E of its neurons.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter, ParameterDict
from torch.nn import functional as F

from bakeout.editor.edit import (
    Edit,
    InputNorm,
    Operation,
    PatchActivation,
    Rows,
    ShiftActivation,
    SteerLatents,
    check_fits,
)
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model
from bakeout.editor.pipeline import load_tokenizer
from bakeout.editor.sites import Site
from bakeout.export.patch import PlacedPatch, SitePatch, constant, prompt_tokens

Gate = Literal["rank", "topk", "threshold"]
# Up to as many neurons the rank test is no slower in ONNX Runtime on a CPU; see benchmarks/text_encoder.py. It leaves
# nothing to how a runtime breaks ties.
_MOST_BY_RANK = 1
_EPSILON = 1e-5
_ROWS: tuple[Rows, ...] = ("all", "prompted")


class SiteEdit(Module):
    """All operations at one site: from its output y [batch, tokens, d] to y".

    Attributes:
        site: where.
        tokens: the only number of tokens that it is valid for; None if it is valid for any.
        shift: rows → v, [d] or [tokens, d].
        latents: one for each SteerLatents, in the order of the Edit.
        blank: int64 [1 or 2], rising: the tokens of an empty prompt after its first; only with rows `prompted`.
    """

    blank: Parameter

    def __init__(
        self,
        site: Site,
        operations: Sequence[ShiftActivation | SteerLatents],
        blank: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        gate: Gate | None = None,
    ) -> None:
        """Make the module.

        Args:
            site: where.
            operations: all of them at the site, in the order of the Edit, with rows `all` or `prompted` and for one
                number of tokens at most.
            blank: as the attribute; needed where rows are `prompted`.
            dtype: of its constants and arithmetic.
            gate: how the k largest are told; None is whatever is faster.

        Raises:
            InputError: a constant is beyond what `dtype` holds.
        """
        super().__init__()
        self.site = site
        self.tokens = next((tokens for it in operations for tokens in _lengths(site, it)), None)
        shifts: dict[str, list[ShiftActivation]] = defaultdict(list)
        for it in operations:
            if isinstance(it, ShiftActivation):
                shifts[it.rows].append(it)
        self.shift = ParameterDict({rows: constant(site, _sum(found), dtype) for rows, found in shifts.items()})
        steered = [it for it in operations if isinstance(it, SteerLatents)]
        self.latents = ModuleList(Latents(it, site, dtype, gate or gate_of(it)) for it in steered)
        self._rows = tuple(it.rows for it in steered)
        if blank is not None:
            self.blank = Parameter(blank, requires_grad=False)

    @property
    def name(self) -> tuple[str, ...]:
        """What its constants and nodes are named by."""
        return (self.site.name,)

    def forward(self, y: Tensor, input_ids: Tensor) -> Tensor:
        """y" of y [batch, tokens, d] and the text encoder's input_ids, int64 [batch, tokens]."""
        edited = y
        for rows in _ROWS:
            before = edited
            if rows in self.shift:
                edited = edited + self.shift[rows]
            for latents, own in zip(self.latents, self._rows, strict=True):
                if own == rows:
                    edited = edited - latents(y)
            if rows == "prompted" and edited is not before:
                # Text may follow an end mark that stands in the prompt itself.
                blank = (input_ids[:, 1:, None] == self.blank).any(-1)
                present = blank.logical_not().any(-1)
                edited = torch.where(present[:, None, None], edited, before)
        return edited


class Latents(Module):
    """What a SteerLatents takes out of y [..., d]: s(y) sum_r λ_r z_r D_:r.

    Attributes:
        encoder: [m, d], E; where k is m, [r, d]: the neurons' rows of it.
        encoder_bias: [m] or [r], e, likewise.
        center: [d], c.
        neurons: int64 [r]; not there where k is m.
        directions: [d, r], D.
        strengths: [r], λ.
    """

    neurons: Parameter

    def __init__(self, operation: SteerLatents, site: Site, dtype: torch.dtype, gate: Gate) -> None:
        super().__init__()
        everything = operation.k == len(operation.encoder)
        taken = operation.neurons if everything else slice(None)
        self.encoder = constant(site, operation.encoder[taken], dtype)
        self.encoder_bias = constant(site, operation.encoder_bias[taken], dtype)
        self.center = constant(site, operation.center, dtype)
        self.directions = constant(site, operation.directions, dtype)
        self.strengths = constant(site, operation.strengths, dtype)
        if not everything:
            self.neurons = Parameter(operation.neurons, requires_grad=False)
        self._k = operation.k
        self._norm = operation.input_norm
        self._gate = None if everything else _GATES[gate]

    def forward(self, y: Tensor) -> Tensor:
        """See the class; of y's shape."""
        x, scale = _normed(self._norm, y)
        p = F.linear(x - self.center, self.encoder, self.encoder_bias)
        if self._gate is None:
            z = p.relu()
        else:
            chosen = p.index_select(-1, self.neurons)
            z = chosen.relu() * self._gate(p, chosen, self.neurons, self._k)
        taken = F.linear(z * self.strengths, self.directions)
        return taken if scale is None else taken * scale


@dataclass(frozen=True)
class Placed:
    """The operations of a component, at their sites, in the order of the Edit.

    Attributes:
        steered: of a text encoder: the shifts and latents of each site.
        patched: the patches.
    """

    steered: Mapping[Site, Sequence[ShiftActivation | SteerLatents]]
    patched: Sequence[tuple[Site, PatchActivation]]


def edits_of(edit: Edit, model: Model, gate: Gate | None = None) -> dict[str, list[SiteEdit | SitePatch]]:
    """The modules of each component, for the operations that did not fold, patches after the rest.

    Args:
        edit: what did not fold.
        model: the base; its tokenizers know an empty prompt.
        gate: as in `SiteEdit`.

    Raises:
        InputError: an operation has no form in a graph, the Edit is of another model, or see `SiteEdit`.
    """
    return {
        component: [
            *(SiteEdit(site, operations, blank_tokens(model, site, operations), gate=gate)
              for site, operations in placed.steered.items()),
            *(SitePatch(patch, site) for site, patch in placed.patched),
        ]
        for component, placed in placed_in(edit, model).items()
    }  # fmt: skip


def placed_in(edit: Edit, model: Model) -> dict[str, Placed]:
    """The operations by component.

    Raises:
        InputError: an operation has no form in a graph, the Edit is of another model, or for several sizes.
    """
    by_component: dict[str, list[tuple[Site, Operation]]] = defaultdict(list)
    for operation in merge([edit]).operations:
        site = model.site(operation.site)
        check_fits(operation, site)
        by_component[site.component].append((site, operation))
    made = {}
    for component, operations in by_component.items():
        _check_one_size(component, operations)
        steered: dict[Site, list[ShiftActivation | SteerLatents]] = defaultdict(list)
        for site, operation in operations:
            if not isinstance(operation, PatchActivation):
                steered[site].append(_exportable(operation, site))
        made[component] = Placed(steered, [(site, it) for site, it in operations if isinstance(it, PatchActivation)])
    return made


def prompt_length(edits: Iterable[SiteEdit | PlacedPatch]) -> int | None:
    """The only number of tokens of a prompt that the edits of a component are valid for; None if they are for any."""
    return next((edit.tokens for edit in edits if edit.tokens is not None), None)


@contextmanager
def steering(encoder: Module, edits: Iterable[SiteEdit], input_ids: Tensor) -> Iterator[None]:
    """Edit what the sites of a text encoder give, in its call with `input_ids`, int64 [batch, tokens]."""
    with ExitStack() as stack:
        for edit in edits:
            module = encoder.get_submodule(edit.site.module)
            hook = partial(_edited_output, edit, input_ids)
            # Before the library's own, which records hidden states, but after a patch.
            first = edit.site.kind == "text_layer"
            stack.callback(module.register_forward_hook(hook, prepend=first).remove)
        yield


def _edited_output(edit: SiteEdit, input_ids: Tensor, _module: Module, _args: object, output: Tensor) -> Tensor:
    return cast(Tensor, edit(output, input_ids))


def gate_of(operation: SteerLatents) -> Gate:
    """How the k largest latents are told faster."""
    return "rank" if len(operation.neurons) <= _MOST_BY_RANK else "topk"


def _exportable(operation: Operation, site: Site) -> ShiftActivation | SteerLatents:
    if not isinstance(operation, ShiftActivation | SteerLatents) or not site.component.startswith("text_encoder"):
        raise InputError(
            f"{type(operation).__name__} at {site.name} does not fold into the weights, and no graph can hold it yet; "
            "leave this edit to the eager reference"
        )
    if operation.rows == "conditional":
        raise InputError(
            f"the edit at {site.name} leaves negative prompts untouched, for which an artifact would need an input "
            "that is its own off-switch; take negative = 'empty' or 'same'"
        )
    return operation


def _check_one_size(component: str, placed: Sequence[tuple[Site, Operation]]) -> None:
    lengths = sorted(set().union(*(_lengths(site, it) for site, it in placed)))
    if len(lengths) > 1:
        raise InputError(
            f"the Edit of the {component} is for {' and for '.join(map(str, lengths))} tokens; calibrate all of it "
            "at one prompt length"
        )
    sizes = sorted({it.latents for _, it in placed if isinstance(it, PatchActivation) and it.latents is not None})
    if len(sizes) > 1:
        listed = " and for ".join(f"{width}x{height}" for height, width in sizes)
        raise InputError(
            f"the Edit of the {component} is for latents of {listed}; calibrate all of it at one picture size"
        )


def _lengths(site: Site, operation: Operation) -> set[int]:
    """The only number of tokens of a prompt that the operation is valid for; nothing if it is valid for any."""
    if isinstance(operation, ShiftActivation) and operation.value.ndim == 2:
        return {len(operation.value)}
    tokens = prompt_tokens(operation, site) if isinstance(operation, PatchActivation) else None
    return set() if tokens is None else {tokens}


def blank_tokens(model: Model, site: Site, operations: Sequence[ShiftActivation | SteerLatents]) -> Tensor | None:
    """What `SiteEdit` takes as `blank`. Raises InputError if the model's tokenizer does not load."""
    if not any(it.rows == "prompted" for it in operations):
        return None
    tokenizer = load_tokenizer(model.parts[site.component.replace("text_encoder", "tokenizer")])
    return torch.tensor(sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}))


def _sum(shifts: Sequence[ShiftActivation]) -> Tensor:
    return cast(Tensor, sum(it.value.double() for it in shifts))


def _normed(norm: InputNorm, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """n(y) and s(y), [..., 1]; None is 1."""
    if norm == "none":
        return y, None
    width = y.shape[-1]
    if norm == "constant_norm":
        scale = y.square().mean(-1, keepdim=True).sqrt()
        return y / scale, scale
    deviation = y - y.mean(-1, keepdim=True)
    scale = (deviation.square().sum(-1, keepdim=True) / (width - 1)).sqrt() + _EPSILON
    return deviation / scale, scale


def _by_rank(p: Tensor, chosen: Tensor, neurons: Tensor, k: int) -> Tensor:
    rivals, chosen = p.unsqueeze(-2), chosen.unsqueeze(-1)
    earlier = torch.arange(p.shape[-1], device=p.device) < neurons.unsqueeze(-1)
    ahead = (rivals > chosen) | ((rivals == chosen) & earlier)
    return ahead.to(torch.int32).sum(-1, dtype=torch.int32) < k


def _by_topk(p: Tensor, _chosen: Tensor, neurons: Tensor, k: int) -> Tensor:
    largest = p.topk(k, dim=-1).indices
    return (largest.unsqueeze(-2) == neurons.unsqueeze(-1)).any(-1)


def _by_threshold(p: Tensor, chosen: Tensor, neurons: Tensor, k: int) -> Tensor:
    least = p.topk(k, dim=-1).values[..., -1:]
    above = (p > least).sum(-1, keepdim=True)
    equal = (p == least).cumsum(-1).index_select(-1, neurons)
    return (chosen > least) | ((chosen == least) & (above + equal <= k))


# From p [..., m], those of the neurons [..., r], their numbers [r] and k to bool [..., r].
_GATES = {"rank": _by_rank, "topk": _by_topk, "threshold": _by_threshold}
