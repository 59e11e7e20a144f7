"""Artifacts of `shapes` with an Edit made by hand, without any calibration."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bakeout.builtin.shapes.routing import GROUPS, group_of
from bakeout.editor.edit import Edit, Origin, PatchWeightInput
from bakeout.editor.model import Model, open_model
from bakeout.export.artifact import making, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower, touched_tensors
from bakeout.export.manifest import base_of
from bakeout.export.precision import cast_file

FACTS: dict[str, Any] = {"recipe": {}, "calibration": {}, "tools": {}}


def edit_without(concept: str) -> Edit:
    """Pruned is what the hidden units meant for a concept give, in every FFN of the UNet of `shapes`."""
    group = GROUPS.index(concept)
    operations = [
        PatchWeightInput(site.name, (group_of(torch.arange(site.d_in)) == group).repeat(site.d_out, 1))
        for site in open_model("shapes").sites_of("ffn2")
    ]
    return Edit(tuple(operations), (Origin("conceptprune", concept),))


def stored(model: Model, component: str, name: str) -> torch.Tensor:
    with safe_open(model.components[component].tensors[name].file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def write(source: str | Path, folder: Path, edit: Edit, targets: Sequence[str] = ("diffusers",)) -> Path:
    model = open_model(source)
    sites = {site.name: site for site in model.sites}
    state = {
        component: {name: stored(model, component, name) for name in names}
        for component, names in touched_tensors(edit, sites).items()
    }
    plan = plan_diffusers(model)
    with making(folder, plan, force=False, targets=targets) as place:
        base = base_of(model, model.source if model.format == "builtin" else model.path.name)
        write_artifact(place, plan, base, edit, lower(edit, sites, state), FACTS, targets)
    return folder


@pytest.fixture(scope="session")
def without() -> Callable[[str], Edit]:
    """`edit_without`."""
    return edit_without


@pytest.fixture(scope="session")
def bake() -> Callable[..., Path]:
    """Writes the artifact of a model and an Edit to a folder, and returns the folder."""
    return write


def in_precision(folder: Path, target: Path, precision: str) -> Path:
    """The graphs of an ONNX folder in another precision, and all else of it."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model.onnx*"))
    for path in folder.glob("*/model.onnx"):
        cast_file(path, target / path.parent.name / path.name, precision, path.parent.name)
    return target


@pytest.fixture(scope="session")
def narrowed() -> Callable[[Path, Path, str], Path]:
    """`in_precision`."""
    return in_precision


@pytest.fixture(scope="session")
def starless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of `shapes` without stars, for torch and ONNX Runtime. Made once; who changes it takes a copy."""
    folder = tmp_path_factory.mktemp("starless") / "artifact"
    return write("shapes", folder, edit_without("star"), ("diffusers", "onnx"))


@pytest.fixture
def artifact(starless: Path, tmp_path: Path) -> Path:
    """A copy of `starless` to break."""
    return Path(shutil.copytree(starless, tmp_path / "artifact"))
