import math

import numpy as np
import pytest
import torch

from bakeout.validate.metrics import (
    distances,
    finite,
    max_difference,
    psnr,
    relative_rms,
    sqnr_db,
    ssim,
    worst_element,
)

rng = np.random.default_rng(0)
PICTURE = rng.integers(0, 256, (24, 20, 3), np.uint8)


def test_relative_rms_is_the_norm_of_the_difference_by_that_of_the_reference():
    assert relative_rms(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(math.sqrt(10) / 5)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
def test_relative_rms_has_no_scale(scale):
    a, b = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert relative_rms(a * scale, b * scale) == pytest.approx(relative_rms(a, b), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["artifact", "reference", "both"])
def test_what_is_not_finite_is_infinitely_far(value, side):
    good, bad = torch.ones(4), torch.tensor([1.0, value, 1, 1])
    assert relative_rms(good if side == "reference" else bad, good if side == "artifact" else bad) == math.inf


def test_nothing_is_near_a_reference_of_zeros_but_zeros():
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_rms(torch.full((3,), 1e-30), torch.zeros(3)) == math.inf


def test_other_shapes_are_infinitely_far_although_they_would_broadcast():
    assert relative_rms(torch.ones(1, 3), torch.ones(2, 3)) == math.inf
    with pytest.raises(ValueError, match="no distance"):
        distances(torch.ones(1, 3), torch.ones(2, 3))


def test_distances_keep_steps_and_trials_apart():
    a, b = torch.randn(2, 3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    a[1, 2] = b[1, 2]
    a[2, 3, 0, 0, 0] = math.nan
    apart = distances(a, b, 2)
    assert apart.shape == (3, 4)
    assert apart[1, 2] == 0
    assert apart[2, 3] == math.inf
    assert apart[0, 1] == pytest.approx(relative_rms(a[0, 1], b[0, 1]))


def test_sqnr_of_a_thousandth_is_60_db():
    assert sqnr_db(1e-3) == pytest.approx(60)
    assert sqnr_db(0) is sqnr_db(math.inf) is sqnr_db(math.nan) is None


def test_the_worst_element_is_found_with_its_place():
    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    a[0, 2], a[1, 1] = 1, -5
    worst = worst_element(a, b)
    assert (worst.index, worst.artifact, worst.reference) == ((1, 1), -5, 0)
    a[0, 0] = math.nan
    worst = worst_element(a, b)
    assert (worst.index, worst.artifact, worst.reference) == ((0, 0), None, 0)
    assert worst_element(b, b) is None


def test_finite():
    assert finite(2.0) == 2
    assert finite(math.nan) is finite(-math.inf) is None


def test_differences_of_bytes_do_not_wrap():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert max_difference(black, white) == max_difference(white, black) == 255
    assert psnr(black, white) == psnr(white, black) == 0


def test_psnr():
    other = PICTURE.copy()
    other[3, 4, 1] ^= 1
    assert psnr(other, PICTURE) == pytest.approx(20 * math.log10(255 * math.sqrt(PICTURE.size)))
    assert psnr(PICTURE, PICTURE) == math.inf


def naive_ssim(a, b):
    """Wang et al. (2004), Eq. 13, window by window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y in range(5, a.shape[0] - 5):
        for x in range(5, a.shape[1] - 5):
            for colour in range(3):
                one, other = (it[y - 5 : y + 6, x - 5 : x + 6, colour] / 255 for it in (a, b))
                mean, other_mean = (window * one).sum(), (window * other).sum()
                variance = (window * (one - mean) ** 2).sum() + (window * (other - other_mean) ** 2).sum()
                covariance = (window * (one - mean) * (other - other_mean)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append(
                    (2 * mean * other_mean + c1) * (2 * covariance + c2)
                    / ((mean**2 + other_mean**2 + c1) * (variance + c2))
                )  # fmt: skip
    return np.mean(values)


@pytest.mark.parametrize("noise", [3, 30, 200])
def test_ssim_is_that_of_the_paper(noise):
    other = (PICTURE + rng.integers(-noise, noise + 1, PICTURE.shape)).clip(0, 255).astype(np.uint8)
    assert ssim(PICTURE, other) == pytest.approx(naive_ssim(PICTURE, other), abs=1e-9)
    assert ssim(PICTURE, other) < 1


@pytest.mark.parametrize("side", [8, 11, 16])
def test_ssim_of_small_pictures(side):
    small = PICTURE[:side, :side]
    assert ssim(small, small) == pytest.approx(1)
    assert ssim(small, 255 - small) < 0.1
