"""What patches in a UNet cost in ONNX Runtime, what removed units save, and how far the graph is from eager hooks.

    python benchmarks/unet.py shapes
    python benchmarks/unet.py sd15 --quick
    python benchmarks/unet.py sd15 --rounds 0
    python benchmarks/unet.py shapes --only tokens --kernels library

The model is `shapes`, or one with random weights in fp16 whose UNet is of full size (benchmarks/full_size.py), with
--quick of one level. Its UNet is exported with random patches of the input of every FFN-2, each realisation of them:
features folded into biases, folded and their units removed, and pairs of token and feature that the graph patches. An
edited UNet and the plain one then run in turn, batch 2, --rounds times, in a process with just these two, and once more
in another where they are loaded in the other order, because of two equal sessions the first is often slower. A ratio is
the geometric mean of both processes' ratios of times in the same round, and what is told is the median with a 95 %
bootstrap interval. `plain again` is the same graph in a second session. Time to load, and the peak of memory beyond
the libraries', are those of one session and one call in a process of its own; that call's answer is compared with the
reference's. The part of the operators' time that is of Where, which only patches have, is ONNX Runtime's own count for
a second call there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from full_size import write_full_size
from random_patches import patches
from ratios import interval
from safetensors.torch import load_file, save_file
from torch import Tensor

from bakeout.editor.edit import Edit
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import write_onnx
from bakeout.export.shrink import kept_units
from bakeout.kernels.build import library
from bakeout.validate.metrics import relative_rms
from bakeout.validate.reference import applied

Numbers = np.ndarray[Any, np.dtype[np.float64]]
BATCH, TOKENS = 2, 77
SHARES_OF_FEATURES = (0.01, 0.05, 0.25)
MULTIPLES = (1, 8, 64)
SHARES_OF_PAIRS = (0.003, 0.01, 0.05)
# Networks that no measurement here runs.
SMALLER: Mapping[str, Mapping[str, Any]] = {
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1},
    "text_encoder": {"num_hidden_layers": 1},
}
# The level of SD 1.5 that has most tokens; there a patch costs most, for the work that it is added to.
QUICK: Mapping[str, Any] = {
    "block_out_channels": [320],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}


@dataclass(frozen=True)
class Variant:
    """A realisation.

    Attributes:
        name: what it is, in words.
        edit: an Edit that has it.
        multiple: of what the number of units is kept where units are removed; 0 removes none.
    """

    name: str
    edit: Edit
    multiple: int = 0


def variants(model: Model, side: int) -> Iterator[Variant]:
    """Every realisation, of random patches for latents of `side` cells a side."""
    yield Variant("plain", Edit(()))
    yield Variant("plain again", Edit(()))
    yield Variant(f"{SHARES_OF_FEATURES[-1]:.0%} of the features, folded", patches(model, SHARES_OF_FEATURES[-1]))
    for share in SHARES_OF_FEATURES:
        for multiple in MULTIPLES:
            name = f"{share:.0%} of the features, removed, multiples of {multiple}"
            yield Variant(name, patches(model, share), multiple)
    for share in SHARES_OF_PAIRS:
        yield Variant(f"{share:.1%} of tokens x features", patches(model, share, side))


def chosen(model: Model, side: int, only: Sequence[str]) -> Iterator[Variant]:
    """The plain one, and those with one of the texts in their names, or all if there are none."""
    for variant in variants(model, side):
        if not only or variant.name == "plain" or any(text in variant.name for text in only):
            yield variant


def export(model: Model, variant: Variant, folder: Path) -> Path:
    """Write the UNet's graph with the edit of a variant."""
    unet = replace(model, components={"unet": model.components["unet"]}, parts={})
    lowered = lower_onto(variant.edit, unet)
    kept = kept_units(variant.edit, {site.name: site for site in model.sites}, variant.multiple)
    write_onnx(unet, folder, changed=lowered.state, remaining=lowered.remaining, kept=kept)
    return folder / "unet" / "model.onnx"


