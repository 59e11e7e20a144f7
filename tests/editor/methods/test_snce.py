"""SNCE against a second derivation from the paper: numpy in fp64, one prompt at a time, plain loops, nothing shared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bakeout.editor.calibrate import PROMPTS_PER_RUN
from bakeout.editor.edit import Edit, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.methods import method, snce
from bakeout.editor.methods.snce import (
    FewNeuronsWarning,
    Settings,
    SilentNeuronsWarning,
    calibrate,
    check,
    concept_activations,
    encode,
    neuron_scores,
    pair_scores,
    rank_neurons,
    select_neurons,
    unfoldable,
)
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import Pair, prompts_digest
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.validate.reference import applied

properties = settings(derandomize=True, deadline=None, max_examples=100)

PAIRS = tuple(Pair(f"a naked {it} by the sea", f"a {it} by the sea") for it in ("man", "owl", "duck", "king", "fox"))
# Like the targets, so that they wake some of the neurons that the targets do.
WORDS = (PAIRS[0].target, "nude, bare", "a naked owl")
SITE = "text_encoder.layer.1"
K = 10


def random_autoencoder(width: int, site: str = SITE, seed: int = 0, **changes: Any) -> SparseAutoencoder:
    """Few enough latents are active that each pair tells some apart."""
    generator = torch.Generator().manual_seed(seed)
    latents = 3 * width
    encoder = torch.randn(latents, width, generator=generator)
    return replace(
        SparseAutoencoder(
            encoder, torch.randn(latents, generator=generator) * 0.3, encoder.T.contiguous() / width**0.5,
            torch.randn(width, generator=generator) * 0.1, K, "topk", "none", site,
        ),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="session")
def shapes() -> tuple[Model, Any]:
    model = open_model("shapes")
    return model, model.pipeline("cpu", torch.float32)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A function that saves autoencoders and gives the settings that name them; they lie in `tmp_path`."""

    def save(*autoencoders: SparseAutoencoder, **options: Any) -> Settings:
        for number, it in enumerate(autoencoders):
            it.save(tmp_path / f"{number}.safetensors")
        return Settings(sae=tuple(f"{number}.safetensors" for number in range(len(autoencoders))), **options)

    return save


