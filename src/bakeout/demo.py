"""The main job on the built-in model: erase an object, a style, a colour and a background, bake, export, validate."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from bakeout.artifact import Artifact
from bakeout.editor.errors import InputError
from bakeout.recipe import Recipe

if TYPE_CHECKING:
    from bakeout.validate.report.schema import Report

RECIPE = """\
# What `bakeout demo` erases from the built-in model: an object and a style by pruning its UNet, a colour by taking a
# neuron out of its text encoder, and a background by holding the UNet's hidden units that draw it at what they are
# without it. No weight can hold what the neuron does, so there are graphs alone.
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
profile = "portable"
prompts.target = "a {colour} shape at {concept}"
prompts.reference = "a {colour} shape"
prompts.lists.colour = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
settings = { compare = "target", mask_time = "mean", tau = 0.03 }
"""
COUNT = 32
# Of `bake`'s progress: four edits and one target.
BAKES = 5
# Scenes in the picture: of each concept and without one, and how the models' rows are called.
_ERASED, _KEPT = 2, 4
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
    above = [*report.erased] * _ERASED
    erased, kept = ([it for it in report.scenes if it.kind == kind] for kind in ("erased", "kept"))
    shown = sorted(zip(above, erased, strict=False), key=itemgetter(0))
    shown += [("kept", scene) for scene in kept[:_KEPT]]
    figure = Figure(figsize=(1.3 * len(shown) + 0.6, 4.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes_of_row in enumerate(figure.subplots(len(_ROWS), len(shown), squeeze=False)):
        model, label = list(_ROWS.items())[row]
        axes_of_row[0].set_ylabel(label, fontsize=9)
        for axes, (what, scene) in zip(axes_of_row, shown, strict=True):
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(
                    "\n".join([*_lines(what, 14, 2), *_lines(scene.prompt, 16, 3)]), fontsize=8, parse_math=False
                )
            if model in scene.drawn:
                with Image.open(home / scene.drawn[model].file) as picture:
                    axes.imshow(picture, interpolation="nearest")
    # Without the version of matplotlib, so that the same pictures give the same bytes.
    figure.savefig(path, metadata={"Software": None})


def _lines(text: str, width: int, count: int) -> list[str]:
    """So many lines for every text, so that what is above them stands at one height."""
    lines = textwrap.wrap(text, width, max_lines=count)
    return [*lines, *[""] * (count - len(lines))]
