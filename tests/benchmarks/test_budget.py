"""The bytes and flops that are counted are those of the tensors, and what the documents say is what is counted."""

from __future__ import annotations

import budget
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bakeout.kernels.packing import pack_mask

SHAPE = budget.Shape("tiny", batch=3, tokens=40, d=12)
DTYPES = (torch.float16, torch.float32)


def patch(density: float, dtype: torch.dtype) -> int:
    """The bytes of a random patch of SHAPE, by looking at every group."""
    size = dtype.itemsize
    mask = torch.rand((40, 48), generator=torch.Generator().manual_seed(0)) < density
    groups = [row[at : at + 16 // size] for row in mask for at in range(0, 48, 16 // size)]
    return pack_mask(mask).nbytes + sum(16 for group in groups if group.any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("density", "exact"), [(0.0, True), (1.0, True), (0.2, False)])
def test_bytes_are_those_of_the_tensors(dtype, density, exact):
    proj, out = torch.empty(3, 40, 96, dtype=dtype), torch.empty(3, 40, 48, dtype=dtype)
    x, weight, bias = (torch.empty(size, dtype=dtype) for size in ((3, 40, 12), (96, 12), (96,)))
    within = 0.0 if exact else 0.05
    geglu = budget.masked_geglu_bytes(SHAPE, density, dtype.itemsize) - proj.nbytes - out.nbytes
    assert abs(geglu / patch(density, dtype) - 1) <= within
    linear = budget.masked_geglu_linear_bytes(SHAPE, density, dtype.itemsize)
    linear -= sum(it.nbytes for it in (x, weight, bias, out))
    assert linear == pytest.approx(geglu, abs=1e-6)


def test_flops_are_those_that_pytorch_counts():
    with FlopCounterMode(display=False) as counter:
        F.linear(torch.empty(3, 40, 12, device="meta"), torch.empty(96, 12, device="meta"))
    assert budget.linear_flops(SHAPE) == counter.get_total_flops()


@pytest.mark.parametrize("shape", budget.SHAPES, ids=str)
def test_no_prediction_is_below_its_floor_and_fusion_moves_least(shape):
    ways = budget.versions(shape, 0.01)
    for launches in ways.values():
        assert budget.predicted(launches, budget.H100) > budget.floor(launches, budget.H100) > 0
    moved = {name: sum(it.bytes for it in launches) for name, launches in ways.items()}
    assert min(moved, key=lambda name: moved[name] if name.startswith(("FFN", "masked_geglu_l")) else 1e18) == (
        "masked_geglu_linear"
    )
    assert moved["masked_geglu"] < moved["GEGLU, patched, compiled"] < moved["GEGLU, patched, eager"]


def test_the_documents_have_the_tables(root):
    text = (root / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    for table in (budget.masked_geglu_table, budget.masked_geglu_linear_table):
        lines = table(budget.H100, 0.01)
        assert len(lines) == 2 + len(budget.SHAPES)
        assert text[text.index(lines[0]) :][: len(lines)] == lines