class Naive:
    """SNCE at one site, in loops."""

    def __init__(self, pipeline: Any, autoencoder: SparseAutoencoder, options: Mapping[str, Any]) -> None:
        self.pipeline, self.options = pipeline, Settings(**options)
        self.component, _, layer = autoencoder.site.partition(".layer.")
        self.hidden = int(layer) + 1
        self.sae = autoencoder
        self.E, self.e, self.D, self.c = (
            getattr(autoencoder, name).double().numpy() for name in ("encoder", "encoder_bias", "decoder", "center")
        )
        self.tokenizer = getattr(pipeline, self.component.replace("text_encoder", "tokenizer"))

    def stream(self, prompt: str) -> np.ndarray:
        """What leaves the layer: [77, d]."""
        tokens = self.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = getattr(self.pipeline, self.component)(tokens.input_ids, output_hidden_states=True)
        return found.hidden_states[self.hidden][0].double().numpy()

    def own(self, prompt: str) -> range:
        """The places of the prompt's own tokens."""
        return range(1, min(76, len(self.tokenizer(prompt).input_ids) - 1))

    def norm(self, x: np.ndarray) -> tuple[float, float]:
        if self.sae.input_norm == "layer_norm":
            mean = sum(x) / len(x)
            return mean, math.sqrt(sum((it - mean) ** 2 for it in x) / (len(x) - 1)) + 1e-5
        if self.sae.input_norm == "constant_norm":
            return 0.0, math.sqrt(sum(it**2 for it in x) / len(x))
        return 0.0, 1.0

    def latents(self, x: np.ndarray) -> dict[int, float]:
        """Those above zero of the K largest of one token, in units of the normed input."""
        shift, scale = self.norm(x)
        before = self.E @ ((x - shift) / scale - self.c) + self.e
        largest = sorted(range(len(before)), key=lambda i: (-before[i], i))[: self.sae.k]
        return {i: before[i] for i in largest if before[i] > 0}

    def scores(self, prompt: str) -> dict[int, float]:
        """Eq. 4-5."""
        stream = self.stream(prompt)
        places = self.own(prompt) if self.options.positions == "real" else range(77)
        frequency: dict[int, int] = {}
        total: dict[int, float] = {}
        for place in places:
            z = self.latents(stream[place])
            length = math.sqrt(sum(it**2 for it in z.values()))
            for i, value in z.items():
                frequency[i] = frequency.get(i, 0) + 1
                total[i] = total.get(i, 0.0) + value / length
        return {i: frequency[i] * total[i] / len(places) for i in total}

    def neurons(self, pairs: Sequence[Pair]) -> list[int]:
        """Eq. 6-7."""
        return naive_selection(
            [self.scores(pair.target) for pair in pairs], [self.scores(pair.reference) for pair in pairs],
            self.options.neurons, self.options.pairs,
        )  # fmt: skip

    def concept(self, words: Sequence[str]) -> dict[int, np.ndarray]:
        """Z_i of Eq. 8 in units of the stream, as [77, 1] or [1, 1], for every neuron that is awake."""

        def token(x: np.ndarray) -> np.ndarray:
            z = np.zeros(len(self.E))
            for i, value in self.latents(x).items():
                z[i] = value * self.norm(x)[1]
            return z

        if self.options.mentions == "joined":
            z = np.stack([token(x) for x in self.stream(", ".join(words))])
        else:
            streams = [(self.stream(word), self.own(word)) for word in words]
            rows = np.stack([token(stream[place]) for stream, places in streams for place in places])
            z = (rows.mean(0) if self.options.mentions == "mean" else rows.max(0))[None]
        return {i: z[:, i, None] for i in range(len(self.E)) if z[:, i].any()}

    def edited(self, prompt: str, neurons: Sequence[int], words: Sequence[str]) -> np.ndarray:
        """Eq. 9: the stream of `prompt` that the later layers are to see, if it is edited at all."""
        h = self.stream(prompt)
        taken = np.zeros_like(h)
        if self.options.activations == "concept":
            z = self.concept(words)
            for i in neurons:
                taken += z.get(i, 0.0) * self.D[:, i]
        else:
            for place, x in enumerate(h):
                awake = self.latents(x)
                for i in neurons:
                    taken[place] += self.norm(x)[1] * awake.get(i, 0.0) * self.D[:, i]
        return h - self.options.strength * taken


def naive_selection(
    concept: Sequence[Mapping[int, float]], deconcept: Sequence[Mapping[int, float]], k: int, pairs: str
) -> list[int]:
    everyone = {i for scores in concept for i, score in scores.items() if score > 0}
    told = {i: [c[i] for c, d in zip(concept, deconcept, strict=True) if c.get(i, 0) > 0 and d.get(i, 0) == 0]
            for i in everyone}  # fmt: skip
    if pairs == "pooled":
        silent = {i for i in everyone if not any(d.get(i, 0) for d in deconcept)}
        ranked = sorted(silent, key=lambda i: (-sum(c.get(i, 0) for c in concept), i))
    else:
        key = (lambda i: (-len(told[i]), -sum(told[i]), i)) if pairs == "vote" else (lambda i: (-sum(told[i]), i))
        ranked = sorted((i for i in everyone if told[i]), key=key)
    return ranked[:k]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).sum() / (expected**2).sum()))


def taken_out(edit: Edit, site: str = SITE) -> list[int]:
    own = [it for it in edit.operations if it.site == site]
    if any(isinstance(it, SteerLatents) for it in own):
        (only,) = own
        return only.neurons.tolist()
    return sorted(int(it.neuron.partition(":")[2]) for it in own)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Warnings have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewNeuronsWarning)
        warnings.simplefilter("ignore", SilentNeuronsWarning)
        yield


