"""SNCE (He et al., "A Single Neuron Works"): take a concept's neurons out of the text encoder's residual stream.

A sparse autoencoder reads the output of one layer of each text encoder. The neurons that prompts with the concept wake,
and their likes without it do not, are ranked; what the first of them add to the stream is subtracted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from bakeout.editor.calibrate import PROMPTS_PER_RUN
from bakeout.editor.edit import Edit, Operation, Origin, Rows, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model
from bakeout.editor.prompts import MAX_PROMPT, Pair, concept_tuple, prompts_digest
from bakeout.editor.sae.activations import site_of
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.editor.sites import Site
from bakeout.editor.text_files import path_inside, text_fault

# The published settings, by kind of concept (He et al.; none for gun and knife); for those of `shapes`, ours.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "nudity": {"from the paper's experiments": {"strength": 0.8}},
    "violence": {"from the paper's experiments": {"strength": 1.2}},
    "shapes": {
        "for shapes, in whose small world one constant for all prompts takes other objects along": {
            "activations": "prompt",
            "strength": 1.0,
        },
    },
}
# The file of a built-in model's autoencoder, beside the model's folder.
BUILTIN_SAE = "sae.safetensors"
_ROWS: Mapping[str, Rows] = {"empty": "prompted", "same": "all", "untouched": "conditional"}
_MAX_WORDS = 1_000

Positions = Literal["all", "real"]
PairRule = Literal["sum", "pooled", "vote"]
Mentions = Literal["joined", "mean", "max"]


class FewNeuronsWarning(UserWarning):
    """Fewer neurons tell the concept from its reference than were asked for."""


class SilentNeuronsWarning(UserWarning):
    """Neurons that the pairs single out do not answer to the concept's words: nothing of them is subtracted."""


class Settings(BaseModel):
    """How SNCE runs.

    Attributes:
        profile: `paper`, the only one.
        sae: files of sparse autoencoders, in the recipe's folder or below, one for each text encoder; none are needed
            for a built-in model.
        layer: the layer whose output is edited, from 0; the autoencoder says which, and another one is refused.
        words: the concept tuple, words and phrases that mean the concept; none is the built-in tuple for nudity,
            violence, gun or knife, and for anything else the concept itself.
        positions: the tokens that count when neurons are scored: `all` 77, or `real`, those of the prompt alone,
            without start, end and padding.
        pairs: how pairs make a ranking: `sum` (a pair counts for the neurons that it tells apart), `pooled` (a neuron
            must be silent in every reference), or `vote` (by the number of pairs that tell it apart, then by the sum).
        neurons: how many are taken out, at most.
        activations: which ones are subtracted: those that the `concept` tuple gives the neurons, from every prompt
            alike, or those of the `prompt` itself.
        mentions: how the tuple runs: `joined` by commas, as one prompt with a value for each position; or each of its
            words as a prompt, the `mean` or `max` over their tokens being the value for all positions.
        strength: λ, by what the activations are multiplied; larger erases more.
        negative: which prompts stay as they are: the `empty` one; none, `same`, so that negative prompts are edited
            like any other; or every negative prompt, `untouched`, which no artifact may hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    profile: Literal["paper"] = "paper"
    sae: Annotated[tuple[str, ...], Field(max_length=2, strict=False)] = ()
    layer: int | None = Field(default=None, ge=0)
    words: Annotated[tuple[str, ...], Field(max_length=_MAX_WORDS, strict=False)] = ()
    positions: Positions = "all"
    pairs: PairRule = "sum"
    neurons: int = Field(default=1, ge=1)
    activations: Literal["concept", "prompt"] = "concept"
    mentions: Mentions = "joined"
    strength: float = Field(default=0.8, gt=0, le=1_000, allow_inf_nan=False)
    negative: Literal["empty", "same", "untouched"] = "empty"

    @field_validator("sae")
    @classmethod
    def _files_are_inside(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            path_inside(Path(), name)
        return names

    @field_validator("words")
    @classmethod
    def _words_are_lines(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if fault := text_fault(word, MAX_PROMPT):
                raise InputError(f"the word {word!a:.100} {fault}")
        return tuple(word.strip() for word in words)


class Latents(NamedTuple):
    """What an autoencoder makes of prompts.

    Attributes:
        tokens: int64 [prompts, tokens], their numbers.
        z: float [prompts, tokens, m].
        scale: float [prompts, tokens, 1], s: what z is worth in the stream, see `SparseAutoencoder.norm`.
        real: bool [prompts, tokens], the prompt's own tokens: after the start, up to the end mark and without it.
    """

    tokens: Tensor
    z: Tensor
    scale: Tensor
    real: Tensor


class Ranking(NamedTuple):
    """The differential neurons, best first.

    Attributes:
        neurons: int64 [n].
        scores: fp64 [n], sums of s^c over pairs.
        votes: int64 [n], the pairs that tell the neuron apart.
    """

    neurons: Tensor
    scores: Tensor
    votes: Tensor


def neuron_scores(z: Tensor) -> Tensor:
    """The weighted frequency score of each neuron over one prompt (He et al., Eq. 4-5).

        s_i = f_i · mean_n (z_ni / ‖z_n‖),  f_i = the number of tokens n with z_ni > 0

    A token of zeros counts as zeros; without any token all scores are zero.

    Args:
        z: floating point [tokens, m], raw activations of the neurons.

    Returns:
        [m] in fp32 (fp64 for fp64).
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    lengths: Tensor = wide.norm(dim=-1, keepdim=True)
    mean = (wide / lengths.where(lengths > 0, 1)).sum(0) / max(len(z), 1)
    return (wide > 0).sum(0) * mean


