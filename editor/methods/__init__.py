"""The erasure methods: each a module that finds an Edit and leaves the model untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import BaseModel

from bakeout.editor.errors import InputError

if TYPE_CHECKING:
    from bakeout.editor.edit import Edit
    from bakeout.editor.model import Model
    from bakeout.editor.prompts import Pair

METHODS: Mapping[str, str] = {
    "conceptprune": "bakeout.editor.methods.conceptprune",
    "snce": "bakeout.editor.methods.snce",
    "acterase": "bakeout.editor.methods.acterase",
}


class Method(Protocol):
    """What a method's module has.

    Attributes:
        Settings: the schema of the method's settings with their defaults; its field `profile` names a published set
            of them, and what is given beside it wins over the profile.

    A module may also have `PUBLISHED`: for a kind of concept (`style`, `nudity`, `gender`, `shapes` for those of the
    built-in model) what settings are known to work, by their source; the first one is the one to take.
    """

    Settings: type[BaseModel]

    def unfoldable(self, settings: Any) -> str | None:
        """Why the Edit of these settings cannot be folded into weights, in words after "because"; None if it can."""

    def latents(self, pipeline: Any, settings: Any) -> tuple[int, int] | None:
        """Height and width of the only latents that the Edit of these settings is for; None if it is for any.

        Raises InputError for settings that do not fit the pipeline.
        """

    def check(self, model: Model, pipeline: Any, settings: Any, *, folder: Path = Path()) -> None:
        """Raise InputError for settings that do not fit the model, as `calibrate` would; runs no network."""

    def calibrate(
        self,
        model: Model,
        pipeline: Any,
        concept: str,
        pairs: Sequence[Pair],
        settings: Any,
        *,
        folder: Path = Path(),
        work: Path | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> Edit:
        """The Edit that erases `concept`; `pipeline` (of `model`) comes out as it went in.

        Args:
            model: the opened base model.
            pipeline: its loaded pipeline, on the device and in the dtype to calibrate with.
            concept: the name that is recorded.
            pairs: target and reference prompts.
            settings: an instance of the module's `Settings`.
            folder: of the recipe, where the names of files in the settings begin.
            work: a folder for what an interrupted calibration needs to go on; None keeps nothing.
            progress: called with the part, of one, of the calibration that was just done.

        Raises:
            InputError: settings or prompts that do not fit the model.
        """


def method(name: str) -> Method:
    """The module of a method; InputError for a name that is not in `METHODS`."""
    if name not in METHODS:
        raise InputError(f"there is no method {name!a:.100}; choose one of {', '.join(METHODS)}")
    return cast(Method, import_module(METHODS[name]))
