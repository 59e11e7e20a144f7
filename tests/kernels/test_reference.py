"""The definitions, against Python's own arithmetic, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bakeout.kernels.reference import masked_geglu

BATCH, TOKENS, WIDTH = 2, 3, 5
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def example(*places: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.rand(places, generator=torch.Generator().manual_seed(1)) < 0.4
    assert mask.any()
    assert not mask.all()
    return random(BATCH, TOKENS, 2 * WIDTH), mask, random(*places, seed=2)


def naive(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """In fp64."""
    result = torch.empty(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    for row in range(BATCH):
        for token in range(TOKENS):
            for feature in range(WIDTH):
                place = (token, feature) if mask.ndim == 2 else (feature,)
                a, g = float(proj[row, token, feature]), float(proj[row, token, WIDTH + feature])
                patched = a * g * 0.5 * (1 + math.erf(g / math.sqrt(2)))
                result[row, token, feature] = float(value[place]) if mask[place] else patched
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(TOKENS, WIDTH), (WIDTH,)])
def test_it_is_the_formula(places, dtype):
    proj, mask, value = example(*places)
    given = proj.to(dtype), mask, value.to(dtype)
    found, expected = masked_geglu(*given), naive(*given)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= 2 * torch.finfo(dtype).eps
    for control in (
        naive(given[0], ~mask, given[2]), naive(given[0], mask.roll(1, -1), given[2]),
        naive(given[0].roll(WIDTH, -1), mask, given[2]),
    ):  # fmt: skip
        assert relative_error(found, control) > 0.1


@pytest.mark.parametrize("places", [(TOKENS, WIDTH), (WIDTH,)])
def test_what_is_masked_is_the_value_to_the_bit_and_no_other_value_is_read(places):
    proj, mask, value = example(*places)
    poisoned = torch.where(mask, value, torch.nan)
    found = masked_geglu(proj, mask, poisoned)
    assert torch.equal(found, masked_geglu(proj, mask, value))
    whole = mask.expand(BATCH, TOKENS, WIDTH)
    assert torch.equal(found[whole], value.expand(BATCH, TOKENS, WIDTH)[whole])
    # A projection that is not finite under the mask is not seen either.
    broken = torch.where(torch.cat([whole, whole], -1), torch.nan, proj)
    assert torch.equal(masked_geglu(broken, mask, value), found)


def test_any_number_of_dimensions_may_come_first():
    proj, mask, value = example(TOKENS, WIDTH)
    found = masked_geglu(proj[:, None].expand(-1, 4, -1, -1), mask, value)
    assert torch.equal(found, masked_geglu(proj, mask, value)[:, None].expand(-1, 4, -1, -1))
    assert torch.equal(masked_geglu(proj[0], mask, value), masked_geglu(proj, mask, value)[0])


WRONG = {
    "another number of tokens": (random(2, 4, 10), random(3, 5) > 0, random(3, 5)),
    # where() would spread it over all tokens.
    "one token": (random(2, 3, 10), random(1, 5) > 0, random(1, 5)),
    "one token in all": (random(10), random(1, 5) > 0, random(1, 5)),
    "another width": (random(2, 3, 10), random(3, 6) > 0, random(3, 6)),
    "an odd projection": (random(2, 3, 11), random(3, 5) > 0, random(3, 5)),
    "a mask for each row": (random(2, 3, 10), random(2, 3, 5) > 0, random(2, 3, 5)),
    "a value for all tokens": (random(2, 3, 10), random(3, 5) > 0, random(5)),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_shapes_are_refused(what):
    with pytest.raises(ValueError, match=r"does not end in|not both"):
        masked_geglu(*WRONG[what])


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bool, torch.float64), (torch.float32, torch.uint8, torch.float32),
        (torch.int32, torch.bool, torch.int32),
    ],
)  # fmt: skip
def test_other_dtypes_are_refused(dtypes):
    proj, mask, value = example(TOKENS, WIDTH)
    with pytest.raises(TypeError, match=f"value {dtypes[2]}"):
        masked_geglu(proj.to(dtypes[0]), mask.to(dtypes[1]), value.to(dtypes[2]))
