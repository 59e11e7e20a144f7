"""From a recipe to an artifact: open the model, let each method find its edit, fold, and write."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeout import __version__
from bakeout.artifact import Artifact
from bakeout.editor.errors import InputError
from bakeout.editor.methods import method
from bakeout.editor.model import BUILTIN, Model, open_model
from bakeout.editor.recipe import EditRecipe
from bakeout.editor.recipe import Recipe as _Recipe
from bakeout.export.artifact import Artifact as Baked
from bakeout.export.artifact import making, write_artifact
from bakeout.export.checkpoint import Plan, plan_diffusers
from bakeout.export.manifest import MANIFEST, base_of
from bakeout.generate import device_from_text, dtype_from_text, recommended_settings

if TYPE_CHECKING:
    from bakeout.editor.edit import Edit
    from bakeout.editor.prompts import Pair
    from bakeout.export.lower import Lowered
    from bakeout.export.manifest import Manifest

# What a bake's bits may depend on.
_TOOLS = ("diffusers", "numpy", "safetensors", "tokenizers", "torch", "transformers")
# Files that a note lists at most.
_NAMED = 20


class Recipe(_Recipe):
    """What to bake, and how to bake it."""

    def bake(
        self,
        folder: str | os.PathLike[str],
        *,
        force: bool = False,
        device: str = "auto",
        dtype: str = "fp32",
        progress: Callable[[float], object] | None = None,
    ) -> Artifact:
        """Calibrate every edit on the base model, fold them, and write the artifact.

        The same recipe and model give the same bytes on one machine; another device, dtype or version of a library may
        round otherwise, so the artifact records them. Killed at any moment, it leaves nothing that opens; run again, it
        goes on where the calibration was, even with another sparsity or vote. An exception has a note where that is so.

        Args:
            folder: the artifact to be.
            force: replace an artifact that is there.
            device: where the methods run the model; `auto` is the GPU where there is one.
            dtype: in which they do: `fp32`, `fp16` or `bf16`. What is written keeps the dtypes of the base.
            progress: called with the part, of one an edit and one a target but `diffusers`, that was just done.

        Raises:
            InputError: recipe, model and folder do not go together, a method finds nothing to erase, or the folder
                cannot be written.
        """
        from bakeout.export.lower import lower_onto

        device = device_from_text(device)
        targets = self.written
        prompts = []
        for number, wanted in enumerate(self.edits):
            with refusing(number, wanted):
                prompts.append(wanted.pairs(self.folder))
        model = open_model(self.source)
        plan = plan_diffusers(model)
        target = Path(folder)
        kept: Callable[[], bool] | None = None
        try:
            with making(target, plan, force=force, targets=targets) as place:
                kept = _watch(place.calibration)
                base = base_of(model, _name(model))
                facts = {
                    "recipe": _told(self, model),
                    "calibration": {"device": device.partition(":")[0], "dtype": dtype},
                    "tools": _tools(),
                }
                edit = self._calibrate(model, prompts, place.calibration, device, dtype, progress)
                lowered = lower_onto(edit, model)
                artifact = write_artifact(place, plan, base, edit, lowered, facts, targets, progress)
        except BaseException as error:
            if kept is not None and kept():
                error.add_note("The same bake, run again, goes on from what was calibrated.")
            raise
        return Artifact(target, artifact.manifest, _notes(plan, artifact.manifest, lowered, target))

    def _calibrate(
        self,
        model: Model,
        prompts: Sequence[Sequence[Pair]],
        work: Path,
        device: str,
        dtype: str,
        progress: Callable[[float], object] | None,
    ) -> Edit:
        import torch

        from bakeout.editor.merge import merge

        found = []
        try:
            pipeline = model.pipeline(device, dtype_from_text(dtype, device))
            for number, edit in enumerate(self.edits):
                with refusing(number, edit):
                    method(edit.method).check(model, pipeline, edit.method_settings(), folder=self.folder)
            self._check_sizes(pipeline)
            for number, (edit, pairs) in enumerate(zip(self.edits, prompts, strict=True)):
                with refusing(number, edit):
                    calibrate, settings = method(edit.method).calibrate, edit.method_settings()
                    one = calibrate(
                        model, pipeline, edit.concept, pairs, settings,
                        folder=self.folder, work=work, progress=progress,
                    )  # fmt: skip
                    if not one.operations:
                        raise InputError(
                            "there is nothing to erase by these prompts and settings, and an artifact would draw it as "
                            "before: take target prompts that have the concept and reference prompts without it, or "
                            "settings that take more"
                        )
                    found.append(one)
        except torch.OutOfMemoryError as error:
            smaller = "--dtype fp16 or " if dtype == "fp32" else ""
            raise InputError(
                f"the GPU's memory is full: free some of it, or bake with {smaller}--device cpu"
            ) from error
        return merge(found)

    def _check_sizes(self, pipeline: Any) -> None:
        each = [method(edit.method).latents(pipeline, edit.method_settings()) for edit in self.edits]
        sizes = {latents for latents in each if latents is not None}
        if len(sizes) > 1:
            factor = pipeline.vae_scale_factor
            listed = " and ".join(f"{width * factor}x{height * factor}" for height, width in sorted(sizes))
            raise InputError(f"the edits are for pictures of {listed} alone: give all of them one size")


def open_any(source: str | os.PathLike[str]) -> Model | Artifact:
    """The artifact in `source`, checked, or what `open_model` opens. Raises InputError."""
    return Artifact.open(source) if is_artifact(source) else open_model(source)


def recommended_for(opened: Model | Baked) -> dict[str, Any]:
    """The `recommended_settings` of a model, or of an artifact's base as far as that is built in."""
    if not isinstance(opened, Baked):
        return recommended_settings(opened)
    base = opened.manifest.base
    known = base.format == "builtin" and base.name in BUILTIN
    return recommended_settings(open_model(base.name)) if known else {}


