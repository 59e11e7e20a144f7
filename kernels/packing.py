"""Masks of one bit a feature, as the fused kernels read them: an eighth of what bool takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BITS = 8


def pack_mask(mask: Tensor) -> Tensor:
    """Eight features a byte: bit j of byte i, from the lowest, is feature 8i + j. Bits past the last feature are zero.

    Args:
        mask: bool [..., h].

    Returns:
        uint8 [..., ⌈h / 8⌉], contiguous.

    Raises:
        TypeError: the mask is of another dtype.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"the mask is {mask.dtype}, not bool")
    *places, width = mask.shape
    bits = F.pad(mask.to(torch.uint8), (0, -width % _BITS)).reshape(*places, packed_width(width), _BITS)
    return (bits << _places(mask)).sum(-1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, width: int) -> Tensor:
    """The mask, bool [..., width], that `pack_mask` packed into `bits`, uint8 [..., ⌈width / 8⌉].

    Raises:
        TypeError: the bits are of another dtype.
        ValueError: they are of another width.
    """
    if bits.dtype != torch.uint8:
        raise TypeError(f"the packed mask is {bits.dtype}, not uint8")
    if bits.shape[-1] != packed_width(width):
        raise ValueError(f"{packed_width(width)} bytes hold a mask of {width} features, not {bits.shape[-1]}")
    return (bits[..., None] >> _places(bits) & 1).flatten(-2)[..., :width].to(torch.bool)


def packed_width(width: int) -> int:
    """How many bytes hold a packed mask of `width` features."""
    return -(-width // _BITS)


def _places(like: Tensor) -> Tensor:
    return torch.arange(_BITS, dtype=torch.uint8, device=like.device)
