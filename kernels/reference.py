"""The definition of every fused operation, in plain PyTorch.

In all of them a mask is bool [N, h], or [h] for the same features at every token, or either as
`bakeout.kernels.packing.pack_mask` packs it: uint8 [N, ⌈h / 8⌉] or [⌈h / 8⌉].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bakeout.kernels.packing import packed_width, unpack_mask


def masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """GEGLU of which some features are constants: where(M, v, a ⊙ gelu(g)), with gelu(g) = g (1 + erf(g / √2)) / 2.

    GEGLU is of Shazeer (2020), "GLU variants improve transformer"; the patch is that of ActErase (Eq. 6).

    Args:
        proj: floating point [..., N, 2h] or [..., 2h]: a, then g, of h features each.
        mask: as the module says; M.
        value: of proj's dtype, [N, h] or [h] as the mask; v. What it is where the mask is not set changes nothing, NaN
            neither.

    Returns:
        [..., h], of proj's dtype.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape is another.
    """
    check_masked_geglu(proj, mask, value)
    a, g = proj.chunk(2, dim=-1)
    if mask.dtype == torch.uint8:
        mask = unpack_mask(mask, value.shape[-1])
    return torch.where(mask, value, a * F.gelu(g))


def masked_geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, value: Tensor) -> Tensor:
    """`masked_geglu` of a Linear: where(M, v, a ⊙ gelu(g)) with [a, g] = x Wᵀ + b. An FFN's first Linear, patched.

    Args:
        x: floating point [..., N, d] or [..., d].
        weight: of x's dtype, [2h, d]: the rows of a, then those of g; W.
        bias: of x's dtype, [2h]; b. None is zero.
        mask: as the module says; M.
        value: of x's dtype, [N, h] or [h] as the mask; v, as `masked_geglu` has it.

    Returns:
        [..., h], of x's dtype.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape is another.
    """
    check_masked_geglu_linear(x, weight, bias, mask, value)
    return masked_geglu(F.linear(x, weight, bias), mask, value)


def check_masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> None:
    """Raise what `masked_geglu` raises. Of tensors without values as well."""
    _check_dtypes({"proj": proj}, mask, value)
    _check_patch(mask, value)
    width = value.shape[-1]
    if not _ends_in(proj, value.ndim, value.shape[:-1], 2 * width):
        raise ValueError(f"proj is {[*proj.shape]}, which does not end in {[*value.shape[:-1], 2 * width]}")


def check_masked_geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, value: Tensor) -> None:
    """Raise what `masked_geglu_linear` raises. Of tensors without values as well."""
    _check_dtypes({"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}, mask, value)
    _check_patch(mask, value)
    width = value.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != 2 * width or (bias is not None and bias.shape != weight.shape[:1]):
        given = "" if bias is None else f" and the bias {[*bias.shape]}"
        raise ValueError(f"the weight is {[*weight.shape]}{given}, which is not of {2 * width} rows, for the mask")
    if not _ends_in(x, value.ndim, value.shape[:-1], weight.shape[1]):
        raise ValueError(f"x is {[*x.shape]}, which does not end in {[*value.shape[:-1], weight.shape[1]]}")


def _check_dtypes(floats: dict[str, Tensor], mask: Tensor, value: Tensor) -> None:
    dtype = next(iter(floats.values())).dtype
    alike = all(it.dtype == dtype for it in (*floats.values(), value))
    if not dtype.is_floating_point or not alike or mask.dtype not in (torch.bool, torch.uint8):
        given = ", ".join(f"{name} is {it.dtype}" for name, it in {**floats, "mask": mask, "value": value}.items())
        raise TypeError(f"{given}: not one floating point dtype, and bool or packed into uint8 for the mask")


def _check_patch(mask: Tensor, value: Tensor) -> None:
    if value.ndim not in (1, 2) or (mask.dtype == torch.bool and mask.shape != value.shape):
        raise ValueError(f"the mask is {[*mask.shape]} and the value {[*value.shape]}, not both [N, h] or both [h]")
    packed = torch.Size((*value.shape[:-1], packed_width(value.shape[-1])))
    if mask.dtype == torch.uint8 and mask.shape != packed:
        raise ValueError(
            f"the mask is uint8 {[*mask.shape]}; packed by pack_mask for a value of {[*value.shape]} it is {[*packed]}"
        )


def _ends_in(tensor: Tensor, ndim: int, tokens: torch.Size, width: int) -> bool:
    return tensor.ndim >= ndim and tensor.shape[-1] == width and (not tokens or tensor.shape[-2] == tokens[0])
