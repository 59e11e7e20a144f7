"""Is a fused kernel right on this machine? Relative RMS errors against its definition in fp64, over many cases.

    PYTHONPATH=src python benchmarks/kernel_checks.py masked_geglu cuda
    PYTHONPATH=src compute-sanitizer python benchmarks/kernel_checks.py masked_geglu cuda --small

prints each case as a line of JSON. The exit status is 1 if one is wrong, and 2 if the kernel cannot run here. Inputs
are drawn anew for every case.
What must not be used is NaN: values outside the mask, projections under it, and every output before it is written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from budget import SHAPES
from torch import Tensor

from bakeout.kernels import ops, reference
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.packing import pack_mask

SECONDS = 240  # that a kernel has for its check, with what it takes to build it
UNAVAILABLE = 2  # the exit status of a kernel that cannot run here
DENSITIES = (0.0, 0.01, 0.25, 1.0)
FORMS = ("packed [N, h]", "packed [h]", "bool [N, h]")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Batch, N, d, h: one token and feature of each picture, and sizes of which nothing is a divisor.
ODD = ((64, 1, 1, 1), (2, 5, 9, 8), (3, 77, 83, 1283), (1, 1000, 768, 3072))


@dataclass(frozen=True)
class Case:
    """Sizes as `Shape` has them, and what the patch is like."""

    batch: int
    tokens: int
    d: int
    h: int
    dtype: torch.dtype
    density: float
    form: str

    def __str__(self) -> str:
        sizes = f"batch {self.batch}, N {self.tokens}, d {self.d}, h {self.h}"
        return f"{sizes}, {str(self.dtype).removeprefix('torch.')}, {self.density:.0%} set, mask {self.form}"


def cases(small: bool) -> Iterator[Case]:
    """Every case, or those of the odd sizes alone, which are small."""
    sizes = ODD if small else (*((it.batch, it.tokens, it.d, it.h) for it in SHAPES), *ODD)
    for (batch, tokens, d, h), dtype, density, form in itertools.product(sizes, DTYPES, DENSITIES, FORMS):
        yield Case(batch, tokens, d, h, dtype, density, form)


def check(operation: str, kernel: str, device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """The error of every case and the bound that it must not exceed, as JSON.

    Raises:
        KernelUnavailable: the kernel cannot run here.
    """
    generator = torch.Generator(device).manual_seed(0)
    for case in cases(small):
        error = relative_rms(*answers(operation, kernel, case, generator))
        found = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch."), "case": str(case)}
        # A NaN is not below any bound, and JSON has none.
        yield found | {
            "error": error if math.isfinite(error) else str(error),
            "bound": bound(operation, case),
            "right": error <= bound(operation, case),
        }


def answers(operation: str, kernel: str, case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the definition in fp64, for random inputs."""
    drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
    patch = (case.h,) if case.form.endswith("d [h]") else (case.tokens, case.h)
    mask = torch.rand(patch, **drawn) < case.density
    value = torch.randn(patch, **drawn).masked_fill_(~mask, math.nan).to(case.dtype)
    given = pack_mask(mask) if case.form.startswith("packed") else mask
    inputs: list[Tensor] = []
    if operation == "masked_geglu":
        proj = torch.randn(case.batch, case.tokens, 2 * case.h, **drawn)
        inputs = [proj.masked_fill_(torch.cat((mask, mask), -1), math.nan)]
    else:
        inputs = [
            torch.randn(case.batch, case.tokens, case.d, **drawn),
            torch.randn(2 * case.h, case.d, **drawn) / math.sqrt(case.d),
            torch.randn(2 * case.h, **drawn) / 4,
        ]
    inputs = [it.to(case.dtype) for it in inputs]
    with poisoned():
        out = getattr(ops, operation)(*inputs, given, value, kernel)
    if out.dtype != case.dtype:
        raise TypeError(f"the output is {out.dtype}, not {case.dtype}")
    first, *others = inputs
    wide = (*(it.double() for it in others), mask, value.double())
    # One picture at a time: fp64 of all of them would be several gigabytes.
    return out, torch.stack([getattr(reference, operation)(it.double(), *wide) for it in first])


def bound(operation: str, case: Case) -> float:
    """The relative RMS error of one rounding to the dtype, and of fp32 arithmetic: of a sum of d terms, or of a few."""
    steps = 8 * math.sqrt(case.d) if operation == "masked_geglu_linear" else 8
    return torch.finfo(case.dtype).eps / 2 + steps * torch.finfo(torch.float32).eps / 2


def relative_rms(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖; NaN where one of them has a NaN, infinite where the shapes differ."""
    if out.shape != reference.shape:
        return math.inf
    return float((out.double() - reference).norm() / reference.norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialised is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Found:
    """What a check found of one kernel.

    Attributes:
        cases: how many were compared.
        wrong: those that are wrong, in words.
        worst: dtype → the largest error that is a number, as a share of its bound.
        stop: why the kernel is not to be timed; empty where it runs and is right in fp16, the dtype that is timed.
        failed: whether it is wrong in any case, or its check came to no end; not where it cannot run here.
    """

    cases: int
    wrong: tuple[str, ...]
    worst: Mapping[str, float]
    stop: str
    failed: bool


def check_all(small: bool) -> dict[tuple[str, str], Found]:
    """(operation, kernel) → what was found: each in a process of its own, so that a crash stays there; all at once."""
    names = [(it, kernel) for it, kernels in ops.KERNELS.items() for kernel in kernels if kernel != "reference"]
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda it: _check_apart(it[0], it[1], small), names), strict=True))


def found_in(out: str, errors: str, status: int | None) -> Found:
    """What a process of this file told by its output and exit status; None: it was stopped after `SECONDS`."""
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    cases = [it for it in lines if "case" in it]
    wrong = [it for it in cases if not it["right"]]
    worst: dict[str, float] = {}
    for it in cases:
        if math.isfinite(share := float(it["error"]) / it["bound"]):
            worst[it["dtype"]] = max(worst.get(it["dtype"], 0.0), share)
    unavailable = [it["unavailable"] for it in lines if "unavailable" in it and status == UNAVAILABLE]
    stop = ""
    if unavailable:
        stop = unavailable[0]
    elif status is None:
        stop = f"its check did not end in {SECONDS} s"
    elif not cases or status not in (0, 1) or (status == 1) != bool(wrong):
        last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "it said nothing")
        stop = f"its check ended with status {status}: {last[:300]}"
    elif any(it["dtype"] == "float16" for it in wrong):
        stop = "it is wrong"
    failed = bool(wrong) or (bool(stop) and not unavailable)
    return Found(len(cases), tuple(f"{it['case']}: {it['error']}" for it in wrong), worst, stop, failed)


def _check_apart(operation: str, kernel: str, small: bool) -> Found:
    command = [sys.executable, __file__, operation, kernel, *(["--small"] if small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603 - this file
    except subprocess.TimeoutExpired as stopped:
        out = stopped.stdout or b""
        return found_in(out.decode() if isinstance(out, bytes) else out, "", None)
    return found_in(done.stdout, done.stderr, done.returncode)


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operation", choices=ops.KERNELS)
    parser.add_argument("kernel")
    parser.add_argument("--small", action="store_true", help="without the large sizes, as under a sanitizer")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    right = True
    try:
        for found in check(options.operation, options.kernel, device, options.small):
            print(json.dumps(found), flush=True)
            right &= found["right"]
    except KernelUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return UNAVAILABLE
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