OPTIONS: list[dict[str, Any]] = [
    {},
    *({"positions": positions, "pairs": pairs, "neurons": 3}
      for positions, pairs in product(("all", "real"), ("sum", "pooled", "vote"))),
    *({"activations": "prompt", "negative": negative, "neurons": 4} for negative in ("empty", "same")),
    *({"mentions": mentions, "negative": negative, "neurons": 4}
      for mentions, negative in product(("joined", "mean", "max"), ("empty", "same"))),
    {"strength": 1.2},
    {"strength": 2, "activations": "prompt"},
    {"neurons": 1000},
]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "layer_norm": {"input_norm": "layer_norm"},
    "constant_norm": {"input_norm": "constant_norm"},
    # The seed is of one whose neurons answer to the words.
    "relu": {"seed": 2, "k": 48, "activation": "relu", "encoder_bias": torch.full((48,), -4.0)},
    "first layer": {"site": "text_encoder.layer.0"},
}
# What a kind of autoencoder takes part in; how neurons are ranked is not of that.
CASES = [("topk", it) for it in OPTIONS] + [
    (kind, it) for kind in KINDS for it in OPTIONS if kind != "topk" and {"activations", "mentions"} & it.keys()
]


def said(options: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda it: it if isinstance(it, str) else said(it))
def test_the_edit_is_that_of_the_paper(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    model, pipeline = tiny
    # As it may be stored; it counts in fp32.
    autoencoder = random_autoencoder(16, **KINDS[kind]).to(torch.float16)
    options = {"words": WORDS, **options}
    edit = calibrate(model, pipeline, "ink", PAIRS, saved(autoencoder, **options), folder=tmp_path)
    naive = Naive(pipeline, autoencoder, options)
    neurons = naive.neurons(PAIRS)
    assert neurons
    awake = naive.concept(WORDS) if naive.options.activations == "concept" else neurons
    assert taken_out(edit, autoencoder.site) == sorted(i for i in neurons if i in awake)
    values = [getattr(it, name) for it in edit.operations for name in ("value", "encoder", "directions", "strengths")
              if hasattr(it, name)]  # fmt: skip
    assert {it.dtype for it in values} == {torch.float32}
    for prompt in (PAIRS[0].target, "the sea", "naked " * 40, ""):
        found = stream_of(edit, model, pipeline, prompt, naive)
        untouched = not prompt and naive.options.negative == "empty"
        expected = naive.stream(prompt) if untouched else naive.edited(prompt, neurons, WORDS)
        assert relative(found, expected) < (0 if untouched else 1e-7) or np.array_equal(found, expected)
    changed = replace_strength(options, naive.options.strength + 0.1)
    wrong = Naive(pipeline, autoencoder, changed).edited(PAIRS[0].target, neurons, WORDS)
    assert relative(stream_of(edit, model, pipeline, PAIRS[0].target, naive), wrong) > 1e-4


def replace_strength(options: Mapping[str, Any], strength: float) -> dict[str, Any]:
    return {**options, "strength": strength}


def stream_of(edit: Edit, model: Model, pipeline: Any, prompt: str, naive: Naive) -> np.ndarray:
    """What leaves the layer while the Edit is applied as hooks."""
    with applied(edit, model, pipeline):
        return naive.stream(prompt)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("options", [{}, {"activations": "prompt"}], ids=said)
def test_both_text_encoders_of_sdxl_are_edited(
    folders: Any, saved: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = open_model(folders("sdxl"))
    pipeline = model.pipeline("cpu", torch.float64)
    both = random_autoencoder(32), random_autoencoder(48, "text_encoder_2.layer.1")
    # The activations of this model are so small that without this the bias alone would decide.
    pair = tuple(replace(it, encoder=it.encoder * 20) for it in both)
    options = {"words": WORDS, "neurons": 20, **options}
    for several in (pair, pair[::-1]):
        edit = calibrate(model, pipeline, "ink", PAIRS, saved(*several, **options), folder=tmp_path)
        assert {it.site for it in edit.operations} == {it.site for it in pair}
        for autoencoder in pair:
            naive = Naive(pipeline, autoencoder, options)
            prompt = PAIRS[0].target
            found = stream_of(edit, model, pipeline, prompt, naive)
            assert relative(found, naive.edited(prompt, naive.neurons(PAIRS), WORDS)) < 1e-7
            assert relative(found, naive.stream(prompt)) > 1e-4


@pytest.mark.usefixtures("quiet")
def test_the_concept_alone_or_its_tuple_is_what_wakes_the_neurons(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path
) -> None:
    model, pipeline = tiny
    chosen = saved(random_autoencoder(16), neurons=20, mentions="mean")

    def values(concept: str, *words: str) -> list[str]:
        own = chosen.model_copy(update={"words": words})
        edit = calibrate(model, pipeline, concept, PAIRS, own, folder=tmp_path)
        return [it.digest for it in edit.operations]

    assert values("a naked owl ") == values("x", "a naked owl") != values("a naked king")
    assert values("Blood") == values("x", "violence", "blood", "bleeding") != values("x", "violence", "blood")


def test_an_edit_says_where_it_comes_from(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = tiny
    autoencoder = random_autoencoder(16)
    done: list[float] = []
    edit = calibrate(model, pipeline, "ink", PAIRS, saved(autoencoder), folder=tmp_path, progress=done.append)
    (origin,) = edit.origins
    assert (origin.method, origin.concept, origin.pairs) == ("snce", "ink", 5)
    assert origin.prompts == prompts_digest(PAIRS)
    assert Settings(**origin.settings) == saved(autoencoder)
    assert sum(done) == pytest.approx(1)
    (shift,) = edit.operations
    assert isinstance(shift, ShiftActivation)
    assert (shift.value.dtype, tuple(shift.value.shape), shift.rows) == (torch.float32, (77, 16), "prompted")
    assert (shift.strength, shift.neuron.partition(":")[0]) == (0.8, autoencoder.digest[:16])
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors") == edit
    assert calibrate(model, pipeline, "ink", PAIRS, saved(autoencoder), folder=tmp_path) == edit


@pytest.mark.parametrize(("negative", "rows"), [("empty", "prompted"), ("same", "all"), ("untouched", "conditional")])
@pytest.mark.parametrize("activations", ["concept", "prompt"])
def test_rows_are_those_of_the_negative_option(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path, activations: str, negative: str, rows: str
) -> None:
    model, pipeline = tiny
    chosen = saved(random_autoencoder(16), negative=negative, activations=activations)
    edit = calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path)
    assert [it.rows for it in edit.operations] == [rows]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_never_shifted(shapes: tuple[Model, Any], saved: Any, tmp_path: Path, dtype: str) -> None:
    model, pipeline = shapes
    if dtype == "bfloat16":
        pipeline = model.pipeline("cpu", torch.bfloat16)
    chosen = saved(random_autoencoder(96, "text_encoder.layer.9"), neurons=300)
    pairs = [Pair(f"a red star {it}", f"a star {it}") for it in ("on grass", "at night", "in the snow", "on sand", "")]
    edit = calibrate(model, pipeline, "red", pairs, chosen, folder=tmp_path)
    assert len(edit.operations) > 5
    for it in edit.operations:
        assert it.value.dtype == torch.float32
        assert not it.value[0].any()
        assert it.value[1:].any()


@pytest.mark.usefixtures("quiet")
def test_shapes_in_fp32_is_what_its_own_encoder_says(shapes: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = shapes
    autoencoder = random_autoencoder(96, "text_encoder.layer.9")
    options: dict[str, Any] = {"words": ("red",), "neurons": 5}
    pairs = [Pair(f"a plain red star {it}", f"a plain star {it}") for it in ("on grass", "at night", "in the snow")]
    edit = calibrate(model, pipeline, "red", pairs, saved(autoencoder, **options), folder=tmp_path)
    naive = Naive(pipeline, autoencoder, options)
    neurons = naive.neurons(pairs)
    awake = naive.concept(("red",))
    assert taken_out(edit, autoencoder.site) == sorted(i for i in neurons if i in awake)
    for it in edit.operations:
        neuron = int(it.neuron.partition(":")[2])
        assert relative(it.value.double().numpy(), -0.8 * awake[neuron] * naive.D[:, neuron]) < 1e-4


def hooks(pipeline: Any) -> list[int]:
    """How many each module has; transformers has some of its own."""
    return [len(module._forward_hooks) for module in pipeline.text_encoder.modules()]


def test_only_the_text_encoder_runs_and_only_to_its_layer(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipeline = tiny

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this network is not needed")

    monkeypatch.setattr(pipeline.unet, "forward", refuse)
    monkeypatch.setattr(pipeline.vae, "decode", refuse)
    chosen = saved(random_autoencoder(16, "text_encoder.layer.0"), words=WORDS)
    later = model.module(pipeline, model.site(SITE))
    monkeypatch.setattr(later, "forward", refuse)
    own = hooks(pipeline)
    before = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    assert calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path).operations
    assert all(torch.equal(value, before[name]) for name, value in pipeline.text_encoder.state_dict().items())
    assert hooks(pipeline) == own


def test_a_failure_leaves_no_hook(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipeline = tiny
    first = model.module(pipeline, model.site("text_encoder.layer.0"))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(first, "forward", fail)
    own = hooks(pipeline)
    with pytest.raises(RuntimeError, match="broken"):
        pair_scores(model, pipeline, model.site(SITE), random_autoencoder(16), PAIRS)
    assert hooks(pipeline) == own


def test_scores_of_a_pair_do_not_depend_on_those_after_it(shapes: tuple[Model, Any]) -> None:
    model, pipeline = shapes
    site = model.site("text_encoder.layer.9")
    autoencoder = random_autoencoder(96, site.name)
    pairs = [Pair(f"a red {it}", f"a {it}") for it in ("star", "ring", "moon", "heart", "cross", "circle")]
    both = pair_scores(model, pipeline, site, autoencoder, pairs)
    for count in (1, 3, 5):
        for few, all_of_them in zip(pair_scores(model, pipeline, site, autoencoder, pairs[:count]), both, strict=True):
            assert torch.equal(few, all_of_them[:count])


def test_every_run_has_the_same_shape(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    shapes = []
    handle = pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        prompts = [it.target for it in PAIRS]
        rows = [len(it.z) for it in encode(model, pipeline, model.site(SITE), random_autoencoder(16), prompts)]
    finally:
        handle.remove()
    assert shapes == [(PROMPTS_PER_RUN, 77)] * 2
    assert rows == [4, 1]


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm"])
def test_latents_are_fp32_where_the_text_encoder_is_not(tiny: tuple[Model, Any], norm: Any) -> None:
    model = tiny[0]
    pipeline = model.pipeline("cpu", torch.bfloat16)
    autoencoder = random_autoencoder(16, input_norm=norm)
    (found,) = encode(model, pipeline, model.site(SITE), autoencoder, [PAIRS[0].target])
    assert found.z.dtype == found.scale.dtype == torch.float32
    naive = Naive(pipeline, autoencoder, {})
    stream = naive.stream(PAIRS[0].target)
    expected = np.zeros((77, 48))
    for place, x in enumerate(stream):
        for i, value in naive.latents(x).items():
            expected[place, i] = value
    assert relative(found.z[0].double().numpy(), expected) < 1e-5
    assert relative(found.scale[0, :, 0].double().numpy(), np.array([naive.norm(x)[1] for x in stream])) < 1e-6


def test_scores_are_the_formula_on_a_tensor_by_hand() -> None:
    z = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    # f = 2, 2, 0; normed columns sum to 0.6 + 1, 0.8 + 1, 0; four tokens.
    assert neuron_scores(z).tolist() == pytest.approx([2 * 1.6 / 4, 2 * 1.8 / 4, 0.0])
    assert neuron_scores(z).dtype == neuron_scores(z.half()).dtype == torch.float32
    assert neuron_scores(z.double()).dtype == torch.float64
    # Neither a square nor a sum of squares fits into fp16.
    assert neuron_scores(torch.full((1, 4), 6e4, dtype=torch.float16)).tolist() == pytest.approx([0.5] * 4)
    assert neuron_scores(torch.zeros(0, 3)).tolist() == [0.0] * 3


SCORES = st.integers(1, 6).flatmap(
    lambda m: st.integers(1, 4).flatmap(
        lambda pairs: st.tuples(
            *[st.lists(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5]), min_size=m, max_size=m),
                       min_size=pairs, max_size=pairs)] * 2
        )
    )
)  # fmt: skip


@properties
@given(scores=SCORES, k=st.integers(1, 7), pairs=st.sampled_from(["sum", "pooled", "vote"]))
def test_selection_is_that_of_the_paper_ties_included(scores: Any, k: int, pairs: Any) -> None:
    concept, deconcept = ([dict(enumerate(row)) for row in rows] for rows in scores)
    expected = naive_selection(concept, deconcept, k, pairs)
    tensors = [torch.tensor(rows) for rows in scores]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = select_neurons(tensors[0], tensors[1], k, pairs)
    assert (found.tolist(), found.dtype) == (expected, torch.int64)
    assert [it.category for it in caught] == [FewNeuronsWarning] * (len(expected) < k)


def test_the_readings_of_pairs_differ() -> None:
    # Neuron 0 is told apart once, strongly; 1 twice; 2 once, and is active in another reference.
    concept = torch.tensor([[9.0, 2.0, 5.0], [0.0, 3.0, 8.0]])
    deconcept = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert select_neurons(concept, deconcept, 3).tolist() == [0, 1, 2]
    with pytest.warns(FewNeuronsWarning, match="2 tell the concept from its reference, and 3 were asked for"):
        assert select_neurons(concept, deconcept, 3, "pooled").tolist() == [0, 1]
    assert select_neurons(concept, deconcept, 3, "vote").tolist() == [1, 0, 2]
    # So many that a sort which is not stable would show.
    equal = torch.ones(1, 1000)
    for rule in ("sum", "pooled", "vote"):
        assert select_neurons(equal, torch.zeros(1, 1000), 500, rule).tolist() == list(range(500))
    ranking = rank_neurons(concept, deconcept)
    assert (ranking.scores.tolist(), ranking.votes.tolist()) == ([9.0, 5.0, 5.0], [1, 2, 1])


def test_the_tuple_is_read_in_three_ways() -> None:
    z = torch.arange(12.0).reshape(2, 3, 2)
    real = torch.tensor([[False, True, False], [False, True, True]])
    assert torch.equal(concept_activations(z[:1], real[:1]), z[0])
    # Over three tokens, not over two means.
    assert concept_activations(z, real, "mean").tolist() == pytest.approx([(2 + 8 + 10) / 3, (3 + 9 + 11) / 3])
    assert concept_activations(z, real, "max").tolist() == [10.0, 11.0]
    with pytest.raises(ValueError, match="one prompt, and 2 are given"):
        concept_activations(z, real)
    with pytest.raises(ValueError, match="no tokens"):
        concept_activations(z, torch.zeros_like(real), "mean")


def test_a_neuron_that_two_edits_choose_takes_the_larger_strength(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path
) -> None:
    model, pipeline = tiny
    for activations in ("concept", "prompt"):
        weak, strong = (
            calibrate(
                model, pipeline, "ink", PAIRS,
                saved(random_autoencoder(16), strength=strength, activations=activations), folder=tmp_path,
            )
            for strength in (0.5, 1.5)
        )  # fmt: skip
        assert merge([weak, strong]).operations == merge([strong, weak]).operations == strong.operations


@pytest.mark.usefixtures("quiet")
def test_what_does_not_fold_is_what_the_lowering_leaves(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    from bakeout.export.lower import lower_onto

    model, pipeline = tiny
    reasons = set()
    for activations, mentions, negative in product(("concept", "prompt"), ("joined", "mean", "max"), ("empty", "same")):
        options = {"activations": activations, "mentions": mentions, "negative": negative, "words": WORDS}
        chosen = saved(random_autoencoder(16), neurons=4, **options)
        lowered = lower_onto(calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path), model)
        why = unfoldable(chosen)
        assert lowered.realisations
        assert (why is None) == (not lowered.remaining.operations)
        reasons.add(why)
    assert reasons == {
        None, "its shift depends on the prompt", "its shift differs from token to token",
        "it leaves empty prompts as they are",
    }  # fmt: skip
    assert unfoldable(Settings(mentions="max", negative="untouched")) == "it leaves negative prompts as they are"


def test_fewer_neurons_than_asked_for_are_a_warning(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = tiny
    chosen = saved(random_autoencoder(16), neurons=40, activations="prompt")
    with pytest.warns(FewNeuronsWarning, match="and 40 were asked for"):
        edit = calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path)
    assert 0 < len(taken_out(edit)) < 40
    same = [Pair("a man", "a man")]
    for activations in ("concept", "prompt"):
        with pytest.warns(FewNeuronsWarning, match="0 tell the concept from its reference, and 1 were"):
            edit = calibrate(
                model, pipeline, "ink", same, saved(random_autoencoder(16), activations=activations), folder=tmp_path
            )
        assert not edit.operations


def test_neurons_that_the_words_do_not_wake_are_named(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = tiny
    options: dict[str, Any] = {"neurons": 9, "mentions": "mean", "words": WORDS[1:]}
    autoencoder = random_autoencoder(16)
    naive = Naive(pipeline, autoencoder, options)
    neurons, awake = naive.neurons(PAIRS), naive.concept(WORDS[1:])
    silent = [i for i in neurons if i not in awake]
    assert 0 < len(silent) < len(neurons)
    named = rf"do not wake {len(silent)} of the {len(neurons)} neurons \({', '.join(map(str, silent[:10]))}"
    with pytest.warns(SilentNeuronsWarning, match=named):
        edit = calibrate(model, pipeline, "ink", PAIRS, saved(autoencoder, **options), folder=tmp_path)
    assert taken_out(edit) == sorted(set(neurons) - set(silent))


def test_a_built_in_model_brings_its_autoencoder(shapes: tuple[Model, Any], tmp_path: Path) -> None:
    model = replace(shapes[0], path=tmp_path / "model")
    with pytest.raises(InputError, match="this installation of bakeout lacks the autoencoder of shapes"):
        snce.autoencoders(model, Settings())
    own, given = random_autoencoder(96, "text_encoder.layer.9"), random_autoencoder(96, "text_encoder.layer.4")
    own.save(tmp_path / "sae.safetensors")
    (tmp_path / "below").mkdir()
    given.save(tmp_path / "below" / "mine.safetensors")
    assert {name: it.digest for name, it in snce.autoencoders(model, Settings()).items()} == {own.site: own.digest}
    named = snce.autoencoders(model, Settings(sae=["below/mine.safetensors"]), tmp_path)
    assert {name: it.digest for name, it in named.items()} == {given.site: given.digest}


def test_a_pair_that_would_be_cut_is_refused(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = tiny
    long = Pair("an owl " * 60 + "naked", "an owl")
    for pairs, words in (((long,), "pair 1: the target is"), ((*PAIRS, Pair(*long[::-1])), "pair 6: the reference is")):
        refused(lambda pairs=pairs: calibrate(model, pipeline, "ink", pairs, saved(random_autoencoder(16)),
                                              folder=tmp_path), words)  # fmt: skip


def refused(call: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"site": "text_encoder.layer.2"}, {}, "and the layers of"),
        ({"site": "unet.mid"}, {}, "reads 'unet.mid', and the layers of"),
        ({"site": SITE + ".ffn2"}, {}, "are text_encoder.layer.0 to text_encoder.layer.1; take an autoencoder"),
        ({}, {"layer": 0}, "layer is 0, but"),
        ({}, {"words": ["naked " * 20] * 2}, "tokens, and the text encoder reads 75: give fewer, or take mentions"),
        ({}, {"words": ["naked " * 20], "mentions": "max"}, "tokens, and the text encoder reads 75: give a shorter"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path, changes: Any, options: Any, words: str
) -> None:
    model, pipeline = tiny
    chosen = saved(random_autoencoder(16, **changes), **options)
    refused(lambda: check(model, pipeline, chosen, folder=tmp_path), words)
    refused(lambda: calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path), words)


def test_a_model_of_one_layer_is_told_of_too(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model = replace(tiny[0], sites=(tiny[0].site(SITE),))
    chosen = saved(random_autoencoder(16, "text_encoder.layer.9"))
    refused(lambda: snce.autoencoders(model, chosen, tmp_path), f"the layers of {model.source} are {SITE} to {SITE};")


def test_autoencoders_that_are_too_few_too_many_or_not_there_are_refused(
    tiny: tuple[Model, Any], folders: Any, saved: Any, tmp_path: Path
) -> None:
    model, pipeline = tiny

    def found(model: Model, chosen: Settings) -> Any:
        return lambda: snce.autoencoders(model, chosen, tmp_path)

    refused(found(model, Settings()), "sae has no autoencoder for text_encoder of")
    refused(found(model, saved(random_autoencoder(16), random_autoencoder(16))), "two autoencoders for text_encoder")
    refused(found(model, saved(random_autoencoder(32))), "reads activations of width 32, and text_encoder.layer.1 of")
    refused(found(model, Settings(sae=["none.safetensors"])), "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x02junk")
    refused(found(model, Settings(sae=["junk.safetensors"])), "junk.safetensors")
    refused(found(open_model(folders("sdxl")), saved(random_autoencoder(32))), "no autoencoder for text_encoder_2 of")
    # SDXL reads the last layer but one, so that an edit of the last one would erase nothing.
    unread = saved(random_autoencoder(32, "text_encoder.layer.2"), random_autoencoder(48, "text_encoder_2.layer.1"))
    refused(found(open_model(folders("sdxl")), unread), "the last layer of text_encoder, and SDXL draws from the one")
    saved(random_autoencoder(16))
    refused(lambda: calibrate(model, pipeline, "ink", [], Settings(), folder=tmp_path), "there are no prompt pairs")
    check(model, pipeline, saved(random_autoencoder(16), layer=1, words=WORDS), folder=tmp_path)


@pytest.mark.parametrize("name", ["/etc/sae.safetensors", "../sae.safetensors", "a/../../b", "C:\\sae", "", "a\nb"])
def test_a_file_outside_the_recipes_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"outside the recipe's folder|it is empty|control character"):
        Settings(sae=(name,))


@pytest.mark.parametrize(
    "options",
    [
        {"neurons": 0}, {"strength": 0}, {"strength": float("nan")}, {"strength": float("inf")}, {"strength": -1},
        {"strength": 1e39}, {"layer": -1}, {"sae": "one.safetensors"}, {"sae": ["a", "b", "c"]}, {"sae": [1]},
        {"words": [" "]}, {"words": ["a\x00"]}, {"words": "nude"}, {"negative": "none"}, {"pairs": "mean"},
        {"other": 1}, {"neurons": 2.0}, {"neurons": True},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Settings(**options)


def test_an_off_switch_is_refused_for_artifacts_only(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = tiny
    chosen = saved(random_autoencoder(16), negative="untouched")
    refused(lambda: check(model, pipeline, chosen, folder=tmp_path), "would ship its own off-switch")
    assert calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path).operations


def test_words_are_not_read_where_the_prompt_says_how_much(tiny: tuple[Model, Any], saved: Any, tmp_path: Path) -> None:
    model, pipeline = tiny
    chosen = saved(random_autoencoder(16), words=["naked " * 20], activations="prompt")
    check(model, pipeline, chosen, folder=tmp_path)
    assert calibrate(model, pipeline, "ink", PAIRS, chosen, folder=tmp_path).operations


def test_words_that_are_no_tokens_are_refused(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipeline = tiny
    monkeypatch.setattr(type(pipeline.tokenizer), "__call__", lambda *_, **__: type("T", (), {"input_ids": [[0, 1]]}))
    chosen = saved(random_autoencoder(16), words=("?",))
    refused(lambda: check(model, pipeline, chosen, folder=tmp_path), "the words '?' are nothing to the text encoder")


def test_activations_that_are_not_finite_are_refused(
    tiny: tuple[Model, Any], saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipeline = tiny
    module = model.module(pipeline, model.site(SITE))
    broken = torch.full((4, 77, 16), float("nan"), dtype=torch.float64)
    monkeypatch.setattr(module, "forward", lambda *_, **__: broken)
    refused(
        lambda: calibrate(model, pipeline, "ink", PAIRS, saved(random_autoencoder(16)), folder=tmp_path),
        f"the activations at {SITE} are not finite: mend the model",
    )


def test_the_method_is_found_by_its_name() -> None:
    assert method("snce") is snce  # type: ignore[comparison-overlap]
    assert isinstance(rank_neurons(torch.zeros(1, 2), torch.zeros(1, 2)).neurons, Tensor)
