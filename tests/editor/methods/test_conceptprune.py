"""ConceptPrune against a second derivation of its masks: one prompt at a time, everything kept, plain loops."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bakeout.editor.calibrate import PROMPTS_PER_RUN
from bakeout.editor.edit import Edit
from bakeout.editor.errors import InputError
from bakeout.editor.methods import conceptprune, method
from bakeout.editor.methods.conceptprune import (
    NothingSkilledWarning,
    Settings,
    activation_norm,
    calibrate,
    combine_norms,
    skilled_mask,
    union,
)
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import Pair, prompts_digest

WORDS = ("cat", "dog", "car", "bag", "owl")
# Five pairs: more than the networks run at a time, and not a multiple of it.
PAIRS = tuple(Pair(f"a {word} in the style of ink", f"a photo of a {word}") for word in WORDS)
# 10 % of a row of the tiny model, 64 or 128 wide, is enough for every rule to matter.
QUICK: dict[str, Any] = {"steps": 6, "first_calls": 3, "sparsity": 0.1}

properties = settings(derandomize=True, deadline=None, max_examples=100)

# How the UNet and the text encoder name the Linears of each site.
ENDINGS = {
    "ffn2": ".ff.net.2", "ffn1": ".ff.net.0.proj", "attn_key": ".attn2.to_k", "attn_value": ".attn2.to_v",
    "text_ffn2": ".mlp.fc2",
}  # fmt: skip


def with_scheduler(pipeline: Any, name: str, **changes: Any) -> Any:
    own = copy.copy(pipeline)
    own.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    return own


def masks_of(edit: Edit) -> dict[str, np.ndarray]:
    return {operation.site: operation.mask.numpy() for operation in edit.operations}


# Readings that differ in what is made of the activations only share them, and wrong readings the Edit they fail at.
KNOWN: dict[tuple[Any, ...], Any] = {}


def edit_of(model: Model, pipeline: Any, options: Mapping[str, Any]) -> Edit:
    key = (pipeline.unet, type(pipeline.scheduler), *sorted(options.items()))
    if key not in KNOWN:
        KNOWN[key] = calibrate(model, pipeline, "ink", PAIRS, Settings(**options))
    return KNOWN[key]


class Naive:
    """The table of ConceptPrune in loops. Activations are `[time of the call][site's module] → rows of a half`."""

    def __init__(self, pipeline: Any, options: Mapping[str, Any]) -> None:
        paper = options.get("profile") == "paper"
        chosen = {
            "site": "ffn2", "rows": "both", "token_normalize": not paper, "sparsity": 0.02, "first_calls": 10,
            "time_step": "noise_level" if paper else "call", "include_last": paper, "vote": 0.0, "seed": 0,
            "steps": 50, "guidance": 7.5,
        }  # fmt: skip
        chosen.update(options)
        self.pipeline, self.options = pipeline, chosen
        network = pipeline.text_encoder if chosen["site"] == "text_ffn2" else pipeline.unet
        ending = ENDINGS[chosen["site"]]
        self.modules = {name: it for name, it in network.named_modules() if name.endswith(ending)}

    def embedded(self, prompt: str) -> Tensor:
        tokens = self.pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        return self.pipeline.text_encoder(tokens.input_ids)[0]

    def activations(self, prompt: str) -> list[tuple[float, dict[str, list[Tensor]]]]:
        """Of one prompt: for each call its time and what each module took in, the unconditional half first."""
        chosen = [self.options[name] for name in ("site", "seed", "steps", "guidance", "first_calls")]
        key = (self.pipeline.unet, *self.modules, type(self.pipeline.scheduler), prompt, *chosen)
        if key not in KNOWN:
            KNOWN[key] = self.run(prompt)
        return KNOWN[key]

    def run(self, prompt: str) -> list[tuple[float, dict[str, list[Tensor]]]]:
        kept: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, x, name=name: kept.setdefault(name, []).extend(x[0].clone()))
            for name, module in self.modules.items()
        ]
        guided = self.options["guidance"] > 1
        try:
            with torch.no_grad():
                context = torch.cat([self.embedded(""), self.embedded(prompt)] if guided else [self.embedded(prompt)])
                if self.options["site"] == "text_ffn2":
                    return [(0.0, kept)]
                return list(self.calls(context, kept, guided))
        finally:
            for handle in handles:
                handle.remove()

    def calls(self, context: Tensor, kept: dict[str, list[Tensor]], guided: bool) -> Iterator[Any]:
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(self.options["steps"])
        side = self.pipeline.unet.config.sample_size
        latent = torch.randn(
            (1, 4, side, side), generator=torch.Generator().manual_seed(self.options["seed"]), dtype=context.dtype
        )
        latent = latent * scheduler.init_noise_sigma
        # Enough for t̂ + 1 noise levels where a few have two calls.
        for time in scheduler.timesteps[: self.options["first_calls"] + 3]:
            kept.clear()
            rows = scheduler.scale_model_input(torch.cat([latent] * len(context)), time)
            noise = self.noise(rows, time, context)
            yield float(time), dict(kept)
            if guided:
                noise = noise[:1] + self.options["guidance"] * (noise[1:] - noise[:1])
            latent = scheduler.step(noise, time, latent).prev_sample

    def noise(self, rows: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.pipeline.unet(rows, time, encoder_hidden_states=context).sample

    def norms(self, prompts: Sequence[str]) -> list[dict[str, list[float]]]:
        """For each time step and module the norm of each column, over all prompts."""
        steps: list[dict[str, list[float]]] = []
        for prompt in prompts:
            step, last = -1, None
            for time, inputs in self.activations(prompt):
                if self.options["time_step"] == "call" or time != last:
                    step += 1
                last = time
                if step == len(steps):
                    steps.append({})
                for name, halves in inputs.items():
                    chosen = halves if self.options["rows"] == "both" else halves[-1:]
                    own = self.column_norms(torch.cat(list(chosen)).double().numpy())
                    before = steps[step].get(name, [0.0] * len(own))
                    steps[step][name] = [math.sqrt(a**2 + b**2) for a, b in zip(before, own, strict=True)]
        return steps

    def column_norms(self, rows: np.ndarray) -> list[float]:
        total = np.zeros(rows.shape[1])
        for row in rows:
            length = math.sqrt((row**2).sum()) if self.options["token_normalize"] else 1.0
            total += (row / length) ** 2
        return [math.sqrt(it) for it in total]

    def masks(self, pairs: Sequence[Pair], first: int = 0) -> list[np.ndarray]:
        """The masks of all modules, in the order of the network; `first` other than 0 is a wrong answer."""
        target = self.norms([pair.target for pair in pairs])
        reference = self.norms([pair.reference for pair in pairs])
        of_text = self.options["site"] == "text_ffn2"
        first_calls = 1 if of_text else self.options["first_calls"]
        last = first_calls - 1 + (not of_text and self.options["include_last"])
        masks = []
        for name, module in self.modules.items():
            weight = module.weight.detach().double().numpy()
            times = range(first, last + first + 1)
            votes = sum(self.skilled(weight, target[t][name], reference[t][name]).astype(int) for t in times)
            masks.append(votes > math.floor(Fraction(str(self.options["vote"])) * first_calls))
        return masks

    def skilled(self, weight: np.ndarray, target: list[float], reference: list[float]) -> np.ndarray:
        mask = np.zeros(weight.shape, bool)
        for i, row in enumerate(weight):
            score, other = abs(row) * np.array(target), abs(row) * np.array(reference)
            for j in np.argsort(-score)[: math.floor(Fraction(str(self.options["sparsity"])) * len(row))]:
                mask[i, j] = score[j] > other[j]
        return mask


def sites_in_network_order(model: Model, pipeline: Any, site: str) -> list[str]:
    network = pipeline.text_encoder if site == "text_ffn2" else pipeline.unet
    of_module = {id(model.module(pipeline, it)): it.name for it in model.sites_of(site)}
    return [of_module[id(it)] for name, it in network.named_modules() if name.endswith(ENDINGS[site])]


def assert_masks_equal(edit: Edit, naive: Sequence[np.ndarray], names: Sequence[str]) -> None:
    found = masks_of(edit)
    assert found.keys() == {name for name, mask in zip(names, naive, strict=True) if mask.any()}
    for name in found:
        assert np.array_equal(found[name], naive[names.index(name)]), name


OPTIONS: list[dict[str, Any]] = [
    {},
    {"profile": "paper"},
    {"rows": "conditional"},
    {"token_normalize": False},
    {"include_last": True},
    {"profile": "paper", "include_last": False},
    {"vote": 0.5},
    {"vote": 0.34, "first_calls": 5},
    # Of four masks, more than 0.5 · 3 are two, more than 0.5 · 4 three.
    {"vote": 0.5, "include_last": True},
    {"vote": 0.5, "site": "text_ffn2", "include_last": True},
    {"first_calls": 1},
    {"sparsity": 0.02},
    {"sparsity": 1.0},
    {"seed": 7},
    {"steps": 9},
    {"guidance": 2.0},
    {"guidance": 1.0},
    {"site": "ffn1"},
    {"site": "attn_key"},
    {"site": "attn_value"},
    {"site": "text_ffn2"},
    {"site": "text_ffn2", "rows": "conditional"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda it: ",".join(f"{k}={v}" for k, v in it.items()) or "released")
def test_masks_are_those_of_the_table(tiny: tuple[Model, Any], options: dict[str, Any]) -> None:
    model, pipeline = tiny
    options = {**QUICK, **options}
    edit = edit_of(model, pipeline, options)
    names = sites_in_network_order(model, pipeline, options.get("site", "ffn2"))
    assert_masks_equal(edit, Naive(pipeline, options).masks(PAIRS), names)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        # PNDM's second noise level has calls 1 and 2, Heun's every one from the second on.
        ("PNDMScheduler", {"profile": "released"}),
        ("PNDMScheduler", {"profile": "paper"}),
        ("PNDMScheduler", {"profile": "paper", "time_step": "call"}),
        ("HeunDiscreteScheduler", {"profile": "released", "first_calls": 4}),
        ("HeunDiscreteScheduler", {"time_step": "noise_level", "first_calls": 2}),
        ("DPMSolverMultistepScheduler", {}),
    ],
)
def test_time_steps_are_calls_or_noise_levels(tiny: tuple[Model, Any], scheduler: str, options: dict[str, Any]) -> None:
    model, pipeline = tiny
    changes = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipeline = with_scheduler(pipeline, scheduler, **changes)
    options = {**QUICK, "steps": 50, **options}
    edit = edit_of(model, pipeline, options)
    names = sites_in_network_order(model, pipeline, "ffn2")
    assert_masks_equal(edit, Naive(pipeline, options).masks(PAIRS), names)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({}, {"first": 1}),
        ({}, {"token_normalize": False}),
        ({}, {"rows": "conditional"}),
        ({}, {"first_calls": 4}),
        ({}, {"vote": 0.5}),
        ({}, {"seed": 1}),
        ({}, {"guidance": 3.0}),
        ({}, {"sparsity": 0.12}),
        ({"profile": "paper"}, {"include_last": False}),
        ({"profile": "paper", "scheduler": "PNDMScheduler", "steps": 50}, {"time_step": "call"}),
        ({"rows": "conditional"}, {"rows": "both"}),
    ],
    ids=lambda it: ",".join(f"{k}={v}" for k, v in it.items()),
)
def test_a_wrong_reading_is_told_apart(tiny: tuple[Model, Any], said: dict[str, Any], wrong: dict[str, Any]) -> None:
    model, pipeline = tiny
    options = {**QUICK, **said}
    if "scheduler" in said:
        pipeline = with_scheduler(pipeline, options.pop("scheduler"), skip_prk_steps=True)
    edit = edit_of(model, pipeline, options)
    names = sites_in_network_order(model, pipeline, "ffn2")
    first = wrong.get("first", 0)
    other = Naive(pipeline, {**options, **{k: v for k, v in wrong.items() if k != "first"}}).masks(PAIRS, first)
    with pytest.raises(AssertionError):
        assert_masks_equal(edit, other, names)


def test_target_and_reference_are_not_exchanged(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    edit = edit_of(model, pipeline, QUICK)
    exchanged = [Pair(pair.reference, pair.target) for pair in PAIRS]
    with pytest.raises(AssertionError):
        assert_masks_equal(
            edit, Naive(pipeline, QUICK).masks(exchanged), sites_in_network_order(model, pipeline, "ffn2")
        )


def test_the_text_site_covers_both_encoders_of_sdxl(folders: Callable[[str], Path]) -> None:
    model = open_model(folders("sdxl"))
    pipeline = model.pipeline("cpu", torch.float64)
    # With this setting of the model the unconditional half is zeros, not what the encoders make of an empty prompt.
    assert pipeline.config.force_zeros_for_empty_prompt
    edit = calibrate(model, pipeline, "ink", PAIRS, Settings(site="text_ffn2", sparsity=0.1))
    found = masks_of(edit)
    assert {name.split(".")[0] for name in found} == {"text_encoder", "text_encoder_2"}
    for component, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        encoder = getattr(pipeline, component)
        naive = Naive(pipeline, {"site": "text_ffn2", "sparsity": 0.1, "guidance": 1.0})
        naive.modules = {name: it for name, it in encoder.named_modules() if name.endswith(".mlp.fc2")}
        own = getattr(pipeline, tokenizer)
        naive.embedded = lambda prompt, own=own, encoder=encoder: encoder(  # type: ignore[method-assign]
            own(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        )[0]
        for number, mask in enumerate(naive.masks(PAIRS)):
            assert np.array_equal(found[f"{component}.layer.{number}.ffn2"], mask)


class NaiveXL(Naive):
    """SDXL: two encoders side by side, a pooled embedding and the picture's size; the unconditional half is zeros."""

    def embedded(self, prompt: str) -> Tensor:
        states = []
        for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            tokens = getattr(self.pipeline, tokenizer)(
                prompt, padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            found = getattr(self.pipeline, encoder)(tokens, output_hidden_states=True)
            states.append(found.hidden_states[-2])
        self.pooled = torch.cat([torch.zeros_like(found.text_embeds), found.text_embeds])
        context = torch.cat(states, dim=-1)
        return context if prompt else torch.zeros_like(context)

    def noise(self, rows: Tensor, time: Tensor, context: Tensor) -> Tensor:
        side = float(self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor)
        size = torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=context.dtype)
        more = {"text_embeds": self.pooled, "time_ids": size}
        return self.pipeline.unet(rows, time, encoder_hidden_states=context, added_cond_kwargs=more).sample


