"""ActErase's calibration against the UNet's calls that it makes, and nothing else.

    python benchmarks/acterase_calibration.py --model shapes
    python benchmarks/acterase_calibration.py --model sd15-width --side 64 --pairs 2 --steps 4

The other variant makes as many calls on random inputs of the same shapes. Each runs in a process of its own, --rounds
times in turn. Time is the processor's, summed over threads; with OMP_NUM_THREADS=1 no thread waits for another. What is
told is the median of the rounds' ratios, and the lowest peak of memory of each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from calibration import WORDS, model_and_pipeline
from torch import Tensor

from bakeout.editor.methods import acterase
from bakeout.editor.model import Model
from bakeout.editor.prompts import Pair


def calibrated(model: Model, pipeline: Any, pairs: int, steps: int) -> dict[str, Any]:
    """Calibrate: the shape [rows, tokens] of the text of every call of the UNet, and how large the Edit is."""
    calls: list[list[int]] = []

    # Not before a call: one that is broken off before it begins would count.
    def note(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], _output: object) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        calls.append([*text.shape[:2]])

    prompts = [Pair(f"a {word} in the style of ink", f"a photo of a {word}") for word in WORDS[:pairs]]
    with pipeline.unet.register_forward_hook(note, with_kwargs=True):
        edit = acterase.calibrate(model, pipeline, "ink", prompts, acterase.Settings(steps=steps))
    masks = [it.touched for it in edit.operations]
    return {
        "calls": calls,
        "masked": sum(count for count, _, _ in masks),
        "of": sum(of for _, of, _ in masks),
        "edit_mb": len(edit.to_bytes()) / 1e6,
    }


@torch.inference_mode()
def called(pipeline: Any, calls: list[list[int]]) -> None:
    """Call the UNet on random inputs of these shapes."""
    config = pipeline.unet.config
    for rows, tokens in calls:
        latents = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
        text = torch.randn(rows, tokens, config.cross_attention_dim)
        pipeline.unet(latents, 500, text, return_dict=False)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in this process: its processor time and the peak of memory."""
    model, pipeline = model_and_pipeline(given.model, given.side)
    start = time.process_time()
    found: dict[str, Any] = {}
    if given.calls is None:
        found = calibrated(model, pipeline, given.pairs, given.steps)
    else:
        called(pipeline, json.loads(given.calls.read_text()))
    seconds = time.process_time() - start
    return {**found, "seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def in_a_process(given: argparse.Namespace, *stage: str) -> dict[str, Any]:
    """What `measure` finds, of a process of its own."""
    command = [sys.executable, __file__, "--model", given.model, "--side", str(given.side)]
    command += ["--pairs", str(given.pairs), "--steps", str(given.steps), "--stage", *stage]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(given: argparse.Namespace, work: Path) -> dict[str, float]:
    """What calibration takes beyond the calls, as ratio of time and in GB."""
    calls = work / "calls"
    found: dict[str, list[dict[str, Any]]] = {"calibrated": [], "called": []}
    for _ in range(given.rounds):
        found["calibrated"].append(in_a_process(given, "calibrate"))
        calls.write_text(json.dumps(found["calibrated"][-1]["calls"]))
        found["called"].append(in_a_process(given, "call", "--calls", str(calls)))
    rounds = list(zip(found["calibrated"], found["called"], strict=True))
    first = found["calibrated"][0]
    peaks = {variant: min(it["peak_gb"] for it in own) for variant, own in found.items()}
    ratios = [own["seconds"] / bare["seconds"] for own, bare in rounds]
    return {
        "calls": len(first["calls"]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "beyond_gb": peaks["calibrated"] - peaks["called"],
        "masked": first["masked"] / max(first["of"], 1),
        "edit_mb": first["edit_mb"],
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", "sd15-width"], default="shapes")
    parser.add_argument("--pairs", type=int, default=4, choices=range(1, len(WORDS) + 1), help="prompt pairs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--side", type=int, default=8, help="of the latent of sd15-width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", choices=("calibrate", "call"), help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        print(json.dumps(measure(given)))
        return
    with tempfile.TemporaryDirectory() as work:
        found = compare(given, Path(work))
    print(f"| {given.model}, {given.pairs} pairs, {given.steps} steps | |")
    print("|---|---|")
    print(f"| calls of the UNet | {found['calls']:.0f} |")
    print(f"| time / that of the calls (of {given.rounds} rounds: least, most) | {found['ratio']:.3f} "
          f"({found['low']:.3f}, {found['high']:.3f}) |")  # fmt: skip
    print(f"| peak memory beyond that of the calls, GB | {found['beyond_gb']:.2f} |")
    print(f"| masked of the layers in the Edit | {found['masked']:.2%} |")
    print(f"| edit.safetensors, MB | {found['edit_mb']:.2f} |")


if __name__ == "__main__":
    main()
