"""Draw what an edit touches, layer by layer, as in ConceptPrune (Chavhan et al., 2024), Figure 3 right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bakeout.describe import headline, totals
from bakeout.editor.errors import InputError
from bakeout.export.manifest import Lowering, Manifest
from bakeout.generate import reserve_file

_COLOURS = {
    "PatchWeightInput": "#4477aa",
    "PatchActivation": "#ee6677",
    "ShiftActivation": "#228833",
    "SteerLatents": "#ccbb44",
}


def write_chart(manifest: Manifest, path: Path, *, force: bool = False) -> None:
    """Draw an artifact's bars to a file, which is there whole or not at all.

    Raises:
        InputError: the file is there and `force` is not given, or it cannot be written, or there are no bars.
    """
    if not manifest.lowering:
        raise InputError(f"this artifact's edit has no operations, so {path} would show nothing: leave -o out")
    reserve_png(path, force=force)
    lines = [
        *wrap(headline(manifest), 110),
        *(f"{touched:,} of {of:,} {unit} ({touched / of:.2%})" for unit, touched, of in totals(manifest)),
    ]
    write_png(path, lambda part: draw_touched(manifest.lowering, "\n".join(lines), part))


def reserve_png(path: Path, *, force: bool = False) -> None:
    """Raise InputError unless a PNG may be written to `path`: it ends so, and is not there or `force` is given."""
    reserve_file(path, "chart.png", "a PNG", force=force)


def write_png(path: Path, draw: Callable[[Path], object]) -> None:
    """Let `draw` write a file that gets its name when it is whole. Raises InputError if it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            draw(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another file with -o") from error


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure`; the same one gives the same bytes. Raises OSError."""
    with warnings.catch_warnings():
        # The font has not every letter that a concept may have; boxes stand for the others.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # Without the version of matplotlib.
        figure.savefig(path, format="png", metadata={"Software": None})


def draw_touched(lowering: Sequence[Lowering], title: str, path: Path) -> None:
    """Write a PNG with a bar for each operation: the share, in percent, of the site's weights or features it touches.

    The same operations and title give the same bytes.

    Args:
        lowering: of a manifest; at least one.
        title: above the bars.
        path: is overwritten.

    Raises:
        OSError: the file cannot be written.
    """
    shares = [100 * it.touched / it.of for it in lowering]
    height = 1 + 0.3 * len(lowering) + 0.2 * len(title.splitlines())
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(lowering))
    bars = axes.barh(places, shares, color=[_COLOURS[it.operation] for it in lowering], height=0.75)
    axes.bar_label(bars, [f"{share:.2f} %" for share in shares], padding=3, fontsize=8)
    axes.set_yticks(places, [it.site for it in lowering], fontsize=8)
    axes.set_ylim(len(lowering) - 0.5, -0.5)
    axes.set_xlim(0, max(*shares, 0.01) * 1.12)
    units = dict.fromkeys(it.unit for it in lowering)
    axes.set_xlabel(f"touched share of the layer's {' or '.join(units)} (%)")
    # Not set as mathematics, whatever signs a concept has.
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = dict.fromkeys(it.operation for it in lowering)
    if len(kinds) > 1:
        handles = [bars.patches[[it.operation for it in lowering].index(kind)] for kind in kinds]
        # Below the axes: inside it would lie on bars.
        figure.legend(handles, list(kinds), loc="outside lower center", ncols=len(kinds), fontsize=8)
    save_png(figure, path)
