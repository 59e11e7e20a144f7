"""The user's cache folder: what is in it is loaded into the process, so nobody else may have written it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from bakeout.kernels.errors import KernelUnavailable


def cache_folder(name: str, kept: str) -> Path:
    """The folder `bakeout/NAME` of the cache, as the XDG Base Directory Specification has it; is made.

    Args:
        name: of the folder.
        kept: what is kept in it, for the error.

    Raises:
        KernelUnavailable: it cannot be used, or is not the user's alone.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (named if named.is_absolute() else Path.home() / ".cache") / "bakeout" / name
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise KernelUnavailable(
            f"there is no folder to keep the {kept} in ({error}); let XDG_CACHE_HOME name one that you can write"
        ) from error
    # Whoever can write in the upper can put another in place of the lower, after it was checked.
    for private in (folder.parent, folder):
        check_private(private, stat.S_ISDIR)
    return folder


def check_private(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise KernelUnavailable if `path` is of another kind, or if another user owns it or may write to it."""
    status = path.lstat()
    others = os.name == "posix" and (
        status.st_uid != os.geteuid() or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    )
    if not is_kind(status.st_mode) or others:
        raise KernelUnavailable(
            f"{path} may have been written by somebody else, and what is in it would be run; remove it and try again"
        )
