"""Which neurons SNCE would take out for a recipe's concepts, as a table and a picture (He et al., Figures 3 and 8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from bakeout.describe import table
from bakeout.editor.errors import InputError
from bakeout.editor.methods import snce
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import Pair
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.editor.sites import Site
from bakeout.generate import device_from_text, dtype_from_text
from bakeout.plot import save_png
from bakeout.recipe import Recipe, refusing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Tokens that are named in a neuron's row.
_TOKENS = 4
_TAKEN, _LEFT, _SHARED = "#cc3311", "#4477aa", "#bbbbbb"


@dataclass(frozen=True)
class Neuron:
    """A differential neuron.

    Attributes:
        index: in the autoencoder.
        score: its sum of weighted frequency scores (`snce.rank_neurons`).
        votes: pairs that tell it apart.
        tokens: at how many tokens of all target prompts it is active, by what the token is, most first.
    """

    index: int
    score: float
    votes: int
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Ranking:
    """The neurons of one edit at one text encoder.

    Attributes:
        concept: what is erased.
        site: the autoencoder's.
        autoencoder: in words.
        neurons: the best ones, best first.
        qualified: how many there are in all.
        taken: how many of the first the edit takes out.
        pairs: of how many pairs the recipe has.
        example: the pair that the picture shows: of those that tell the best neuron apart, where it scores most.
        concept_scores: float [m], s^c of the example.
        deconcept_scores: float [m], s^d of the example.
    """

    concept: str
    site: str
    autoencoder: str
    neurons: tuple[Neuron, ...]
    qualified: int
    taken: int
    pairs: int
    example: Pair
    concept_scores: Tensor
    deconcept_scores: Tensor


def rank_recipe(
    recipe: Recipe,
    *,
    top: int = 20,
    device: str = "auto",
    dtype: str = "fp32",
    progress: Callable[[float], object] | None = None,
) -> tuple[Ranking, ...]:
    """Rank the neurons of each SNCE edit of `recipe`, for each text encoder of its model.

    Args:
        recipe: what would be baked.
        top: how many neurons to tell of, at least one.
        device: where the text encoders run; `auto` is the GPU where there is one.
        dtype: in which they do: `fp32`, `fp16` or `bf16`.
        progress: called with the part, of one an edit, that was just done.

    Raises:
        InputError: no edit is by SNCE, or recipe and model do not go together.
    """
    if top < 1:
        raise InputError(f"{top} neurons cannot be shown: ask for at least one")
    wanted = [(number, edit) for number, edit in enumerate(recipe.edits) if edit.method == "snce"]
    if not wanted:
        raise InputError('no edit of this recipe has method = "snce", so it ranks no neurons: give another recipe')
    device = device_from_text(device)
    model = open_model(recipe.source)
    pipeline = model.pipeline(device, dtype_from_text(dtype, device))
    tell = progress or (lambda _part: None)
    found = []
    for number, edit in wanted:
        with refusing(number, edit):
            settings = cast(snce.Settings, edit.method_settings())
            pairs = edit.pairs(recipe.folder)
            autoencoders = snce.autoencoders(model, settings, recipe.folder)
            for name, autoencoder in autoencoders.items():
                found.append(_rank(model, pipeline, model.site(name), autoencoder, edit.concept, pairs, settings, top))
                tell(1 / len(autoencoders))
    return tuple(found)


def describe_rankings(rankings: Sequence[Ranking]) -> str:
    """A table for each ranking, under a line that says what it is of; what is taken out is marked."""
    texts = []
    for ranking in rankings:
        head = (
            f"{ranking.concept!a} at {ranking.site} ({ranking.autoencoder}): {ranking.pairs:,} "
            f"pair{'s' * (ranking.pairs != 1)}, neurons that tell one apart: {ranking.qualified:,}, of which the edit "
            f"takes out {ranking.taken:,}"
        )
        rows = [
            (
                f"{number}{' *' * (number <= ranking.taken)}", f"{it.index}", f"{it.score:.1f}", f"{it.votes}",
                ", ".join(f"{token} {count:,}" for token, count in it.tokens[:_TOKENS])
                + ", …" * (len(it.tokens) > _TOKENS),
            )
            for number, it in enumerate(ranking.neurons, 1)
        ]  # fmt: skip
        columns = ("rank", "neuron", "score", "pairs", "active at (tokens of the prompts with the concept)")
        texts.append(f"{head}\n\n{table(columns, rows)}" if rows else head)
    return "\n\n".join(texts)


def draw_rankings(rankings: Sequence[Ranking], path: Path) -> None:
    """Write a PNG: of each ranking the scores of one pair (Figure 3) and the ranked neurons (Figure 8).

    Args:
        rankings: at least one.
        path: is overwritten.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(14, 4.4 * len(rankings)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(rankings), 2, squeeze=False, width_ratios=(3, 2))
    for (example, ranked), ranking in zip(grid, rankings, strict=True):
        _draw_example(example, ranking)
        _draw_ranked(ranked, ranking)
    save_png(figure, path)


