"""A folder that is there whole or not at all, whenever the program that writes it is killed.

Everything happens in `.NAME.baking/` beside the folder NAME, on the same file system:

    calibration/   what an interrupted calibration needs to go on; stays until NAME is there
    new/           NAME as it is being written; renamed at the end
    old/           the NAME that is being replaced, between two renames
    gone/          the same, being deleted

One program at a time: the lock on `.NAME.baking/` goes with the process that holds it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bakeout.editor.errors import InputError

if sys.platform != "win32":
    import fcntl


@dataclass(frozen=True)
class Workplace:
    """Where a folder is being made.

    Attributes:
        folder: the folder to be.
        calibration: is there, and is still there in a run after one that was interrupted.
        new: is there, empty.
        check: raises InputError if what is now at `folder` must stay.
    """

    folder: Path
    calibration: Path
    new: Path
    check: Callable[[], None]

    def finish(self) -> None:
        """Put `new` into the place of `folder`, and what was there away.

        Raises:
            InputError: somebody else made the folder meanwhile.
            OSError: the file system refuses.
        """
        place = self.new.parent
        sync_folders(self.new)
        self.check()
        if self.folder.exists():
            self.folder.replace(place / "old")
        try:
            self.new.replace(self.folder)
        except OSError:
            _recover(self.folder, place)
            raise
        _sync(self.folder.parent)
        _recover(self.folder, place)
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def workplace(folder: Path, is_ours: Callable[[Path], str | None], *, force: bool) -> Iterator[Workplace]:
    """A place to make `folder`, which nobody else has; without `finish` the folder stays as it was.

    Args:
        folder: an absolute path without links.
        is_ours: says of an existing folder why it must never be deleted, or None if it may be.
        force: replace what is there.

    Raises:
        InputError: the folder is there already, or another program is making it.
        OSError: the place cannot be written.
    """

    def check() -> None:
        if not os.path.lexists(folder):
            return
        if why := is_ours(folder):
            raise InputError(f"{folder} exists and is never overwritten, because {why}; choose another folder")
        if not force:
            raise InputError(f"{folder} exists already; choose another folder, or replace it with --force")

    place = folder.with_name(f".{folder.name}.baking")
    made = Workplace(folder, place / "calibration", place / "new", check)
    place.mkdir(parents=True, exist_ok=True)
    with _lock(place, folder):
        try:
            _recover(folder, place)
            check()
            _remove(made.new)
            made.new.mkdir()
            made.calibration.mkdir(exist_ok=True)
            yield made
        finally:
            _remove(made.new)
            for path in (made.calibration, place):
                # Not empty: an interrupted calibration goes on from there.
                with suppress(OSError):
                    path.rmdir()


def sync_folders(folder: Path) -> None:
    """Wait until the names of everything in `folder` are on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    _sync(folder)


def _recover(folder: Path, place: Path) -> None:
    """Put `old` back if nothing took its place, else away. Renamed first: what is half deleted never comes back."""
    old, gone = place / "old", place / "gone"
    _remove(gone)
    if not old.exists():
        return
    if folder.exists():
        old.replace(gone)
        _remove(gone)
    else:
        old.replace(folder)


@contextmanager
def _lock(place: Path, folder: Path) -> Iterator[None]:
    if sys.platform == "win32":  # has no locks that go with the process
        yield
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{folder} is being made by another program; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    if sys.platform == "win32":  # has no handles of folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
