"""Lower an Edit: fold into weights and biases what folds exactly, leave the rest to the graph.

At a Linear with weight W [d_out, d_in] and bias b, in the notation of `bakeout.editor.edit`, for patches of features
(the same at every token) and shifts of every row and token:

    W'_ij = 0 where P_ij, E_ij, M_in_j or M_out_i, else W_ij
    b'    = where(M_out, v_out, b + sum_j W_ij (1 - P_ij) (E_ij e_j + (1 - E_ij) M_in_j v_in_j)) + sum of v

A shift of a text encoder layer's output goes into the bias of that layer's second FFN Linear, which is exact because
the output is the residual plus what this Linear gives. So weights only ever become zero, and biases are computed in
fp64 and rounded once to the dtype in which they are stored.

Whatever does not fold stays in an Edit of its own, to be applied to the folded model: both together are the whole Edit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bakeout.editor.edit import (
    Edit,
    Operation,
    PatchActivation,
    PatchWeightInput,
    ShiftActivation,
    SteerLatents,
    check_fits,
)
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model
from bakeout.editor.sites import Site
from bakeout.export.patch import is_in_geglu
from bakeout.export.steer import gate_of

State = Mapping[str, Mapping[str, Tensor]]
# In a graph: place and value of what is patched; mask and value of everything.
_PATCHED_BYTES = 8 + 4
_EXPANDED_BYTES = 1 + 4
_FOLDABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Realisation:
    """How one operation is realised.

    Attributes:
        site: the operation's site.
        operation: its class.
        how: `folded` into stored tensors, or left to the `graph`.
        reason: where it was folded to, or why it was not.
        cost: what it costs at run time, in words.
        rounding: relative RMS error of the changed entries of the bias that it was folded into, stored against fp64;
            0 where it only writes zeros into a weight, None in the graph.
    """

    site: str
    operation: str
    how: Literal["folded", "graph"]
    reason: str
    cost: str
    rounding: float | None


@dataclass(frozen=True)
class Lowered:
    """What `lower` made of an Edit.

    Attributes:
        state: component → name of the stored tensor → new tensor, of the dtype and shape of the old; only those that
            changed.
        realisations: one an operation.
        remaining: the operations that did not fold, to be applied on top of `state`.
    """

    state: dict[str, dict[str, Tensor]]
    realisations: tuple[Realisation, ...]
    remaining: Edit


def lower_onto(edit: Edit, model: Model) -> Lowered:
    """`lower` with the tensors of `model`, of which those that are touched are read. Raises what `lower` raises."""
    sites = {site.name: site for site in model.sites}
    touched = touched_tensors(edit, sites)
    return lower(edit, sites, {component: _read(model, component, names) for component, names in touched.items()})


def lower(edit: Edit, sites: Mapping[str, Site], state: State) -> Lowered:
    """Fold `edit` into the tensors of `state` as far as that is exact. No input is modified.

    Args:
        edit: what to fold; several operations of a sort at one site count as `merge` combines them.
        sites: the model's sites by name, all of them.
        state: component → name of the stored tensor → tensor as stored: float16, bfloat16, float32 or float64. Those of
            `touched_tensors` suffice.

    Raises:
        InputError: the Edit is of another model; a tensor is missing, of another shape or of a quantised dtype; or a
            folded bias is beyond what its dtype holds, or not finite because the model's own tensors are not.
    """
    changed: dict[str, dict[str, Tensor]] = defaultdict(dict)
    realisations: list[Realisation] = []
    remaining: list[Operation] = []
    for plan in _plans(edit, sites):
        stored = {name: _stored(state, plan.linear, name) for name in plan.touched}
        folded, rounding = _folded(plan, stored)
        for name, tensor in folded.items():
            if not _same_bits(tensor, stored[name]):
                changed[plan.linear.component][name] = tensor
        for it in plan.folded:
            place, error = _place(it, plan.linear), rounding if _writes_bias(it, plan.linear) else 0.0
            realisations.append(Realisation(it.site, type(it).__name__, "folded", place, "nothing at run time", error))
        kept = [it for it, _ in plan.kept]
        for it, reason in plan.kept:
            realisations.append(Realisation(it.site, type(it).__name__, "graph", reason, _cost(it, kept, sites), None))
        remaining += kept
    return Lowered(dict(changed), tuple(realisations), Edit(tuple(remaining), edit.origins))


def touched_tensors(edit: Edit, sites: Mapping[str, Site]) -> dict[str, set[str]]:
    """Which stored tensors, by component, `lower` needs for `edit`; raises what `lower` raises for the Edit alone."""
    touched: dict[str, set[str]] = defaultdict(set)
    for plan in _plans(edit, sites):
        if plan.touched:
            touched[plan.linear.component].update(plan.touched)
    return dict(touched)


def left_to_graph(edit: Edit, sites: Mapping[str, Site]) -> tuple[Operation, ...]:
    """The operations that `lower` leaves to the graph; raises what `lower` raises for the Edit alone."""
    return tuple(it for plan in _plans(edit, sites) for it, _ in plan.kept)


@dataclass(frozen=True)
class _Plan:
    """What is done at one Linear: which operations fold into it, and why each of the others does not."""

    linear: Site
    folded: tuple[Operation, ...]
    kept: tuple[tuple[Operation, str], ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """The names of the stored tensors that folding reads."""
        weight = any(isinstance(it, PatchWeightInput | PatchActivation) for it in self.folded)
        bias = any(_writes_bias(it, self.linear) for it in self.folded)
        names = (self.linear.weight if weight else None, self.linear.bias if bias else None)
        return tuple(name for name in names if name is not None)


def _plans(edit: Edit, sites: Mapping[str, Site]) -> list[_Plan]:
    by_linear: dict[str, list[Operation]] = defaultdict(list)
    for operation in merge([edit]).operations:
        site = _site(sites, operation.site)
        check_fits(operation, site)
        by_linear[f"{site.name}.ffn2" if site.kind == "text_layer" else site.name].append(operation)
    return [_plan(_site(sites, name), operations) for name, operations in by_linear.items()]


def _plan(linear: Site, operations: Sequence[Operation]) -> _Plan:
    reasons = [_why_not_alone(it, linear) for it in operations]
    staying = [it for it, reason in zip(operations, reasons, strict=True) if reason]
    reasons = [reason or _why_not_first(it, staying) for it, reason in zip(operations, reasons, strict=True)]
    both = list(zip(operations, reasons, strict=True))
    return _Plan(linear, tuple(it for it, why in both if not why), tuple((it, why) for it, why in both if why))


def _why_not_alone(operation: Operation, linear: Site) -> str | None:
    """Why the operation does not fold, were it alone; None if it does."""
    if isinstance(operation, SteerLatents):
        return "what it takes out depends on the activation"
    if isinstance(operation, ShiftActivation | PatchActivation) and operation.rows != "all":
        return f"it skips the rows of {'empty' if operation.rows == 'prompted' else 'negative'} prompts"
    if isinstance(operation, PatchActivation) and operation.calls is not None:
        return "it acts in some calls of the UNet only"
    constant = operation.value if isinstance(operation, ShiftActivation) else operation.mask
    if constant.ndim == 2 and not isinstance(operation, PatchWeightInput):
        return "it differs from token to token"
    if linear.bias is None and _has_constant(operation):
        return f"{linear.name} has no bias to hold its constants"
    return None


def _why_not_first(operation: Operation, staying: Sequence[Operation]) -> str | None:
    """Why the operation must not happen in the weights while `staying` happen in the graph; None if it may.

    The rest commutes: a patch of the input goes through the edited weight whether it is folded or not; an output that
    was patched is constant whatever the weights; shifts add up.
    """
    for other in staying:
        if isinstance(operation, PatchActivation) and operation.at == "input" and isinstance(other, PatchWeightInput):
            return "weights at its site stay in the graph, and would be zero there"
        if isinstance(operation, PatchActivation) and isinstance(other, PatchActivation) and operation.at == other.at:
            return f"with another patch of {other.site}'s {other.at}, which stays in the graph, it gives a mean"
        if isinstance(operation, ShiftActivation):
            if isinstance(other, PatchActivation) and other.at == "output" and _overlap(operation, other):
                return f"the patch of {other.site}'s output, which stays in the graph, would overwrite it"
            if isinstance(other, SteerLatents) and _reads_what_shifts(other, operation):
                return f"the latents at {other.site}, which stay in the graph, are those of the unshifted activation"
    return None


def _cost(operation: Operation, kept: Sequence[Operation], sites: Mapping[str, Site]) -> str:
    """What an operation costs in the graph; `kept` are all that stay at its Linear or the layer around it."""
    site = _site(sites, operation.site)
    if isinstance(operation, PatchActivation):
        if operation.rows != "all" or operation.calls is not None:
            return "not known: no graph can hold it"
        how = "MaskedGeglu in place of GEGLU" if is_in_geglu(operation, site) else "one more Where"
        stored = _PATCHED_BYTES * int(operation.mask.sum())
        expanded = _EXPANDED_BYTES * operation.mask.numel()
        return f"{how}, {_size(stored)} of constants on disk, {_size(expanded)} in memory"
    if isinstance(operation, PatchWeightInput) or not site.component.startswith("text_encoder"):
        return "not known: no graph can hold it yet"
    rows = ", the test for empty prompts" if operation.rows == "prompted" else ""
    if isinstance(operation, ShiftActivation):
        shifts = [it for it in kept if isinstance(it, ShiftActivation)]
        together = [it.value for it in shifts if (it.site, it.rows) == (operation.site, operation.rows)]
        shape = max(([*value.shape] for value in together), key=len)
        others = len(together) - 1
        shared = f", shared with {others} other{'s' * (others > 1)}" if others else ""
        return f"one more Add of {shape}{shared}{rows}"
    count, latents = len(operation.neurons), len(operation.encoder)
    gated = operation.k < latents
    # Without a gate only the neurons' own rows of the encoder are needed.
    products = ((latents if gated else count) + count) * site.d_out
    share = products / _products(sites, site.component)
    gate = ("the rank test" if gate_of(operation) == "rank" else "TopK") if gated else "no gate"
    return f"{share:.1%} more multiply-adds a token, {_size(4 * products)} of constants, {gate}{rows}"


def _size(count: int) -> str:
    """A number of bytes in words."""
    return f"{1e-6 * count:.1f} MB" if count >= 1e6 else f"{1e-3 * count:.1f} kB"


def _products(sites: Mapping[str, Site], component: str) -> int:
    """The multiply-adds a token of the Linears in a text encoder's layers: four of attention, two of the FFN."""
    ffn2 = [it for it in sites.values() if it.component == component and it.kind == "text_ffn2"]
    return sum(4 * it.d_out**2 + 2 * it.d_in * it.d_out for it in ffn2)