def test_sdxl_is_pruned_in_its_unet(folders: Callable[[str], Path]) -> None:
    model = open_model(folders("sdxl"))
    pipeline = model.pipeline("cpu", torch.float64)
    edit = calibrate(model, pipeline, "ink", PAIRS[:2], Settings(**QUICK))
    names = sites_in_network_order(model, pipeline, "ffn2")
    assert {operation.site for operation in edit.operations} == set(names)
    assert_masks_equal(edit, NaiveXL(pipeline, QUICK).masks(PAIRS[:2]), names)
    with pytest.raises(AssertionError):
        assert_masks_equal(edit, NaiveXL(pipeline, {**QUICK, "seed": 1}).masks(PAIRS[:2]), names)


def iou(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    both = [(one[name], other[name]) for name in one.keys() | other.keys()]
    return sum((a & b).sum() for a, b in both) / sum((a | b).sum() for a, b in both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_work(tiny: tuple[Model, Any], dtype: torch.dtype) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", dtype)
    found = masks_of(calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK)))
    names = sites_in_network_order(model, pipeline, "ffn2")
    right, wrong = (
        dict(zip(names, Naive(pipeline, {**QUICK, "token_normalize": normalize}).masks(PAIRS), strict=True))
        for normalize in (True, False)
    )
    # The two derivations run other shapes, and so round apart.
    assert iou(found, right) > 0.9 > 0.8 > iou(found, wrong)


