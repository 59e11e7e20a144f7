"""Draw how the training of a sparse autoencoder went: its loss, what it explains and what is dead, over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bakeout.plot import save_png

_COLOUR, _HELD_OUT = "#4477aa", "#ee6677"


def draw_training(curve: Mapping[str, Sequence[float]], held_out: Mapping[str, float], title: str, path: Path) -> None:
    """Write a PNG with three panels. The same numbers and title give the same bytes.

    Args:
        curve: `tokens`, `loss`, `variance_explained` and `dead_share` at the same steps.
        held_out: `variance_explained` and `dead_share` on prompts that were not trained on, as dashed lines.
        title: above the panels.
        path: is overwritten.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # Not set as mathematics, whatever signs a model's name has.
    figure.suptitle(title, fontsize=10, parse_math=False)
    loss, explained, dead = figure.subplots(3, sharex=True)
    tokens = [it / 1e6 for it in curve["tokens"]]
    dead_shares = [100 * it for it in curve["dead_share"]]
    silent = 100 * held_out["dead_share"]
    for axes, values, label in (
        (loss, curve["loss"], "loss"),
        (explained, curve["variance_explained"], "variance explained"),
        (dead, dead_shares, "dead latents (%)"),
    ):
        axes.plot(tokens, values, color=_COLOUR, linewidth=1, marker="o" if len(tokens) == 1 else "")
        axes.set_ylabel(label)
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_yscale("log")
    # As numbers: powers of ten are set as mathematics, for which not every installation has fonts.
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}" if max(curve["loss"]) < 10 * min(curve["loss"]) else "")
    reached = held_out["variance_explained"]
    explained.axhline(reached, color=_HELD_OUT, linestyle="--", label=f"on held-out prompts: {reached:.4f}")
    explained.set_ylim(max(0, min(*curve["variance_explained"], reached, 0.95)), 1)
    dead.axhline(silent, color=_HELD_OUT, linestyle="--", label=f"active nowhere in held-out prompts: {silent:.1f} %")
    most = max(5, 1.3 * max(*dead_shares, silent))
    dead.set_ylim(-0.02 * most, most)
    dead.set_xlabel("million tokens")
    explained.legend(loc="lower right", fontsize=8)
    dead.legend(loc="upper right", fontsize=8)
    save_png(figure, path)
