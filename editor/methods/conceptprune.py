"""ConceptPrune (Chavhan et al., 2024): prune the weights that matter for a concept and less for its reference.

Two arithmetics are published, the paper's equations and what its released code ran; each is a profile of `Settings`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from bakeout.editor.calibrate import Half, Sampling, call_timesteps, fingerprint, sum_over_prompts
from bakeout.editor.edit import Edit, Origin, PatchWeightInput
from bakeout.editor.errors import InputError
from bakeout.editor.methods.selection import count_of, largest
from bakeout.editor.model import Model
from bakeout.editor.prompts import Pair, prompts_digest

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "released": {"token_normalize": True, "time_step": "call", "include_last": False},
    "paper": {"token_normalize": False, "time_step": "noise_level", "include_last": True},
}
_PAPER, _FILES = "from the paper's Table 10", "from the released files"
# The published settings, by kind of concept (Chavhan et al., 2024); for those of `shapes`, ours.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "style": {
        _PAPER: {"sparsity": 0.02, "first_calls": 10},
        _FILES: {"sparsity": 0.01, "first_calls": 10},
    },
    "nudity": {_PAPER: {"sparsity": 0.01, "first_calls": 9}},
    "object": {_PAPER: {"sparsity": 0.02, "first_calls": 10}},
    "gender": {
        _PAPER: {"sparsity": 0.05, "first_calls": 20},
        _FILES: {"sparsity": 0.01, "first_calls": 10},
    },
    "shapes": {"for shapes, which keeps a concept in more of its units than a large model": {"sparsity": 0.05}},
}
# What decides on masks only after the activations are summed.
_AFTER_THE_SUMS = {"profile", "sparsity", "vote"}
# Elements of an activation that are squared at a time: 16 MiB in fp32.
_CHUNK = 1 << 22
# Rows of a weight that are scored at a time; scoring holds several times what it scores.
_ROWS = 128


class NothingSkilledWarning(UserWarning):
    """The target prompts set no weight apart from the reference prompts: the Edit is empty."""


class Settings(BaseModel):
    """How ConceptPrune runs; what is given wins over the profile.

    Attributes:
        profile: `released` (what the published numbers were made with) or `paper` (the paper's equations).
        site: which Linears are pruned: `ffn2`, or for the ablation of the paper's Tables 7-8 `ffn1`, `attn_key`,
            `attn_value` (cross-attention) or `text_ffn2` (of every text encoder; it has no time steps).
        rows: the halves of the guidance whose activations count, `both` or `conditional`.
        token_normalize: divide each token's activation by its own L2 norm first.
        sparsity: k; the floor(k · d_in) largest target scores of a row of the weight may be skilled.
        time_step: what is one: a `call` of the UNet, or a `noise_level` (several calls, where a scheduler evaluates
            one more than once, as PNDM its second).
        first_calls: t̂; the masks of the first t̂ time steps are united.
        include_last: also that of the one after them.
        vote: a weight is pruned if it is skilled in more than vote · t̂ of the time steps; 0 is the union.
        steps: denoising steps, as the scheduler counts them.
        guidance: scale of classifier-free guidance.
        seed: of every prompt's latent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    profile: Literal["released", "paper"] = "released"
    site: Literal["ffn2", "ffn1", "attn_key", "attn_value", "text_ffn2"] = "ffn2"
    rows: Literal["both", "conditional"] = "both"
    token_normalize: bool = True
    sparsity: float = Field(default=0.02, gt=0, le=1, allow_inf_nan=False)
    time_step: Literal["call", "noise_level"] = "call"
    first_calls: int = Field(default=10, ge=1)
    include_last: bool = False
    vote: float = Field(default=0.0, ge=0, lt=1)
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_profile(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {**PROFILES.get(str(given.get("profile", "released")), {}), **given}


def activation_norm(rows: Tensor, token_normalize: bool = True) -> Tensor:
    """The L2 norm of each column, each row divided by its own L2 norm first if `token_normalize` (else Eq. 3).

        norm_j = sqrt(sum_n (x_nj / ‖x_n‖)²)

    A row of zeros counts as zeros.

    Args:
        rows: floating point [n, d_in], the inputs of a Linear.
        token_normalize: see above.

    Returns:
        [d_in] in fp32 (fp64 for fp64), so that no norm overflows fp16.
    """
    return _squared_sums(rows, token_normalize).sqrt()


def combine_norms(norms: Tensor | Sequence[Tensor]) -> Tensor:
    """The norms of several prompts as one: sqrt(sum_p norm_p²), not divided by their number.

    Args:
        norms: floating point [prompts, d_in].

    Returns:
        [d_in] in fp32 (fp64 for fp64).
    """
    stacked = norms if isinstance(norms, Tensor) else torch.stack(list(norms))
    return stacked.to(_wide(stacked)).square().sum(0).sqrt()


def skilled_mask(weight: Tensor, target_norm: Tensor, reference_norm: Tensor, sparsity: float) -> Tensor:
    """The skilled weights of a Linear (Eq. 3-5, Definition 4.1), with S = |W| * norm (Wanda).

        M_ij = S_ij(target) is among the floor(k · d_in) largest of row i, and S_ij(target) > S_ij(reference)

    The comparison is made on the norms, as |W| is on both its sides; a weight of zero is never skilled. Of equal scores
    the lower column counts as the larger, on any device.

    Args:
        weight: floating point [d_out, d_in].
        target_norm: [d_in], over the target prompts.
        reference_norm: [d_in], over the reference prompts.
        sparsity: k.

    Returns:
        bool [d_out, d_in].

    Raises:
        InputError: floor(k · d_in) is 0.
    """
    count = _count(sparsity, weight.shape[1], "this layer")
    scores = weight.abs().to(_wide(weight)) * target_norm
    return largest(scores, count) & (target_norm > reference_norm) & (weight != 0)


def union(masks: Iterable[Tensor], vote: float | Fraction = 0.0) -> Tensor:
    """What is set in more than `vote` of the masks (Eq. 6: in any, with `vote` 0).

    Args:
        masks: one or more bool tensors of one shape.
        vote: at least 0 and below 1; a float counts as the decimal that it prints as, so that 29 of 50 masks are not
            more than 0.58 of them.

    Returns:
        bool, of the masks' shape.
    """
    votes, count = torch.zeros((), dtype=torch.int32), 0
    for mask in masks:
        votes = votes + mask
        count += 1
    return votes > math.floor(Fraction(str(vote)) * count)


def unfoldable(_settings: Settings) -> str | None:
    """See `bakeout.editor.methods.Method`: zeros always fold."""
    return None


def latents(_pipeline: Any, _settings: Settings) -> tuple[int, int] | None:
    """See `bakeout.editor.methods.Method`: weights are for any size."""
    return None


def check(model: Model, pipeline: Any, settings: Settings, *, folder: Path = Path()) -> None:  # noqa: ARG001
    """See `bakeout.editor.methods.Method`.

    Raises:
        InputError: a sparsity too small for a layer, more time steps than there are, or more steps than the model was
            trained with.
    """
    narrowest = min(model.sites_of(settings.site), key=lambda site: site.d_in)
    _count(settings.sparsity, narrowest.d_in, narrowest.name)
    _moments(pipeline, settings)


def calibrate(
    model: Model,
    pipeline: Any,
    concept: str,
    pairs: Sequence[Pair],
    settings: Settings,
    *,
    folder: Path = Path(),  # noqa: ARG001 - no setting names a file
    work: Path | None = None,
    progress: Callable[[float], object] | None = None,
) -> Edit:
    """The pruning that erases `concept`: see `bakeout.editor.methods.Method`.

    Sums of squares are all that is kept, in fp32 on the pipeline's device; a file in `work` keeps them too, and serves
    any `sparsity` and `vote`.

    Raises:
        InputError: no pairs, what `check` refuses, or activations that are not finite.
    """
    if not pairs:
        raise InputError("there are no prompt pairs to calibrate on: give at least one")
    check(model, pipeline, settings)
    sites = model.sites_of(settings.site)
    prompts = [[pair.target for pair in pairs], [pair.reference for pair in pairs]]
    saved = None
    if work is not None:
        facts = {"method": "conceptprune", "settings": settings.model_dump(exclude=_AFTER_THE_SUMS)}
        saved = work / f"conceptprune-{fingerprint(pipeline, prompts, facts)}.safetensors"
    halves: tuple[Half, ...] = ("unconditional", "conditional") if settings.rows == "both" else ("conditional",)
    sums = sum_over_prompts(
        model, pipeline, sites, prompts,
        Sampling(settings.steps, settings.guidance, settings.seed),
        lambda inputs: _squared_sums(inputs, settings.token_normalize),
        moments=_moments(pipeline, settings),
        halves=halves, saved=saved, progress=progress,
    )  # fmt: skip
    masks = {site.name: _mask(model.module(pipeline, site), sums[site.name], settings).cpu() for site in sites}
    operations = tuple(PatchWeightInput(name, mask) for name, mask in masks.items() if mask.any())
    if not operations:
        warnings.warn(
            f"no weight is skilled for {concept!a}: no layer answers more to the target prompts than to the reference "
            "prompts, so nothing is pruned",
            NothingSkilledWarning,
            stacklevel=2,
        )
    used = settings.model_dump(mode="json")
    return Edit(operations, (Origin("conceptprune", concept, used, prompts_digest(pairs), len(pairs)),))


def _mask(module: Any, sums: Tensor, settings: Settings) -> Tensor:
    """The mask of one site from its sums of squares [2, time steps, d_in], of target and reference prompts."""
    target, reference = sums.sqrt()
    weight = module.weight.detach()
    # Relative to t̂, which with `include_last` is one less than the masks are.
    vote = Fraction(str(settings.vote)) * min(settings.first_calls, len(target)) / len(target)

    def of_rows(rows: Tensor) -> Tensor:
        masks = (skilled_mask(rows, *norms, settings.sparsity) for norms in zip(target, reference, strict=True))
        return union(masks, vote)

    return torch.cat([of_rows(rows) for rows in torch.split(weight, _ROWS)])


def _squared_sums(rows: Tensor, token_normalize: bool) -> Tensor:
    """The square of `activation_norm` for each of several inputs: [..., n, d_in] → [..., d_in]."""
    total = torch.zeros_like(rows[..., 0, :], dtype=_wide(rows))
    # In pieces, because a square of a whole activation, in fp32, is as large as what the networks themselves hold.
    tokens = max(1, _CHUNK * rows.shape[-2] // max(1, rows.numel()))
    for part in torch.split(rows, tokens, dim=-2):
        squares = part.to(total.dtype).square()
        if token_normalize:
            lengths = squares.sum(-1, keepdim=True)
            squares /= lengths.where(lengths > 0, 1)
        total += squares.sum(-2)
    return total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _count(sparsity: float, d_in: int, layer: str) -> int:
    """floor(k · d_in), of a layer that an error names."""
    return count_of(sparsity, d_in, "sparsity", f"the {d_in} weights in a row of {layer}")


def _moments(pipeline: Any, settings: Settings) -> tuple[int, ...]:
    """Of each UNet call that is needed, the number of its time step; text encoders have one."""
    if settings.site == "text_ffn2":
        return (0,)
    timesteps = (None, *call_timesteps(pipeline, settings.steps))
    starts = [settings.time_step == "call" or timestep != before for before, timestep in pairwise(timesteps)]
    moments = [number - 1 for number in accumulate(starts)]
    needed, there = settings.first_calls + settings.include_last, moments[-1] + 1
    if needed > there:
        raise InputError(
            f"first_calls is {settings.first_calls}, which takes {needed} time steps, but {settings.steps} steps of "
            f"{type(pipeline.scheduler).__name__} have {there}: take fewer, or more steps"
        )
    return tuple(moment for moment in moments if moment < needed)
