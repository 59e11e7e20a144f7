"""The main job on the built-in model: erase an object, a style, a colour and a background, bake, export, validate."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bakeout.artifact import Artifact
from bakeout.editor.errors import InputError
from bakeout.recipe import Recipe

if TYPE_CHECKING:
    from bakeout.validate.report.schema import Report, Scene

RECIPE = """\
# What `bakeout demo` erases from the built-in model: an object and a style by pruning its UNet, a colour by taking a
# neuron out of its text encoder, and a background by holding what draws it, in some places, at what is there without
# it. No weight can hold the last two, so there are graphs alone.
version = 1
model = "shapes"
targets = ["onnx"]

[[edits]]
method = "conceptprune"
concept = "star"
prompts = { pack = "shapes-object" }
settings = { sparsity = 0.05 }

[[edits]]
method = "conceptprune"
concept = "striped"
prompts = { pack = "shapes-style" }
settings = { sparsity = 0.05 }

[[edits]]
method = "snce"
concept = "yellow"
prompts = { pack = "shapes-colour" }
settings = { activations = "prompt", strength = 1.0 }

[[edits]]
method = "acterase"
concept = "night"
prompts.target = "a {look} at {concept}"
prompts.reference = "a {look}"
prompts.lists.look = [
    "plain red circle", "striped orange square", "dotted yellow triangle", "checkered green star",
    "plain cyan cross", "striped blue ring", "dotted purple heart", "checkered pink moon",
]
settings = { compare = "target", mask_time = "mean", tau = 0.03 }
"""
COUNT = 32
# Of `bake`'s progress: four edits and one target.
BAKES = 5
# Scenes in the picture: of each kind, and how the models' rows are called.
_SHOWN = 4
_ROWS = {"base": "shapes", "reference": "erased,\nPyTorch hooks", "onnx": "erased,\nONNX Runtime"}


def bake(folder: Path, progress: Callable[[float], object] | None = None) -> Artifact:
    """Write `recipe.toml` into `folder` and bake it to `shapes-erased/`, over an earlier run's.

    Raises:
        InputError: the folder cannot be written, or holds an artifact with somebody else's files in it.
    """
    recipe = folder / "recipe.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(RECIPE, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another folder with -o") from error
    return Recipe.load(recipe).bake(folder / "shapes-erased", force=True, device="cpu", progress=progress)


def judge(artifact: Artifact, folder: Path, progress: Callable[[float], object] | None = None) -> Report:
    """Validate the ONNX graphs on `COUNT` prompts, with the report in `folder/report/`, and draw `folder/demo.png`.

    Raises:
        InputError: the folder cannot be written.
    """
    home = folder / "report"
    report = artifact.validate(home, targets=["onnx"], count=COUNT, device="cpu", progress=progress)
    if report.scenes:
        write_picture(report, home, folder / "demo.png")
    return report


def write_picture(report: Report, home: Path, path: Path) -> None:
    """Draw some scenes of the report in `home` side by side, a row for each model. Raises OSError.

    Above a prompt with what was erased stands what that is and by which method, above another one that it is kept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    # The prompts with what was erased have its concepts in turn.
    erased = _first(report, "erased")
    shown = [*zip(erased, report.erased, strict=False), *((scene, "kept") for scene in _first(report, "kept"))]
    figure = Figure(figsize=(1.35 * len(shown) + 0.6, 5.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes_of_row in enumerate(figure.subplots(len(_ROWS), len(shown), squeeze=False)):
        model, label = list(_ROWS.items())[row]
        axes_of_row[0].set_ylabel(label, fontsize=9)
        for axes, (scene, above) in zip(axes_of_row, shown, strict=True):
            axes.set(xticks=[], yticks=[])
            if row == 0:
                lines = textwrap.wrap(scene.prompt, 16)
                axes.set_title("\n".join(lines), fontsize=8, parse_math=False)
                axes.annotate(
                    above,
                    (0.5, 1.5),
                    xycoords="axes fraction",
                    ha="center",
                    fontsize=8,
                    weight="bold",
                    parse_math=False,
                )
            if model in scene.drawn:
                with Image.open(home / scene.drawn[model].file) as picture:
                    axes.imshow(picture, interpolation="nearest")
    # Without the version of matplotlib, so that the same pictures give the same bytes.
    figure.savefig(path, metadata={"Software": None})


def _first(report: Report, kind: str) -> list[Scene]:
    return [scene for scene in report.scenes if scene.kind == kind][:_SHOWN]
