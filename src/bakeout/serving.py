"""Of which pictures engines are made, as it is said on the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from bakeout.editor.errors import InputError
from bakeout.editor.recipe import MAX_SIZE, Range, Tensorrt
from bakeout.export.targets import serving_of
from bakeout.generate import size_from_text

if TYPE_CHECKING:
    from bakeout.export.artifact import Artifact

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,4}")


def serving_for(artifact: Artifact, sizes: str | None, batches: str | None) -> Tensorrt:
    """What the recipe has, but for what is given.

    Args:
        artifact: that has the recipe.
        sizes: of pictures, as `size_from_text` reads one, or three of them with colons between.
        batches: pictures at a time, or three such numbers.

    Raises:
        InputError: a text is not of that form, or the numbers do not rise.
    """
    changes: dict[str, Range] = {}
    if sizes is not None:
        each = [size_from_text(text) for text in _one_or_three("--size", sizes)]
        changes["width"], changes["height"] = (_range("--size", [size[axis] for size in each]) for axis in (0, 1))
    if batches is not None:
        texts = _one_or_three("--batch", batches)
        for text in texts:
            if not _NUMBER.fullmatch(text):
                raise InputError(f"--batch {batches!a:.50} is none; write a number as 4, or three as 1:1:4")
        changes["batch"] = _range("--batch", [int(text) for text in texts])
    return serving_of(artifact.manifest, None, None).model_copy(update=changes)


def _one_or_three(option: str, text: str) -> list[str]:
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise InputError(
            f"{option} {text!a:.50} has {len(parts)} parts; give one, or the least, the usual and the most"
        )
    return parts


def _range(option: str, numbers: list[int]) -> Range:
    least, usual, most = numbers if len(numbers) == 3 else numbers * 3
    if not least <= usual <= most:
        raise InputError(f"{option}: {least}, {usual}, {most} do not rise; give the least, the usual and the most")
    try:
        return Range(min=least, opt=usual, max=most)
    except ValidationError:
        odd = least if least < 1 else most
        raise InputError(f"{option}: {odd} is out of range; give 1 to {MAX_SIZE}") from None
