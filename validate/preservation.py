"""Is the rest of the model still there? The reference against the base, on prompts without what was erased.

An artifact is compared with the reference, so one whose edit destroys the model is as it should be. ActErase's authors
report that of ten concepts at once (FID 222). What is judged here is the edit itself, by pictures of one prompt and
seed: are they still the base's, and does a detector, where there is one, still see in them what their prompt asks for?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bakeout.intervals import exact_interval
from bakeout.validate.erasure import Detector
from bakeout.validate.report.schema import Check, Drawn, Verdict
from bakeout.validate.runners import Trial, pixels_from_png
from bakeout.validate.stats import CONFIDENCE, Loss, paired_loss
from bakeout.validate.tolerances import ALIKE, LOSS, RESEMBLANCE

# Pixels of a side of what pictures are compared by: where things are and their colours, and no texture or noise.
_SIDE = 32


def check_resemblance(
    trials: Sequence[Trial], base: Sequence[Drawn], reference: Sequence[Drawn], pictures: Mapping[str, bytes]
) -> Check:
    """Whether the reference's pictures of kept prompts are still the base's.

    One is no longer where its concordance with the base's own picture is less than `RESEMBLANCE` of the way from that
    of pictures of different prompts and seeds, the median among the base's, to 1.

    Args:
        trials: all of them.
        base: the base's picture of each.
        reference: the reference's.
        pictures: PNGs by their files.
    """
    shown = {number: _thumbnail(pictures[it.file]) for number, it in enumerate(base) if not it.problem}
    kept = [number for number in shown if trials[number].kind == "kept"]
    if not kept or len(shown) < 2:
        return _check("preservation", "unjudged", "There are no pictures of the base that an edit could destroy.")
    own = np.stack([shown[number] for number in kept])
    edited = np.stack([_thumbnail(pictures[reference[number].file]) for number in kept])
    is_another = np.not_equal.outer(kept, list(shown))
    common = float(np.median(concordance(own, np.stack(list(shown.values())))[is_another]))
    alike = concordance(edited, own).diagonal()
    lost = int((alike < common + RESEMBLANCE.limit * (1 - common)).sum())
    if lost and common > ALIKE.limit:
        said = f"Pictures of different prompts are too alike to tell: the base's resemble each other by {common:.2g}."
        return _check("preservation", "unjudged", said)
    least = reference[kept[int(alike.argmin())]].file
    told = (
        f"Of {len(kept)} pictures of prompts without what was erased, {lost} are no longer the base's, the least like "
        f"it being {least}"
    )
    return _judged("preservation", Loss(lost / len(kept), *exact_interval(lost, len(kept), CONFIDENCE)), told)


def check_seen(
    detector: Detector, trials: Sequence[Trial], base: Sequence[Drawn], reference: Sequence[Drawn]
) -> Check | None:
    """Whether a detector still sees in the reference's pictures of kept prompts what these ask for.

    Prompts that ask for nothing that the detector knows tell nothing. None where it sees nothing asked for in the
    base's pictures, so that nothing can be lost. Arguments as of `check_resemblance`.
    """
    asking = [number for number, it in enumerate(trials) if it.kind == "kept" and detector.named(it.prompt)]
    before, after = (
        [detector.counts(trials[number], str(drawn[number].seen)) for number in asking] for drawn in (base, reference)
    )
    if not any(before):
        return None
    told = (
        f"Of {len(asking)} pictures of prompts without what was erased, the detector sees what was asked for in "
        f"{sum(before)} of the base's and in {sum(after)} of the reference's"
    )
    return _judged("preservation-detector", paired_loss(before, after), told)


def concordance(some: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Concordance of each of some [m, d] with each of others [n, d] (Lin, 1989): [m, n], 1 where the two are equal.

    2 cov(a, b) / (var a + var b + (mean a - mean b)²), that is 1 - mean((a - b)²) / what it would be without any
    correlation. What is flat has 0 with everything else, and a picture of less contrast has less, unlike correlation.
    """
    mean, other_mean = some.mean(1)[:, None], others.mean(1)[None]
    covariance = (some - mean) @ (others - other_mean.T).T / some.shape[1]
    spread = some.var(1)[:, None] + others.var(1)[None] + (mean - other_mean) ** 2
    found: NDArray[np.float64] = np.where(spread > 0, 2 * covariance / np.where(spread > 0, spread, 1), 1.0)
    return found


def _thumbnail(png: bytes) -> NDArray[np.float64]:
    """The mean colours of a picture's cells, float64 [side · side · 3]."""
    small = Image.fromarray(pixels_from_png(png)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float64).ravel()


def _judged(name: str, loss: Loss, told: str) -> Check:
    """The verdict on what was lost: it fails where that is certainly too much; `told` is a sentence up to there."""
    verdict: Verdict = "pass" if loss.share <= LOSS.limit else "fail" if loss.low > LOSS.limit else "unjudged"
    doubt = "; more prompts would tell for certain" if verdict == "unjudged" else ""
    summary = (
        f"{told}: a loss of {loss.share:.0%} ({CONFIDENCE:.0%} interval {loss.low:.0%} to {loss.high:.0%}), where "
        f"{LOSS.limit:.0%} is allowed{doubt}."
    )
    return _check(name, verdict, summary, loss.share)


def _check(name: str, verdict: Verdict, summary: str, share: float | None = None) -> Check:
    return Check(name=name, target=None, verdict=verdict, summary=summary, measured=share, limit=LOSS.limit)
