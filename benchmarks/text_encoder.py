"""What an edit in a text encoder's graph costs in ONNX Runtime, and how far it is from eager hooks on the base.

    python benchmarks/text_encoder.py sd15
    python benchmarks/text_encoder.py sdxl --rounds 0

Writes the model with random weights in fp16, its text encoders of full size (benchmarks/full_size.py), and exports each
text encoder with every realisation of an edit at SNCE's layer: folded, a constant, and gated neurons of an autoencoder
with m = 4d and K = 32, in both forms. Each is compared with the reference on two prompts, one of them empty. Then all
of them run in turn, --rounds times: a ratio is the time of the edited encoder over that of the plain one in the same
round, and what is told is the median with a 95 % bootstrap interval. `plain again` is the same graph in a second
session.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from full_size import write_full_size
from ratios import interval
from torch import Tensor

from bakeout.editor.edit import Edit, ShiftActivation, SteerLatents
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import write_onnx
from bakeout.export.steer import Gate
from bakeout.validate.metrics import relative_rms
from bakeout.validate.reference import applied

Seconds = np.ndarray[Any, np.dtype[np.float64]]
PROMPTS = ("a photo of a cat on a red chair", "")
K = 32
# Networks that no measurement here runs.
SMALLER: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd15": {"unet": {"block_out_channels": [32] * 4, "layers_per_block": 1},
             "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1}},
    "sdxl": {"unet": {"block_out_channels": [32] * 3, "layers_per_block": 1, "attention_head_dim": [4] * 3,
                      "transformer_layers_per_block": [1] * 3},
             "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1}},
}  # fmt: skip


class Subject:
    """A text encoder, and what its layer gives for the prompts.

    Attributes:
        name: of the component.
        site: of SNCE's layer.
        ids: int64 [2, 77].
        activations: float [2, 77, d], the layer's output.
    """

    @torch.no_grad()
    def __init__(self, model: Model, pipeline: Any, name: str) -> None:
        self.model, self.pipeline, self.name = model, pipeline, name
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        self.ids: Tensor = tokenizer([*PROMPTS], padding="max_length", return_tensors="pt").input_ids
        depth = len([site for site in model.sites_of("text_layer") if site.component == name])
        layer = round(depth * 10 / 12) - 1
        self.site = f"{name}.layer.{layer}"
        self.activations: Tensor = getattr(pipeline, name)(self.ids, output_hidden_states=True).hidden_states[layer + 1]

    @torch.no_grad()
    def hooked(self, edit: Edit) -> dict[str, Tensor]:
        """What the reference gives, under the names of the graph's outputs."""
        with applied(edit, self.model, self.pipeline):
            output = getattr(self.pipeline, self.name)(self.ids, output_hidden_states=True)
        states = {f"hidden_states.{number}": state for number, state in enumerate(output.hidden_states)}
        return {**{name: output[name] for name in output if name != "hidden_states"}, **states}


def edits_of(subject: Subject) -> Iterator[tuple[str, Edit, Gate | None]]:
    """Each realisation: what it is, an Edit that has it, and the gate."""
    width = subject.activations.shape[-1]
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(width, 4 * width, generator=generator)
    directions /= directions.norm(dim=0)
    # Neurons that many tokens have among their largest.
    largest = (subject.activations[0] @ directions).topk(K).indices
    often = torch.bincount(largest.flatten(), minlength=4 * width).argsort(descending=True, stable=True)
    scale = 0.1 * float(subject.activations.square().mean().sqrt())
    vector, matrix = (scale * torch.randn(shape, generator=generator) for shape in ((width,), (77, width)))

    def latents(count: int) -> SteerLatents:
        neurons = often[:count].sort().values
        return SteerLatents(
            subject.site, directions.T.contiguous(), torch.zeros(4 * width), torch.zeros(width), K, neurons,
            directions[:, neurons], torch.ones(count), "prompted",
        )  # fmt: skip

    yield "plain", Edit(()), None
    yield "plain again", Edit(()), None
    yield "folded into a bias", Edit((ShiftActivation(subject.site, vector),)), None
    yield "constant [77, d]", Edit((ShiftActivation(subject.site, matrix),)), None
    yield "constant [77, d], not for empty prompts", Edit((ShiftActivation(subject.site, matrix, "prompted"),)), None
    gates: tuple[Gate, ...] = ("rank", "topk")
    for gate in gates:
        for count in (1, 10, 20):
            yield f"gated by {'rank' if gate == 'rank' else 'TopK'}, r = {count}", Edit((latents(count),)), gate