def inputs(model: Model, side: int) -> dict[str, Tensor]:
    """Random inputs, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    config = model.components["unet"].config
    return {
        "sample": torch.randn(BATCH, config["in_channels"], side, side, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, config["cross_attention_dim"], generator=generator),
    }


@torch.inference_mode()
def hooked(model: Model, side: int, only: Sequence[str]) -> dict[str, Tensor]:
    """What the UNet gives in eager PyTorch under the hooks of each Edit, by its digest."""
    pipeline = model.pipeline(dtype=torch.float32)
    given = inputs(model, side)
    answers = {}
    for digest, edit in {it.edit.digest: it.edit for it in chosen(model, side, only)}.items():
        with applied(edit, model, pipeline):
            answers[digest] = pipeline.unet(*given.values()).sample
    return answers


def session_of(path: Path, given: argparse.Namespace, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session of a graph on the CPU, without memory patterns and remarks as bakeout has it.

    `profile` is the beginning of the name of a file for the operators' times.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    if given.kernels == "library":
        options.register_custom_ops_library(str(library("cpu")))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def called_alone(
    path: Path, tensors: Mapping[str, Tensor], given: argparse.Namespace
) -> tuple[Tensor, dict[str, float]]:
    """The answer of a graph, and what a session with it takes.

    That is the seconds to load it; the peak of memory, in GB, that session and call add; and of another call the part
    of the operators' time that is of Where, which only patches have.
    """
    feeds = {name: value.numpy() for name, value in tensors.items()}
    with tempfile.TemporaryDirectory() as work:
        before = memory("VmRSS")
        started = time.perf_counter()
        session = session_of(path, given, Path(work) / "profile")
        loaded = time.perf_counter() - started
        [answer] = session.run(None, feeds)
        peak = memory("VmHWM") - before
        session.run(None, feeds)
        share = share_of("Where", json.loads(Path(session.end_profiling()).read_text()))
    return torch.from_numpy(answer), {"load": loaded, "peak_gb": peak, "where": share}


def share_of(operator: str, events: Sequence[Mapping[str, Any]]) -> float:
    """The part that an operator has of all operators' time in the last of the profiled calls."""
    last = max(event["ts"] for event in events if event["name"] == "model_run")
    took: list[tuple[str, float]] = [
        (event["args"]["op_name"], event["dur"])
        for event in events
        if event["name"].endswith("_kernel_time") and event["ts"] >= last
    ]
    return sum(time for name, time in took if name == operator) / sum(time for _, time in took)


def memory(what: str) -> float:
    """GB of this process, of Linux: `VmRSS` now, or `VmHWM` at most; getrusage counts the parent's too."""
    said = Path("/proc/self/status").read_text()
    return int(said.partition(f"{what}:")[2].split()[0]) / 1e6


def timed(paths: Sequence[Path], tensors: Mapping[str, Tensor], given: argparse.Namespace) -> Numbers:
    """Seconds of a call of each graph in each round [rounds, graphs]; every round begins with another graph.

    They are the processor's, of all threads: other work on the machine counts as little as can be.
    """
    feeds = {name: value.numpy() for name, value in tensors.items()}
    sessions = [session_of(path, given) for path in paths]
    seconds = np.empty((given.rounds + 1, len(sessions)))
    for number in range(given.rounds + 1):
        for place in np.roll(np.arange(len(sessions)), number):
            started = time.process_time()
            sessions[place].run(None, feeds)
            seconds[number, place] = time.process_time() - started
    return seconds[1:]  # the first warms up


def structure_of(path: Path) -> tuple[list[str], list[tuple[int, ...]]]:
    """The operators of a graph in order, and the shapes of its constants."""
    graph = onnx.load(path, load_external_data=False).graph
    return [node.op_type for node in graph.node], sorted(tuple(it.dims) for it in graph.initializer)


