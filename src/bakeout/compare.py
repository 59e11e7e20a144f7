"""Put base, reference and artifact side by side: what the erasure changed, and that the artifact does what it says."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from bakeout.editor.errors import InputError
from bakeout.export.artifact import Artifact
from bakeout.export.base import open_base
from bakeout.generate import Request, draw, write_whole

if TYPE_CHECKING:
    from PIL import Image

    from bakeout.editor.model import Model
    from bakeout.runtime import Runtime

# Pictures that are smaller are enlarged by a whole number, so that their pixels stay what they are.
_SHOWN_WIDTH = 256
_MOST_LINES = 6
_PAD = 16
_FONT = 18


@dataclass(frozen=True)
class Comparison:
    """An artifact, and the base from which it was made."""

    artifact: Artifact
    base: Model

    @staticmethod
    def files(request: Request) -> list[str]:
        """The names of the comparisons, in the order of `request.files`: `<number of prompt>-<seed>-compared.png`."""
        return [f"{PurePath(name).stem}-compared.png" for name in request.files]

    def write(
        self, request: Request, folder: Path, runtime: Runtime, progress: Callable[[float], object] | None = None
    ) -> None:
        """Draw with the base, and again with the artifact's Edit as hooks on it (the reference), and write the sheets.

        Args:
            request: with which the artifact's pictures were drawn.
            folder: to which `draw_to_folder` wrote these.
            runtime: by which they were drawn.
            progress: called after every step with the number of pictures, in parts of one, that the step was worth;
                two for each of the request.

        Raises:
            InputError: what `draw` raises, or a file cannot be written.
        """
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        from bakeout.validate.reference import applied

        pipeline = self.base.pipeline(runtime.device, runtime.dtype)
        of_base = [picture.image for picture in draw(pipeline, request, progress)]
        with applied(self.artifact.edit, self.base, pipeline):
            of_reference = [picture.image for picture in draw(pipeline, request, progress)]
        names = zip(request.pictures, request.files, self.files(request), strict=True)
        for ((_, prompt, seed), file, name), first, second in zip(names, of_base, of_reference, strict=True):
            with Image.open(folder / file) as third:
                columns = {"base": first, "reference": second, f"artifact, {runtime.name}": third}
                made = sheet(columns, f"{prompt}  ·  seed {seed}")
            text = PngInfo()
            text.add_itxt("prompt", prompt)
            text.add_itxt("seed", str(seed))
            write_whole(folder / name, partial(made.save, format="PNG", pnginfo=text))


def comparison_for(opened: Model | Artifact, base: str | None = None) -> Comparison:
    """What is needed to compare, seen to be there before any work is done.

    Args:
        opened: an artifact.
        base: what to open as its base; None is what its manifest names.

    Raises:
        InputError: it is no artifact or has no Edit, or what `open_base` raises.
    """
    if not isinstance(opened, Artifact):
        raise InputError(f"{opened.source} is no artifact, so there is nothing to compare: leave --compare out")
    _ = opened.edit
    return Comparison(opened, open_base(opened, base))


def sheet(columns: Mapping[str, Image.Image], caption: str) -> Image.Image:
    """Pictures of one size side by side, each under its label, and a caption below."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = next(iter(columns.values())).size
    factor = max(1, math.ceil(_SHOWN_WIDTH / width))
    width, height = factor * width, factor * height
    font = ImageFont.load_default(_FONT)
    line = math.ceil(1.5 * _FONT)
    total = len(columns) * (width + _PAD) + _PAD
    # Lines are as wide as letters are on average, with room for wider ones.
    letters = int(0.9 * (total - 2 * _PAD) * len(caption) / max(1, font.getlength(caption)))
    lines = textwrap.wrap(caption, max(10, letters), max_lines=_MOST_LINES, placeholder=" …")
    top = _PAD + line
    made = Image.new("RGB", (total, top + height + _PAD + line * len(lines) + _PAD // 2), "white")
    pen = ImageDraw.Draw(made)
    for number, (label, picture) in enumerate(columns.items()):
        left = _PAD + number * (width + _PAD)
        pen.text((left, _PAD // 2), label, "black", font)
        made.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
    for number, text in enumerate(lines):
        pen.text((_PAD, top + height + _PAD // 2 + number * line), text, "black", font)
    return made