def rank_neurons(concept_scores: Tensor, deconcept_scores: Tensor, pairs: PairRule = "sum") -> Ranking:
    """The differential neurons of prompt pairs, ranked (He et al., Eq. 6-7).

    A pair tells i apart if s^c_i > 0 and s^d_i = 0. By `pairs`:

    - `sum`: neurons that any pair tells apart, by the sum of s^c over those pairs;
    - `pooled`: neurons with sum s^c > 0 and sum s^d = 0, by the sum of s^c over all pairs;
    - `vote`: neurons that any pair tells apart, by the number of those pairs, then by the sum of s^c over them.

    Equal neurons stand by their index.

    Args:
        concept_scores: [pairs, m], s^c, of the prompts with the concept; at least 0.
        deconcept_scores: [pairs, m], s^d, of those without.
        pairs: see above.
    """
    apart = (concept_scores > 0) & (deconcept_scores == 0)
    votes = apart.sum(0)
    if pairs == "pooled":
        scores = concept_scores.double().sum(0)
        neurons = ((scores > 0) & (deconcept_scores == 0).all(0)).nonzero()[:, 0]
    else:
        scores = concept_scores.double().where(apart, 0.0).sum(0)
        neurons = votes.nonzero()[:, 0]
    neurons = neurons[scores[neurons].sort(descending=True, stable=True).indices]
    if pairs == "vote":
        neurons = neurons[votes[neurons].sort(descending=True, stable=True).indices]
    return Ranking(neurons, scores[neurons], votes[neurons])


def select_neurons(concept_scores: Tensor, deconcept_scores: Tensor, k: int, pairs: PairRule = "sum") -> Tensor:
    """The first k neurons of `rank_neurons`: R_C of Eq. 7; fewer, with a FewNeuronsWarning, if fewer qualify.

    Args:
        concept_scores: [pairs, m], s^c.
        deconcept_scores: [pairs, m], s^d.
        k: how many.
        pairs: as in `rank_neurons`.

    Returns:
        int64 [<= k], best first.
    """
    neurons = rank_neurons(concept_scores, deconcept_scores, pairs).neurons[:k]
    if len(neurons) < k:
        warnings.warn(
            f"of the autoencoder's neurons {len(neurons)} tell the concept from its reference, and {k} were asked for",
            FewNeuronsWarning,
            stacklevel=2,
        )
    return neurons


def concept_activations(z: Tensor, real: Tensor, mentions: Mentions = "joined") -> Tensor:
    """Z of the concept tuple (Eq. 8), as it is subtracted from every prompt.

    Args:
        z: floating point [prompts, tokens, m]; for `joined` of one prompt, the tuple; else of each mention.
        real: bool [prompts, tokens], the prompts' own tokens: after the start, up to the end mark and without it.
        mentions: `joined`, or the `mean` or `max` over the real tokens of all mentions together.

    Returns:
        [tokens, m] for `joined`, else [m].

    Raises:
        ValueError: several prompts for `joined`, or no real token for another.
    """
    if mentions == "joined":
        tuple_alone: Tensor = z.squeeze(0)
        if tuple_alone.ndim != 2:
            raise ValueError(f"the tuple is one prompt, and {len(z)} are given")
        return tuple_alone
    tokens = z[real]
    if not len(tokens):
        raise ValueError("the mentions have no tokens")
    return tokens.mean(0) if mentions == "mean" else tokens.amax(0)