def exported(subject: Subject, edit: Edit, gate: Gate | None, folder: Path) -> Path:
    """The graph of the text encoder with the edit."""
    model = replace(subject.model, components={subject.name: subject.model.components[subject.name]})
    lowered = lower_onto(edit, model)
    write_onnx(model, folder, changed=lowered.state, remaining=lowered.remaining, gate=gate)
    return folder / subject.name / "model.onnx"


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session of a graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compared(
    session: onnxruntime.InferenceSession, subject: Subject, edit: Edit, plain: Mapping[str, Tensor]
) -> dict[str, float]:
    """Relative RMS of the worst output against hooks on the base, and how far the edit takes the last one from it."""
    names = [it.name for it in session.get_outputs()]
    found = dict(zip(names, map(torch.from_numpy, session.run(None, {"input_ids": subject.ids.numpy()})), strict=True))
    expected = subject.hooked(edit)
    last = "last_hidden_state"
    parity = max(relative_rms(tensor, expected[name]) for name, tensor in found.items())
    return {"parity": parity, "effect": relative_rms(expected[last], plain[last])}


def timed(sessions: Sequence[onnxruntime.InferenceSession], ids: Tensor, rounds: int) -> Seconds:
    """Seconds of each session's call in each round [rounds, sessions]; every round begins with another session."""
    seconds = np.empty((rounds + 1, len(sessions)))
    for number in range(rounds + 1):
        for place in np.roll(np.arange(len(sessions)), number):
            started = time.perf_counter()
            sessions[place].run(None, {"input_ids": ids.numpy()})
            seconds[number, place] = time.perf_counter() - started
    return seconds[1:]  # the first warms up


def measure(model: Model, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each text encoder and realisation."""
    pipeline = model.pipeline(dtype=torch.float32)
    rows: list[dict[str, Any]] = []
    for name in (name for name in model.components if name.startswith("text_encoder")):
        subject = Subject(model, pipeline, name)
        plain = subject.hooked(Edit(()))
        found: list[dict[str, Any]] = []
        sessions: list[onnxruntime.InferenceSession] = []
        for what, edit, gate in edits_of(subject):
            with tempfile.TemporaryDirectory() as work:
                path = exported(subject, edit, gate, Path(work) / "onnx")
                nodes = len(onnx.load(path, load_external_data=False).graph.node)
                session = session_of(path, threads)
            found.append({"encoder": name, "realisation": what, "nodes": nodes})
            found[-1] |= compared(session, subject, edit, plain)
            sessions += [session] if rounds else []
            print(found[-1], file=sys.stderr, flush=True)
        if rounds:
            seconds = timed(sessions, subject.ids, rounds).T
            found = [{**row, **interval(own / seconds[0])} for row, own in zip(found, seconds, strict=True)]
        rows += found
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The measurements as Markdown."""
    head = ("encoder", "edit", "nodes", "time / plain (95 %)", "against hooks", "edited from base")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shown = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if "ratio" in row else ""
        cells = (
            row["encoder"],
            row["realisation"],
            str(row["nodes"]),
            shown,
            f"{row['parity']:.1e}",
            f"{row['effect']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the text encoders of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(SMALLER))
    parser.add_argument("--rounds", type=int, default=60, help="0 compares only")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        write_full_size(given.name, folder, smaller=SMALLER[given.name])
        rows = measure(open_model(folder), given.rounds, given.threads)
    print(json.dumps(rows) if given.json else table(rows))


if __name__ == "__main__":
    main()
