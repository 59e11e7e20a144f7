"""A folder that is there whole or not at all, whenever the program that writes it is killed.

Everything happens in `.NAME.baking/` beside the folder NAME, on the same file system:

    calibration/   what an interrupted calibration needs to go on; stays until NAME is there
    new/           NAME as it is being written; renamed at the end
    old/           the NAME that is being replaced, between two renames
    gone/          the same, being deleted
    lock           one program at a time: the lock on this file goes with the process that holds it
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bakeout.editor.errors import InputError

if sys.platform != "win32":
    import fcntl

_LOCK = "lock"
# How often a lock may be removed while it is being taken.
_TRIES = 100


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
            # Whoever could not look into it before cannot now.
            shutil.copymode(self.folder, self.new)
            self.folder.replace(place / "old")
        try:
            self.new.replace(self.folder)
        except OSError:
            _recover(self.folder, place)
            raise
        _sync(self.folder.parent)
        _recover(self.folder, place)
        shutil.rmtree(self.calibration, ignore_errors=True)


@contextmanager
def workplace(folder: Path, is_ours: Callable[[Path], str | None], *, force: bool) -> Iterator[Workplace]:
    """A place to make `folder`, which nobody else has; without `finish` the folder stays as it was.

    Args:
        folder: an absolute path without links.
        is_ours: says of an existing folder why it must never be deleted, or None if it may be.
        force: replace what is there.

    Raises:
        InputError: the folder is there already, another program is making it, or it is to be replaced and this one
            works in it.
        OSError: the place cannot be written.
    """

    def check() -> None:
        if not os.path.lexists(folder):
            return
        if why := is_ours(folder):
            raise InputError(f"{folder} exists and is never overwritten, because {why}; choose another folder")
        if not force:
            raise InputError(f"{folder} exists already; choose another folder, or replace it with --force")
        # What is there now is deleted at the end, and with it the folder in which whoever calls this stands.
        if Path.cwd().is_relative_to(folder):
            raise InputError(f"{folder} is replaced as a whole, and you are in it; go to another folder first")

    place = _place(folder)
    made = Workplace(folder, place / "calibration", place / "new", check)
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
            # Not empty: an interrupted calibration goes on from there.
            with suppress(OSError):
                made.calibration.rmdir()


def recover(folder: Path) -> None:
    """Put back the folder that a program was replacing when it was killed between the two renames.

    Args:
        folder: an absolute path without links.

    Raises:
        InputError: a program is at it now.
        OSError: the file system refuses.
    """
    place = _place(folder)
    if (place / "old").exists() and not os.path.lexists(folder):
        with _lock(place, folder):
            _recover(folder, place)


def sync_folders(folder: Path) -> None:
    """Wait until the names of everything in `folder` are on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    _sync(folder)


def _place(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.baking")


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
    """Make `place`, have it alone, and remove it if nothing is left in it."""
    try:
        with _locked(place, folder):
            try:
                yield
            finally:
                # Before it is let go: whoever has opened it meanwhile then sees that it is no longer the lock.
                with suppress(OSError):
                    (place / _LOCK).unlink()
    finally:
        with suppress(OSError):
            place.rmdir()


def _locked(place: Path, folder: Path) -> ExitStack:
    path = place / _LOCK
    for _ in range(_TRIES):
        place.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":  # has no locks that go with the process
            return ExitStack()
        # Not found: its last holder removed it, or the place, in between.
        with suppress(FileNotFoundError), ExitStack() as opened:
            # Network file systems lock only what is a file, and open for writing.
            stream = opened.enter_context(path.open("a+b"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return opened.pop_all()
    raise InputError(f"{folder} is being made by another program; wait for it, or choose another folder")


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
