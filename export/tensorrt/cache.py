"""Engines that were built before, and what TensorRT timed for them, in the cache folder `bakeout/tensorrt`.

    NAME          an engine, under the digest of all that it was built from and for; or what was timed
    NAME.json     its SHA-256, without which it is none

What is read is compared with its digest, and built again where it differs. What was not used for longest goes where
there is more than `MAX_BYTES`; the folder can be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bakeout.editor.errors import InputError
from bakeout.export.checkpoint import write_synced
from bakeout.export.manifest import file_digest
from bakeout.export.tensorrt.skeleton import skeleton
from bakeout.kernels.cache import cache_folder, check_private
from bakeout.kernels.errors import KernelUnavailable

# SDXL's networks in fp16 are 7 GB.
MAX_BYTES: Final = 40_000_000_000
_CHUNK: Final = 1 << 22
_MAX_RECORD: Final = 1000
# Seconds, longer than any build takes.
_MAX_AGE: Final = 7 * 24 * 3600


class CacheWarning(UserWarning):
    """Something cannot be kept for the next time."""


def key_of(facts: Mapping[str, object]) -> str:
    """SHA-256 of facts, in hexadecimal: of their JSON without spaces, with sorted names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def graph_digests(path: Path) -> dict[str, str]:
    """SHA-256 of an ONNX file and of each that it has weights in, by name.

    Raises:
        InputError: it is no ONNX file, or one of them cannot be read.
    """
    entries = (entry for tensor in skeleton(path).graph.initializer for entry in tensor.external_data)
    names = {path.name} | {entry.value for entry in entries if entry.key == "location"}
    try:
        return {name: file_digest(path.parent / name) for name in sorted(names)}
    except OSError as error:
        raise InputError(f"weights of {path} cannot be read ({error.strerror}); export the model again") from error


class Cache:
    """The folder. Several processes may use it at a time.

    Raises:
        InputError: it cannot be used, or is not the user's alone: an engine is a program.
    """

    def __init__(self) -> None:
        try:
            self.folder = cache_folder("tensorrt", "built engine")
        except KernelUnavailable as error:
            raise InputError(str(error)) from error

    def fetch(self, name: str, target: Path) -> bool:
        """Copy what is kept under `name` to the new file `target`; False if there is nothing, or it is damaged.

        Raises:
            InputError: somebody else may have written it.
            OSError: the target cannot be written.
        """
        kept, record = self.folder / name, self._record(name)
        if not (os.path.lexists(kept) and os.path.lexists(record)):
            return False
        try:
            for path in (kept, record):
                check_private(path, stat.S_ISREG)
        except KernelUnavailable as error:
            raise InputError(str(error)) from error
        if _copy(kept, target) != _read(record):
            target.unlink()
            self._remove(name)
            return False
        with suppress(OSError):
            os.utime(record)
        return True

    def keep(self, name: str, source: Path) -> None:
        """Keep a copy of a file under `name`, in the place of what is there. Warns where that is not possible."""
        try:
            with TemporaryDirectory(dir=self.folder, prefix="keeping-") as aside:
                new, record = Path(aside) / "new", Path(aside) / "record"
                content = json.dumps({"sha256": _copy(source, new)}).encode()
                write_synced(record, [content])
                for path in (new, record):
                    path.chmod(0o600)
                # Without its digest it is no entry, and with that of another none either.
                new.replace(self.folder / name)
                record.replace(self._record(name))
            self._make_room(name)
        except OSError as error:
            warnings.warn(
                f"{self.folder} does not keep what was built ({error.strerror}), so it is built again the next time",
                CacheWarning,
                stacklevel=2,
            )

    def _make_room(self, newest: str) -> None:
        used = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        names = [newest, *(path.stem for path in used if path.stem != newest)]
        total = 0
        for name in names:
            with suppress(FileNotFoundError):
                total += (self.folder / name).stat().st_size
            if total > MAX_BYTES and name != newest:
                self._remove(name)
        for path in self.folder.glob("*-*/"):
            # What a program that was killed left.
            if time.time() - path.stat().st_mtime > _MAX_AGE:
                shutil.rmtree(path, ignore_errors=True)

    def _remove(self, name: str) -> None:
        for path in (self._record(name), self.folder / name):
            path.unlink(missing_ok=True)

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _copy(source: Path, target: Path) -> str:
    """SHA-256 of what was written, which is on the disk."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as written:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _read(record: Path) -> str | None:
    try:
        with record.open("rb") as stream:
            found = json.loads(stream.read(_MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return None
    digest = found.get("sha256") if isinstance(found, dict) else None
    return digest if isinstance(digest, str) else None