def rows_of(model: Model, given: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """A row for each variant."""
    in_a_process(model, given, "--hooks", work / "hooks")
    answers = load_file(work / "hooks")
    base = answers[Edit(()).digest]
    plain = export(model, Variant("plain", Edit(())), work / "plain")
    for variant in chosen(model, given.side, given.only):
        with tempfile.TemporaryDirectory(dir=work) as place:
            path = export(model, variant, Path(place) / "onnx")
            row: dict[str, Any] = {
                "variant": variant.name,
                "nodes": len(structure_of(path)[0]),
                "as_plain": structure_of(path) == structure_of(plain),
                "onnx_gb": sum(file.stat().st_size for file in path.parent.iterdir()) / 1e9,
                "edit_mb": len(variant.edit.to_bytes()) / 1e6,
            }
            row |= in_a_process(model, given, "--alone", path, "--answer", work / "answer")
            answer, expected = load_file(work / "answer")["answer"], answers[variant.edit.digest]
            row |= {"parity": relative_rms(answer, expected), "effect": relative_rms(expected, base)}
            if given.rounds and variant.name != "plain":
                seconds = np.array(in_a_process(model, given, "--pair", plain, path))
                swapped = np.array(in_a_process(model, given, "--pair", path, plain))
                row |= interval(np.sqrt(seconds[:, 1] / seconds[:, 0] * swapped[:, 0] / swapped[:, 1]))
        print(row, file=sys.stderr, flush=True)
        yield row


def in_a_process(model: Model, given: argparse.Namespace, *stage: str | Path) -> Any:
    """What a stage prints, run in a process of its own."""
    command = [sys.executable, __file__, given.name, "--folder", str(model.path), "--side", str(given.side)]
    command += ["--rounds", str(given.rounds), "--threads", str(given.threads), "--kernels", given.kernels]
    command += map(str, stage)
    command += [word for text in given.only for word in ("--only", text)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
    return json.loads(done.stdout.splitlines()[-1])


def stage_here(model: Model, given: argparse.Namespace) -> Any:
    """Do a stage in this process."""
    if given.hooks:
        save_file(hooked(model, given.side, given.only), given.hooks)
        return {}
    if given.alone:
        answer, facts = called_alone(given.alone, inputs(model, given.side), given)
        save_file({"answer": answer}, given.answer)
        return facts
    return timed(given.pair, inputs(model, given.side), given).tolist()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The measurements as Markdown."""
    head = ("edit", "nodes", "time / plain (95 %)", "of it in Where", "load / plain", "memory, GB", "graph, GB",
            "edit.safetensors, MB", "against hooks", "edited from base")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shown = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if "ratio" in row else "1"
        cells = (
            row["variant"],
            f"{row['nodes']}{' (as plain)' if row['as_plain'] else ''}",
            shown,
            f"{row['where']:.1%}",
            f"{row['load'] / rows[0]['load']:.2f}",
            f"{row['peak_gb']:.2f}",
            f"{row['onnx_gb']:.3f}",
            f"{row['edit_mb']:.2f}",
            f"{row['parity']:.1e}",
            f"{row['effect']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the UNet of a model, or do one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("shapes", "sd15"))
    parser.add_argument("--quick", action="store_true", help="a UNet of one level in place of four")
    parser.add_argument("--folder", type=Path, help="of a model, in place of one that is written for this")
    parser.add_argument("--side", type=int, help="of the latents; the model's own unless given")
    parser.add_argument("--only", action="append", default=[], help="realisations with this text in their names")
    parser.add_argument("--rounds", type=int, default=20, help="0 compares only")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--kernels", choices=("function", "library"), default="function", help="see SessionSettings")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hooks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pair", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = given.folder or work / "model"
        if given.folder is None and given.name == "sd15":
            write_full_size("sd15", folder, smaller={**SMALLER, "unet": QUICK if given.quick else {}})
        model = open_model("shapes" if given.name == "shapes" else folder)
        given.side = given.side or model.components["unet"].config["sample_size"]
        if given.hooks or given.alone or given.pair:
            print(json.dumps(stage_here(model, given)))
            return
        rows = list(rows_of(model, given, work))
    print(json.dumps(rows) if given.json else table(rows))


if __name__ == "__main__":
    main()