def test_activations_that_overflow_are_refused_and_not_kept(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", torch.float16)
    with torch.no_grad():
        model.module(pipeline, model.sites_of("ffn1")[0]).weight.mul_(1e4)
    for _again in range(2):
        with pytest.raises(InputError, match=r"unet\.down.*ffn2 are not finite: calibrate in fp32"):
            calibrate(model, pipeline, "ink", PAIRS[:1], Settings(**QUICK), work=tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_in_fp32_no_wider_dtype_is_advised(tiny_model: Path) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float32)
    with torch.no_grad():
        model.module(pipeline, model.sites_of("ffn1")[0]).weight.mul_(float("inf"))
    with pytest.raises(InputError, match="are not finite: this model draws nothing with these settings"):
        calibrate(model, pipeline, "ink", PAIRS[:1], Settings(**QUICK))


def test_the_networks_always_run_one_shape(tiny_model: Path) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float32)
    shapes = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    for pairs in (PAIRS, PAIRS[:1]):
        calibrate(model, pipeline, "ink", pairs, Settings(**QUICK))
    handle.remove()
    assert set(shapes) == {(2 * PROMPTS_PER_RUN, 4, 4, 4)}


@pytest.mark.parametrize("prompts", [1, 2, 3, 8])
def test_masks_do_not_depend_on_how_many_prompts_run_at_a_time(
    tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch, prompts: int
) -> None:
    model, pipeline = tiny
    expected = edit_of(model, pipeline, QUICK)
    monkeypatch.setattr("bakeout.editor.calibrate.PROMPTS_PER_RUN", prompts)
    assert calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK)) == expected


