"""ActErase against a second derivation of its masks and values: one prompt at a time, everything kept, plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from bakeout.editor.edit import Edit, PatchWeightInput
from bakeout.editor.merge import merge
from bakeout.editor.methods.acterase import NothingToPatchWarning, Settings, calibrate
from bakeout.editor.model import Model, open_model
from bakeout.editor.prompts import Pair, prompts_digest

WORDS = ("cat", "dog", "car", "bag", "owl")
# Five pairs: more than the networks draw at a time, and not a multiple of it.
PAIRS = tuple(Pair(f"a {word} in the style of ink", f"a photo of a {word}") for word in WORDS)
# Of the tiny model's layers, 64 to 1024 features wide, 10 % is enough for every rule to matter.
QUICK: dict[str, Any] = {"steps": 3, "tau": 0.1}
FEATURE: dict[str, Any] = {"granularity": "feature"}
# What is patched, by the ends of the modules' names in the UNet.
PLACES = {
    "ffn2_input": (".ff.net.2", "input"),
    "ffn_output": (".ff.net.2", "output"),
    "ffn1_input": (".ff.net.0.proj", "input"),
    "attn": (".attn2.to_out.0", "input"),
}
KINDS = {"ffn2_input": "ffn2", "ffn_output": "ffn2", "ffn1_input": "ffn1", "attn": "attn_out"}
# One look of the UNet at a prompt: by module, what goes in and what comes out, [tokens, d].
Look = Mapping[str, Mapping[str, np.ndarray]]


def with_scheduler(pipeline: Any, name: str, **changes: Any) -> Any:
    own = copy.copy(pipeline)
    own.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    return own


# Readings that differ in what is made of the activations only share them.
KNOWN: dict[tuple[Any, ...], Any] = {}


def edit_of(model: Model, pipeline: Any, options: Mapping[str, Any], pairs: Sequence[Pair] = PAIRS) -> Edit:
    key = (id(pipeline.unet), type(pipeline.scheduler), tuple(pairs), *sorted(options.items()))
    if key not in KNOWN:
        KNOWN[key] = calibrate(model, pipeline, "ink", pairs, Settings(**options))
    return KNOWN[key]


class Naive:
    """The table of ActErase in loops."""

    def __init__(self, pipeline: Any, options: Mapping[str, Any]) -> None:
        site = options.get("site", "ffn2_input")
        chosen = {
            "site": site, "importance": "row" if site == "ffn_output" else "column", "signed": False, "tau": 0.01,
            "tau_mode": "fraction", "tau_scope": "layer", "compare": "source",
            "granularity": "feature" if options.get("profile") == "portable" else "token", "mask_time": "last",
            "pairs": "mean", "trajectory": "shared", "steps": 30, "guidance": 7.5, "seed": 0,
            "scheduler": "dpm-solver", "size": None,
        }  # fmt: skip
        chosen.update(options)
        self.pipeline, self.options = pipeline, chosen
        self.ending, self.at = PLACES[chosen["site"]]
        self.modules = {name: it for name, it in pipeline.unet.named_modules() if name.endswith(self.ending)}

    def conditions(self, prompt: str) -> dict[str, Any]:
        tokens = self.pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        return {"encoder_hidden_states": self.pipeline.text_encoder(tokens.input_ids)[0]}

    def scheduler(self) -> Any:
        own = self.pipeline.scheduler
        kind = diffusers.DPMSolverMultistepScheduler if self.options["scheduler"] == "dpm-solver" else type(own)
        return kind.from_config(own.config)

    def look(self, latent: Tensor, time: Tensor, prompt: str) -> tuple[Tensor, Look]:
        """The UNet's noise for one prompt alone, and all that its Linears of any kind take in and give out."""
        seen: dict[str, dict[str, np.ndarray]] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: Any, inputs: Any, output: Tensor) -> None:
                seen[name] = {"input": inputs[0][0].double().numpy(), "output": output[0].double().numpy()}

            return hook

        endings = tuple(ending for ending, _ in PLACES.values())
        handles = [
            it.register_forward_hook(keep(name))
            for name, it in self.pipeline.unet.named_modules() if name.endswith(endings)
        ]  # fmt: skip
        try:
            with torch.no_grad():
                return self.pipeline.unet(latent, time, **self.conditions(prompt)).sample, seen
        finally:
            for handle in handles:
                handle.remove()

    def drawing(self, prompt: str) -> list[tuple[Tensor, Tensor, Look]]:
        """Of each call: what the UNet is given, its time, and what is seen of the prompt."""
        chosen = [self.options[name] for name in ("steps", "guidance", "seed", "scheduler", "size")]
        key = (id(self.pipeline.unet), type(self.pipeline.scheduler), prompt, *chosen)
        if key not in KNOWN:
            KNOWN[key] = list(self.calls(prompt))
        return KNOWN[key]

    def calls(self, prompt: str) -> Iterable[tuple[Tensor, Tensor, Look]]:
        scheduler = self.scheduler()
        scheduler.set_timesteps(self.options["steps"])
        own = self.pipeline.unet.config.sample_size
        width, height = (side // self.pipeline.vae_scale_factor for side in self.options["size"] or (0, 0))
        generator = torch.Generator().manual_seed(self.options["seed"])
        dtype = self.pipeline.unet.dtype
        latent = torch.randn((1, 4, height or own, width or own), generator=generator, dtype=dtype)
        latent = latent * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            given = scheduler.scale_model_input(latent, time)
            noise, seen = self.look(given, time, prompt)
            yield given, time, seen
            if self.options["guidance"] > 1:
                empty, _ = self.look(given, time, "")
                noise = empty + self.options["guidance"] * (noise - empty)
            latent = scheduler.step(noise, time, latent).prev_sample

    def looks(self, pair: Pair) -> list[tuple[Look, Look]]:
        """Of each call, source and target."""
        source = self.drawing(pair.reference)
        if self.options["trajectory"] == "independent":
            target = [seen for _, _, seen in self.drawing(pair.target)]
        else:
            key = (id(self.pipeline.unet), pair, *(float(given.sum()) for given, _, _ in source))
            if key not in KNOWN:
                KNOWN[key] = [self.look(given, time, pair.target)[1] for given, time, _ in source]
            target = KNOWN[key]
        return [(seen, other) for (_, _, seen), other in zip(source, target, strict=True)]

    def importance(self, name: str, seen: Look) -> np.ndarray:
        """Eq. 4 of one layer in one call."""
        x = abs(seen[name]["input"])
        if self.options["granularity"] == "feature":
            x = x.mean(0, keepdims=True)
        weight = self.modules[name].weight.detach().double().numpy()
        weight = weight if self.options["signed"] else abs(weight)
        if self.options["importance"] == "edge":
            return np.array([[w * value for w, value in zip(row, x[0], strict=True)] for row in weight])
        each = x[:, None, :] * weight[None]  # [tokens, d_out, d_in]
        return each.sum(2 if self.options["importance"] == "row" else 1)

    def mask(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Eq. 5."""
        judged = source if self.options["compare"] == "source" else target
        tau = self.options["tau"]
        passing = np.zeros(judged.shape, bool)
        if self.options["tau_mode"] == "absolute":
            passing = judged >= tau
        else:
            of_layer = self.options["tau_scope"] == "layer"
            for row, chosen in [(judged, passing)] if of_layer else zip(judged, passing, strict=True):
                ranking = sorted(np.ndindex(row.shape), key=lambda place, row=row: -row[place])
                for place in ranking[: int(Fraction(str(tau)) * row.size)]:
                    chosen[place] = True
        return passing & (source < target)

    def masks(self, name: str, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """The mask of one layer; with `per_step` that of each call."""
        # Of each pair, each call, source and target.
        scores = np.array([[[self.importance(name, it) for it in both] for both in self.looks(pair)] for pair in pairs])
        if self.options["mask_time"] == "last":
            scores = scores[:, -1:]
        elif self.options["mask_time"] == "mean":
            scores = scores.mean(1, keepdims=True)
        if self.options["pairs"] == "mean":
            scores = scores.mean(0, keepdims=True)
        decided = np.array([[self.mask(*both) for both in of_pair] for of_pair in scores]).any(0)
        if self.options["importance"] != "edge" and self.options["granularity"] == "feature":
            decided = decided[:, 0]
        return list(decided) if self.options["mask_time"] == "per_step" else [decided.any(0)]

    def value(self, name: str, pairs: Sequence[Pair]) -> np.ndarray:
        """x_avg of one layer."""
        seen = [it[name][self.at] for pair in pairs for _, _, it in self.drawing(pair.reference)]
        mean = sum(seen) / len(seen)
        return mean.mean(0) if self.options["granularity"] == "feature" else mean


class NaiveXL(Naive):
    """SDXL: two encoders side by side, a pooled embedding and the picture's size; the unconditional half is zeros."""

    def conditions(self, prompt: str) -> dict[str, Any]:
        states = []
        for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            own = getattr(self.pipeline, tokenizer)
            tokens = own(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
            found = getattr(self.pipeline, encoder)(tokens, output_hidden_states=True)
            states.append(found.hidden_states[-2])
        factor = 1 if prompt else 0
        side = float(self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor)
        size = torch.tensor([[side, side, 0, 0, side, side]], dtype=states[0].dtype)
        more = {"text_embeds": factor * found.text_embeds, "time_ids": size}
        return {"encoder_hidden_states": factor * torch.cat(states, dim=-1), "added_cond_kwargs": more}


def assert_is_naive(
    edit: Edit, naive: Naive, model: Model, pairs: Sequence[Pair] = PAIRS, tolerance: float = 1e-6
) -> None:
    """Masks to the bit, values to fp32's rounding."""
    found = {(it.site, getattr(it, "calls", None)): it for it in edit.operations}
    expected = {}
    for site in model.sites_of(KINDS[naive.options["site"]]):
        (name,) = [name for name, it in naive.modules.items() if it is model.module(naive.pipeline, site)]
        for call, mask in enumerate(naive.masks(name, pairs)):
            calls = (call, call + 1) if naive.options["mask_time"] == "per_step" else naive.options.get("calls")
            if mask.any():
                expected[site.name, calls] = mask, naive.value(name, pairs)
    assert found.keys() == expected.keys()
    assert 0 < sum(mask.sum() for mask, _ in expected.values()) < sum(mask.size for mask, _ in expected.values())
    for key, (mask, value) in expected.items():
        operation: Any = found[key]
        assert np.array_equal(operation.mask.numpy(), mask), key
        assert operation.value.dtype == torch.float32
        if isinstance(operation, PatchWeightInput):
            chosen = value
        else:
            chosen = value * mask
            latents = naive.drawing(pairs[0].reference)[0][0].shape[2:]
            assert (operation.at, operation.rows) == (naive.at, naive.options.get("rows", "all"))
            assert operation.latents == (tuple(latents) if naive.options["granularity"] == "token" else None)
        error = np.abs(operation.value.numpy() - chosen).max() / np.abs(chosen).max()
        assert error <= tolerance, (key, error)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"profile": "portable"},
    {"tau": 0.02},
    {"tau": 1.0},
    {"tau": 0.15, "tau_mode": "absolute"},
    {"tau_scope": "token"},
    {"compare": "target"},
    {"compare": "target", "tau_scope": "token"},
    {"signed": True},
    {"signed": True, "tau": 0.001, "tau_mode": "absolute"},
    {"mask_time": "union"},
    {"mask_time": "mean"},
    {"mask_time": "per_step"},
    {"pairs": "union"},
    {"pairs": "union", "mask_time": "union"},
    {"pairs": "union", "mask_time": "mean", **FEATURE},
    {"pairs": "union", "mask_time": "per_step", **FEATURE},
    {"trajectory": "independent"},
    {"trajectory": "independent", "mask_time": "mean", "pairs": "union"},
    {"site": "ffn_output"},
    {"site": "ffn_output", "signed": True, "profile": "portable"},
    {"site": "ffn_output", "tau_scope": "token", "mask_time": "union", "compare": "target"},
    {"site": "ffn1_input"},
    {"site": "ffn1_input", **FEATURE, "mask_time": "mean"},
    {"site": "attn"},
    {"site": "attn", "profile": "portable", "tau": 0.3},
    {"importance": "edge", **FEATURE},
    {"importance": "edge", **FEATURE, "signed": True, "mask_time": "union"},
    {"importance": "edge", **FEATURE, "site": "attn", "compare": "target", "pairs": "union"},
    {"importance": "edge", **FEATURE, "tau_mode": "absolute", "tau": 0.01},
    {"rows": "conditional"},
    {"calls": (1, 3)},
    {"calls": (0, 2), **FEATURE, "rows": "conditional"},
    {"steps": 2},
    {"guidance": 2.0},
    {"guidance": 1.0},
    {"seed": 7},
    {"scheduler": "model"},
    # 6 x 4 latents, 24 and 6 tokens.
    {"size": (24, 16)},
    {"size": (16, 24), **FEATURE},
]


def said(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items()) or "paper"


@pytest.mark.parametrize("options", OPTIONS, ids=said)
def test_masks_and_values_are_those_of_the_table(tiny: tuple[Model, Any], options: dict[str, Any]) -> None:
    model, pipeline = tiny
    options = {**QUICK, **options}
    assert_is_naive(edit_of(model, pipeline, options), Naive(pipeline, options), model)


@pytest.mark.parametrize("calls", [(0, 3), (1, 2)], ids=str)
def test_single_steps_masks_are_of_the_calls_that_are_patched(tiny: tuple[Model, Any], calls: tuple[int, int]) -> None:
    options = {**QUICK, "mask_time": "per_step", **FEATURE}
    every: list[Any] = list(edit_of(*tiny, options).operations)
    some = edit_of(*tiny, {**options, "calls": calls}).operations
    assert {it.calls for it in every} == {(call, call + 1) for call in range(3)}
    assert set(map(repr, some)) <= set(map(repr, every))
    assert [it.digest for it in every if calls[0] <= it.calls[0] < calls[1]] == [it.digest for it in some]


@pytest.mark.parametrize(
    ("scheduler", "calls"), [("PNDMScheduler", 4), ("HeunDiscreteScheduler", 5), ("EulerDiscreteScheduler", 3)]
)
def test_every_call_of_the_models_own_scheduler_counts(tiny: tuple[Model, Any], scheduler: str, calls: int) -> None:
    model, pipeline = tiny
    pipeline = with_scheduler(pipeline, scheduler, **({"skip_prk_steps": True} if scheduler[0] == "P" else {}))
    options = {**QUICK, "scheduler": "model", "mask_time": "mean"}
    naive, pairs = Naive(pipeline, options), PAIRS[:2]
    assert len(naive.drawing(pairs[0].reference)) == calls
    assert_is_naive(edit_of(model, pipeline, options, pairs), naive, model, pairs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 0.12}, {"tau_scope": "token"}, {"compare": "target"}, {"signed": True}, {"mask_time": "union"},
        {"mask_time": "mean"}, {"pairs": "union"}, {"trajectory": "independent"}, {"seed": 1}, {"guidance": 3.0},
        {"steps": 4}, {"scheduler": "model"}, {"size": (24, 16)}, {"site": "ffn_output"}, {"granularity": "feature"},
    ],
    ids=said,
)  # fmt: skip
def test_a_wrong_reading_is_told_apart(tiny: tuple[Model, Any], wrong: dict[str, Any]) -> None:
    model, pipeline = tiny
    with pytest.raises(AssertionError):
        assert_is_naive(edit_of(model, pipeline, QUICK), Naive(pipeline, {**QUICK, **wrong}), model)


