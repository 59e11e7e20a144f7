"""Bring a sparse autoencoder of another project in, measured on prompts where some are given."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.generate import reserve_file, write_whole
from bakeout.neurons import Activity, attached, doubt, measure

if TYPE_CHECKING:
    from bakeout.editor.sae.model import SparseAutoencoder


class ConstantErrorWarning(UserWarning):
    """The reconstructions of an autoencoder are all off by the same vector."""


def import_autoencoder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    site: str | None = None,
    model: str | os.PathLike[str] | None = None,
    prompts: Iterable[str] | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[int], object] | None = None,
) -> tuple[SparseAutoencoder, Activity | None]:
    """Read a foreign autoencoder (`bakeout.editor.sae.formats.read_foreign`) and write it as a file of bakeout.

    Args:
        source: a folder or a file.
        output: a `.safetensors` file.
        site: whose output it reads; None where the source says it.
        model: on whose activations it is measured, as `open_model` takes it.
        prompts: of which they are; with `model`, or neither.
        device: where they are made; `auto` is the GPU where there is one.
        force: overwrite `output`.
        progress: called with the number of prompts that were just done.

    Returns:
        The autoencoder, and what was measured.

    Raises:
        InputError: the source cannot be read, `output` cannot be written or is there, or the autoencoder explains less
            of the activations than their mean does. Nothing is written then.
    """
    from bakeout.editor.sae.formats import read_foreign

    path = Path(output)
    reserve_file(path, "sae.safetensors", "a safetensors file", force=force)
    if (model is None) != (prompts is None):
        raise InputError("an autoencoder is measured on a model's prompts: give --model and --prompts, or neither")
    autoencoder = read_foreign(Path(source), site)
    activity = None
    if model is not None and prompts is not None:
        activity = measure(*attached(autoencoder, open_model(model), device), prompts, progress)
        fault = doubt(activity)
        if fault is not None and activity.but_for_a_constant < 0:
            raise InputError(fault)
        if fault is not None:
            warnings.warn(fault, ConstantErrorWarning, stacklevel=2)
    write_whole(path, autoencoder.save)
    return autoencoder, activity
