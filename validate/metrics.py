"""How far two tensors, or two pictures, are apart: scale-free, and never small where a number is not finite."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bakeout.validate.report.schema import Worst

Pixels = NDArray[np.uint8]
# Of SSIM (Wang et al., 2004): the radius of the window of 11, its standard deviation, and K1 and K2.
_RADIUS, _SIGMA, _K1, _K2 = 5, 1.5, 0.01, 0.03


def relative_rms(a: Tensor, b: Tensor) -> float:
    """rms(a - b) / rms(b) in fp64, of tensors of one shape.

    Infinite if an element of either is not finite, or only b is zero; so it is never below a limit by mistake.
    """
    return float(distances(a[None], b[None])) if a.shape == b.shape else math.inf


def distances(a: Tensor, b: Tensor, kept: int = 1) -> Tensor:
    """`relative_rms` over all but the first `kept` dimensions: float64 [a.shape[:kept]]."""
    if a.shape != b.shape:
        raise ValueError(f"tensors of {list(a.shape)} and {list(b.shape)} have no distance")
    wide, other = (it.double().flatten(kept).reshape(*it.shape[:kept], -1) for it in (a, b))
    apart, size = (wide - other).square().mean(-1).sqrt(), other.square().mean(-1).sqrt()
    relative = torch.where(apart == 0, 0.0, apart / size)
    return torch.where(wide.isfinite().all(-1) & other.isfinite().all(-1), relative, math.inf)


def sqnr_db(relative: float) -> float | None:
    """The signal-to-noise ratio that a relative RMS is, 20 log10(1 / r) in dB; None where it is 0 or not finite."""
    return -20 * math.log10(relative) if 0 < relative < math.inf else None


def worst_element(a: Tensor, b: Tensor) -> Worst | None:
    """The element at which two tensors of one shape differ most; None where they are equal.

    What is not finite in one of them only differs more than anything else.
    """
    wide, other = a.double(), b.double()
    apart = (wide - other).abs().nan_to_num(math.inf)
    apart[(wide == other) | (wide.isnan() & other.isnan())] = 0
    if not apart.numel() or not apart.max() > 0:
        return None
    place = tuple(int(it) for it in np.unravel_index(int(apart.argmax()), tuple(apart.shape)))
    return Worst(index=place, artifact=finite(float(wide[place])), reference=finite(float(other[place])))


def finite(value: float) -> float | None:
    """The value, or None if it is not finite."""
    return value if math.isfinite(value) else None


def max_difference(a: Pixels, b: Pixels) -> int:
    """The largest difference of a value in 0 … 255."""
    return int(np.abs(a.astype(np.int16) - b).max())


def psnr(a: Pixels, b: Pixels) -> float:
    """The peak signal-to-noise ratio in dB, 20 log10(255 / rms(a - b)); infinite for identical pictures."""
    rms = math.sqrt(np.square(a.astype(np.float64) - b).mean())
    return 20 * math.log10(255 / rms) if rms else math.inf


def ssim(a: Pixels, b: Pixels) -> float:
    """The mean structural similarity (Wang et al., 2004, Eq. 13) of RGB pictures [height, width, 3], 1 where identical.

    A Gaussian window of 11 with standard deviation 1.5, wherever it lies within the picture; the mean over the colours.
    """
    from scipy.ndimage import gaussian_filter

    x, y = a / 255, b / 255
    inside = tuple(slice(edge, -edge or None) for edge in (min(_RADIUS, (side - 1) // 2) for side in a.shape[:2]))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        filtered: NDArray[np.float64] = gaussian_filter(values, _SIGMA, radius=_RADIUS, axes=(0, 1))
        return filtered[inside]

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    return float((luminance * (2 * covariance + _K2**2) / (variances + _K2**2)).mean())