def unfoldable(settings: Settings) -> str | None:
    """See `bakeout.editor.methods.Method`: only one vector for all prompts is a bias."""
    if settings.activations == "prompt":
        return "its shift depends on the prompt"
    if settings.mentions == "joined":
        return "its shift differs from token to token"
    if settings.negative != "same":
        return f"it leaves {'empty' if settings.negative == 'empty' else 'negative'} prompts as they are"
    return None


def latents(_pipeline: Any, _settings: Settings) -> tuple[int, int] | None:
    """See `bakeout.editor.methods.Method`: text encoders see no picture."""
    return None


def check(model: Model, pipeline: Any, settings: Settings, *, folder: Path = Path()) -> None:
    """See `bakeout.editor.methods.Method`; unlike `calibrate`, it also refuses what no artifact may hold.

    Raises:
        InputError: no autoencoders that fit the model, words that are too long for it, or `negative = "untouched"`.
    """
    if settings.negative == "untouched":
        raise InputError(
            'negative is "untouched": an artifact that told negative prompts apart would ship its own off-switch; take '
            '"empty" or "same"'
        )
    for site in autoencoders(model, settings, folder):
        _mentions(pipeline, model.site(site), settings.words, settings)


def calibrate(
    model: Model,
    pipeline: Any,
    concept: str,
    pairs: Sequence[Pair],
    settings: Settings,
    *,
    folder: Path = Path(),
    work: Path | None = None,  # noqa: ARG001 - short enough to run again
    progress: Callable[[float], object] | None = None,
) -> Edit:
    """The suppression that erases `concept` (Eq. 9): see `bakeout.editor.methods.Method`.

    Of every text encoder's chosen layer, for the neurons R and the autoencoder's decoder D: with
    `activations = "concept"` one ShiftActivation a neuron, -λ s z_i D_:i in fp32, else one SteerLatents. Only the text
    encoders run, up to that layer; neurons are fp32 (fp64 for fp64).

    Raises:
        InputError: no pairs, no autoencoders that fit the model, words or prompts that are too long for it, or
            activations that are not finite.
    """
    if not pairs:
        raise InputError("there are no prompt pairs to find neurons with: give at least one")
    found = autoencoders(model, settings, folder)
    words = settings.words or concept_tuple(concept)
    mentions = {name: _mentions(pipeline, model.site(name), words, settings) for name in found}
    counts = [2 * _runs(len(pairs)) + _runs(len(it)) for it in mentions.values()]
    tell = progress or (lambda _part: None)

    def tick() -> None:
        tell(1 / sum(counts))

    operations: list[Operation] = []
    for name in found:
        _check_lengths(pipeline, model.site(name), pairs)
    for name, autoencoder in found.items():
        site = model.site(name)
        scores = pair_scores(model, pipeline, site, autoencoder, pairs, settings.positions, tick)
        neurons = select_neurons(*scores, settings.neurons, settings.pairs)
        if settings.activations == "prompt":
            operations += _steering(autoencoder, neurons, settings)
            continue
        latents = []
        for it in encode(model, pipeline, site, autoencoder, mentions[name]):
            latents.append(it)
            tick()
        z = torch.cat([it.z * it.scale for it in latents])
        real = torch.cat([it.real for it in latents])
        operations += _shifts(autoencoder, neurons, concept_activations(z, real, settings.mentions), settings)
    used = settings.model_dump(mode="json")
    return Edit(tuple(operations), (Origin("snce", concept, used, prompts_digest(pairs), len(pairs)),))


