"""What is wrong is not timed, what fails is a line of the table, and goals are judged by what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import gpu_kernels
import pytest
import torch
from budget import Card, Shape
from gpu_timing import Timing
from kernel_checks import Found
from kernel_versions import OPERATIONS, Versions, draw, tiles

from bakeout.kernels import reference
from bakeout.kernels.errors import KernelUnavailable

CARD = Card(copy=1e12, matmul=1e14)
SHAPE = Shape("tiny", 2, 5, 8)
NAMES = (("masked_geglu", "triton"), ("masked_geglu", "cuda"), ("masked_geglu_linear", "triton"))
STOPPED = {name: Found(1, (), {}, "there is no such thing here", failed=False) for name in NAMES}


def versions(fused, bytes_moved=1000):
    one = torch.ones(1)
    return Versions({"patched, eager": lambda _: one}, fused, dict.fromkeys(fused, NAMES[0]), bytes_moved, flops=0)


def rows(fused, checks):
    return [
        *gpu_kernels.rows_of("masked_geglu", SHAPE, lambda _: versions(fused), gpu_kernels.rehearsal(), CARD, checks)
    ]


def test_a_kernel_that_its_check_stops_is_not_run():
    eager, mine = rows({"mine": lambda _: pytest.fail("it was run")}, STOPPED)
    assert eager.seconds > 0
    assert (mine.seconds, mine.remark) == (None, "not timed: see its check")


def test_a_kernel_that_fails_and_one_that_does_not():
    def fails(_):
        raise RuntimeError("no")

    right = {name: replace(found, stop="") for name, found in STOPPED.items()}
    _, failing, mine = rows({"failing": fails, "mine": lambda _: torch.ones(1)}, right)
    assert failing.remark == "not timed: RuntimeError: no"
    assert mine.ratios.keys() == {"patched, eager"}
    assert mine.of_copy == pytest.approx(1000 / mine.seconds / 1e12)
    assert "misses of copy 0.9" in mine.remark
    assert "cannot judge patched, compiled" in mine.remark


def test_a_kernel_that_is_right_in_its_check_and_wrong_here_is_not_timed():
    right = {name: replace(found, stop="") for name, found in STOPPED.items()}
    fused = {"mine": lambda _: torch.ones(1), "off": lambda _: torch.full((1,), 1.01),
             "nan": lambda _: torch.full((1,), float("nan")), "short": lambda _: torch.ones(2)}  # fmt: skip
    eager, *found = rows(fused, right)
    assert [bool(it.seconds) for it in (eager, *found)] == [True, True, False, False, False]
    assert [gpu_kernels.WRONG in it.remark for it in found] == [False, True, True, True]
    assert found[1].remark == "not timed: it is wrong, 1.0e-02 from patched, eager"


@pytest.mark.parametrize(
    ("check", "remark", "status"),
    [
        (STOPPED[NAMES[0]], "", 0),
        (replace(STOPPED[NAMES[0]], failed=True), "", 1),
        (replace(STOPPED[NAMES[0]], stop=""), f"not timed: {gpu_kernels.WRONG}, nan from patched, eager", 1),
        (replace(STOPPED[NAMES[0]], stop=""), "not timed: RuntimeError: no", 0),
    ],
)
def test_the_exit_status_says_whether_anything_is_wrong(monkeypatch, tmp_path, capsys, check, remark, status):
    stands_in = {
        "check_all": lambda small: {NAMES[0]: check},
        "on_gpu": gpu_kernels.rehearsal,
        "measured": lambda *args, **options: [gpu_kernels.Row("masked_geglu", "tiny", "mine", remark=remark)],
    }
    for name, it in stands_in.items():
        monkeypatch.setattr(gpu_kernels, name, it)
    monkeypatch.setattr(gpu_kernels, "machine", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "-o", str(tmp_path / "kernels.json")])
    assert gpu_kernels.main() == status
    assert remark in capsys.readouterr().out
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["rows"][0]["remark"] == remark


def test_what_cannot_be_made_is_one_line():
    def unavailable(_):
        raise ImportError("no module")

    (row,) = gpu_kernels.rows_of("masked_geglu", SHAPE, unavailable, gpu_kernels.rehearsal(), CARD, STOPPED)
    assert row.remark == "not timed: ImportError: no module"


@pytest.mark.parametrize(
    ("reached", "said"),
    [
        ({"of copy": 0.9, "patched, eager": 3.0, "patched, compiled": 1.0}, "meets its goals"),
        ({"of copy": 0.899, "patched, eager": 3.0, "patched, compiled": 1.0}, "misses of copy 0.9"),
        ({"of copy": 0.95, "patched, eager": 2.99, "patched, compiled": 0.99},
         "misses patched, eager 3, misses patched, compiled 1"),
        ({"of copy": 0.95, "patched, eager": float("nan")}, "misses patched, eager 3, cannot judge patched, compiled"),
    ],
)  # fmt: skip
def test_goals(reached, said):
    assert gpu_kernels.verdict("masked_geglu", reached) == said


def test_every_version_without_our_kernels_computes_what_it_says():
    given = draw(SHAPE, torch.device("cpu"))
    proj = torch.nn.functional.linear(given.x, given.weight, given.bias)
    for operation, make in OPERATIONS.items():
        baselines = make(SHAPE, "eager").baselines
        for how, mask in (("patched", given.mask), ("stock", torch.zeros_like(given.mask))):
            expected = reference.masked_geglu(given.proj if operation == "masked_geglu" else proj, mask, given.value)
            if operation == "whole FFN":
                expected = torch.nn.functional.linear(expected, given.weight_2, given.bias_2)
            for way in ("eager", "compiled"):
                assert torch.equal(baselines[f"{how}, {way}"](given), expected), (operation, how, way)


def test_the_copy_moves_as_many_bytes():
    given = draw(SHAPE, torch.device("cpu"))
    copied = OPERATIONS["masked_geglu"](SHAPE, "eager").baselines[gpu_kernels.COPY](given)
    out = given.proj.nbytes // 2
    assert 2 * copied.nbytes == given.proj.nbytes + out


def test_when_no_time_is_left_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "SECONDS", -1.0)
    found = gpu_kernels.measured(
        gpu_kernels.rehearsal(), CARD, STOPPED, begin=gpu_kernels.time.monotonic(), sweep=False
    )
    assert {it.remark for it in found} == {"not timed: no time was left"}
    assert {it.operation for it in found} == {*OPERATIONS, gpu_kernels.IN_ONNXRUNTIME}
    assert capsys.readouterr().err.count("no time was left") == len(found)


def test_every_line_of_the_table_has_as_many_cells():
    timed = Timing(1e-5, 0.01)
    row = gpu_kernels.row_of(
        "masked_geglu", SHAPE, "mine", timed, versions({"mine": None}), {"patched, eager": timed}, CARD
    )
    report = {"date": "today", "machine": {"gpu": "none"}, "card": {"copy": 3e12, "matmul": 7.9e14},
              "card at the end": "it is gone", "checks": {"masked_geglu, cuda": {"cases": 3, "wrong": ["two: nan"],
              "worst": {"float16": 0.5}, "stop": "it is wrong"}}}  # fmt: skip
    lines = [*gpu_kernels.text(report, [row, gpu_kernels.Row("a", "b", "all", remark="not timed")])][1:]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 2 + 1 + 2
    assert "copy 3.00 TB/s, fp16 product 790 TFLOP/s" in lines[2]
    assert "1 WRONG, first two: nan" in lines[4]
    assert "| 10.0 | 1% | 0% |  | 1.00 |" in lines[5]


def test_without_a_gpu_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    assert gpu_kernels.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_a_sweep_times_every_tile_and_the_one_that_is_taken():
    triton = pytest.importorskip("bakeout.kernels.masked_geglu_linear", exc_type=KernelUnavailable)
    for capability, unit in (((9, 0), "wgmma"), ((8, 6), "mma")):
        made = tiles(SHAPE, "eager", capability)
        assert len(made.fused) == len(triton.CONFIGS[unit]) + 1
        assert made.needs.keys() == made.fused.keys()
    found = gpu_kernels.measured(gpu_kernels.rehearsal(), CARD, STOPPED, gpu_kernels.time.monotonic(), sweep=True)
    assert [it.version for it in found if not it.seconds] == [*made.fused]


@pytest.mark.slow
def test_the_rehearsal(root, tmp_path):
    command = [sys.executable, root / "benchmarks" / "gpu_kernels.py", "--dry-run", "-o", tmp_path / "kernels.json"]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without_gpu)
    assert done.returncode == 2, done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    timed = {(it["operation"], it["version"]) for it in report["rows"] if it["seconds"]}
    assert {(name, "stock, compiled") for name in OPERATIONS} <= timed
    # A kernel that runs on GPUs only says so, and why.
    assert all(len(it["stop"].split()) > 5 for it in report["checks"].values())
    assert done.stdout.count("\n") > len(report["checks"])
