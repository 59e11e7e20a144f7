"""How long something takes over how long another thing takes, of times that were measured side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def interval(ratios: Numbers) -> dict[str, float]:
    """The median of the rounds' ratios with its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}
