"""The artifact as users of the package see it: what `bakeout.export.artifact` makes and opens, and its validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from bakeout.editor.errors import InputError
from bakeout.export.artifact import STALE, validation_folder
from bakeout.export.artifact import Artifact as _Artifact
from bakeout.export.workplace import workplace

if TYPE_CHECKING:
    from bakeout.export.onnx_pipeline import SessionSettings
    from bakeout.validate.asked import Profile
    from bakeout.validate.report.schema import Report

# What a report's folder may hold, besides its pictures.
_FILES = ("report.json", "report.html", "junit.xml", STALE)


class Options(TypedDict, total=False):
    """How to validate; `bakeout.validate.validation.validate` says what each is."""

    base: str | os.PathLike[str] | None
    edit: str | os.PathLike[str] | None
    profile: Profile | None
    targets: Sequence[str] | None
    prompts: str | os.PathLike[str] | None
    count: int | None
    seed: int
    steps: int | None
    guidance: float | None
    size: tuple[int, int] | None
    scheduler: str | None
    sessions: SessionSettings | None
    device: str
    progress: Callable[[float], object] | None


class Artifact(_Artifact):
    """A baked model in a folder."""

    def validate(self, output: str | os.PathLike[str] | None = None, **options: Unpack[Options]) -> Report:
        """Compare what ships with the eager reference, and write a report: see `validate_folder`."""
        return validate_folder(self.folder, output, **options)


def validate_folder(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, **options: Unpack[Options]
) -> Report:
    """Validate the artifact in `folder`, also one too broken for `Artifact.open`, and write a report.

    Args:
        folder: of the artifact.
        output: of the report; None is beside the artifact. An earlier report there is replaced.
        options: as `bakeout.validate.validation.validate` takes them.

    Returns:
        The report, whose `verdict` is `pass`, `fail` or `unjudged`.

    Raises:
        InputError: what was given cannot be used, or the report cannot be written.
    """
    from bakeout.validate.report import write_report
    from bakeout.validate.validation import validate

    target, home = report_folder(folder, output), Path(folder).expanduser().resolve()
    if target == home or home in target.parents or target in home.parents:
        raise InputError(f"{target} and the artifact {folder} lie in one another; choose another folder with -o")
    try:
        with workplace(target, _not_a_report, force=True) as place:
            report, pictures = validate(folder, **options)
            write_report(report, pictures, place.new)
            place.finish()
    except OSError as error:
        raise InputError(
            f"cannot write {target} ({error.strerror or error}); make room or mend its permissions, or choose another "
            "folder with -o"
        ) from error
    return report


def report_folder(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Where the report on the artifact in `folder` goes, without links: to `output`, or beside the artifact."""
    home = validation_folder(Path(folder).expanduser().resolve()) if output is None else Path(output)
    return home.expanduser().resolve()


def _not_a_report(folder: Path) -> str | None:
    """Why a folder must never be deleted; None for a report with nothing of anybody else's in it, or for nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        home, _, file = name.rpartition("/")
        ours = name in _FILES or (home == "pictures" and file.endswith(".png"))
        if path.is_symlink() or not (name == "pictures" if path.is_dir() else ours):
            return f"it holds {name!a:.200}, which is not part of a report"
    return None
