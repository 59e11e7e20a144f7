"""How well `shapes` draws: how often the detector finds in a picture what its prompt asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from bakeout.builtin.shapes.detector import Detector
from bakeout.builtin.shapes.scenes import ATTRIBUTES, Scene, draw, prompt, sample_scene
from bakeout.builtin.shapes.similarity import clip_similarity
from bakeout.intervals import exact_interval

STEPS, GUIDANCE = 20, 4.0
# Scenes for training and for judging come from generators seeded differently.
HELD_OUT_SEED = 1


class Share(TypedDict):
    """`correct` of `of`, their ratio, and its exact (Clopper-Pearson) 95 % interval."""

    correct: int
    of: int
    share: float
    interval_95: list[float]


def uniform_scenes(count: int) -> list[Scene]:
    """Held-out scenes whose attributes are uniform and independent; the same for the same count."""
    rng = np.random.default_rng([HELD_OUT_SEED, 0])
    chosen = [{name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()} for _ in range(count)]
    return [Scene(it["object"], it["colour"], it["style"], it["background"]) for it in chosen]


def scenes_with(attribute: str, value: str, count: int) -> list[Scene]:
    """Held-out scenes that show a concept; their other attributes are uniform."""
    changed: Any = {attribute: value}
    return [replace(scene, **changed) for scene in uniform_scenes(count)]


def scenes_without(values: Collection[str], count: int) -> list[Scene]:
    """Held-out scenes that show none of these concepts; else uniform. None where every scene has one of them."""
    if any(set(values) >= set(all_values) for all_values in ATTRIBUTES.values()):
        return []
    drawn = count
    while len(found := [it for it in uniform_scenes(drawn) if not set(it.labels.values()) & set(values)]) < count:
        drawn *= 2
    return found[:count]


def generate(pipeline: Any, prompts: Sequence[str], seed: int = 0, batch: int = 50) -> NDArray[np.uint8]:
    """One picture a prompt, uint8 [n, 64, 64, 3]; the i-th starts from the latents of seed `seed + i`."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(prompts), batch):
        part = list(prompts[first : first + batch])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        floats = pipeline(
            part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np"
        ).images
        pictures.append(np.rint(floats * 255).astype(np.uint8))
    return np.concatenate(pictures)


def accuracy(detector: Detector, pictures: NDArray[np.uint8], scenes: Sequence[Scene]) -> dict[str, Share]:
    """Of each attribute: in how many pictures the detector sees what the scene says."""
    verdicts = detector.classify(pictures)
    return {
        name: share(sum(verdict[name] == scene.labels[name] for verdict, scene in zip(verdicts, scenes, strict=True)),
                    len(scenes))
        for name in ATTRIBUTES
    }  # fmt: skip


def share(correct: int, of: int) -> Share:
    """`correct` of `of` with its exact binomial interval."""
    return {
        "correct": correct,
        "of": of,
        "share": round(correct / of, 4),
        "interval_95": [round(bound, 4) for bound in exact_interval(correct, of, 0.95)],
    }


def measure(pipeline: Any, detector: Detector, image_encoder: Any, count: int = 300, drawings: int = 4000) -> Any:
    """Everything that the model card says, as JSON: what `accuracy.json` holds.

    Pictures of `count` prompts judged by the detector; the same with every FFN-2 weight of the UNet at zero (does the
    network draw by its FFNs?); the detector on held-out drawings; and how often CLIP finds, for a generated picture,
    its own prompt among all of them.
    """
    scenes = uniform_scenes(count)
    prompts = [prompt(scene) for scene in scenes]
    pictures = generate(pipeline, prompts)
    with without_ffn2(pipeline.unet):
        silent = generate(pipeline, prompts)
    rng = np.random.default_rng([HELD_OUT_SEED, 1])
    held_out = [sample_scene(rng) for _ in range(drawings)]
    similarity = clip_similarity(prompts, pictures, pipeline, image_encoder)
    own = similarity.diagonal()
    return {
        "settings": {
            "prompts": count,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "scheduler": type(pipeline.scheduler).__name__,
            "seeds": f"0 to {count - 1}",
        },
        "accuracy": accuracy(detector, pictures, scenes),
        "accuracy_without_ffn2": accuracy(detector, silent, scenes),
        "detector_on_held_out_drawings": accuracy(detector, np.stack([draw(scene) for scene in held_out]), held_out),
        "nearest_by_clip": {"own prompt": share(int((own >= similarity.max(dim=0).values).sum()), count)},
    }


@contextmanager
def without_ffn2(unet: Any) -> Iterator[None]:
    """Inside, the UNet computes as if the weights of all its FFN-2 layers were zero: only their biases are left."""
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs: (torch.zeros_like(inputs[0]),))
        for name, module in unet.named_modules()
        if name.endswith("ff.net.2")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_accuracy(measured: Mapping[str, Any], folder: Path) -> None:
    """Write `accuracy.json` into the model's folder."""
    (folder / "accuracy.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