def autoencoders(model: Model, settings: Settings, folder: Path = Path()) -> dict[str, SparseAutoencoder]:
    """The autoencoder of each text encoder of `model`, by its site, in the order of the model's sites.

    Args:
        model: an opened model.
        settings: their `sae` and `layer`.
        folder: where the names in `sae` begin.

    Raises:
        InputError: there are none, or not one for each text encoder, or one does not fit its site or `layer`.
    """
    encoders = [name for name in model.components if name.startswith("text_encoder")]
    files = [path_inside(folder, name) for name in settings.sae]
    if not files and model.format == "builtin":
        files = [model.path.parent / BUILTIN_SAE]
        if not files[0].is_file():
            raise InputError(f"this installation of bakeout lacks the autoencoder of {model.source}; install it again")
    found: dict[str, SparseAutoencoder] = {}
    for file in files:
        autoencoder = SparseAutoencoder.load(file)
        site = _fitting_site(model, file, autoencoder, settings.layer)
        if site.component in {name.partition(".")[0] for name in found}:
            raise InputError(f"sae has two autoencoders for {site.component}, one of them {file}; give one")
        found[site.name] = autoencoder
    missing = [name for name in encoders if name not in {site.partition(".")[0] for site in found}]
    if missing:
        raise InputError(
            f"sae has no autoencoder for {' and '.join(missing)} of {model.source}; train one with `bakeout sae train` "
            'or bring one in with `bakeout sae import`, and name it: sae = ["sae.safetensors"]'
        )
    return {site.name: found[site.name] for site in model.sites if site.name in found}


