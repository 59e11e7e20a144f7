"""ActErase (Activation Patching, Algorithm 1): hold features that a concept drives at what they are without it.

Of features that matter without the concept (the source prompts), those that matter more with it (the target prompts)
are patched: in every call of the UNet they are what they were on average without it. The published reading masks single
features of single tokens; the portable one masks features, which folds into weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from bakeout.editor.calibrate import (
    PROMPTS_PER_RUN,
    Sampling,
    call_timesteps,
    fingerprint,
    latent_size,
    latent_tokens,
    load_sums,
    save_sums,
)
from bakeout.editor.edit import Edit, Operation, Origin, PatchActivation, PatchWeightInput
from bakeout.editor.errors import InputError
from bakeout.editor.methods.acterase_mask import (
    Compare,
    Importance,
    TauMode,
    TauScope,
    importance,
    passing_count,
    patch_mask,
)
from bakeout.editor.methods.acterase_passes import Drawing, draw, magnitudes, text_conditions
from bakeout.editor.model import Model
from bakeout.editor.prompts import Pair, prompts_digest
from bakeout.editor.sites import Site

__all__ = [
    "PROFILES",
    "PUBLISHED",
    "NothingToPatchWarning",
    "Settings",
    "calibrate",
    "check",
    "importance",
    "patch_mask",
    "unfoldable",
]

PROFILES: Mapping[str, Mapping[str, Any]] = {"paper": {}, "portable": {"granularity": "feature"}}
_PAPER = "from the paper's appendix A.3"
# The published settings, by kind of concept (appendix A.3); for those of `shapes`, ours.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "style": {_PAPER: {"tau": 0.02}},
    "nudity": {_PAPER: {"tau": 0.01}},
    "violence": {_PAPER: {"tau": 0.01}},
    "object": {
        f"{_PAPER}, for church and tench": {"tau": 0.01},
        f"{_PAPER}, for french horn and garbage truck": {"tau": 0.02},
    },
    "shapes": {
        "for shapes, whose units for a concept are silent without it": {
            "compare": "target", "mask_time": "mean", "tau": 0.03
        },
    },
}  # fmt: skip
# Masks may be large and the work on them short: after they are saved, at least so many times as long goes by before
# they are saved again.
_SAVING = 20
# What decides on nothing that a calibration measures, and so not on its masks either.
_AFTER_THE_MASKS = {"profile", "rows"}
# What the drawing of the prompts depends on, besides the calls that are looked at again.
_OF_THE_DRAWING = {"site", "granularity", "steps", "guidance", "seed", "scheduler"}


class _Place(NamedTuple):
    """Which sites a setting `site` names, and whether their input or their output is patched."""

    kind: str
    at: Literal["input", "output"]


_PLACES: Mapping[str, _Place] = {
    "ffn2_input": _Place("ffn2", "input"),
    "ffn_output": _Place("ffn2", "output"),
    "ffn1_input": _Place("ffn1", "input"),
    "attn": _Place("attn_out", "input"),
}


class NothingToPatchWarning(UserWarning):
    """No feature matters more with the concept than without it: the Edit is empty."""


class Settings(BaseModel):
    """How ActErase runs; what is given wins over the profile.

    Attributes:
        profile: `paper` patches single features of single tokens, which needs an operation in the graph and is for one
            picture size; `portable` patches features at every token, which folds into weights and is for any size.
        site: what is patched: `ffn2_input` (the hidden units of a feed-forward layer), `ffn_output`, `ffn1_input`, or
            for the paper's ablation `attn` (what the cross-attention hands to its output projection).
        importance: of an input, over the outputs that it goes to (`column`); of an output, over its inputs (`row`, for
            `ffn_output` alone); or of each weight (`edge`, with `granularity = "feature"`).
        signed: weigh by the weights as they are, not by their magnitudes.
        tau: τ, how important a feature must be with the prompts that `compare` names.
        tau_mode: `fraction`: the largest τ of the importances pass; `absolute`: those of at least τ.
        tau_scope: whether the fraction is of a whole `layer` or of the features of each `token`.
        compare: the prompts whose importances must pass τ, those without the concept (`source`) or with it (`target`).
        granularity: whether a `token`'s `feature` is patched by itself or at every token.
        mask_time: the calls of the UNet that decide on the mask: the `last` one, the `union` over all, their `mean`;
            or each on its own mask (`per_step`), which no artifact may hold.
        pairs: whether the importances of pairs are averaged (`mean`) or the masks of pairs united (`union`).
        trajectory: whether both prompts are seen at the latents of the source's drawing (`shared`) or each at its own
            (`independent`).
        rows: which rows of a batch are patched, `all` or the `conditional` ones, which no artifact can tell.
        calls: the first of the UNet's calls that are patched and the first one after those, `[first, end]`; none is
            every call, and no artifact may hold another choice.
        steps: denoising steps, as the scheduler counts them.
        guidance: scale of classifier-free guidance.
        seed: of every prompt's latent.
        scheduler: `dpm-solver`, or the `model`'s own.
        size: of the pictures in pixels, `[width, height]`; none is the model's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    profile: Literal["paper", "portable"] = "paper"
    site: Literal["ffn2_input", "ffn_output", "ffn1_input", "attn"] = "ffn2_input"
    importance: Importance = "column"
    signed: bool = False
    tau: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    tau_mode: TauMode = "fraction"
    tau_scope: TauScope = "layer"
    compare: Compare = "source"
    granularity: Literal["token", "feature"] = "token"
    mask_time: Literal["last", "union", "mean", "per_step"] = "last"
    pairs: Literal["mean", "union"] = "mean"
    trajectory: Literal["shared", "independent"] = "shared"
    rows: Literal["all", "conditional"] = "all"
    calls: Annotated[tuple[int, int], Field(strict=False)] | None = Field(default=None, description="[first, end]")
    steps: int = Field(default=30, ge=1)
    guidance: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)
    scheduler: Literal["dpm-solver", "model"] = "dpm-solver"
    size: Annotated[tuple[int, int], Field(strict=False)] | None = Field(default=None, description="[width, height]")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_profile(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        importance = {"importance": "row"} if given.get("site") == "ffn_output" else {}
        return {**PROFILES.get(str(given.get("profile", "paper")), {}), **importance, **given}

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if (self.importance == "row") != (self.site == "ffn_output"):
            fitting = '"row"' if self.site == "ffn_output" else '"column" or "edge"'
            raise InputError(
                f'importance is "{self.importance}", which is not of what site = "{self.site}" patches: take {fitting}'
            )
        if self.importance == "edge" and self.granularity != "feature":
            raise InputError(
                'importance is "edge", and a weight is the same at every token: take granularity "feature"'
            )
        narrow = self.rows != "all" or self.calls is not None or self.mask_time == "per_step"
        if self.importance == "edge" and narrow:
            raise InputError(
                'importance is "edge", and a weight is the same in every row and call: take importance "column", or '
                'rows "all", no calls, and another mask_time than "per_step"'
            )
        if self.tau_scope == "token" and (self.granularity != "token" or self.tau_mode != "fraction"):
            raise InputError(
                'tau_scope is "token", which is for a fraction of single tokens\' features: take granularity "token" '
                'and tau_mode "fraction", or tau_scope "layer"'
            )
        if self.tau_mode == "fraction" and self.tau > 1:
            raise InputError(f'tau is {self.tau:g}, more than all: take at most 1, or tau_mode "absolute"')
        if self.calls is not None and not 0 <= self.calls[0] < self.calls[1]:
            raise InputError(
                "calls holds no call: give the first one, from 0, and the first one after the last, [first, end]"
            )
        return self


def unfoldable(settings: Settings) -> str | None:
    """See `bakeout.editor.methods.Method`: what differs from token to token is no weight."""
    return "its mask differs from token to token" if settings.granularity == "token" else None


def latents(pipeline: Any, settings: Settings) -> tuple[int, int] | None:
    """See `bakeout.editor.methods.Method`: tokens are places of one size of latents."""
    return latent_size(pipeline, settings.size) if settings.granularity == "token" else None


def check(model: Model, pipeline: Any, settings: Settings, *, folder: Path = Path()) -> None:  # noqa: ARG001
    """See `bakeout.editor.methods.Method`; unlike `calibrate`, it also refuses what no artifact can hold.

    Raises:
        InputError: a size that the model does not draw, more steps than it was trained with, a τ too small for a layer,
            or `mask_time = "per_step"`, `calls` or `rows = "conditional"`.
    """
    for name, given, cure in (
        ("mask_time", settings.mask_time == "per_step", 'take "last", "union" or "mean"'),
        ("calls", settings.calls is not None, "leave it out"),
        ("rows", settings.rows == "conditional", 'take "all"'),
    ):
        if given:
            raise InputError(
                f"{name} is for experiments in Python: an artifact does the same in every call and row; {cure}"
            )
    _plan(model, pipeline, settings)


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
    """The patches that erase `concept`: see `bakeout.editor.methods.Method`.

    The source prompts are drawn, and what is patched is averaged over all calls. Then both prompts of each pair are
    evaluated at latents of the drawing, in the calls on which `mask_time` decides. Files in `work` keep the sums of the
    drawing, which serve any τ, and the masks that are done.

    Raises:
        InputError: no pairs, what `check` refuses for any use, or activations that are not finite.
    """
    if not pairs:
        raise InputError("there are no prompt pairs to calibrate on: give at least one")
    plan = _plan(model, pipeline, settings)
    groups = _groups(settings, plan.calls, len(pairs))
    drawn = plan.calls * -(-len(pairs) // PROMPTS_PER_RUN) * (2 if settings.trajectory == "independent" else 1)
    whole = drawn * _rows(settings) + sum(2 * len(group.evaluations) for group in groups)
    prompts = {"source": [pair.reference for pair in pairs], "target": [pair.target for pair in pairs]}
    job = _Job(
        model, pipeline, settings, plan, model.sites_of(_PLACES[settings.site].kind), prompts, groups,
        tell=lambda evaluations: progress(evaluations / whole) if progress is not None else None,
    )  # fmt: skip
    files = _files(job, work)
    drawings = _drawings(job, files)
    masks = _masks(job, drawings, files.get("masks"))
    operations = tuple(_operations(job, drawings["source"], masks))
    if not operations:
        warnings.warn(
            f"nothing is patched for {concept!a}: of what passes tau, nothing in any layer is more important with the "
            "concept than without it",
            NothingToPatchWarning,
            stacklevel=2,
        )
    used = settings.model_dump(mode="json")
    return Edit(operations, (Origin("acterase", concept, used, prompts_digest(pairs), len(pairs)),))


class _Plan(NamedTuple):
    """What settings mean for a pipeline: how it draws, in how many calls of the UNet, and latents' height and width."""

    sampling: Sampling
    calls: int
    latents: tuple[int, int]


class _Group(NamedTuple):
    """What decides on one mask: calls with a prompt pair each; and the calls in which the mask acts, None for all."""

    evaluations: Sequence[tuple[int, int]]
    acts: tuple[int, int] | None

    @property
    def runs(self) -> Iterator[tuple[int, list[int]]]:
        """The evaluations, each call's pairs in runs of PROMPTS_PER_RUN."""
        for call, of_call in groupby(self.evaluations, key=itemgetter(0)):
            pairs = [pair for _, pair in of_call]
            for start in range(0, len(pairs), PROMPTS_PER_RUN):
                yield call, pairs[start : start + PROMPTS_PER_RUN]


class _Job(NamedTuple):
    """What the parts of a calibration share.

    `prompts` are those of `source` and `target`; `tell` is called with the number of rows that the UNet has just done.
    """

    model: Model
    pipeline: Any
    settings: Settings
    plan: _Plan
    sites: Sequence[Site]
    prompts: Mapping[str, Sequence[str]]
    groups: Sequence[_Group]
    tell: Callable[[int], object]

    @property
    def by_token(self) -> bool:
        return self.settings.granularity == "token"

    @property
    def looked_at(self) -> list[int]:
        """The calls on which masks depend."""
        return sorted({call for group in self.groups for call, _ in group.evaluations})


def _plan(model: Model, pipeline: Any, settings: Settings) -> _Plan:
    latents = latent_size(pipeline, settings.size)
    calls = len(call_timesteps(pipeline, settings.steps, settings.scheduler))
    if settings.calls is not None and settings.calls[1] > calls:
        raise InputError(
            f"calls ends at {settings.calls[1]}, but {settings.steps} steps make {calls} calls of the UNet: end there"
        )
    if settings.tau_mode == "fraction":
        sites = model.sites_of(_PLACES[settings.site].kind)
        counts = {site.name: _importances(site, latent_tokens(pipeline, site, latents), settings) for site in sites}
        narrowest = min(counts, key=counts.__getitem__)
        passing_count(settings.tau, counts[narrowest], narrowest)
    height, width = (side * pipeline.vae_scale_factor for side in latents)
    sampling = Sampling(settings.steps, settings.guidance, settings.seed, settings.scheduler, (width, height))
    return _Plan(sampling, calls, latents)


def _importances(site: Site, tokens: int, settings: Settings) -> int:
    """How many importances a fraction τ is of."""
    if settings.importance == "edge":
        return site.d_out * site.d_in
    width = site.d_out if settings.importance == "row" else site.d_in
    return width * tokens if settings.granularity == "token" and settings.tau_scope == "layer" else width


def _rows(settings: Settings) -> int:
    """How many rows the UNet has in each call of a drawing."""
    return PROMPTS_PER_RUN * (2 if settings.guidance > 1 else 1)


def _groups(settings: Settings, calls: int, pairs: int) -> list[_Group]:
    """The masks to make; those that act in the same calls are united."""
    per_step = settings.mask_time == "per_step"
    first, end = settings.calls if per_step and settings.calls else (0, calls)
    moments = {"last": [range(calls - 1, calls)], "mean": [range(calls)]}.get(
        settings.mask_time, [range(call, call + 1) for call in range(first, end)]
    )
    votes = [range(pairs)] if settings.pairs == "mean" else [range(pair, pair + 1) for pair in range(pairs)]
    return [
        _Group(list(product(moment, vote)), (moment.start, moment.stop) if per_step else settings.calls)
        for moment in moments
        for vote in votes
    ]


def _files(job: _Job, work: Path | None) -> Mapping[str, Path | None]:
    """Where the drawings and the masks are kept; their names depend on all that they do."""
    if work is None:
        return {}
    drawing = job.settings.model_dump(include=_OF_THE_DRAWING)
    facts = {"method": "acterase", "settings": drawing, "size": job.plan.sampling.size, "calls": job.looked_at}
    # Several concepts often have the same prompts without them.
    drawn = {which: fingerprint(job.pipeline, [prompts], facts) for which, prompts in job.prompts.items()}
    said = json.dumps([drawn, job.settings.model_dump(mode="json", exclude=_AFTER_THE_MASKS)], sort_keys=True)
    names = {**drawn, "masks": hashlib.sha256(said.encode()).hexdigest()}
    return {which: work / f"acterase-{which}-{name}.safetensors" for which, name in names.items()}


def _drawings(job: _Job, files: Mapping[str, Path | None]) -> dict[str, Drawing]:
    """The drawings at whose latents the `source` and the `target` prompts are looked at."""

    def drawing(which: str, sites: Sequence[Site]) -> Drawing:
        return draw(
            job.model, job.pipeline, sites, job.prompts[which], job.plan.sampling, at=_PLACES[job.settings.site].at,
            by_token=job.by_token, calls=job.plan.calls, kept=job.looked_at, saved=files.get(which),
            tell=lambda calls: job.tell(_rows(job.settings) * calls),
        )  # fmt: skip

    source = drawing("source", job.sites)
    return {"source": source, "target": source if job.settings.trajectory == "shared" else drawing("target", ())}


def _masks(job: _Job, drawings: Mapping[str, Drawing], saved: Path | None) -> dict[str, Tensor]:
    """The masks of all sites, by `_key`."""
    settings = job.settings
    done, masks = (0, {}) if saved is None else load_sums(saved, job.pipeline.unet.device)
    if done:
        job.tell(sum(2 * len(group.evaluations) for group in job.groups[:done]))

    @cache
    def conditions(which: str) -> Mapping[str, Any]:
        return text_conditions(job.pipeline, job.prompts[which], job.plan.sampling)

    def mean_magnitudes(which: str, group: _Group) -> dict[str, Tensor]:
        inputs = (drawings[which].inputs(call, pairs, conditions(which)) for call, pairs in group.runs)
        return magnitudes(job.model, job.pipeline, job.sites, inputs, by_token=job.by_token, tell=job.tell)

    def mask(site: Site, *magnitudes_of_both: Tensor) -> Tensor:
        weight: Any = job.model.module(job.pipeline, site).weight
        source, target = (
            importance(it, weight.detach(), settings.importance, settings.signed) for it in magnitudes_of_both
        )
        return patch_mask(source, target, settings.tau, settings.tau_mode, settings.tau_scope, settings.compare)

    due = 0.0
    for number, group in enumerate(job.groups[done:], done + 1):
        source, target = (mean_magnitudes(which, group) for which in ("source", "target"))
        for site in job.sites:
            key, found = _key(site, group), mask(site, source.pop(site.name), target.pop(site.name))
            masks[key] = masks[key] | found if key in masks else found
        begun = monotonic()
        if saved is not None and (begun >= due or number == len(job.groups)):
            save_sums(saved, number, masks)
            due = monotonic() + _SAVING * (monotonic() - begun)
    return masks


def _operations(job: _Job, source: Drawing, masks: Mapping[str, Tensor]) -> Iterator[Operation]:
    """What the masks patch, at the mean over the calls and prompts of the source's drawing."""
    latents = job.plan.latents if job.by_token else None
    count = job.plan.calls * len(job.prompts["source"])
    for site, group in product(job.sites, {group.acts: group for group in job.groups}.values()):
        mask = masks[_key(site, group)].cpu()
        if not mask.any():
            continue
        value = (source.sums[site.name] / count).float().cpu()
        if job.settings.importance == "edge":
            yield PatchWeightInput(site.name, mask, value)
        else:
            at = _PLACES[job.settings.site].at
            yield PatchActivation(site.name, at, mask, value, latents, job.settings.rows, group.acts)


def _key(site: Site, group: _Group) -> str:
    return f"{'all' if group.acts is None else group.acts[0]}/{site.name}"
