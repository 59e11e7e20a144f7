"""What verdicts on pictures prove: shares with exact intervals, and how often two models' verdicts part."""

from __future__ import annotations

from collections.abc import Sequence

from bakeout.intervals import exact_interval
from bakeout.validate.report.schema import Detection, Kind

CONFIDENCE = 0.95


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
