"""What verdicts on pictures prove: shares with exact intervals, and how often two models' verdicts part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from bakeout.intervals import exact_interval
from bakeout.validate.report.schema import Detection, Kind

CONFIDENCE = 0.95
# Halvings of an interval of length 2: to beyond what a report tells.
_HALVINGS = 50


@dataclass(frozen=True)
class Loss:
    """How much smaller a share is after than before, of the same prompts and seeds; negative if it is larger.

    Attributes:
        share: the difference.
        low: of its interval.
        high: of its interval.
    """

    share: float
    low: float
    high: float


def detection(concept: str, kind: Kind, model: str, verdicts: Sequence[bool]) -> Detection:
    """The share of true verdicts with its Clopper-Pearson interval; there must be a verdict."""
    detected = sum(verdicts)
    low, high = exact_interval(detected, len(verdicts), CONFIDENCE)
    return Detection(
        concept=concept, kind=kind, model=model,
        detected=detected, pictures=len(verdicts), low=low, high=high, confidence=CONFIDENCE,
    )  # fmt: skip


def disagreements(some: Sequence[bool], others: Sequence[bool]) -> int:
    """In how many pairs of verdicts on the same prompt and seed the two part.

    Equal shares are no agreement: as many pictures may have won the concept as lost it.
    """
    return sum(one != other for one, other in zip(some, others, strict=True))


def paired_loss(before: Collection[bool], after: Collection[bool]) -> Loss:
    """The difference of two shares of true verdicts on the same pictures, with its score interval (Tango, 1998).

    With b verdicts lost and c gained of n, the bounds are the differences d at which

        (b - c - n d)² = z² n (2 q + d (1 - d))

    where q, the most likely share of gained ones given d, is the larger root of
    2 n q² + ((2 n - b + c) d - b - c) q - c d (1 - d) = 0.

    Raises ValueError without verdicts, or where there are not as many of both.
    """
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        raise ValueError("there are no verdicts to compare")
    n, lost, gained = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)

    def is_outside(difference: float) -> bool:
        linear = (2 * n - lost + gained) * difference - lost - gained
        product = gained * difference * (1 - difference)
        q = (sqrt(linear**2 + 8 * n * product) - linear) / (4 * n)
        return (lost - gained - n * difference) ** 2 > z**2 * n * (2 * q + difference * (1 - difference))

    share = (lost - gained) / n
    return Loss(share, _bound(is_outside, share, -1.0), _bound(is_outside, share, 1.0))


def _bound(is_outside: Callable[[float], bool], inside: float, end: float) -> float:
    """Where an interval that `inside` is in ends on the way to `end`."""
    if not is_outside(end):
        return end
    for _ in range(_HALVINGS):
        middle = (inside + end) / 2
        inside, end = (inside, middle) if is_outside(middle) else (middle, end)
    return inside
