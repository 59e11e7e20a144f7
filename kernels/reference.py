"""The definition of every fused operation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """GEGLU of which some features are constants: where(M, v, a ⊙ gelu(g)), with gelu(g) = g (1 + erf(g / √2)) / 2.

    GEGLU is of Shazeer (2020), "GLU variants improve transformer"; the patch is that of ActErase (Eq. 6).

    Args:
        proj: floating point [..., N, 2h] or [..., 2h]: a, then g, of h features each.
        mask: bool [N, h], or [h] for the same features at every token; M.
        value: of proj's dtype, as the mask; v. What it is where the mask is not set changes nothing, NaN neither.

    Returns:
        [..., h], of proj's dtype.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape is another.
    """
    check_masked_geglu(proj, mask, value)
    a, g = proj.chunk(2, dim=-1)
    return torch.where(mask, value, a * F.gelu(g))


def check_masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> None:
    """Raise what `masked_geglu` raises. Of tensors without values as well."""
    if not proj.is_floating_point() or value.dtype != proj.dtype or mask.dtype != torch.bool:
        raise TypeError(
            f"proj is {proj.dtype}, mask {mask.dtype} and value {value.dtype}, not floating point, bool and as proj"
        )
    if mask.ndim not in (1, 2) or value.shape != mask.shape:
        raise ValueError(f"the mask is {[*mask.shape]} and the value {[*value.shape]}, not both [N, h] or both [h]")
    *_, tokens, width = (*mask.shape,) if mask.ndim == 2 else (None, *mask.shape)
    if proj.ndim < mask.ndim or proj.shape[-1] != 2 * width or (tokens is not None and proj.shape[-2] != tokens):
        raise ValueError(f"proj is {[*proj.shape]}, which does not end in {[*mask.shape[:-1], 2 * width]}")
