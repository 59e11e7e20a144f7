"""Is the artifact near the reference? Of each network, of each step, of where the steps lead, and of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.validate.contract import Interface, run_network
from bakeout.validate.metrics import (
    finite,
    max_difference,
    psnr,
    relative_rms,
    sqnr_db,
    ssim,
    worst_element,
)
from bakeout.validate.report.schema import Check, Curve, Detection, Drawn, Kind, TensorParity
from bakeout.validate.runners import Call, pixels_from_png
from bakeout.validate.stats import disagreements
from bakeout.validate.tolerances import FP32, PARITY, Limits

# Runs a network of a pipeline, as `run_network` does.
Run = Callable[[Any, str, Interface, Mapping[str, Tensor]], dict[str, Tensor]]
# Letters of an error that a report holds.
_MESSAGE = 300
# What torch, CUDA, ONNX Runtime and C++ say, in small letters. A shorter word could be in the name of a folder.
_NO_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory",
    "failed to allocate memory", "storage size calculation overflowed", "bad_alloc", "bad allocation", "_alloc_failed",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What the reference gave in a call, by the names of the contract; and how far what the base gave is from it."""

    kind: Kind
    call: Call
    outputs: Mapping[str, Tensor]
    base: Mapping[str, float]


def component_parity(
    target: str, pipeline: Any, interfaces: Mapping[str, Interface], expected: Sequence[Expected],
    limits: Limits = FP32, run: Run = run_network,
) -> list[TensorParity]:  # fmt: skip
    """Each output of each network of a target, fed what the reference's was fed, against what that one gave.

    `limits` are of the target's precision, and `run` runs one of its networks.
    """
    rows = []
    for it in expected:
        failed, found = None, {}
        try:
            found = run(pipeline, it.call.network, interfaces[it.call.network], it.call.inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failed = f"it does not run ({reason(error)})"
        rows += [_row(target, it, name, found.get(name), failed, limits) for name in it.outputs]
    return rows


def _row(
    target: str, expected: Expected, name: str, found: Tensor | None, failed: str | None, limits: Limits
) -> TensorParity:
    wanted = expected.outputs[name]
    problem, apart, worst = failed, math.inf, None
    if found is None:
        problem = failed or "the output is missing"
    elif found.shape != wanted.shape:
        problem = f"its shape is {list(found.shape)} in place of {list(wanted.shape)}"
    else:
        apart, worst = relative_rms(found, wanted), worst_element(found, wanted)
        if not found.isfinite().all():
            problem = f"{int((~found.isfinite()).sum()):,} of {found.numel():,} elements are not finite"
    return TensorParity(
        target=target, component=expected.call.network, output=name, kind=expected.kind, call=expected.call.when,
        shape=tuple(wanted.shape), relative_rms=finite(apart), sqnr_db=sqnr_db(apart),
        base_relative_rms=finite(expected.base[name]), limit=limits.of(expected.call.network).limit, worst=worst,
        problem=problem,
    )  # fmt: skip


def curve(model: str, kind: Kind, apart: Tensor, *, forced: bool) -> Curve:
    """A model's curve from its distances to the reference [steps, prompts]."""
    each = tuple(finite(it) for it in _over_prompts(apart).tolist())
    return Curve(model=model, forced=forced, kind=kind, relative_rms=each)


def check_components(target: str, rows: Sequence[TensorParity]) -> Check:
    """Whether every output of every network is at rounding level, which a missing one is not."""
    odd = [row for row in rows if row.problem is not None]
    if odd:
        summary = (
            f"{len(odd)} of {len(rows)} outputs of networks cannot be compared, the first of them {_place(odd[0])}: "
            f"{odd[0].problem}."
        )
        return Check(name="components", target=target, verdict="fail", summary=summary, limit=odd[0].limit)
    worst = max(rows, key=lambda row: math.inf if row.relative_rms is None else row.relative_rms / row.limit)
    summary = (
        f"Of {len(rows)} outputs of networks the worst against its limit is {_place(worst)}, "
        "whose distance to the reference's is"
    )
    return within("components", target, worst.relative_rms, worst.limit, summary)


def check_erased(
    target: str, steps: Tensor, base_steps: Tensor, final: Tensor, base_final: Tensor, limits: Limits = FP32
) -> list[Check]:
    """The verdict on prompts of what was erased: distance(artifact, reference) as a part of distance(base, reference).

    Args:
        target: which format of the artifact.
        steps: after teacher-forced steps, the artifact's distances to the reference [steps, prompts].
        base_steps: the base's.
        final: where free-running trajectories end, the artifact's distances [prompts].
        base_final: the base's.
        limits: of the target's precision.
    """
    step, drift = limits.step.limit, limits.drift.limit
    measured = {
        "step-parity": (
            _ratio(_over_prompts(steps), _over_prompts(base_steps), step),
            "After a step from the reference's latents",
        ),
        "step-parity-worst-prompt": (
            _ratio(steps, base_steps, step),
            "After a step from the reference's latents, on the worst prompt,",
        ),
        "final-parity": (
            _ratio(_over_prompts(final), _over_prompts(base_final), drift),
            "At the end of its own path",
        ),
        "final-parity-worst-prompt": (
            _ratio(final, base_final, drift),
            "At the end of its own path, on the worst prompt,",
        ),
    }
    said = "the artifact's distance to the reference, as a share of the base's, is"
    return [within(name, target, ratio, PARITY.limit, f"{where} {said}") for name, (ratio, where) in measured.items()]


def check_kept(target: str, steps: Tensor, final: Tensor, limits: Limits = FP32) -> list[Check]:
    """Whether the artifact is at rounding level on prompts without what was erased; arguments as of `check_erased`."""
    return [
        within(
            "step-rounding", target, float(_over_prompts(steps).max()), limits.step.limit,
            "On prompts without what was erased the artifact's distance to the reference, after a step from the "
            "reference's latents, is",
        ),
        within(
            "drift", target, float(_over_prompts(final)), limits.drift.limit,
            "On prompts without what was erased the artifact's distance to the reference, at the end of its own path, "
            "is",
        ),
    ]  # fmt: skip


def check_edit(
    concepts: Sequence[str],
    base_steps: Tensor,
    base_final: Tensor,
    tracked: Sequence[str],
    seen: Iterable[tuple[Detection, Detection]] = (),
    target: str | None = None,
    limits: Limits = FP32,
) -> Check:
    """Whether the reference is far enough from the base on each concept's prompts to prove anything, and erases it.

    What is far enough depends on how coarsely the artifact rounds.

    Args:
        concepts: of each prompt with what was erased.
        base_steps: the base's distances after teacher-forced steps [steps, tracked prompts].
        base_final: the base's distances where free-running trajectories end [prompts].
        tracked: of each prompt in `base_steps`, its concept.
        seen: what a detector sees of a concept on its prompts, in the base's pictures and in the reference's.
        target: for which it must be enough; None is one in fp32.
        limits: of the target's precision.
    """
    far, far_step = limits.far.limit, limits.far_step.limit
    names = dict.fromkeys(concepts)
    ends = {name: float(base_final[[it == name for it in concepts]].median()) for name in names}
    moved = {
        name: float(_over_prompts(base_steps[:, [it == name for it in tracked]]).max())
        for name in names
        if name in tracked
    }
    of_target = "" if target is None else f" of {target} in {limits.precision}"
    doubts = [
        *(
            f"At the end, base and reference are {it:.2g} apart on the median prompt with {name!a:.100}; it takes "
            f"{far:g} to prove anything{of_target}."
            for name, it in ends.items()
            if not far <= it < math.inf
        ),
        *(
            f"After one step, base and reference are {it:.2g} apart at most on prompts with {name!a:.100}; it takes "
            f"{far_step:g} to prove anything{of_target}."
            for name, it in moved.items()
            if not far_step <= it < math.inf
        ),
        *(
            f"The detector sees {base.concept!a:.100} in {reference.detected} of {reference.pictures} pictures of the "
            f"reference and in {base.detected} of the base's, so it does not see that anything was erased."
            for base, reference in seen
            if reference.detected >= base.detected
        ),
    ]
    nearest = min(ends, key=ends.__getitem__)
    found = f"At the end, base and reference are {ends[nearest]:.2g} apart on the median prompt with {nearest!a:.100}"
    return Check(
        name="edit-is-seen", target=target, verdict="unjudged" if doubts else "pass",
        summary=doubts[0] if doubts else f"{found}, where {far:g} is needed{of_target}.",
        measured=finite(ends[nearest]), limit=far, bound="at least",
    )  # fmt: skip


def check_pictures(
    target: str, pictures: Sequence[Drawn], reference: Sequence[Drawn], distinct: tuple[int, int],
    limits: Limits = FP32,
) -> Check:  # fmt: skip
    """Whether all are pictures, each another one, and as the reference's.

    Args:
        target: which format of the artifact.
        pictures: the artifact's.
        reference: the reference's; what is no picture there need not be one here.
        distinct: how many different pictures there are of the artifact, and of the reference.
        limits: of the target's precision.
    """
    needed = limits.psnr.limit
    odd = [it for it, other in zip(pictures, reference, strict=True) if it.problem and not other.problem]
    worst = min((math.inf if it.psnr_db is None else it.psnr_db for it in pictures), default=math.inf)
    if odd:
        summary = (
            f"{len(odd)} of {len(pictures)} pictures show nothing, the first of them {odd[0].file}: {odd[0].problem}."
        )
        return Check(name="pictures", target=target, verdict="fail", summary=summary)
    if distinct[0] < distinct[1]:
        summary = (
            f"There are {distinct[0]} different pictures among {len(pictures)}, where the reference has {distinct[1]}."
        )
        return Check(name="pictures", target=target, verdict="fail", summary=summary)
    near = worst >= needed
    apart = max(it.max_difference or 0 for it in pictures)
    return Check(
        name="pictures", target=target, verdict="pass" if near else "fail",
        summary=f"Of {len(pictures)} pictures the one least like the reference's has a PSNR of {worst:.1f} dB against "
        f"it, where {needed:g} dB is needed; the largest difference of a value is {apart} of 255."
        if worst < math.inf
        else f"All {len(pictures)} pictures are the reference's, value for value.",
        measured=finite(worst), limit=needed, bound="at least",
    )  # fmt: skip


def check_detector(target: str, verdicts: Sequence[bool], reference: Sequence[bool], limits: Limits = FP32) -> Check:
    """Whether a detector says the same of the artifact's pictures as of the reference's."""
    count = disagreements(verdicts, reference)
    summary = f"The detector judges {count} of {len(verdicts)} pictures otherwise than the reference's, a share of"
    return within("detector", target, count / len(verdicts), limits.disagreement.limit, summary)


def within(name: str, target: str | None, measured: float | None, limit: float, summary: str) -> Check:
    """A check that passes where `measured` is at most `limit`; None and what is not finite fail.

    `summary` is a sentence up to the number.
    """
    number = math.inf if measured is None else measured
    told = "not finite" if finite(number) is None else f"{number:.2g}"
    return Check(
        name=name, target=target, verdict="pass" if number <= limit else "fail",
        summary=f"{summary} {told}; {limit:g} is allowed.", measured=finite(number), limit=limit,
    )  # fmt: skip


def _place(row: TensorParity) -> str:
    return f"{row.component} {row.output} ({row.call}, {row.kind})"


def _ratio(artifact: Tensor, base: Tensor, rounding: float) -> float:
    """The largest distance(artifact, reference) / distance(base, reference).

    Where the base is so near that PARITY of its distance is less than `rounding`, that much is granted: exact
    implementations are apart by rounding. This proves nothing of such a place, which `check_edit` sees to.
    """
    return float((artifact / base.clamp(min=rounding / PARITY.limit)).max())


def _over_prompts(values: Tensor) -> Tensor:
    """The root of the mean square over the last dimension."""
    return values.square().mean(-1).sqrt()


def drawn(file: str, png: bytes, problem: str | None, seen: str | None, reference: bytes | None) -> Drawn:
    """A picture's record, compared with the reference's picture unless that is None."""
    if reference is None:
        return Drawn(file=file, psnr_db=None, ssim=None, max_difference=None, problem=problem, seen=seen)
    own, other = pixels_from_png(png), pixels_from_png(reference)
    return Drawn(
        file=file, psnr_db=finite(psnr(own, other)), ssim=min(1.0, max(0.0, ssim(own, other))),
        max_difference=max_difference(own, other), problem=problem, seen=seen,
    )  # fmt: skip


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that memory was short: this tells nothing of the artifact."""
    while error is not None:
        said = str(error).lower()
        if isinstance(error, MemoryError) or any(it in said for it in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_not_implemented(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that ONNX Runtime has no kernel for an operator in some type."""
    while error is not None:
        if "NOT_IMPLEMENTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """An error's first line, for a report; with its class, unless it is a sentence of bakeout's own."""
    first = str(error).strip().partition("\n")[0]
    printable = "".join(it if it.isprintable() else " " for it in first)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{kind}{printable:.{_MESSAGE}}"