def is_artifact(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a folder with a manifest; a built-in model's name is none, whatever lies here."""
    return source not in BUILTIN and (Path(source) / MANIFEST).is_file()


def _name(model: Model) -> str:
    """How the model is called, without the folders of this machine."""
    return model.source if model.format in ("builtin", "hub") else model.path.resolve().name


def _told(recipe: Recipe, model: Model) -> dict[str, Any]:
    """The recipe for the manifest: the order of its edits means nothing, so it does not show."""
    said = recipe.model_dump(mode="json")
    edits = sorted(said["edits"], key=lambda edit: json.dumps(edit, sort_keys=True))
    return {**said, "model": _name(model), "edits": edits}


@contextmanager
def refusing(number: int, edit: EditRecipe) -> Iterator[None]:
    """Says which edit is refused."""
    try:
        yield
    except InputError as error:
        raise InputError(f"edits[{number}] (concept {edit.concept!a}): {error}") from error


def _watch(folder: Path) -> Callable[[], bool]:
    """A function that says whether a calibration in `folder` was written or used since."""

    def calibrations() -> set[tuple[str, int]]:
        # Hidden files are not whole.
        return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("[!.]*")}

    before = calibrations()
    return lambda: bool(calibrations() - before)


def _tools() -> dict[str, str]:
    return {"bakeout": __version__, "python": platform.python_version(), **{name: version(name) for name in _TOOLS}}


def _notes(plan: Plan, manifest: Manifest, lowered: Lowered, folder: Path) -> tuple[str, ...]:
    notes = []
    copied = "diffusers" in manifest.targets
    if plan.left_out and copied:
        named = [name if name.isprintable() else ascii(name) for name in plan.left_out[:_NAMED]]
        others = len(plan.left_out) - len(named)
        more = f" and {others} more" if others else ""
        notes.append(f"Left out of the base's folder: {', '.join(named)}{more}.")
    if plan.variant and copied:
        notes.append(
            f'Its weight files are named as in the base: load {folder / "diffusers"} with variant="{plan.variant}".'
        )
    if not any(lowered.state.values()) and not lowered.remaining.operations:
        notes.append("The edit changes no weight: this model draws what the base draws.")
    return tuple(notes)