def _rank(
    model: Model,
    pipeline: Any,
    site: Site,
    autoencoder: SparseAutoencoder,
    concept: str,
    pairs: Sequence[Pair],
    settings: snce.Settings,
    top: int,
) -> Ranking:
    scores = snce.pair_scores(model, pipeline, site, autoencoder, pairs, settings.positions)
    neurons, sums, votes = snce.rank_neurons(*scores, settings.pairs)
    best = neurons[:top]
    active = _active_at(model, pipeline, site, autoencoder, [pair.target for pair in pairs], best)
    apart = scores[0].where(scores[1] == 0, 0.0)
    example = int(apart[:, best[0]].argmax()) if len(best) else 0
    return Ranking(
        concept, site.name, str(autoencoder).partition(": ")[2],
        tuple(
            Neuron(index, score, count, tuple(tokens.most_common()))
            for index, score, count, tokens in zip(
                best.tolist(), sums[:top].tolist(), votes[:top].tolist(), active, strict=True
            )
        ),
        len(neurons), min(settings.neurons, len(neurons)), len(pairs),
        pairs[example], scores[0][example], scores[1][example],
    )  # fmt: skip


def _active_at(
    model: Model, pipeline: Any, site: Site, autoencoder: SparseAutoencoder, prompts: Sequence[str], neurons: Tensor
) -> list[Counter[str]]:
    """For each of `neurons` the tokens at which it is above zero."""
    tokenizer = getattr(pipeline, site.component.replace("text_encoder", "tokenizer"))
    counts: list[Counter[str]] = [Counter() for _ in neurons]
    for it in snce.encode(model, pipeline, site, autoencoder, prompts):
        active = (it.z[..., neurons.to(it.z.device)] > 0).cpu()
        for row, tokens, real in zip(active, it.tokens.tolist(), it.real.cpu(), strict=True):
            names = _names(tokenizer, tokens, int(real.sum()))
            for place, column in row.nonzero().tolist():
                counts[column][names[place]] += 1
    return counts


def _names(tokenizer: Any, tokens: Sequence[int], own: int) -> list[str]:
    """What the tokens of a prompt are, of which `own` are its words."""
    words = [tokenizer.decode([token]).strip() or "?" for token in tokens[1 : own + 1]]
    return ["(start)", *words, "(end)", *["(padding)"] * (len(tokens) - own - 2)]


def _draw_example(axes: Axes, ranking: Ranking) -> None:
    """The scores of one pair: with the concept upwards, without it downwards."""
    above, below = ranking.concept_scores.double(), ranking.deconcept_scores.double()
    taken = {it.index for it in ranking.neurons[: ranking.taken]}
    shared = (above > 0) & (below > 0)
    groups = (
        (_SHARED, "active in both: filtered out", shared),
        (_LEFT, "active in one", (above > 0) ^ (below > 0)),
    )
    for colour, label, chosen in groups:
        places = chosen.nonzero()[:, 0]
        # Square roots, because a neuron that marks the padding scores hundreds of times what a word's does.
        axes.vlines(places, -below[places].sqrt(), above[places].sqrt(), color=colour, linewidth=1.5, label=label)
    own = torch.tensor(sorted(index for index in taken if above[index] > 0), dtype=torch.int64)
    if len(own):
        heights = above[own].sqrt()
        axes.vlines(own, 0, heights, color=_TAKEN, linewidth=2, label="taken out")
        for index, height in zip(own.tolist(), heights.tolist(), strict=True):
            axes.annotate(str(index), (index, height), ha="center", va="bottom", fontsize=8, color=_TAKEN)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.margins(y=0.12)
    axes.set_xlim(-0.01 * len(above), 1.01 * len(above))
    ticks = [it for it in axes.get_yticks() if axes.get_ylim()[0] <= it <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{it * it:.3g}" for it in ticks])
    axes.set_xlabel("neuron")
    axes.set_ylabel("score: without ↓, with ↑")
    title = f"↑ {ranking.example.target}\n↓ {ranking.example.reference}"
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.legend(fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ranked(axes: Axes, ranking: Ranking) -> None:
    """The differential neurons by their sums."""
    places = range(len(ranking.neurons))
    colours = [_TAKEN if place < ranking.taken else _LEFT for place in places]
    axes.bar(places, [it.score for it in ranking.neurons], color=colours)
    axes.set_xticks(places, [str(it.index) for it in ranking.neurons], rotation=90, fontsize=8)
    axes.set_xlabel("neuron, best first")
    axes.set_ylabel(f"weighted frequency score, sum over {ranking.pairs} pairs")
    title = f"{ranking.concept} at {ranking.site}\n{ranking.autoencoder}"
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
