"""Several Edits as one (`bakeout.editor.edit`), whatever their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, get_args

import torch
from torch import Tensor

from bakeout.editor.edit import (
    Edit,
    Operation,
    PatchActivation,
    PatchWeightInput,
    Rows,
    ShiftActivation,
    SteerLatents,
)
from bakeout.editor.errors import InputError
from bakeout.editor.records import canonical, tensor_digest


def merge(edits: Iterable[Edit]) -> Edit:
    """One Edit that does what all of them do; all were calibrated on the base model.

    At a site: prunings are the OR of their masks. Patches are the OR of their masks, and where several patch the same
    feature the mean of their values (ActErase, Eq. 7-8). Shifts and latents all read what no other of them changed, and
    add up; of two of one kind that choose the same neuron the one with the larger λ counts, whatever its rows, and the
    very same shift given twice counts once. The order of `edits` changes nothing. A mean of means is another mean:
    merge all at once.

    Raises:
        InputError: two edits that do not fit one model, or patches for different numbers of tokens.
    """
    edits = list(edits)
    groups: dict[tuple[object, ...], list[Operation]] = defaultdict(list)
    # Sorted, so that sums over a group come out the same to the last bit.
    for operation in sorted((it for edit in edits for it in edit.operations), key=lambda it: it.digest):
        groups[(type(operation), operation.site, *_sort_of(operation))].append(operation)
    merged = [it for group in groups.values() for it in (group if len(group) == 1 else _MERGES[type(group[0])](group))]
    origins = {canonical(vars(it)): it for edit in edits for it in edit.origins}
    return Edit(tuple(merged), tuple(origins.values()))


def _sort_of(operation: Operation) -> tuple[object, ...]:
    """What operations at one site must share to become one; a shift without a neuron is one only with itself."""
    if isinstance(operation, PatchWeightInput):
        return (operation.value is None,)
    if isinstance(operation, PatchActivation):
        return operation.at, operation.rows, operation.calls
    if isinstance(operation, ShiftActivation):
        return (operation.neuron or operation.digest,)
    autoencoder = (operation.encoder, operation.encoder_bias, operation.center)
    return operation.k, operation.input_norm, *(tensor_digest(part) for part in autoencoder)


def _merge_weight_inputs(group: Sequence[Any]) -> list[Operation]:
    mask = _either(group[0].site, [it.mask for it in group])
    if group[0].value is None:
        return [PatchWeightInput(group[0].site, mask)]
    # One value a column, so a column's mean is over the edits that mask any weight of it.
    return [PatchWeightInput(group[0].site, mask, _masked_mean([it.mask.any(0) for it in group], group))]


def _merge_patches(group: Sequence[Any]) -> list[Operation]:
    first = group[0]
    # A patch of features is one of these features at every token.
    whole = max((it.mask for it in group), key=lambda mask: mask.ndim).shape
    masks = [it.mask.expand(whole) if it.mask.shape == whole[-1:] else it.mask for it in group]
    sizes = sorted({it.latents for it in group if it.latents is not None})
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for height, width in sizes)
        raise InputError(
            f"edits at {first.site} are for latents of {listed}; calibrate all of them at one picture size"
        )
    mask = _either(first.site, masks)
    value = _masked_mean(masks, group)
    return [PatchActivation(first.site, first.at, mask, value, sizes[0] if sizes else None, first.rows, first.calls)]


def _merge_shifts(group: Sequence[Any]) -> list[Operation]:
    # Of equal λ the one for more rows, then the longer one.
    return [max(group, key=lambda it: (it.strength, _reach(it), float(it.value.double().norm()), it.digest))]


def _merge_latents(group: Sequence[Any]) -> list[Operation]:
    first = group[0]
    chosen: dict[int, tuple[float, int, Rows, Tensor]] = {}
    for it in group:
        for column, (neuron, strength) in enumerate(zip(it.neurons.tolist(), it.strengths.tolist(), strict=True)):
            if neuron not in chosen or (strength, _reach(it)) > chosen[neuron][:2]:
                chosen[neuron] = strength, _reach(it), it.rows, it.directions[:, column]
    dtype = _common_dtype([it.strengths for it in group])
    merged: list[Operation] = []
    for rows in get_args(Rows):
        own = sorted(neuron for neuron, (_, _, its_rows, _) in chosen.items() if its_rows == rows)
        if own:
            merged.append(SteerLatents(
                first.site, first.encoder, first.encoder_bias, first.center, first.k, torch.tensor(own),
                torch.stack([chosen[neuron][3] for neuron in own], dim=1),
                torch.tensor([chosen[neuron][0] for neuron in own], dtype=dtype), rows, first.input_norm,
            ))  # fmt: skip
    return merged


def _reach(operation: Any) -> int:
    """Larger for rows that are more."""
    return -get_args(Rows).index(operation.rows)


_MERGES: Mapping[type[Operation], Callable[[Sequence[Any]], list[Operation]]] = {
    PatchWeightInput: _merge_weight_inputs,
    PatchActivation: _merge_patches,
    ShiftActivation: _merge_shifts,
    SteerLatents: _merge_latents,
}


def _either(site: str, masks: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(mask.shape) for mask in masks}
    if len(shapes) > 1:
        listed = " and ".join(map(str, sorted(shapes)))
        raise InputError(
            f"edits at {site} have masks of shapes {listed}; calibrate all of them on one model at one size"
        )
    return reduce(torch.logical_or, masks)


def _masked_mean(masks: Sequence[Tensor], group: Sequence[Any]) -> Tensor:
    """The mean, in fp64 rounded once, of the values whose mask holds; zero where none does."""
    total = torch.stack([it.value.double() * mask for mask, it in zip(masks, group, strict=True)]).sum(0)
    count = torch.stack(list(masks)).sum(0)
    return (total / count.clamp(min=1)).to(_common_dtype([it.value for it in group]))


def _common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
