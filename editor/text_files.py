"""Read a text file that somebody wrote by hand or exported: small, and in whichever Unicode encoding it came out."""

from __future__ import annotations

import codecs
import stat
import unicodedata
from pathlib import Path, PureWindowsPath

from bakeout.editor.errors import InputError

# Control characters, lone surrogates, line and paragraph separators: a prompt or a name is one line of text.
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}
MAX_NAME = 1_000  # characters


def read_text(path: Path, limit: int) -> str:
    """The text of the file `path`: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        InputError: there is no such file, it has more than `limit` bytes, or it is in another encoding.
    """
    try:
        # A FIFO or a device would block or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a file; give the path of a text file")
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise InputError(
            f"{path!s:.300} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path!s:.300} is not a path ({error}); check it") from None
    if len(raw) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes; give a smaller file")
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig").upper()
        raise InputError(f"{path}, line {line}: this is not {name} text; save the file as UTF-8") from None


def text_fault(text: str, limit: int) -> str | None:
    """What is wrong with one line of text of at most `limit` characters, and the cure; None if nothing is."""
    if not text.strip():
        return "is empty; write something"
    if len(text) > limit:
        return f"has {len(text):,} characters; write at most {limit:,}"
    for place, character in enumerate(text, 1):
        if unicodedata.category(character) in _NO_TEXT:
            return f"has the control character {character!a} at place {place}; take it out"
    return None


def path_inside(folder: Path, name: str) -> Path:
    """The path `name` below `folder`; by its text, so that a recipe means the same on every system.

    Raises:
        InputError: the name is not one line of text, or leaves the folder.
    """
    if fault := text_fault(name, MAX_NAME):
        raise InputError(f"it {fault}")
    text = name.strip()
    parts = PureWindowsPath(text)  # knows both kinds of slash, and drives
    if parts.anchor or ".." in parts.parts:
        raise InputError(f"the file {text!a:.200} is outside the recipe's folder; put it beside the recipe")
    return folder / text
