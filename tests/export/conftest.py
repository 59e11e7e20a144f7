"""Edits made by hand, and artifacts of them, without any calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bakeout.editor.edit import Edit, Origin, PatchWeightInput
from bakeout.editor.model import Model, open_model
from bakeout.export.artifact import Artifact, making, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import base_of

FACTS: dict[str, Any] = {
    "recipe": {"version": 1},
    "calibration": {"device": "cpu", "dtype": "fp32"},
    "tools": {"bakeout": "0"},
}


def random_edit(model: Model, seed: int = 0, kinds: tuple[str, ...] = ("ffn2", "attn_key", "text_ffn2")) -> Edit:
    """A tenth of the weights of every site of some kinds pruned."""
    generator = torch.Generator().manual_seed(seed)
    sites = [site for kind in kinds for site in model.sites_of(kind)]
    operations = [
        PatchWeightInput(site.name, torch.rand(site.d_out, site.d_in, generator=generator) < 0.1) for site in sites
    ]
    return Edit(tuple(operations), (Origin("conceptprune", "a star", {"sparsity": 0.1}, "0" * 64, 3),))


@pytest.fixture(scope="session")
def edited() -> Callable[..., Edit]:
    """`random_edit`."""
    return random_edit


@pytest.fixture(scope="session")
def baked() -> Callable[..., Artifact]:
    """Writes the artifact of a model and an Edit (a random one by default)."""

    def bake(
        source: Path, folder: Path, made: Edit | None = None, *, force: bool = False,
        targets: tuple[str, ...] = ("diffusers",),
    ) -> Artifact:  # fmt: skip
        model = open_model(source)
        made = random_edit(model) if made is None else made
        plan = plan_diffusers(model)
        with making(folder, plan, force=force, targets=targets) as place:
            base = base_of(model, source.name)
            return write_artifact(place, plan, base, made, lower_onto(made, model), FACTS, targets)

    return bake
