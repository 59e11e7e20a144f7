"""Exact confidence intervals."""

from __future__ import annotations


def exact_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The exact binomial interval of a share (Clopper and Pearson, 1934): its lower and upper bound.

    Raises ValueError without trials, or with more successes than trials.
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence, "exact")
    return float(interval.low), float(interval.high)
