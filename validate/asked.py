"""What a validation is asked for: of which targets of which artifact, with which Edit, at which length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Literal

from bakeout.editor.edit import Edit
from bakeout.editor.errors import InputError
from bakeout.export.artifact import EDIT, RUNTIMES, Artifact
from bakeout.export.manifest import Manifest
from bakeout.export.targets import ONNX, TENSORRT

Profile = Literal["quick", "release"]
# Of those that draw with it, the one that needs the least.
RUNTIME_OF = {target: runtime for runtime, target in reversed(RUNTIMES.items())}


def recorded_profile(manifest: Manifest) -> Profile:
    """That of the recipe, `quick` where it has none."""
    said = manifest.recipe.get("validation")
    return "release" if isinstance(said, dict) and said.get("profile") == "release" else "quick"


def chosen_targets(artifact: Artifact, targets: Sequence[str] | None) -> list[str]:
    """The targets to validate, each once. Raises InputError for one that is not there, or that nobody can validate."""
    there = artifact.manifest.targets
    for target in targets or ():
        if target not in there:
            command = f"bakeout export {quote(str(artifact.folder))} --target {target}"
            cure = f"run `{command}`, or " if target in (ONNX, TENSORRT) else ""
            raise InputError(f"{artifact.folder} has no target {target!a:.50}; {cure}choose from {', '.join(there)}")
    chosen = list(dict.fromkeys(targets or there))
    for target in chosen:
        if target not in RUNTIME_OF:
            raise InputError(
                f"there is no way to draw with the target {target!a:.50}; choose from {', '.join(RUNTIME_OF)}"
            )
    return chosen


def check_edit_given(artifact: Artifact, given: Path | None) -> None:
    """Raise InputError for another artifact's Edit, or where there is none."""
    if given is not None:
        if Edit.load(given).digest != artifact.manifest.edit:
            raise InputError(f"{given} is not the Edit of {artifact.folder}; give that artifact's")
    elif not (artifact.folder / EDIT).exists():
        raise InputError(f"{artifact.folder} was released without its {EDIT}; give it with --edit")