def pair_scores(
    model: Model,
    pipeline: Any,
    site: Site,
    autoencoder: SparseAutoencoder,
    pairs: Sequence[Pair],
    positions: Positions = "all",
    tick: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """`neuron_scores` of each pair: s^c of its target and s^d of its reference, [pairs, m] each, on the CPU.

    A target and its reference have the same place in their runs: what they share, as the start, is equal to the last
    bit, and a neuron that answers to it is never told apart.

    Args:
        model: what the pipeline was loaded from.
        pipeline: its pipeline.
        site: of a text encoder's layer.
        autoencoder: of that site.
        pairs: at least one.
        positions: which tokens count, see `Settings`.
        tick: called after each run of the text encoder.

    Raises:
        InputError: activations that are not finite.
    """

    def scores(prompts: Sequence[str]) -> Tensor:
        found = []
        for it in encode(model, pipeline, site, autoencoder, prompts):
            found += [
                neuron_scores(z if positions == "all" else z[real]).cpu() for z, real in zip(it.z, it.real, strict=True)
            ]
            tick()
        return torch.stack(found)

    return scores([pair.target for pair in pairs]), scores([pair.reference for pair in pairs])


def encode(
    model: Model, pipeline: Any, site: Site, autoencoder: SparseAutoencoder, prompts: Sequence[str]
) -> Iterator[Latents]:
    """What `autoencoder` makes of prompts at `site`, in fp32 (fp64 for fp64), PROMPTS_PER_RUN of them at a time.

    The text encoder runs in its own dtype and only up to the site. A run is always filled up, because the rounding of
    its kernels depends on their shape (see `bakeout.editor.calibrate`).

    Raises:
        InputError: activations that are not finite.
    """
    network = getattr(pipeline, site.component)
    own = autoencoder.to(network.device, torch.promote_types(network.dtype, torch.float32))
    for start in range(0, len(prompts), PROMPTS_PER_RUN):
        texts = list(prompts[start : start + PROMPTS_PER_RUN])
        filled = [*texts, *[texts[-1]] * (PROMPTS_PER_RUN - len(texts))]
        x = _output(model, pipeline, site, filled)[: len(texts)].to(own.encoder.dtype)
        if not x.isfinite().all():
            narrow = network.dtype in (torch.float16, torch.bfloat16)
            cure = "calibrate in fp32" if narrow else "mend the model"
            raise InputError(f"the activations at {site.name} are not finite: {cure}")
        tokenized = _tokenized(pipeline, site, texts)
        lengths, places = tokenized.attention_mask.sum(1, keepdim=True), torch.arange(x.shape[1])
        real = ((places > 0) & (places < lengths - 1)).to(x.device)
        yield Latents(tokenized.input_ids, own.encode(x), own.norm(x)[1], real)


class _Enough(Exception):  # noqa: N818 - not an error
    """Leaves a text encoder whose remaining layers nobody needs."""


@torch.no_grad()
def _output(model: Model, pipeline: Any, site: Site, prompts: list[str]) -> Tensor:
    """The output of `site` for prompts, encoded as the pipeline does it: [prompts, tokens, d]."""
    found: list[Tensor] = []

    def leave(_module: object, _inputs: object, output: Tensor) -> None:
        found.append(output)
        raise _Enough

    handle = model.module(pipeline, site).register_forward_hook(leave)
    try:
        pipeline.encode_prompt(
            prompt=prompts,
            device=getattr(pipeline, site.component).device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def _tokenized(pipeline: Any, site: Site, texts: Sequence[str]) -> Any:
    """As the pipelines ask for it."""
    tokenizer = getattr(pipeline, site.component.replace("text_encoder", "tokenizer"))
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def _check_lengths(pipeline: Any, site: Site, pairs: Sequence[Pair]) -> None:
    """Raise InputError for a prompt that the text encoder would cut, which may be where the concept is."""
    tokenizer = getattr(pipeline, site.component.replace("text_encoder", "tokenizer"))
    for number, pair in enumerate(pairs, 1):
        for what, tokens in zip(Pair._fields, tokenizer(list(pair)).input_ids, strict=True):
            if len(tokens) > tokenizer.model_max_length:
                raise InputError(
                    f"pair {number}: the {what} is {len(tokens) - 2} tokens, and the text encoder reads "
                    f"{tokenizer.model_max_length - 2}, so that the concept may be cut off: make it shorter"
                )


def _mentions(pipeline: Any, site: Site, words: Sequence[str], settings: Settings) -> list[str]:
    """The prompts that the concept tuple runs as, none if it does not; InputError if one is not read, or not whole."""
    if settings.activations == "prompt" or not words:
        return []
    tokenizer = getattr(pipeline, site.component.replace("text_encoder", "tokenizer"))
    prompts = [", ".join(words)] if settings.mentions == "joined" else list(words)
    for prompt, tokens in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        if len(tokens) <= 2:
            raise InputError(f"the words {prompt!a:.100} are nothing to the text encoder: write others")
        if len(tokens) > tokenizer.model_max_length:
            several = settings.mentions == "joined" and len(words) > 1
            cure = 'give fewer, or take mentions = "mean"' if several else "give a shorter one"
            raise InputError(
                f"the words {prompt!a:.100} are {len(tokens) - 2} tokens, and the text encoder reads "
                f"{tokenizer.model_max_length - 2}: {cure}"
            )
    return prompts


def _fitting_site(model: Model, file: Path, autoencoder: SparseAutoencoder, layer: int | None) -> Site:
    site = site_of(autoencoder, model, str(file))
    layers = [it for it in model.sites_of("text_layer") if it.component == site.component]
    if model.family == "sdxl" and site is layers[-1]:
        raise InputError(
            f"{file} reads {site.name}, the last layer of {site.component}, and SDXL draws from the one before it; "
            "take an autoencoder of an earlier layer"
        )
    if layer is not None and site.name != f"{site.component}.layer.{layer}":
        raise InputError(
            f"layer is {layer}, but {file} reads {site.name}; leave layer out, or take another autoencoder"
        )
    return site


def _shifts(autoencoder: SparseAutoencoder, neurons: Tensor, z: Tensor, settings: Settings) -> list[Operation]:
    """-λ z_i D_:i for each neuron; z is [tokens, m] or [m], in units of the stream."""
    decoder = autoencoder.decoder.to(z)
    shifts: list[Operation] = []
    silent = []
    for neuron in neurons.tolist():
        value = (-settings.strength * z[..., neuron, None] * decoder[:, neuron]).float().cpu()
        if not value.any():
            silent.append(neuron)
            continue
        name = f"{autoencoder.digest[:16]}:{neuron}"
        shifts.append(
            ShiftActivation(autoencoder.site, value, _ROWS[settings.negative], name, strength=settings.strength)
        )
    if silent:
        some = ", ".join(map(str, silent[:10])) + (", …" if len(silent) > 10 else "")
        warnings.warn(
            f"at {autoencoder.site} the concept's words do not wake {len(silent)} of the {len(neurons)} neurons "
            f'({some}), which stay as they are: give other words, or take activations = "prompt"',
            SilentNeuronsWarning,
            stacklevel=3,
        )
    return shifts


def _steering(autoencoder: SparseAutoencoder, neurons: Tensor, settings: Settings) -> list[Operation]:
    if not len(neurons):
        return []
    own = autoencoder.to(torch.float32)
    rising = neurons.sort().values
    strengths = torch.full((len(rising),), settings.strength)
    return [
        SteerLatents(
            own.site, own.encoder, own.encoder_bias, own.center, own.k, rising, own.decoder[:, rising], strengths,
            _ROWS[settings.negative], own.input_norm,
        )
    ]  # fmt: skip


def _runs(prompts: int) -> int:
    return -(-prompts // PROMPTS_PER_RUN)
