"""The model that an artifact was made from: where it is, and that it is the one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model

if TYPE_CHECKING:
    from bakeout.export.artifact import Artifact


def open_base(artifact: Artifact, base: Model | str | os.PathLike[str] | None = None) -> Model:
    """The model that was edited, opened and compared with the artifact's record of it, which reads all of its weights.

    Args:
        artifact: whose base.
        base: what to open, or a model; None opens a built-in model or one of the hub by the name in the manifest.

    Raises:
        InputError: the base is a folder or file and not given, does not open, or is another model.
    """
    model = source_of(artifact, base)
    check_base(artifact, model)
    return model


def source_of(artifact: Artifact, base: Model | str | os.PathLike[str] | None = None) -> Model:
    """As `open_base`, but not compared with the artifact's record. Raises InputError."""
    if isinstance(base, Model):
        return base
    recorded = artifact.manifest.base
    if base is None:
        if recorded.format not in ("builtin", "hub"):
            raise InputError(
                f"{artifact.folder} was made from {recorded.name!a:.200}, a {recorded.format.replace('_', ' ')} of "
                "which it knows no place; give that model as the base (--base)"
            )
        base = recorded.name
    return open_model(base)


def check_base(artifact: Artifact, model: Model) -> None:
    """Raise InputError unless the artifact was made from `model`, all of whose weights are read."""
    if not artifact.matches(model):
        raise InputError(
            f"{model.source} is not the model {artifact.manifest.base.name!a:.200} from which {artifact.folder} was "
            "made; give that model as the base (--base)"
        )
