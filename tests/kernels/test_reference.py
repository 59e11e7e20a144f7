"""The definitions, against Python's own arithmetic, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bakeout.kernels.packing import pack_mask
from bakeout.kernels.reference import masked_geglu, masked_geglu_linear

BATCH, TOKENS, WIDTH, INPUTS = 2, 3, 5, 4
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


@pytest.mark.parametrize("places", [(TOKENS, WIDTH), (WIDTH,)])
def test_a_packed_mask_is_the_mask(places):
    proj, mask, value = example(*places)
    assert torch.equal(masked_geglu(proj, pack_mask(mask), value), masked_geglu(proj, mask, value))
    assert not torch.equal(masked_geglu(proj, pack_mask(mask.roll(1, -1)), value), masked_geglu(proj, mask, value))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("places", [(TOKENS, WIDTH), (WIDTH,)])
def test_with_a_linear_it_is_the_formula(places, with_bias, packed):
    _, mask, value = example(*places)
    x, weight = random(BATCH, TOKENS, INPUTS, seed=3), random(2 * WIDTH, INPUTS, seed=4)
    bias = random(2 * WIDTH, seed=5) if with_bias else None
    proj = torch.empty(BATCH, TOKENS, 2 * WIDTH, dtype=torch.float64)
    for row in range(BATCH):
        for token in range(TOKENS):
            for unit in range(2 * WIDTH):
                terms = (float(x[row, token, j]) * float(weight[unit, j]) for j in range(INPUTS))
                proj[row, token, unit] = sum(terms) + (0 if bias is None else float(bias[unit]))
    found = masked_geglu_linear(x, weight, bias, pack_mask(mask) if packed else mask, value)
    assert relative_error(found, naive(proj, mask, value)) <= 8 * torch.finfo(torch.float64).eps
    assert relative_error(found, naive(proj, ~mask, value)) > 0.1
    assert relative_error(found, naive(proj.roll(WIDTH, -1), mask, value)) > 0.01


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
    "a mask that nobody packed": (random(2, 3, 10), (random(3, 5) > 0).byte(), random(3, 5)),
    "a mask packed for another width": (random(2, 3, 10), pack_mask(random(3, 9) > 0), random(3, 5)),
}
X, WEIGHT, BIAS, MASK, VALUE = random(2, 3, 4), random(10, 4), random(10), random(3, 5) > 0, random(3, 5)
WRONG_LINEAR = {
    "a weight of another height": (X, random(12, 4), None, MASK, VALUE),
    "a weight for another input": (X, random(10, 6), BIAS, MASK, VALUE),
    "a weight of three dimensions": (X, random(1, 10, 4), BIAS, MASK, VALUE),
    "a bias of another height": (X, WEIGHT, random(5), MASK, VALUE),
    "another number of tokens": (random(2, 4, 4), WEIGHT, BIAS, MASK, VALUE),
    "a mask of another width": (X, WEIGHT, BIAS, random(3, 6) > 0, VALUE),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_shapes_are_refused(what):
    with pytest.raises(ValueError, match=r"does not end in|not both|for a value of \[3, 5\] it is \[3, 1\]"):
        masked_geglu(*WRONG[what])


@pytest.mark.parametrize("what", WRONG_LINEAR)
def test_other_shapes_are_refused_with_a_linear(what):
    masked_geglu_linear(X, WEIGHT, BIAS, MASK, VALUE)
    with pytest.raises(ValueError, match=r"does not end in|not both|is not of 10 rows"):
        masked_geglu_linear(*WRONG_LINEAR[what])


@pytest.mark.parametrize("place", range(5))
def test_other_dtypes_are_refused_with_a_linear(place):
    given = [X, WEIGHT, BIAS, MASK, VALUE]
    given[place] = given[place].float()
    with pytest.raises(TypeError, match="not one floating point dtype"):
        masked_geglu_linear(*given)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bool, torch.float64), (torch.float32, torch.int8, torch.float32),
        (torch.int32, torch.bool, torch.int32),
    ],
)  # fmt: skip
def test_other_dtypes_are_refused(dtypes):
    proj, mask, value = example(TOKENS, WIDTH)
    with pytest.raises(TypeError, match=f"value is {dtypes[2]}"):
        masked_geglu(proj.to(dtypes[0]), mask.to(dtypes[1]), value.to(dtypes[2]))
