"""Choose a share of scores, the largest, the same ones on any device."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from bakeout.editor.errors import InputError


def count_of(share: float, of: int, setting: str, what: str) -> int:
    """floor(share · of), where `share` counts as the decimal that it prints as.

    Args:
        share: above 0, at most 1.
        of: how many there are.
        setting: what the share is called, for the error.
        what: what they are, for the error.

    Raises:
        InputError: there is none.
    """
    count = math.floor(Fraction(str(share)) * of)
    if not count:
        # Rounded up, to what can be typed and works.
        smallest = math.ceil(1e6 / of) / 1e6
        raise InputError(f"{setting} {share:g} is too small: of {what} it takes none; take at least {smallest:g}")
    return count


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
