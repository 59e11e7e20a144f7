"""What an erased model costs on a GPU, in every runtime: latency, memory, and the edit's overhead; in one table.

    python benchmarks/gpu.py WORK
    python benchmarks/gpu.py WORK --part sd15/tensorrt
    python benchmarks/gpu.py REHEARSAL --dry-run

Models have the sizes of SD 1.5 and SDXL and random weights (benchmarks/full_size.py). Each is erased in the form of
each method, with random masks as dense as the method's, and runs in eager PyTorch, torch.compile, ONNX Runtime with
CUDA, and TensorRT, in fp16. A network's call and a whole picture are timed beside those of the unedited model, which
are called in turn (benchmarks/gpu_latency.py): of the rounds' ratios the median is told, with a 95 % bootstrap
interval. The unedited model beside itself says how fine that resolves. A network that is wrong is not timed.

Every part, as sd15/tensorrt/snce, is a process of its own that has --seconds, so that none takes another along. What
cannot run is told in one sentence, and the next part begins. WORK/gpu.json has what was measured, WORK/gpu.md the
table; called again, only what was not measured yet is run. Models and engines stay in WORK until all is measured.
--dry-run rehearses on the CPU with tiny models; that, and a machine without a GPU, end with exit status 2. The exit
status is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import machine
from gpu_latency import PICTURE, Bench, measure
from gpu_models import MODELS, ON_CPU, PLAIN, RUNTIMES, VARIANTS, Home
from gpu_timing import one_line

from bakeout.editor.errors import InputError

COLUMNS = ("network", "ms", "unedited, ms", "edited / unedited (95 %)", "goal", "from fp32", "memory, GB", "remarks")
# Where a goal holds: what an edit of a UNet slows, and what anybody waits for.
JUDGED = ("unet", PICTURE)
Report = dict[str, Any]


def on_gpu(steps: int) -> Bench:
    """On the first GPU."""
    return Bench("cuda:0", "fp16", steps, seconds=15.0, rounds=(10, 300), small=False)


def rehearsal() -> Bench:
    """On the CPU, in minutes."""
    return Bench("cpu", "fp32", 2, seconds=0.0, rounds=(2, 2), small=True)


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the models and of what is measured")
    parser.add_argument("--part", action="append", default=[], help="run only parts whose names begin so")
    parser.add_argument("--steps", type=int, default=20, help="of a picture")
    parser.add_argument("--seconds", type=int, default=580, help="that a part has")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with tiny models")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    bench = rehearsal() if given.dry_run else on_gpu(given.steps)
    if not given.dry_run and not torch.cuda.is_available():
        return _refuse("PyTorch finds no NVIDIA GPU here: run this on a machine with one, or rehearse with --dry-run")
    if given.measure:
        print(json.dumps(found(given.work, given.measure, bench)))
        return 0
    report = read(given.work / "gpu.json", bench)
    if report is None:
        return _refuse(f"{given.work} has what was measured elsewhere or otherwise: give another folder")
    parts = [part for part in all_parts(bench) if part.startswith(tuple(given.part or [""]))]
    if not parts:
        return _refuse(f"no part begins with {given.part[0]!a:.100}; one of them is {next(all_parts(bench))}")
    for part in parts:
        if "networks" not in report["parts"].get(part, {}):
            report["parts"][part] = in_a_process(given, part)
            write(given.work, report)
            print(part, json.dumps(report["parts"][part]), file=sys.stderr, flush=True)
            make_room(given.work, report, bench)
    print(text(report))
    if given.dry_run:
        return _refuse("this was a rehearsal on the CPU: none of it is a measurement")
    rows = [it for part in parts for it in report["parts"][part].get("networks", {}).values()]
    return int(any("why" in it for it in rows))


def all_parts(bench: Bench) -> Iterator[str]:
    """Every part, in order: what is unedited comes first, with which the others are compared."""
    for model in MODELS:
        for variant in VARIANTS:
            yield from (f"{model}/{runtime}/{variant}" for runtime in _runtimes(bench))


def found(work: Path, part: str, bench: Bench) -> Mapping[str, Any]:
    """What is measured of a part, or `why` it is not."""
    model, runtime, variant = part.split("/")
    try:
        return measure(Home(work, model, bench.small), variant, _runtimes(bench)[runtime], bench)
    except InputError as error:
        return {"why": str(error)}
    except Exception as error:  # noqa: BLE001 - a runtime that cannot is a line of the table, not its end
        return {"why": one_line(error)}


def in_a_process(given: argparse.Namespace, part: str) -> Any:
    """`found`, in a process of its own, which may crash or take too long."""
    command = [sys.executable, __file__, str(given.work), "--measure", part, "--steps", str(given.steps)]
    command += ["--dry-run"] * given.dry_run
    try:
        done = subprocess.run(  # noqa: S603 - this file
            command, stdout=subprocess.PIPE, text=True, timeout=given.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"why": f"{given.seconds} s were too short; call again, and it goes on with what was made"}
    if done.returncode:
        return {"why": f"its process ended with exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def read(path: Path, bench: Bench) -> Report | None:
    """What was measured before; None if that was elsewhere or otherwise."""
    here = {"machine": machine(), "precision": bench.precision, "steps": bench.steps}
    if not path.exists():
        return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **here, "parts": {}}
    report: Report = json.loads(path.read_text(encoding="utf-8"))
    return report if {name: report.get(name) for name in here} == here else None


def write(work: Path, report: Report) -> None:
    """Put down what was measured so far."""
    work.mkdir(parents=True, exist_ok=True)
    for name, content in (("gpu.json", json.dumps(report, indent=1, allow_nan=False) + "\n"), ("gpu.md", text(report))):
        aside = work / f"{name}.part"
        aside.write_text(content, encoding="utf-8")
        aside.replace(work / name)


def make_room(work: Path, report: Report, bench: Bench) -> None:
    """Remove artifacts that no part needs any more; every part needs that of the unedited model."""
    for model in MODELS:
        left = {part.split("/")[2] for part in all_parts(bench) if part.startswith(f"{model}/")
                and "networks" not in report["parts"].get(part, {})}  # fmt: skip
        for variant in VARIANTS.keys() - left - ({PLAIN} if left else set()):
            Home(work, model, bench.small).remove(variant)


def text(report: Report) -> str:
    """The table, in Markdown."""
    here = "; ".join(f"{name} {it}" for name, it in report["machine"].items())
    lines = [f"{report['date']}; {here}; {report['precision']}, {report['steps']} steps", ""]
    for model, name in MODELS.items():
        head = (name, "runtime", "edit", *COLUMNS)
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for part, row in report["parts"].items():
            if part.startswith(f"{model}/"):
                lines += [f"| {' | '.join(cells)} |" for cells in rows_of(part, row, report)]
        lines.append("")
    return "\n".join(lines)


def rows_of(part: str, row: Mapping[str, Any], report: Report) -> Iterator[Sequence[str]]:
    """A row for each network of a part, or one that says why there is none."""
    model, runtime, variant = part.split("/")
    first = ("", ON_CPU[runtime].what, VARIANTS[variant].what)
    if "networks" not in row:
        yield (*first, *[""] * (len(COLUMNS) - 1), f"not measured: {_safe(row['why'])}")
        return
    alone = report["parts"].get(f"{model}/{runtime}/{PLAIN}", {}).get("networks", {})
    for name, it in row["networks"].items():
        error = f"{it['error']:.1e}" if "error" in it else ""
        memory = f"{row['memory_gb']:.2f}" if name == PICTURE else ""
        if "why" in it:
            yield (*first, name, "", "", "", "", error, memory, f"not timed: {_safe(it['why'])}")
            continue
        goal = VARIANTS[variant].goal if name in JUDGED else None
        ratio = f"{it['ratio']:.3f} ({it['low']:.3f} to {it['high']:.3f})"
        said = "" if goal is None else verdict(it, goal, alone.get(name, {}))
        shown = "" if goal is None else f"≤ {goal:.2f}"
        yield (*first, name, f"{it['ms']:.2f}", f"{it['plain_ms']:.2f}", ratio, shown, error, memory, said)


def verdict(it: Mapping[str, Any], goal: float, alone: Mapping[str, Any]) -> str:
    """Whether a ratio reaches its goal, as far as it can be told.

    The unedited model beside itself has a ratio other than one, for reasons of how it is measured; by so much the
    interval is wider on either side.
    """
    if "ratio" not in alone:
        return "not resolved: the unedited model was not measured beside itself"
    noise = max(abs(alone[name] - 1) for name in ("ratio", "low", "high"))
    if it["high"] + noise <= goal:
        return "met"
    return "missed" if it["low"] - noise > goal else f"not resolved: beside itself ± {noise:.3f}"


def _runtimes(bench: Bench) -> Mapping[str, Any]:
    return ON_CPU if bench.small else RUNTIMES


def _safe(words: str) -> str:
    return " ".join(words.split()).replace("|", "/")


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
