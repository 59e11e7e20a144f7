"""The fused operations on a GPU: are they right, and how fast, beside eager PyTorch and torch.compile; in one table.

    export PYTHONPATH=src
    python benchmarks/gpu_kernels.py -o kernels.json
    compute-sanitizer python benchmarks/kernel_checks.py masked_geglu cuda --small
    ncu --set full --clock-control none -k regex:geglu -s 3 -c 1 python benchmarks/kernel_checks.py masked_geglu cuda

First each kernel is compared with the definition in fp64 (benchmarks/kernel_checks.py), in a process of its own: one
that crashes takes nothing else along, and one that is wrong is told and not timed. Then the card's own rates are
measured, a large copy and a large fp16 product, and then every version at the shapes of SD 1.5 and SDXL, in fp16, with
1 % of the pairs of token and feature patched. What is timed is compared once more, with the first version without a
kernel of ours, so that no tile and no runtime goes unchecked. Times are the GPU's (benchmarks/gpu_timing.py). `again`
is how far apart two captures of one version are: smaller differences between versions are noise. PyTorch alone is
enough; what needs Triton or nvcc and lacks it says so in the table. It ends within 8 minutes, and tells what it had no
time for. --sweep times every configuration of `masked_geglu_linear` instead. --dry-run rehearses on the CPU with tiny
shapes; that, and a machine without a GPU, end with exit status 2. The exit status is 1 where a kernel is wrong or
crashes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from budget import SHAPES, Card, Shape
from gpu_timing import Clock, GraphClock, HostClock, StreamClock, Timing, one_line, sets_and_calls, timings
from kernel_checks import Found, check_all, relative_rms
from kernel_versions import COPY, OPERATIONS, Inputs, Version, Versions, draw, masked_geglu_in_onnxruntime, tiles
from torch import Tensor

SECONDS = 430  # after which no other shape is begun
# Of the fp16 of eager PyTorch, rounded after every step, a right kernel is about one epsilon away, and one that forgets
# 1 % of patches a hundred.
BOUND = 4 * torch.finfo(torch.float16).eps
WRONG = "it is wrong"
# What a fused kernel is compared with: a row of the table has the ratio of each one's time to the kernel's.
BASELINES = ("patched, eager", "patched, compiled", "stock, eager", "stock, compiled", COPY)
# Operation → the least that a fused kernel is meant to reach.
GOALS: Mapping[str, Mapping[str, float]] = {
    "masked_geglu": {"of copy": 0.9, "patched, eager": 3.0, "patched, compiled": 1.0},
    "masked_geglu_linear": {"patched, eager": 3.0, "patched, compiled": 1.0, "stock, eager": 1.0},
    "whole FFN": {"patched, compiled": 1.0, "stock, eager": 1.0},
}
IN_ONNXRUNTIME = "MaskedGeglu in ONNX Runtime"
COLUMNS = ("operation", "shape", "version", "µs", "again", "of copy", "of matmul", *(f"{it} / it" for it in BASELINES))


@dataclass(frozen=True)
class Row:
    """What was measured of one version, or why nothing was.

    Attributes:
        operation: what it computes.
        shape: of which sizes.
        version: how.
        seconds: of one call.
        again: its noise, as a share.
        of_copy: the bytes that the fused operation must move, over the time, as a share of the card's copy.
        of_matmul: the flops of the products, over the time, as a share of the card's large product.
        ratios: a baseline's time over this one's; of fused versions.
        remark: what else there is to say.
    """

    operation: str
    shape: str
    version: str
    seconds: float | None = None
    again: float | None = None
    of_copy: float | None = None
    of_matmul: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Bench:
    """How everything is measured.

    Attributes:
        clock: what measures.
        cache: bytes of the card's L2 cache.
        volume: bytes that one timed capture moves, about.
        rounds: how often each capture has its turn.
        backend: of torch.compile.
        large: bytes of the copy, and the side of the product, that are the card's rates.
        shapes: what is measured.
    """

    clock: Clock
    cache: int
    volume: float
    rounds: int
    backend: str
    large: tuple[int, int]
    shapes: Sequence[Shape]


def rehearsal() -> Bench:
    """On the CPU, in seconds."""
    return Bench(HostClock(), 2**12, 2**14, 2, "eager", (2**12, 16), (Shape("rehearsal", 2, 5, 8),))


def on_gpu() -> Bench:
    """On the first GPU."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Bench(GraphClock(), cache, 2e9, 15, "inductor", (2**30, 8192), SHAPES)


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write everything that was measured, as JSON")
    parser.add_argument("--sweep", action="store_true", help="time every configuration of masked_geglu_linear instead")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with tiny shapes")
    options = parser.parse_args()
    begin = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        sentence = "PyTorch finds no NVIDIA GPU here: run this on a machine with one, or rehearse it with --dry-run"
        print(sentence, file=sys.stderr)
        return 2
    checks = check_all(options.dry_run)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "checks": {", ".join(name): asdict(it) for name, it in checks.items()},
    }
    bench = rehearsal() if options.dry_run else on_gpu()
    with torch.no_grad():
        report["card"] = asdict(card := rates(bench))
        rows = measured(bench, card, checks, begin, sweep=options.sweep)
        try:
            report["card at the end"] = asdict(rates(bench))
        except Exception as error:  # noqa: BLE001 - a kernel that leaves the GPU unusable takes no earlier result along
            report["card at the end"] = one_line(error)
    report["rows"] = [asdict(it) for it in rows]
    print(*text(report, rows), sep="\n", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    if options.dry_run:
        print("this was a rehearsal on the CPU: none of it is a measurement", file=sys.stderr)
        return 2
    return int(any(it.failed for it in checks.values()) or any(WRONG in it.remark for it in rows))


def measured(bench: Bench, card: Card, checks: Mapping[tuple[str, str], Found], begin: float, sweep: bool) -> list[Row]:
    """Every row, as far as `SECONDS` after `begin` allow; each is told on stderr as it comes."""
    rows: list[Row] = []
    for operation, (make, clock) in sections(bench, sweep).items():
        for shape in bench.shapes:
            found: list[Row]
            if time.monotonic() - begin > SECONDS:
                found = [Row(operation, str(shape), "all", remark="not timed: no time was left")]
            else:
                found = [*rows_of(operation, shape, make, replace(bench, clock=clock), card, checks)]
            gc.collect()
            print(*map(asdict, found), sep="\n", file=sys.stderr, flush=True)
            rows += found
    return rows


def sections(bench: Bench, sweep: bool) -> Mapping[str, tuple[Callable[[Shape], Versions], Clock]]:
    """Operation → what makes its versions for a shape, and what measures them."""
    if sweep:
        capability = torch.cuda.get_device_capability() if bench.clock.device.type == "cuda" else (8, 0)
        return {"masked_geglu_linear": (partial(tiles, backend=bench.backend, capability=capability), bench.clock)}
    made = {name: (partial(make, backend=bench.backend), bench.clock) for name, make in OPERATIONS.items()}
    if bench.clock.device.type == "cpu":
        return made | {IN_ONNXRUNTIME: (partial(masked_geglu_in_onnxruntime, stream=None), bench.clock)}
    clock = StreamClock()
    stream = clock.stream.cuda_stream
    return made | {IN_ONNXRUNTIME: (partial(masked_geglu_in_onnxruntime, stream=stream), clock)}


def rates(bench: Bench) -> Card:
    """What the card reaches: a large device-to-device copy, read and written, and a large square fp16 product."""
    size, side = bench.large
    device = bench.clock.device
    source, target = (torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, dtype=torch.float16, device=device) for _ in range(2))
    versions = {"copy": lambda _: target.copy_(source), "product": lambda _: left @ right}
    found = timings(versions, [None], bench.clock, calls=4, rounds=bench.rounds)
    copy, product = found["copy"], found["product"]
    if isinstance(copy, str) or isinstance(product, str):
        raise RuntimeError(f"the card's own rates cannot be measured: {copy}; {product}")
    return Card(copy=2 * size / copy.seconds, matmul=2 * side**3 / product.seconds)


