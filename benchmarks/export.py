"""Export a model of full size, every stage in a process of its own, and the same networks by `torch.onnx.export` alone.

    python benchmarks/export.py sd15
    python benchmarks/export.py sdxl

Writes the model with random weights in fp16 (benchmarks/full_size.py), or takes an earlier one with --folder. For each
network it reports time and peak memory of our export, of `torch.onnx.export` as its documentation shows it (with
loading and saving), and of a session of ONNX Runtime with one call, which is compared with eager PyTorch. Latents have
--side cells a side.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from full_size import write_full_size
from safetensors.torch import load_file, save_file
from torch import Tensor

from bakeout.editor.model import Model, open_model
from bakeout.editor.weights import load_module
from bakeout.export.graphs import Graph, graphs_of
from bakeout.export.onnx import OPSET, write_onnx
from bakeout.validate.metrics import relative_rms

STAGES = ("ours", "theirs", "eager", "run")


def graph_of(model: Model, name: str) -> Graph:
    """The graph called `name`, traced from a network without weights."""
    return next(graph for graph in graphs_of(model) if graph.name == name)


def with_weights(graph: Graph) -> torch.nn.Module:
    """The graph's module with the weights of its component, in fp32."""
    it = graph.component
    network = load_module(it.class_name, it.config, it.tensors, it.locations, "cpu", torch.float32)
    graph.module.network = network
    return graph.module


def inputs_of(graph: Graph, side: int) -> dict[str, Tensor]:
    """Random inputs, the same in every process: latents of `side` cells, pictures of eight times that."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, it in graph.inputs.items():
        shape = [*it.shape]
        if len(shape) == 4:
            shape[2:] = [side * (8 if graph.name == "vae_encoder" else 1)] * 2
        if it.dtype == torch.int64:
            made[name] = torch.randint(0, 49408, shape, generator=generator)
        else:
            made[name] = torch.randn(shape, generator=generator) if shape else torch.tensor(500.0)
    return made


def ours(model: Model, graph: str, work: Path, side: int) -> dict[str, float]:
    """Write the component of a graph."""
    del side
    component = model.components[component_of(graph)]
    write_onnx(replace(model, components={component.name: component}, parts={}), work / f"ours-{component.name}")
    return {}


def theirs(model: Model, graph: str, work: Path, side: int) -> dict[str, float]:
    """Load, export and save a graph the way of torch's documentation."""
    del side
    found = graph_of(model, graph)
    example = tuple(torch.zeros(it.shape, dtype=it.dtype) for it in found.inputs.values())
    dynamic = tuple(it.dynamic for it in found.inputs.values())
    module = with_weights(found)
    program = torch.onnx.export(
        module, example, dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, verbose=False
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.save(work / "theirs.onnx", external_data=True)
    for path in work.glob("theirs.onnx*"):
        path.unlink()
    return {}


def eager(model: Model, graph: str, work: Path, side: int) -> dict[str, float]:
    """Call the network in PyTorch, and keep its answers."""
    found = graph_of(model, graph)
    given = inputs_of(found, side)
    with torch.inference_mode():
        answers = with_weights(found)(*given.values())
    named = dict(zip(found.outputs, answers, strict=True))
    save_file({name: value.contiguous() for name, value in named.items()}, work / f"{graph}.safetensors")
    return {}


def run(model: Model, graph: str, work: Path, side: int) -> dict[str, float]:
    """Load the exported graph into ONNX Runtime, call it once, and compare with `eager`."""
    from bakeout.export.onnx_pipeline import OnnxGraph, SessionSettings

    found = graph_of(model, graph)
    path = work / f"ours-{component_of(graph)}" / graph / "model.onnx"
    started = time.perf_counter()
    session = OnnxGraph(path, tuple(found.inputs), tuple(found.outputs), SessionSettings())
    loaded = time.perf_counter() - started
    answers = session.run(inputs_of(found, side))
    expected = load_file(work / f"{graph}.safetensors")
    distances = [relative_rms(answers[name], value) for name, value in expected.items()]
    return {"load": loaded, "relative_rms": max(it if it is not None else float("inf") for it in distances)}


def component_of(graph: str) -> str:
    """The component of which a graph is."""
    return "vae" if graph.startswith("vae") else graph


def measured(stage: str, model: Path, graph: str, work: Path, side: int) -> Mapping[str, Any]:
    """Run a stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--graph", graph, "--folder", str(model)]
    command += ["--work", str(work), "--side", str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this file
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1:] or [f"killed by signal {-done.returncode}"]}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def stage_alone(stage: str, folder: Path, graph: str, work: Path, side: int) -> Mapping[str, Any]:
    """Do a stage here: its seconds, and the peak of this process's memory in GB."""
    model = open_model(folder)
    started = time.perf_counter()
    more = {"ours": ours, "theirs": theirs, "eager": eager, "run": run}[stage](model, graph, work, side)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": time.perf_counter() - started, "peak_gb": peak, **more}


def _cell(found: Mapping[str, Any], time_of: str) -> str:
    """Seconds and GB, or why there are none."""
    if time_of in found:
        return f"{found[time_of]:.0f}, {found['peak_gb']:.1f}"
    return " ".join(found.get("failed", ["not run"]))


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The measurements as Markdown."""
    head = ("graph", "ours: s, GB", "torch.onnx.export: s, GB", "ours / theirs: time, memory",
            "ONNX Runtime: load s, GB", "against eager")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for graph, found in rows.items():
        own, other, ran = found["ours"], found.get("theirs", {}), found["run"]
        ratio = ""
        if "seconds" in own and "seconds" in other:
            ratio = f"{own['seconds'] / other['seconds']:.2f}, {own['peak_gb'] / other['peak_gb']:.2f}"
        distance = f"{ran['relative_rms']:.1e}" if "relative_rms" in ran else ""
        cells = [graph, _cell(own, "seconds"), _cell(other, "seconds"), ratio, _cell(ran, "load"), distance]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all graphs of a model, or one stage of one graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=("sd15", "sdxl"))
    parser.add_argument("--folder", type=Path, help="of the model, written before")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--without-theirs", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--graph", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        print(json.dumps(stage_alone(given.stage, given.folder, given.graph, given.work, given.side)))
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = given.folder or work / "model"
        if given.folder is None:
            write_full_size(given.name, folder)
        rows: dict[str, dict[str, Mapping[str, Any]]] = {}
        exported: dict[str, Mapping[str, Any]] = {}
        for graph in [graph.name for graph in graphs_of(open_model(folder))]:
            component = component_of(graph)
            # Both graphs of a VAE are written at once.
            exported.setdefault(component, measured("ours", folder, graph, work, given.side))
            rows[graph] = {"ours": exported[component]}
            for stage in ("theirs", "eager", "run"):
                if stage != "theirs" or not given.without_theirs:
                    rows[graph][stage] = measured(stage, folder, graph, work, given.side)
            print(graph, rows[graph], file=sys.stderr, flush=True)
    print(json.dumps(rows) if given.json else table(rows))


if __name__ == "__main__":
    main()