def test_rows_are_scored_in_pieces(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = edit_of(*tiny, QUICK)
    monkeypatch.setattr(conceptprune, "_ROWS", 5)
    assert calibrate(*tiny, "ink", PAIRS, Settings(**QUICK)) == expected


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_a_concept_equal_to_its_reference_prunes_nothing_and_says_so(tiny_model: Path, scheduler: str) -> None:
    model = open_model(tiny_model)
    pipeline = with_scheduler(model.pipeline("cpu", torch.float32), scheduler)
    pairs = [Pair(pair.target, pair.target) for pair in PAIRS]
    with pytest.warns(NothingSkilledWarning, match="no weight is skilled for 'ink'"):
        edit = calibrate(model, pipeline, "ink", pairs, Settings(**QUICK))
    assert edit.operations == ()
    assert edit.origins[0].pairs == len(pairs)


def test_the_edit_says_where_it_comes_from(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    chosen = Settings(profile="paper", **QUICK)
    with warnings.catch_warnings(action="error"):
        (origin,) = calibrate(model, pipeline, "ink", PAIRS, chosen).origins
    assert (origin.method, origin.concept, origin.pairs) == ("conceptprune", "ink", len(PAIRS))
    assert origin.prompts == prompts_digest(PAIRS)
    assert Settings(**origin.settings) == chosen


def test_a_sparsity_that_takes_nothing_is_refused_before_any_work(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    with pytest.raises(InputError, match=r"64 weights in a row of unet\.\S+ it takes none; take at least 0\.015625"):
        calibrate(model, pipeline, "ink", PAIRS, Settings(**{**QUICK, "sparsity": 0.01}))


@properties
@given(st.integers(1, 200_000))
def test_the_smallest_sparsity_that_an_error_names_works(d_in: int) -> None:
    with pytest.raises(InputError) as caught:
        conceptprune._count(0.5 / d_in, d_in, "a layer")
    named = float(str(caught.value).rsplit(maxsplit=1)[1])
    assert conceptprune._count(named, d_in, "a layer") >= 1


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ((), {}, "no prompt pairs"),
        (PAIRS, {"first_calls": 7}, "first_calls is 7, which takes 7 time steps, but 6 steps of DDIMScheduler have 6"),
        (PAIRS, {"first_calls": 6, "include_last": True}, "takes 7 time steps"),
        (
            PAIRS,
            {"steps": 5000, "first_calls": 1},
            "steps is 5000: this model was trained with 1000, so use at most as many",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    tiny: tuple[Model, Any], pairs: tuple[Pair, ...], options: dict[str, Any], message: str
) -> None:
    chosen = Settings(**{**QUICK, **options})
    with Counter(tiny[1]) as calls:
        with pytest.raises(InputError, match=message):
            calibrate(*tiny, "ink", pairs, chosen)
        if pairs:
            with pytest.raises(InputError, match=message):
                conceptprune.check(*tiny, chosen)
    assert calls.number == 0


def test_what_can_be_calibrated_is_not_refused(tiny: tuple[Model, Any]) -> None:
    with Counter(tiny[1]) as calls:
        conceptprune.check(*tiny, Settings(**{**QUICK, "first_calls": 6}))
        conceptprune.check(*tiny, Settings(site="text_ffn2", sparsity=0.1, steps=1))
    assert calls.number == 0


@pytest.mark.parametrize("kind", conceptprune.PUBLISHED)
def test_published_settings_are_settings(kind: str) -> None:
    assert conceptprune.PUBLISHED[kind]
    assert all(Settings(**given) for given in conceptprune.PUBLISHED[kind].values())


def test_an_interrupted_calibration_goes_on_where_it_was(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, pipeline = tiny
    expected = calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK))
    calls = Counter(pipeline)
    parts: list[float] = []

    def until_two_thirds(part: float) -> None:
        parts.append(part)
        if sum(parts) > 0.66:
            raise KeyboardInterrupt

    with calls, pytest.raises(KeyboardInterrupt):
        calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK), work=tmp_path, progress=until_two_thirds)
    (saved,) = tmp_path.iterdir()
    parts.clear()
    with calls:
        resumed = calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK), work=tmp_path, progress=parts.append)
    assert resumed == expected
    # Four runs of three calls: two runs were whole.
    assert calls.number == 2 * 3
    assert parts[0] == pytest.approx(0.5)
    assert sum(parts) == pytest.approx(1)
    # The sums are there now, for any sparsity and vote.
    with calls:
        other = {**QUICK, "sparsity": 0.3, "vote": 0.5}
        again = calibrate(model, pipeline, "ink", PAIRS, Settings(**other), work=tmp_path)
    assert calls.number == 0
    assert again == calibrate(model, pipeline, "ink", PAIRS, Settings(**other))
    assert [*tmp_path.iterdir()] == [saved]


