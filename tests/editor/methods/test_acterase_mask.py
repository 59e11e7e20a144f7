"""The mathematics of ActErase, and the choice of the largest, against their definitions in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.methods.acterase import importance, patch_mask
from bakeout.editor.methods.acterase_mask import passing_count
from bakeout.editor.methods.selection import largest

properties = settings(derandomize=True, deadline=None, max_examples=100)
FEW = st.integers(-2, 2)  # few values: many ties


def matrices(rows: Any, columns: Any, values: Any) -> Any:
    return st.tuples(rows, columns).flatmap(
        lambda shape: st.lists(
            st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(lambda it: torch.tensor(it, dtype=torch.float64))
    )


def pairs_of(values: Any) -> Any:
    """Two matrices of one shape."""
    return st.tuples(st.integers(1, 5), st.integers(1, 7)).flatmap(
        lambda shape: st.tuples(*[matrices(st.just(shape[0]), st.just(shape[1]), values)] * 2)
    )


@properties
@given(st.data(), st.booleans())
def test_importance_is_its_formula(data: st.DataObject, signed: bool) -> None:
    # Small whole numbers: every sum is exact, in any order.
    weight = data.draw(matrices(st.integers(1, 4), st.integers(1, 5), st.integers(-9, 9)))
    d_out, d_in = weight.shape
    x = data.draw(matrices(st.integers(1, 4), st.just(d_in), st.integers(-9, 9)))
    factor = [[w if signed else abs(w) for w in row] for row in weight.tolist()]
    rows = x.tolist()
    column = [[abs(row[j]) * sum(factor[i][j] for i in range(d_out)) for j in range(d_in)] for row in rows]
    row_form = [[sum(factor[i][j] * abs(row[j]) for j in range(d_in)) for i in range(d_out)] for row in rows]
    edge = [[factor[i][j] * abs(rows[0][j]) for j in range(d_in)] for i in range(d_out)]
    before = x.clone(), weight.clone()
    assert importance(x, weight, signed=signed).tolist() == column
    assert importance(x, weight, "row", signed).tolist() == row_form
    assert importance(x[0], weight, "row", signed).tolist() == row_form[0]
    assert importance(x[0], weight, "edge", signed).tolist() == edge
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_signed_columns_cancel_and_magnitudes_do_not() -> None:
    weight, x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]]), torch.tensor([-3.0, 1.0])
    assert importance(x, weight).tolist() == [6, 4]
    assert importance(x, weight, signed=True).tolist() == [0, 4]
    assert importance(x, weight, "row", signed=True).tolist() == [5, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_importance_does_not_overflow_half_precision(dtype: torch.dtype) -> None:
    x, weight = torch.full((2, 4), 30000.0, dtype=dtype), torch.full((3, 4), 4.0, dtype=dtype)
    for kind, factor in (("column", 12), ("row", 16)):
        found = importance(x, weight, kind)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.full_like(found, x[0, 0].item() * factor))
    assert importance(x.double(), weight).dtype == torch.float64


def test_weights_have_one_input_each() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 4\]"):
        importance(torch.ones(2, 4), torch.ones(3, 4), "edge")


def best(scores: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


@properties
@given(matrices(st.integers(1, 4), st.integers(1, 9), FEW), st.data())
def test_largest_is_its_definition(scores: Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, scores.shape[1]))
    expected = [[place in best(row, count) for place in range(len(row))] for row in scores.tolist()]
    assert largest(scores, count).tolist() == expected


@properties
@given(pairs_of(FEW), st.floats(0.1, 1.0), st.sampled_from(["layer", "token"]), st.sampled_from(["source", "target"]))
def test_a_fraction_is_its_definition(both: tuple[Tensor, Tensor], tau: float, scope: Any, compare: Any) -> None:
    source, target = both
    judged = source if compare == "source" else target
    rows = [judged.flatten().tolist()] if scope == "layer" else judged.tolist()
    count = math.floor(Fraction(str(tau)) * len(rows[0]))
    if count == 0:
        with pytest.raises(InputError, match="is too small"):
            patch_mask(source, target, tau, "fraction", scope, compare)
        return
    passing = torch.tensor([place in best(row, count) for row in rows for place in range(len(row))])
    found = patch_mask(source, target, tau, "fraction", scope, compare)
    assert found.dtype == torch.bool
    assert torch.equal(found, passing.view(judged.shape) & torch.lt(source, target))


@properties
@given(pairs_of(FEW), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from(["source", "target"]))
def test_an_absolute_tau_is_its_definition(both: tuple[Tensor, Tensor], tau: float, compare: Any) -> None:
    source, target = both
    expected = [
        [(s if compare == "source" else t) >= tau and s < t for s, t in zip(*rows, strict=True)]
        for rows in zip(source.tolist(), target.tolist(), strict=True)
    ]
    assert patch_mask(source, target, tau, "absolute", compare=compare).tolist() == expected


def test_equal_importances_are_not_patched_and_features_and_weights_have_masks_too() -> None:
    source, target = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([4.0, 5.0, 5.0, 5.0])
    assert patch_mask(source, target, 0.5).tolist() == [False, True, False, False]
    assert patch_mask(source, target, 0.5, compare="target").tolist() == [False, True, True, False]
    assert patch_mask(source, target, 2.0, "absolute").tolist() == [False, True, True, False]
    # All of a layer's weights stand in one ranking, whatever row they are of.
    assert patch_mask(source.view(2, 2), target.view(2, 2), 0.75).tolist() == [[False, True], [True, False]]
    assert patch_mask(source.view(2, 2), target.view(2, 2), 0.5, tau_scope="token").tolist() == [
        [False, False], [True, False],
    ]  # fmt: skip
    # Source and target exchanged, nothing rises.
    assert not patch_mask(target, source, 1.0).any()


def test_tau_is_the_decimal_that_is_written() -> None:
    assert int(0.29 * 100) == 28, "in floating point"
    assert int(patch_mask(torch.arange(100.0), torch.full((100,), 200.0), 0.29).sum()) == 29


@properties
@given(st.integers(1, 10_000_000))
def test_the_smallest_tau_that_an_error_names_works(count: int) -> None:
    with pytest.raises(InputError, match="of this layer it takes none") as caught:
        passing_count(0.5 / count, count, "this layer")
    named = float(str(caught.value).rsplit(maxsplit=1)[1])
    assert passing_count(named, count, "this layer") >= 1
