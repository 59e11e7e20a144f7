"""Look into a sparse autoencoder: what it is, how well it tells activations, and what its neurons answer to.

Prompts are read twice, once for what all neurons do together and once for the neurons that are shown, so that memory
does not grow with their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeout.describe import table
from bakeout.editor.errors import InputError
from bakeout.editor.model import BUILTIN, Model, open_model
from bakeout.generate import device_from_text

if TYPE_CHECKING:
    from torch import Tensor

    from bakeout.editor.sae.activations import Encoder, TextActivations
    from bakeout.editor.sae.model import Fidelity, SparseAutoencoder

BINS = 48
EXAMPLES = 8
TOP = 4
BUILTIN_COUNT = 2_000  # prompts, of the 120,000 that there are of `shapes`
# Latents that are held at a time: 64 MiB of them in fp32, and several times that while the largest are found.
_LATENTS = 1 << 24
# Characters of a prompt on each side of a token: in text, and over a panel of a chart.
_AROUND, _AROUND_IN_CHART = 48, 22

_Progress = Callable[[int], object]


@dataclass(frozen=True)
class Activity:
    """What an autoencoder made of prompts.

    Attributes:
        fidelity: as `bakeout.editor.sae.model.fidelity` measures it.
        but_for_a_constant: the variance explained if the mean error is added to each reconstruction.
        prompts: how many there were.
        active: int64 [m], at how many tokens each latent was above zero.
        total: fp64 [m], the sum of each latent, the first position aside: it is the same in every prompt.
        largest: fp32 [m], the largest activation of each latent.
    """

    fidelity: Fidelity
    but_for_a_constant: float
    prompts: int
    active: Tensor
    total: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Example:
    """A prompt, the token at which a neuron answers to it most, by its position, and how much."""

    prompt: str
    position: int
    activation: float


@dataclass(frozen=True)
class Neuron:
    """What a neuron answered to.

    Attributes:
        index: from 0.
        active: at how many tokens it was above zero.
        tokens: of how many.
        prompts: in how many prompts it was above zero.
        largest: its largest activation.
        counts: tokens by their activation: `BINS` intervals from zero to `largest`, tokens at zero aside.
        examples: the prompts with the largest activations, the largest first, each text once.
    """

    index: int
    active: int
    tokens: int
    prompts: int
    largest: float
    counts: tuple[int, ...]
    examples: tuple[Example, ...]


def inspect_autoencoder(
    path: Path,
    model: str | os.PathLike[str] | None = None,
    names: Sequence[str | os.PathLike[str]] = (),
    *,
    column: str | None = None,
    count: int | None = None,
    neurons: Sequence[int] = (),
    top: int | None = None,
    chart: Path | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[int], object] | None = None,
) -> str:
    """What is to be said of the autoencoder in a file, and of its neurons where there are prompts.

    Args:
        path: of the file.
        model: whose activations it reads, as `open_model` takes it.
        names: of files of prompts or built-in models, as `bakeout.sae.prompts_from` takes them.
        column: of the files that have columns.
        count: prompts to read, from the first on; None is all.
        neurons: to tell of.
        top: also tell of the most active ones, so many; None is `TOP` where `neurons` are not given.
        chart: a PNG of the neurons' histograms to write.
        device: where the text encoder runs; `auto` is the GPU where there is one.
        force: overwrite `chart`.
        progress: called with the number of prompts that were just done; each is done twice.

    Raises:
        InputError: something given cannot be used, or `chart` is there already.
    """
    from bakeout.editor.sae.model import SparseAutoencoder
    from bakeout.sae import prompts_from

    for name, number in (("--count", count), ("--top", top)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}: it must be 1 or more")
    if (model is None) == bool(names):
        raise InputError("neurons answer to the prompts of a model: give both --model and --prompts, or neither")
    if model is None and (neurons or top is not None or chart is not None):
        raise InputError("neurons show what they are only on prompts: give --model and --prompts too")
    if chart is not None:
        from bakeout.plot import reserve_png

        reserve_png(chart, force=force)
    autoencoder = SparseAutoencoder.load(path)
    _refuse_unless_there(neurons, autoencoder)
    said = describe_autoencoder(autoencoder, path)
    if model is None:
        return said
    opened = open_model(model)
    prompts = _First(prompts_from(names, column), count)
    moved, encoder = attached(autoencoder, opened, device)
    activity = measure(moved, encoder, prompts, progress)
    top = TOP if top is None and not neurons else top or 0
    shown = tuple(dict.fromkeys((*neurons, *most_active(activity, top))))
    found = examine(moved, encoder, prompts, shown, activity, progress)
    measured = describe_activity(activity)
    if chart is not None:
        mark = marker(opened, autoencoder.site, _AROUND_IN_CHART)
        _write_chart(found, mark, f"{path.name}: {autoencoder!r}\n{measured}", chart)
    if fault := doubt(activity):
        measured += f"\nWarning: {fault}"
    told = describe_neurons(found, autoencoder, marker(opened, autoencoder.site))
    return "\n\n".join(filter(None, (said, measured, told)))


def builtin_autoencoder(name: str) -> Path | None:
    """The file of the autoencoder that comes with a built-in model; None for a name that is no built-in model's.

    Raises:
        InputError: this installation lacks it.
    """
    if name not in BUILTIN:
        return None
    from bakeout.editor.methods.snce import BUILTIN_SAE

    path = BUILTIN[name].parent / BUILTIN_SAE
    if not path.is_file():
        raise InputError(f"this installation of bakeout lacks the autoencoder of {name}; install bakeout again")
    return path


def attached(
    autoencoder: SparseAutoencoder, model: Model, device: str = "auto"
) -> tuple[SparseAutoencoder, TextActivations]:
    """The autoencoder in fp32, and what makes the activations of `model` that it reads, both on a device.

    Raises:
        InputError: the model has no such site, or that is of another width, or the device is not here.
    """
    import torch

    from bakeout.editor.sae.activations import TextActivations, site_of

    site = site_of(autoencoder, model)
    chosen = device_from_text(device)
    return autoencoder.to(chosen, torch.float32), TextActivations(model, site, chosen)


def measure(
    autoencoder: SparseAutoencoder, encoder: Encoder, prompts: Iterable[str], progress: _Progress | None = None
) -> Activity:
    """What `autoencoder` makes of the activations of all prompts, in one pass.

    Args:
        autoencoder: in fp32, on the device of the activations.
        encoder: makes activations of prompts.
        prompts: at least one.
        progress: called with the number of prompts that were just done.

    Raises:
        InputError: there are no prompts, or all tokens have the same activations.
    """
    import torch

    from bakeout.editor.sae.model import Fidelity

    count = tokens = 0
    error = square = 0.0
    device = autoencoder.encoder.device
    # fp64 is for sums over more tokens than fp32 has digits.
    total_x, total_error = (torch.zeros(autoencoder.width, dtype=torch.float64, device=device) for _ in range(2))
    total = torch.zeros(autoencoder.latents, dtype=torch.float64, device=device)
    active = torch.zeros(autoencoder.latents, dtype=torch.int64, device=device)
    largest = torch.zeros(autoencoder.latents, device=device)
    for texts in _pieces(prompts, autoencoder, encoder):
        x = encoder(texts)
        z = autoencoder.encode(x)
        shift, scale = autoencoder.norm(x)
        off = (autoencoder.decode(z) * scale + shift - x).double()
        count, tokens = count + len(texts), tokens + x.shape[0] * x.shape[1]
        error, square = error + float(off.square().sum()), square + float(x.double().square().sum())
        total_x += x.double().sum((0, 1))
        total_error += off.sum((0, 1))
        total += z[:, 1:].sum((0, 1), dtype=torch.float64)
        active += (z > 0).sum((0, 1))
        largest = largest.maximum(z.amax((0, 1)))
        _tell(progress, len(texts))
    if not tokens:
        raise InputError("there are no prompts to look at: give a file with at least one")
    spread = square - float(total_x.square().sum()) / tokens
    if spread <= 0:
        raise InputError("the activations of all tokens are the same: give other prompts, or check the model")
    constant = float(total_error.square().sum()) / tokens
    dead = float((active == 0).double().mean())
    return Activity(
        Fidelity(1 - error / spread, float(active.sum()) / tokens, dead, tokens),
        1 - (error - constant) / spread,
        count, active.cpu(), total.cpu(), largest.cpu(),
    )  # fmt: skip


def most_active(activity: Activity, count: int) -> tuple[int, ...]:
    """The neurons of the largest sums of activations, the first position aside, the largest first; none is zero."""
    order = activity.total.argsort(descending=True, stable=True)[:count]
    return tuple(int(index) for index in order if activity.total[index] > 0)


def examine(
    autoencoder: SparseAutoencoder,
    encoder: Encoder,
    prompts: Iterable[str],
    neurons: Sequence[int],
    activity: Activity,
    progress: _Progress | None = None,
) -> tuple[Neuron, ...]:
    """What each of `neurons` answers to, in the prompts of which `measure` gave `activity`.

    Raises:
        InputError: there is no such neuron.
    """
    _refuse_unless_there(neurons, autoencoder)
    albums = [_Album(index, float(activity.largest[index])) for index in neurons]
    for texts in _pieces(prompts, autoencoder, encoder):
        z = autoencoder.encode(encoder(texts))[..., list(neurons)].cpu()
        for place, album in enumerate(albums):
            album.add(texts, z[..., place])
        _tell(progress, len(texts))
    return tuple(album.finished(int(activity.active[album.index]), activity.fidelity.tokens) for album in albums)


@dataclass
class _Album:
    """What is kept of one neuron while prompts pass."""

    index: int
    largest: float
    prompts: int = 0
    counts: Any = 0
    examples: dict[str, Example] = field(default_factory=dict)

    def add(self, texts: Sequence[str], z: Tensor) -> None:
        """Note the activations [prompts, positions] of some prompts."""
        import torch

        above = z[z > 0]
        if not len(above):
            return
        places = (above * (BINS / self.largest)).long().clamp(max=BINS - 1)
        self.counts = self.counts + torch.bincount(places, minlength=BINS)
        values, positions = z.max(1)
        self.prompts += int((values > 0).sum())
        for row in values.argsort(descending=True, stable=True).tolist():
            value = float(values[row])
            least = min((it.activation for it in self.examples.values()), default=0.0)
            if value <= (least if len(self.examples) == EXAMPLES else 0.0):
                break
            # The same text has the same activations, but for the rounding of other shapes.
            self.examples.setdefault(texts[row], Example(texts[row], int(positions[row]), value))
            if len(self.examples) > EXAMPLES:
                del self.examples[min(self.examples, key=lambda text: self.examples[text].activation)]

    def finished(self, active: int, tokens: int) -> Neuron:
        examples = sorted(self.examples.values(), key=lambda it: -it.activation)
        counts = tuple(self.counts.tolist()) if self.prompts else (0,) * BINS
        return Neuron(self.index, active, tokens, self.prompts, self.largest, counts, tuple(examples))


def describe_autoencoder(autoencoder: SparseAutoencoder, path: Path) -> str:
    """What an autoencoder is, from its file alone."""
    norms = autoencoder.decoder.float().norm(dim=0)
    activation = f"TopK, {autoencoder.k:,} of a token" if autoencoder.activation == "topk" else "ReLU"
    rows = (
        ("site", autoencoder.site),
        ("features", f"{autoencoder.width:,}"),
        ("latents", f"{autoencoder.latents:,}, {activation}"),
        ("norm of the input", autoencoder.input_norm.replace("_", " ")),
        ("decoder's columns", f"norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}"),
        ("made by", autoencoder.source_format),
        ("stored", f"{str(autoencoder.encoder.dtype).removeprefix('torch.')}, {path.stat().st_size / 1e3:,.0f} kB"),
        ("digest", autoencoder.digest),
    )
    return table((f"{path}", ""), rows)


def describe_activity(activity: Activity) -> str:
    """How well an autoencoder tells what it was given, in a line."""
    found = activity.fidelity
    return (
        f"On {activity.prompts:,} prompt{'s' * (activity.prompts > 1)} ({found.tokens:,} tokens): variance explained "
        f"{found.variance_explained:.4f}, L0 {found.l0:.1f}, dead {found.dead_share:.1%}"
    )


def doubt(activity: Activity) -> str | None:
    """What is wrong with an autoencoder that explains less than the mean does; None if nothing is."""
    explained = activity.fidelity.variance_explained
    if activity.but_for_a_constant < 0:
        return (
            f"the variance explained is {explained:.4g}: these are not the activations that the autoencoder was "
            "trained on; check the site, the model and how its input is normalised"
        )
    if explained < 0:
        # Concept Steerers' training takes b_pre from x before it compares x with x̂.
        return (
            f"the variance explained is {explained:.4g}, and {activity.but_for_a_constant:.4f} but for a constant: "
            "every reconstruction is off by the same vector, which no edit sees"
        )
    return None


def describe_neurons(neurons: Sequence[Neuron], autoencoder: SparseAutoencoder, mark: Callable[[Example], str]) -> str:
    """For each neuron how often it is active, and its examples, a line each."""
    blocks = []
    for it in neurons:
        head = (
            f"neuron {it.index} ({autoencoder.digest[:16]}:{it.index} in an edit): active at {it.active:,} of "
            f"{it.tokens:,} tokens ({it.active / it.tokens:.2%}), in {it.prompts:,} "
            f"prompt{'s' * (it.prompts != 1)}"
        )
        rows = [(f"{example.activation:10.4g}", mark(example)) for example in it.examples]
        blocks.append(f"{head}\n{table(('activation', 'at'), rows)}" if rows else head)
    return "\n\n".join(blocks)


def marker(model: Model, site: str, around: int = _AROUND) -> Callable[[Example], str]:
    """What writes an example as its prompt with the token marked: `a red «star» on grass`.

    Args:
        model: whose tokenizer it was.
        site: of the text encoder.
        around: characters to show on each side of the token.
    """
    from bakeout.editor.pipeline import load_tokenizer

    tokenizer = load_tokenizer(model.parts[site.partition(".")[0].replace("text_encoder", "tokenizer")])

    def mark(example: Example) -> str:
        text, position = example.prompt, example.position
        spans = tokenizer(
            text, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
        )["offset_mapping"]  # fmt: skip
        if position == 0:
            text, begin, end, token = f" {text}", 0, 0, "start"
        elif position >= len(spans) - 1:
            text = f"{text} "
            begin = end = len(text)
            token = "end" if position == len(spans) - 1 else f"padding, position {position}"
        else:
            begin, end = spans[position]
            token = text[begin:end]
        before, after = text[max(0, begin - around) : begin], text[end : end + around]
        shown = f"{'…' * (begin > around)}{before}«{token}»{after}{'…' * (end + around < len(text))}"
        return "".join(it if it.isprintable() else " " for it in shown)  # no codes that a terminal obeys

    return mark


def _pieces(prompts: Iterable[str], autoencoder: SparseAutoencoder, encoder: Encoder) -> Iterator[list[str]]:
    from bakeout.editor.sae.activations import CHUNK

    size = max(1, min(CHUNK, _LATENTS // (encoder.positions * autoencoder.latents)))
    left = iter(prompts)
    while piece := list(islice(left, size)):
        yield piece


def _tell(progress: _Progress | None, count: int) -> None:
    if progress is not None:
        progress(count)


def _refuse_unless_there(neurons: Sequence[int], autoencoder: SparseAutoencoder) -> None:
    for index in neurons:
        if not 0 <= index < autoencoder.latents:
            raise InputError(f"there is no neuron {index}: they are 0 to {autoencoder.latents - 1}")


def _write_chart(neurons: Sequence[Neuron], mark: Callable[[Example], str], title: str, path: Path) -> None:
    from bakeout.neuron_chart import draw_histograms
    from bakeout.plot import write_png

    if not neurons:
        raise InputError(f"no neuron is active on these prompts, so {path} would show nothing: leave -o out")
    best = [mark(it.examples[0]) if it.examples else "active nowhere" for it in neurons]
    write_png(path, lambda part: draw_histograms(neurons, best, title, part))


@dataclass(frozen=True)
class _First:
    """The first `count` prompts, or all, again whenever asked."""

    prompts: Iterable[str]
    count: int | None

    def __iter__(self) -> Iterator[str]:
        return islice(iter(self.prompts), self.count)