def rows_of(
    operation: str,
    shape: Shape,
    make: Callable[[Shape], Versions],
    bench: Bench,
    card: Card,
    checks: Mapping[tuple[str, str], Found],
) -> Iterator[Row]:
    """All versions of an operation, timed side by side but for those that are not to be."""
    torch.compiler.reset()
    try:
        versions = make(shape)
        count, calls = sets_and_calls(versions.bytes, bench.cache, bench.volume)
        sets = [draw(shape, bench.clock.device) for _ in range(count)]
        stopped = {name: "see its check" for name, needed in versions.needs.items() if checks[needed].stop}
        stopped |= wrong_ones(versions, {*versions.fused} - {*stopped}, sets[0])
        runnable = {name: run for name, run in versions.fused.items() if name not in stopped}
        times = timings({**versions.baselines, **runnable}, sets, bench.clock, calls, bench.rounds)
    except Exception as error:  # noqa: BLE001 - what was measured before must not be lost
        yield Row(operation, str(shape), "all", remark=f"not timed: {one_line(error)}")
        return
    for name in (*versions.baselines, *versions.fused):
        timed = times[name] if name in times else stopped[name]
        if isinstance(timed, str):
            yield Row(operation, str(shape), name, remark=f"not timed: {timed}")
        else:
            yield row_of(operation, shape, name, timed, versions, times, card)


