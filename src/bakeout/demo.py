"""Draw a few pictures with the built-in model and let its own detector say what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from bakeout.builtin.shapes import load_detector
from bakeout.builtin.shapes.scenes import Scene, prompt
from bakeout.editor.model import open_model
from bakeout.generate import Request, complete, draw_to_folder, recommended_settings, reserve

SCENES = (
    Scene("circle", "red", "plain", "grass"),
    Scene("star", "yellow", "striped", "night"),
    Scene("heart", "pink", "dotted", "snow"),
    Scene("ring", "blue", "checkered", "sand"),
)


@dataclass(frozen=True)
class Verdict:
    """What a picture was to show, and what the detector saw; both by attribute: object, colour, style, background."""

    prompt: str
    wanted: Mapping[str, str]
    seen: Mapping[str, str]


def run(folder: Path, progress: Callable[[float], object] | None = None) -> list[Verdict]:
    """Draw `SCENES` into `folder`, over an earlier run's pictures, and judge them.

    Raises:
        InputError: the folder cannot be written.
    """
    model = open_model("shapes")
    request = Request(tuple(prompt(scene) for scene in SCENES))
    reserve(folder, request, force=True)
    # Its weights are stored in half precision, which a CPU computes slowly.
    pipeline = model.pipeline(dtype=torch.float32)
    request = complete(request, pipeline, recommended_settings(model))
    entries = draw_to_folder(
        pipeline, request, folder, {"model": "shapes", "device": "cpu", "dtype": "torch.float32"}, progress
    )
    pictures = [Image.open(folder / entry["file"]).convert("RGB") for entry in entries]
    seen = load_detector().classify(pictures)
    return [Verdict(prompt(scene), scene.labels, verdict) for scene, verdict in zip(SCENES, seen, strict=True)]
