"""TensorRT's engines: what can be told of files that nobody can read, and how networks of a few shapes are asked.

An engine has no weights or constants that could be compared with the Edit's. So that nothing but its answers counts,
and what it is asked goes to the engine that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bakeout.editor.edit import Operation, PatchActivation
from bakeout.editor.model import Model
from bakeout.export.manifest import Shapes, Tensorrt
from bakeout.validate.audit import BESIDE, told
from bakeout.validate.contract import Interface, contract, run_network
from bakeout.validate.graph_patch import is_fused
from bakeout.validate.parity import Expected
from bakeout.validate.report.schema import Check
from bakeout.validate.runners import Call, Settings

_FILES = frozenset(("config.json", "model.engine"))


def check_engines(target: str, base: Model, folder: Path, made: Tensorrt, kept: Sequence[Operation]) -> Check:
    """Whether there is an engine of each network and nothing beside it, and what the manifest says of them.

    Args:
        target: its name.
        base: the model that was edited.
        folder: of the target.
        made: what the manifest says.
        kept: operations that no weight can hold; of those at FFNs each is a plugin.
    """
    networks = contract(base)
    faults = [f"{name} is not in the manifest" for name in sorted(networks.keys() - made.engines.keys())]
    faults += [f"the manifest names {name!a:.100} too" for name in sorted(made.engines.keys() - networks.keys())]
    for name in networks:
        there = {path.name for path in (folder / name).glob("*")}
        faults += [f"{name} has no {file}" for file in sorted(_FILES - there)]
        faults += [f"{name}/{file}{BESIDE}" for file in sorted(there - _FILES)]
    fused = sum(isinstance(it, PatchActivation) and is_fused(it, base) for it in kept)
    plugins = sum(it.plugins for it in made.engines.values())
    if plugins != fused:
        faults.append(f"the manifest counts {plugins:,} plugins, and the edit needs {fused:,}")
    if faults:
        summary = f"Its engines are not those of the model: {told(faults)}."
        return Check(name="engines", target=target, verdict="fail", summary=summary)
    doubts = [f"of {name}: {it.doubt}" for name, it in made.engines.items() if it.doubt]
    if doubts:
        summary = (
            "When the engines were built, TensorRT did not tell of all layers in which precision they compute, so what "
            f"they answer is all that is known: {told(doubts)}. Export again with the TensorRT that bakeout names."
        )
        return Check(name="engines", target=target, verdict="unjudged", summary=summary)
    capability = ".".join(map(str, made.capability))
    summary = (
        f"There is an engine of each of {len(networks)} networks, built in {made.precision} by TensorRT {made.version} "
        f"for {made.gpu} (compute capability {capability}), with {plugins:,} plugins. Engines are opaque: no weight in "
        "them can be read, and they are judged by what they answer alone."
    )
    return Check(name="engines", target=target, verdict="pass", summary=summary)


def recorded(made: Tensorrt) -> dict[str, Any]:
    """What a report says of engines: with and for what they were built, and the key of each."""
    facts = made.model_dump(mode="json", include={"version", "gpu", "capability", "driver", "shapes"})
    return {**facts, "keys": {name: it.key for name, it in made.engines.items()}}


def why_not_of_size(shapes: Shapes, settings: Settings) -> str | None:
    """In words, why engines of some shapes cannot draw as it is asked; None if they can."""
    width, height = settings.size
    if shapes.width.min <= width <= shapes.width.max and shapes.height.min <= height <= shapes.height.max:
        return None
    return (
        f"Its engines draw pictures from {shapes.width.min}x{shapes.height.min} to "
        f"{shapes.width.max}x{shapes.height.max} pixels, and not of {width}x{height}: choose such a size with --size."
    )


def settings_of(shapes: Shapes, settings: Settings) -> Settings:
    """The settings, with as many pictures at once as engines of some shapes take."""
    return replace(settings, batch=min(settings.batch, shapes.batch.max), least=shapes.batch.min)


def of_size(shapes: Shapes, expected: Sequence[Expected], factor: int) -> list[Expected]:
    """The calls whose pictures, or latents of which one is `factor` pixels, have sides that engines take."""
    return [it for it in expected if _is_of_size(shapes, it.call, factor)]


def _is_of_size(shapes: Shapes, call: Call, factor: int) -> bool:
    scale = 1 if call.network == "vae_encoder" else factor
    return all(
        side.min <= scale * call.inputs[name].shape[place] <= side.max
        for name in {"sample", "latent_sample"} & call.inputs.keys()
        for place, side in ((2, shapes.height), (3, shapes.width))
    )


def run_in_pieces(
    shapes: Shapes, pipeline: Any, name: str, interface: Interface, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`run_network` for any number of rows: as many at a time as engines of some shapes take."""
    # Guidance has the UNet see each picture twice, and without it once.
    most = shapes.batch.max * (2 if name == "unet" else 1)
    rows = next(len(value) for value in inputs.values() if value.ndim)
    pieces = []
    for first in range(0, rows, most):
        own = torch.arange(first, min(first + most, rows))
        places = torch.cat([own, own[-1:].expand(max(0, shapes.batch.min - len(own)))])
        given = {key: value if value.ndim == 0 else value[places] for key, value in inputs.items()}
        found = run_network(pipeline, name, interface, given)
        pieces.append({key: value[: len(own)] for key, value in found.items()})
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