def wrong_ones(versions: Versions, names: Collection[str], given: Inputs) -> dict[str, str]:
    """Which of these fused versions do not give what the first baseline gives, and in words how far they are off."""
    first, *_ = versions.baselines
    wrong: dict[str, str] = {}
    for name in names:
        try:
            expected, found = (complete(run, given) for run in (versions.baselines[first], versions.fused[name]))
            error = relative_rms(found, expected.double())
        except Exception as problem:  # noqa: BLE001 - a version that cannot run is a line of the table, not its end
            wrong[name] = one_line(problem)
        else:
            if not error <= BOUND:
                wrong[name] = f"{WRONG}, {error:.1e} from {first}"
    return wrong


def complete(run: Version, given: Inputs) -> Tensor:
    """What a version gives, on whichever stream it runs, when all of it is there."""
    if given.proj.is_cuda:
        torch.cuda.synchronize()
    out = run(given)
    if out.is_cuda:
        torch.cuda.synchronize()
    return out


def row_of(
    operation: str,
    shape: Shape,
    name: str,
    timed: Timing,
    versions: Versions,
    times: Mapping[str, Timing | str],
    card: Card,
) -> Row:
    """The row of a version that was timed, beside the others."""
    baselines = {it: other.seconds for it in BASELINES if isinstance(other := times.get(it), Timing)}
    ratios = {it: seconds / timed.seconds for it, seconds in baselines.items()} if name in versions.fused else {}
    of_copy = versions.bytes / timed.seconds / card.copy
    return Row(
        operation,
        str(shape),
        name,
        timed.seconds,
        timed.again,
        of_copy,
        versions.flops / timed.seconds / card.matmul if versions.flops else None,
        ratios,
        verdict(operation, {**ratios, "of copy": of_copy}) if ratios else "",
    )


def verdict(operation: str, reached: Mapping[str, float]) -> str:
    """Which goals are missed; a baseline that has no time is one that cannot be judged."""
    said = []
    for name, least in GOALS.get(operation, {}).items():
        if name not in reached:
            said.append(f"cannot judge {name}")
        elif not reached[name] >= least:
            said.append(f"misses {name} {least:g}")
    return ", ".join(said) or ("meets its goals" if operation in GOALS else "")


def text(report: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What is printed: one table of the fused versions, with the checks and the card at its head."""
    yield f"{report['date']}; " + "; ".join(f"{name} {it}" for name, it in report["machine"].items())
    yield f"| {' | '.join(COLUMNS)} | remarks |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for when in ("card", "card at the end"):
        card = report[when]
        if not isinstance(card, str):
            card = f"copy {card['copy'] / 1e12:.2f} TB/s, fp16 product {card['matmul'] / 1e12:.0f} TFLOP/s"
        yield _line((when,), card)
    for name, found in report["checks"].items():
        worst = ", ".join(f"{dtype} {share:.2f}" for dtype, share in found["worst"].items())
        said = f"{found['cases']} cases, largest error / bound: {worst}" if found["cases"] else ""
        wrong = f"{len(found['wrong'])} WRONG, first {found['wrong'][0]}" if found["wrong"] else ""
        yield _line(
            (name.split(", ")[0], "check", name.split(", ")[1]), "; ".join(filter(None, (said, wrong, found["stop"])))
        )
    for row in rows:
        if row.version not in (*BASELINES, "Linear alone") or row.seconds is None:
            numbers = (
                *((f"{1e6 * row.seconds:.1f}",) if row.seconds is not None else ("",)),
                *("" if it is None else f"{it:.0%}" for it in (row.again, row.of_copy, row.of_matmul)),
                *(f"{row.ratios[it]:.2f}" if it in row.ratios else "" for it in BASELINES),
            )
            yield _line((row.operation, row.shape, row.version, *numbers), row.remark)


def _line(cells: Sequence[str], remark: str) -> str:
    blank = [""] * (len(COLUMNS) - len(cells))
    return f"| {' | '.join((*cells, *blank, remark))} |"


def machine() -> dict[str, str]:
    """The GPU, and the versions of what is used."""
    found = {"python": platform.python_version(), "processor": platform.machine()}
    for name in ("torch", "triton", "nvidia-cuda-nvcc", "onnxruntime", "onnxruntime-gpu", "tensorrt"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        it = torch.cuda.get_device_properties(0)
        found["gpu"] = (
            f"{it.name}, compute capability {it.major}.{it.minor}, {it.multi_processor_count} multiprocessors, "
            f"{it.total_memory / 2**30:.0f} GiB, L2 {it.L2_cache_size / 2**20:.0f} MiB"
        )
        found["CUDA of torch"] = str(torch.version.cuda)
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 - found above
        found["driver"] = next(iter(done.stdout.splitlines()), "unknown").strip()
    return found


if __name__ == "__main__":
    sys.exit(main())