def _overlap(shift: ShiftActivation, patch: PatchActivation) -> bool:
    features = patch.mask if patch.mask.ndim == 1 else patch.mask.any(0)
    return bool((features & (shift.value != 0)).any())


def _reads_what_shifts(latents: SteerLatents, shift: ShiftActivation) -> bool:
    # A shift of the Linear itself comes before what reads the output of the layer around it.
    return latents.site == shift.site or latents.site.startswith(f"{shift.site}.")


def _has_constant(operation: PatchWeightInput | PatchActivation | ShiftActivation) -> bool:
    """Whether the operation adds anything, or only takes away."""
    if isinstance(operation, PatchWeightInput):
        return operation.value is not None and bool(operation.value[operation.mask.any(0)].any())
    return bool((operation.value if isinstance(operation, ShiftActivation) else operation.value[operation.mask]).any())


def _writes_bias(operation: Operation, linear: Site) -> bool:
    if linear.bias is None or isinstance(operation, SteerLatents):
        return False
    return _has_constant(operation) or (isinstance(operation, PatchActivation) and operation.at == "output")


def _place(operation: Operation, linear: Site) -> str:
    if isinstance(operation, ShiftActivation):
        own = operation.site == linear.name
        return "into the bias" if own else f"into the bias of {linear.name}, which adds to the layer's output"
    if isinstance(operation, PatchActivation):
        zeros = "columns of zeros" if operation.at == "input" else "rows of zeros"
    else:
        zeros = "zeros"
    return f"{zeros} in the weight" + (", its constants in the bias" if _writes_bias(operation, linear) else "")


