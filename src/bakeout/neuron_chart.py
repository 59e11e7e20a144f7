"""Draw how strongly neurons of a sparse autoencoder answer: a histogram of activations for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import wrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from bakeout.neurons import BINS, Neuron
from bakeout.plot import save_png

_COLOUR = "#4477aa"
_COLUMNS = 2
_LETTERS = 75  # of the title, over each column


def draw_histograms(neurons: Sequence[Neuron], best: Sequence[str], title: str, path: Path) -> None:
    """Write a PNG with a panel for each neuron: tokens by activation, those at zero aside, on a logarithmic axis.

    The same neurons and texts give the same bytes.

    Args:
        neurons: at least one.
        best: of each, what stands under its panel's title: the example with its largest activation.
        title: above the panels; its lines are broken where they are too long.
        path: is overwritten.

    Raises:
        OSError: the file cannot be written.
    """
    columns = min(_COLUMNS, len(neurons))
    rows = ceil(len(neurons) / columns)
    figure = Figure(figsize=(5 * columns + 0.5, 2.7 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # Not set as mathematics, whatever signs a prompt has.
    lines = [part for line in title.splitlines() for part in wrap(line, _LETTERS * columns)]
    figure.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left", parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(neurons) :]:
        axes.set_visible(False)
    for axes, neuron, example in zip(panels.flat, neurons, best, strict=False):
        share = f"active at {neuron.active:,} of {neuron.tokens:,} tokens"
        axes.set_title(f"neuron {neuron.index}: {share}\n{example}", fontsize=8, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        if not neuron.active:
            axes.set_xticks([])
            axes.set_yticks([])
            continue
        width = neuron.largest / BINS
        axes.bar([(place + 0.5) * width for place in range(BINS)], neuron.counts, width=width, color=_COLOUR)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        # As numbers of tokens: powers of ten would be set as mathematics.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, neuron.largest)
        axes.set_xlabel("activation", fontsize=8)
        axes.set_ylabel("tokens", fontsize=8)
        axes.tick_params(labelsize=7)
    save_png(figure, path)