@pytest.mark.parametrize("change", ["seed", "prompts", "weights", "scheduler", "broken"])
def test_sums_of_something_else_are_not_used(tiny_model: Path, tmp_path: Path, change: str) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float64)
    calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK), work=tmp_path)
    options, pairs = dict(QUICK), PAIRS
    if change == "seed":
        options["seed"] = 1
    elif change == "prompts":
        pairs = PAIRS[:4]
    elif change == "scheduler":
        pipeline = with_scheduler(pipeline, "PNDMScheduler")
    elif change == "weights":
        with torch.no_grad():
            pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    else:
        (saved,) = tmp_path.iterdir()
        saved.write_bytes(saved.read_bytes()[:-1])
    with Counter(pipeline) as calls:
        found = calibrate(model, pipeline, "ink", pairs, Settings(**options), work=tmp_path)
    assert calls.number == 3 * 2 * math.ceil(len(pairs) / PROMPTS_PER_RUN)
    assert found == calibrate(model, pipeline, "ink", pairs, Settings(**options))


def test_a_folder_that_cannot_be_written_is_refused(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*: make room there, or choose another output folder$"):
        calibrate(*tiny, "ink", PAIRS, Settings(**QUICK), work=tmp_path / "file")


class Counter:
    """Counts the calls of a pipeline's UNet while it is open."""

    def __init__(self, pipeline: Any) -> None:
        self.unet, self.number = pipeline.unet, 0

    def __enter__(self) -> Self:
        self.number = 0
        self.handle = self.unet.register_forward_hook(self.count)
        return self

    def count(self, *_: object) -> None:
        self.number += 1

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_settings_take_a_profile_and_what_is_given_wins() -> None:
    released, paper = Settings(), Settings(profile="paper")
    assert (released.token_normalize, released.include_last, released.time_step) == (True, False, "call")
    assert (paper.token_normalize, paper.include_last, paper.time_step) == (False, True, "noise_level")
    assert Settings(profile="paper", include_last=False, time_step="call", token_normalize=True) == Settings(
        profile="paper", **released.model_dump(exclude={"profile"})
    )
    common = {"sparsity", "first_calls", "vote", "rows", "site", "steps", "guidance", "seed"}
    assert released.model_dump(include=common) == paper.model_dump(include=common) == {
        "sparsity": 0.02, "first_calls": 10, "vote": 0.0, "rows": "both", "site": "ffn2", "steps": 50,
        "guidance": 7.5, "seed": 0,
    }  # fmt: skip
    assert method("conceptprune").Settings is Settings


@pytest.mark.parametrize(
    "bad",
    [
        {"profile": "mine"}, {"profile": ["paper"]}, {"sparsity": 0}, {"sparsity": 1.1}, {"sparsity": math.nan},
        {"sparsity": "0.1"}, {"first_calls": 0}, {"first_calls": True}, {"vote": 1}, {"vote": -0.1}, {"rows": "all"},
        {"site": "text_layer"}, {"steps": 0}, {"guidance": -1}, {"guidance": math.inf}, {"seed": -1}, {"seed": 2**63},
        {"time_step": "step"}, {"sparsty": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Settings(**bad)


FINITE = st.floats(-1e3, 1e3, width=32)


def matrices(rows: st.SearchStrategy[int], columns: st.SearchStrategy[int], values: Any = FINITE) -> Any:
    return st.tuples(rows, columns).flatmap(
        lambda shape: st.lists(
            st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(lambda it: torch.tensor(it, dtype=torch.float64))
    )


@properties
@given(matrices(st.integers(1, 6), st.integers(1, 5)), st.booleans())
def test_activation_norm_is_its_formula(rows: Tensor, normalize: bool) -> None:
    expected = []
    for j in range(rows.shape[1]):
        total = 0.0
        for row in rows.tolist():
            length = math.hypot(*row)
            total += (row[j] / length if normalize and length > 1e-150 else row[j]) ** 2
        expected.append(math.sqrt(total))
    assert activation_norm(rows, normalize).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-150)


@properties
@given(matrices(st.integers(1, 6), st.integers(1, 5)), st.booleans())
def test_rows_of_zeros_change_nothing(rows: Tensor, normalize: bool) -> None:
    padded = torch.cat([torch.zeros_like(rows), rows])
    found = activation_norm(padded, normalize)
    assert found.isfinite().all()
    assert found.tolist() == pytest.approx(activation_norm(rows, normalize).tolist(), rel=1e-12, abs=1e-150)


@properties
@given(matrices(st.integers(1, 6), st.integers(1, 5)), st.sampled_from([0.25, 8.0, -1024.0]))
def test_the_length_of_a_token_counts_only_without_normalisation(rows: Tensor, factor: float) -> None:
    assert torch.equal(activation_norm(rows * factor), activation_norm(rows))
    assert torch.equal(activation_norm(rows * factor, False), activation_norm(rows, False) * abs(factor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_do_not_overflow_fp16(dtype: torch.dtype) -> None:
    rows = torch.full((4096, 3), 300.0, dtype=dtype)
    norm = activation_norm(rows, token_normalize=False)
    assert norm.dtype == torch.float32
    assert torch.equal(norm, torch.full((3,), rows[0, 0].item() * 64))
    assert torch.equal(combine_norms([rows[0], rows[0], rows[0], rows[0]]), torch.full((3,), rows[0, 0].item() * 2))
    # What fp16 itself makes of it.
    assert torch.full((4096, 3), 300.0, dtype=torch.float16).square().sum(0).sqrt().isinf().all()


@properties
@given(matrices(st.integers(2, 8), st.integers(1, 5)), st.booleans())
def test_prompts_combine_to_the_norm_of_all_their_rows(rows: Tensor, normalize: bool) -> None:
    parts = [activation_norm(part, normalize) for part in (rows[:1], rows[1:])]
    combined = combine_norms(parts)
    assert torch.equal(combined, combine_norms(torch.stack(parts)))
    assert combined.tolist() == pytest.approx(activation_norm(rows, normalize).tolist(), rel=1e-12, abs=1e-150)


SMALL = st.integers(-2, 2)  # few values: many ties
NORMS = st.integers(0, 2)


@properties
@given(st.data(), matrices(st.integers(1, 4), st.integers(1, 9), SMALL), st.floats(0.05, 1.0))
def test_skilled_mask_is_its_definition(data: st.DataObject, weight: Tensor, sparsity: float) -> None:
    d_in = weight.shape[1]
    target, reference = (
        torch.tensor(data.draw(st.lists(NORMS, min_size=d_in, max_size=d_in)), dtype=torch.float64) for _ in range(2)
    )
    count = math.floor(Fraction(str(sparsity)) * d_in)
    if count == 0:
        with pytest.raises(InputError, match="is too small"):
            skilled_mask(weight, target, reference, sparsity)
        return
    before = weight.clone(), target.clone(), reference.clone()
    expected = []
    for row in weight.abs().tolist():
        score = [w * norm for w, norm in zip(row, target.tolist(), strict=True)]
        ranking = sorted(range(d_in), key=lambda j: (-score[j], j))
        chosen = {j for j in ranking[:count] if score[j] > row[j] * reference[j].item()}
        expected.append([j in chosen for j in range(d_in)])
    found = skilled_mask(weight, target, reference, sparsity)
    assert found.dtype == torch.bool
    assert found.tolist() == expected
    assert all(torch.equal(old, new) for old, new in zip(before, (weight, target, reference), strict=True))


def test_columns_that_are_equal_by_construction_are_not_skilled() -> None:
    weight = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    target = torch.linspace(1, 2, 10)
    reference = target.clone()
    reference[::2] -= 1e-6
    mask = skilled_mask(weight, target, reference, 1.0)
    assert mask[:, ::2].all()
    assert not mask[:, 1::2].any()
    # A test that is not strict takes them, one that takes the norms for rows' finds no shape that fits.
    assert (target >= reference).all()
    with pytest.raises(RuntimeError):
        skilled_mask(weight, target[:8], reference[:8], 1.0)


def test_one_norm_for_each_column_not_row() -> None:
    weight = torch.ones(3, 3)
    mask = skilled_mask(weight, torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0.0, 0.0, 5.0]), 0.7)
    assert mask.tolist() == [[False, True, False]] * 3
    assert not torch.equal(mask, mask.T)


def test_comparison_is_exact_where_fp16_scores_are_not() -> None:
    # Both scores are inf in fp16, and would be equal; both are zero in fp16, and would be equal.
    for size in (60000.0, 6e-8):
        weight = torch.full((1, 2), size, dtype=torch.float16)
        norms = torch.tensor([2.0, 2.0]) if size > 1 else torch.tensor([1e-3, 1e-3])
        assert skilled_mask(weight, norms * torch.tensor([1.5, 1.0]), norms, 0.5).tolist() == [[True, False]]


@properties
@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_union_counts_votes(masks: list[list[bool]], percent: int) -> None:
    tensors, vote = [torch.tensor(mask) for mask in masks], percent / 100
    expected = [100 * sum(mask[j] for mask in masks) > percent * len(masks) for j in range(4)]
    assert union(tensors, vote).tolist() == expected
    assert union(torch.stack(tensors), vote).tolist() == expected
    assert union(iter(tensors)).tolist() == [any(mask[j] for mask in masks) for j in range(4)]


def test_votes_are_counted_exactly() -> None:
    assert 0.58 * 50 < 29
    for count in (28, 29, 30):
        masks = torch.arange(50)[:, None] < count
        assert union(masks, 0.58).tolist() == union(masks, Fraction(29, 50)).tolist() == [count > 29]


def test_a_vote_counts_the_calls_and_not_the_one_after_them(tiny: tuple[Model, Any]) -> None:
    # More than 1.5 of four masks, and not more than 2, which 0.67 · 3 says.
    found, three = (edit_of(*tiny, {**QUICK, "include_last": True, "vote": vote}) for vote in (0.5, 0.67))
    assert found.operations != three.operations


class Largest(TorchDispatchMode):
    """How many elements the largest tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.elements = max(self.elements, made.numel())
        return made


def test_an_activation_is_squared_in_pieces() -> None:
    rows = torch.ones((PROMPTS_PER_RUN, 4096, 1280), dtype=torch.float16)
    with Largest() as largest:
        sums = conceptprune._squared_sums(rows, True)
    assert torch.allclose(sums, torch.full_like(sums, 4096 / 1280), rtol=1e-4)
    assert 0 < largest.elements <= 1 << 22


def test_k_is_the_decimal_that_is_written() -> None:
    assert int(0.29 * 100) == 28, "in floating point"
    weight, one, none = torch.rand(3, 100) + 0.1, torch.ones(100), torch.zeros(100)
    assert skilled_mask(weight, one, none, 0.29).sum(1).tolist() == [29, 29, 29]
