"""Choose the largest of scores, the same ones on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """Which are among the `count` largest of their row; of equal ones the lower column counts as the larger.

    Args:
        scores: floating point [rows, n].
        count: 1 to n.

    Returns:
        bool [rows, n], `count` of each row.
    """
    least = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    larger, equal = scores > least, scores == least
    room = count - larger.sum(1, keepdim=True)
    return larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
