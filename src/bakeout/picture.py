"""Read a picture that somebody gives to begin with: what it is, is seen before it is decoded."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bakeout.editor.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Other formats of Pillow start programs (EPS), or are read by code that few pictures go through.
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_RATIO = 8


def read_picture(path: Path) -> Image.Image:
    """The picture in a file as RGB, upright, on white where it is transparent.

    Raises:
        InputError: it is not there, no picture in `FORMATS`, damaged, or of more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise InputError(f"{path} is no file: give a picture as {', '.join(FORMATS)}")
    try:
        with warnings.catch_warnings():
            # Pillow warns of what is refused below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path, formats=FORMATS)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{path} has {opened.width}x{opened.height} pixels, more than {MAX_PIXELS:,}: make it smaller"
                )
            upright = ImageOps.exif_transpose(opened)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            white = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is no picture, or damaged: give a {', '.join(FORMATS)}") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything on damaged files
        raise InputError(f"{path} cannot be read as a picture ({error!s:.100}): give a {', '.join(FORMATS)}") from None


def fitted_size(size: tuple[int, int], side: int, unit: int) -> tuple[int, int]:
    """Width and height with about the shape of `size` and the area of a square of `side`, in multiples of `unit`.

    Raises:
        InputError: it is more than `MAX_RATIO` times as long as it is wide.
    """
    width, height = size
    if max(size) > MAX_RATIO * min(size):
        raise InputError(f"the picture is {width}x{height}, too long to fit: choose the size to draw with --size")
    scale = side / math.sqrt(width * height)
    return max(1, round(width * scale / unit)) * unit, max(1, round(height * scale / unit)) * unit