def test_source_and_target_are_not_exchanged(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    exchanged = [Pair(pair.reference, pair.target) for pair in PAIRS]
    for options in (QUICK, {**QUICK, **FEATURE}):
        with pytest.raises(AssertionError):
            assert_is_naive(edit_of(model, pipeline, options), Naive(pipeline, options), model, exchanged)


def test_values_are_of_every_call_and_pair(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    naive = Naive(pipeline, QUICK)
    naive.value = lambda name, pairs: np.array(  # type: ignore[method-assign]
        [naive.drawing(pair.reference)[-1][2][name]["input"] for pair in pairs]
    ).mean(0)
    with pytest.raises(AssertionError):
        assert_is_naive(edit_of(model, pipeline, QUICK), naive, model)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family_is_patched(folders: Callable[[str], Path], family: str) -> None:
    model = open_model(folders(family))
    pipeline = model.pipeline("cpu", torch.float64)
    pairs, naive = PAIRS[:1], NaiveXL if family == "sdxl" else Naive
    for options in ({}, {"profile": "portable"}):
        chosen = {**QUICK, "steps": 2, "mask_time": "mean", **options}
        edit = calibrate(model, pipeline, "ink", pairs, Settings(**chosen))
        assert {it.site for it in edit.operations} == {site.name for site in model.sites_of("ffn2")}
        assert_is_naive(edit, naive(pipeline, chosen), model, pairs)
    with pytest.raises(AssertionError):
        assert_is_naive(edit, naive(pipeline, {**chosen, "seed": 1}), model, pairs)


@pytest.mark.parametrize("options", [{}, {"profile": "portable"}], ids=said)
def test_several_concepts_are_the_or_of_masks_and_the_masked_mean(
    tiny: tuple[Model, Any], options: dict[str, Any]
) -> None:
    model, pipeline = tiny
    options = {**QUICK, "tau": 0.5, **options}
    concepts = [
        tuple(Pair(f"a {word} {what}", f"a {word}") for word in WORDS[:2]) for what in ("of ink", "at night", "in oil")
    ]
    found = {it.site: it for it in merge([edit_of(model, pipeline, options, pairs) for pairs in concepts]).operations}
    naive, overlap = Naive(pipeline, options), 0
    for site in model.sites_of("ffn2"):
        (name,) = [name for name, it in naive.modules.items() if it is model.module(pipeline, site)]
        masks = np.array([naive.masks(name, pairs)[0] for pairs in concepts])
        values = np.array([naive.value(name, pairs) for pairs in concepts])
        expected = (masks * values).sum(0) / np.maximum(1, masks.sum(0))
        operation: Any = found[site.name]
        assert np.array_equal(operation.mask.numpy(), masks.any(0))
        assert np.abs(operation.value.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()
        overlap += (masks.sum(0) > 1).sum()
    assert overlap > 10


def iou(edit: Edit, naive: Naive, model: Model) -> float:
    """Intersection over union of the masks."""
    both = shared = 0
    for operation in edit.operations:
        module = model.module(naive.pipeline, model.site(operation.site))
        (name,) = [name for name, it in naive.modules.items() if it is module]
        found, mask = operation.mask.numpy(), naive.masks(name, PAIRS)[0]  # type: ignore[union-attr]
        both, shared = both + (found | mask).sum(), shared + (found & mask).sum()
    return float(shared / both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_work(tiny: tuple[Model, Any], dtype: torch.dtype) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", dtype)
    options = {**QUICK, "mask_time": "mean"}
    edit = calibrate(model, pipeline, "ink", PAIRS, Settings(**options))
    right, wrong = (Naive(pipeline, {**options, "seed": seed}) for seed in (0, 1))
    # The two derivations run other shapes, and so round apart.
    assert iou(edit, right, model) > 0.9 > 0.5 > iou(edit, wrong, model)
    for operation in edit.operations:
        module = model.module(pipeline, model.site(operation.site))
        (name,) = [name for name, it in right.modules.items() if it is module]
        mask, found = operation.mask.numpy(), operation.value.numpy()  # type: ignore[union-attr]
        assert found.dtype == np.float32
        expected = right.value(name, PAIRS)
        assert np.abs(found - expected)[mask].max() < 1e-3 * np.abs(expected[mask]).max()


@pytest.mark.parametrize(
    "options",
    [{}, {"profile": "portable"}, {"mask_time": "union", "pairs": "union"}, {"trajectory": "independent"},
     {"site": "ffn_output"}, {"importance": "edge", **FEATURE}],
    ids=said,
)  # fmt: skip
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_a_concept_equal_to_its_source_patches_nothing_and_says_so(
    tiny_model: Path, scheduler: str, options: dict[str, Any]
) -> None:
    model = open_model(tiny_model)
    pipeline = with_scheduler(model.pipeline("cpu", torch.float32), scheduler)
    pairs = [Pair(pair.target, pair.target) for pair in PAIRS]
    with pytest.warns(NothingToPatchWarning, match="nothing is patched for 'ink'"):
        edit = calibrate(
            model, pipeline, "ink", pairs, Settings(**{**QUICK, "scheduler": "model", "tau": 1.0, **options})
        )
    assert edit.operations == ()
    assert edit.origins[0].pairs == len(pairs)


def test_the_edit_says_where_it_comes_from_and_survives_a_file(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    chosen = Settings(**QUICK, size=(24, 16), calls=(1, 2))
    edit = calibrate(*tiny, "ink", PAIRS, chosen)
    (origin,) = edit.origins
    assert (origin.method, origin.concept, origin.pairs) == ("acterase", "ink", len(PAIRS))
    assert origin.prompts == prompts_digest(PAIRS)
    assert Settings(**origin.settings) == chosen
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors") == edit