def _folded(plan: _Plan, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The Linear's new tensors by name, and the relative rounding error of its bias."""
    linear = plan.linear
    weight, bias = (None if name is None else stored.get(name) for name in (linear.weight, linear.bias))
    new: dict[str, Tensor] = {}
    rounding = 0.0
    if weight is not None:
        new[str(linear.weight)] = weight.masked_fill(_zeros(plan.folded, weight), 0.0)
    if bias is not None:
        exact = _exact_bias(plan.folded, weight, bias)
        rounded = _rounded(exact, bias)
        if not rounded.isfinite().all():
            raise _not_finite(linear, exact, stored)
        rounding = _relative_error(rounded.double(), exact, exact != bias.double())
        new[str(linear.bias)] = rounded
    return new, rounding


def _zeros(operations: Sequence[Operation], weight: Tensor) -> Tensor:
    zeros = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for it in operations:
        if isinstance(it, PatchWeightInput):
            zeros |= it.mask.to(weight.device)
        elif isinstance(it, PatchActivation):
            mask = it.mask.to(weight.device)
            zeros |= mask if it.at == "input" else mask[:, None]
    return zeros


def _exact_bias(operations: Sequence[Operation], weight: Tensor | None, bias: Tensor) -> Tensor:
    exact = bias.double()
    if weight is not None:
        exact = exact + _constant(operations, weight).to(exact.device)
    for it in operations:
        if isinstance(it, PatchActivation) and it.at == "output":
            exact = torch.where(it.mask.to(exact.device), it.value.to(exact), exact)
    for it in operations:
        if isinstance(it, ShiftActivation):
            exact = exact + it.value.to(exact)
    return exact


def _constant(operations: Sequence[Operation], weight: Tensor) -> Tensor:
    """sum_j W_ij (1 - P_ij) (E_ij e_j + (1 - E_ij) M_in_j v_in_j), fp64 [d_out]."""
    seen = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for it in operations:
        if isinstance(it, PatchActivation) and it.at == "input":
            seen = torch.where(it.mask.to(seen.device), it.value.to(seen), seen)
    weights = [it for it in operations if isinstance(it, PatchWeightInput)]
    # Pruned weights see nothing, whatever else is at the site.
    for operation in sorted(weights, key=lambda it: it.value is None):
        value = torch.zeros_like(seen) if operation.value is None else operation.value.to(seen)
        seen = torch.where(operation.mask.to(seen.device), value, seen)
    return (weight.double() * seen).sum(1)


def _rounded(exact: Tensor, old: Tensor) -> Tensor:
    """`exact` in the dtype of `old`; entries that did not change keep their bits."""
    return torch.where(exact != old.double(), _nearest(exact, old.dtype), old)


def _not_finite(linear: Site, exact: Tensor, stored: Mapping[str, Tensor]) -> InputError:
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            return InputError(f"{name} of the model itself has values that are not finite; take a sound copy of it")
    return InputError(
        f"the Edit makes the bias of {linear.name} as large as {exact.abs().max():.3g}, beyond what "
        f"{stored[str(linear.bias)].dtype} holds; take a float32 version of the model"
    )


def _nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 rounded once.

    torch rounds to 16 bits by way of fp32, which is twice. Rounding to odd on that way loses nothing (Boldo and
    Melquiond, 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    if dtype.itemsize >= 4:
        return exact.to(dtype)
    single = exact.float()
    error = exact - single.double()
    toward = torch.nextafter(single, torch.full_like(single, torch.inf).copysign(error.float()))
    even = single.view(torch.int32) & 1 == 0
    return torch.where((error != 0) & even, toward, single).to(dtype)


def _relative_error(actual: Tensor, exact: Tensor, where: Tensor) -> float:
    norm = float(exact[where].norm())
    return float((actual - exact)[where].norm()) / norm if norm else 0.0


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _read(model: Model, component: str, names: Iterable[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    stored = model.components[component].tensors
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt")) for file in {stored[name].file for name in names}
        }
        return {name: files[stored[name].file].get_tensor(name) for name in sorted(names)}


def _site(sites: Mapping[str, Site], name: str) -> Site:
    if name not in sites:
        raise InputError(f"this Edit was made for another model: this one has no site {name}; use the model it is for")
    return sites[name]


def _stored(state: State, linear: Site, name: str) -> Tensor:
    tensor = state.get(linear.component, {}).get(name)
    if tensor is None:
        raise InputError(f"the model has no tensor {name} in its {linear.component}; give all of its weight files")
    if tensor.dtype not in _FOLDABLE_DTYPES:
        raise InputError(
            f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, into which nothing folds exactly; take a "
            "version of the model in float16, bfloat16 or float32"
        )
    shape = (linear.d_out, linear.d_in) if name == linear.weight else (linear.d_out,)
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)} and not {list(shape)}; use the model the Edit is for")
    return tensor
