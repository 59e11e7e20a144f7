"""ActErase against a second derivation of its masks and values: one prompt at a time, everything kept, plain loops."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from bakeout.editor.calibrate import PROMPTS_PER_RUN
from bakeout.editor.edit import Edit, PatchWeightInput, merge
from bakeout.editor.errors import InputError
from bakeout.editor.methods import acterase, method
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


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> tuple[Model, Any]:
    """The tiny model in fp64: its two derivations round apart by far less than any two importances."""
    model = open_model(tiny_model)
    return model, model.pipeline("cpu", torch.float64)


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


def test_activations_that_overflow_are_refused_and_not_kept(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", torch.float16)
    with torch.no_grad():
        model.module(pipeline, model.sites_of("ffn1")[0]).weight.mul_(1e4)
    for _again in range(2):
        with pytest.raises(InputError, match=r"unet\.down.*ffn2 are not finite: calibrate in fp32"):
            calibrate(model, pipeline, "ink", PAIRS[:1], Settings(**QUICK), work=tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_target_that_overflows_is_refused(tiny: tuple[Model, Any]) -> None:
    model, _ = tiny
    pipeline = model.pipeline("cpu", torch.float32)
    start = pipeline.tokenizer("@").input_ids[1]
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[start] = torch.nan
    with pytest.raises(InputError, match="are not finite: this model draws nothing with these settings"):
        calibrate(model, pipeline, "ink", [Pair("a cat @", "a cat")], Settings(**QUICK))


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


class Counter:
    """Counts the calls of a pipeline's UNet and the rows of each while it is open."""

    def __init__(self, pipeline: Any) -> None:
        self.unet = pipeline.unet
        self.rows: list[int] = []

    def __enter__(self) -> Self:
        self.rows.clear()
        self.handle = self.unet.register_forward_hook(lambda _, inputs, _output: self.rows.append(len(inputs[0])))
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_the_unet_runs_no_more_than_it_must(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    drawn = [2 * PROMPTS_PER_RUN] * 3 * 2
    for options, looks in (
        ({}, [4, 1]), ({"mask_time": "mean"}, [4, 1] * 3), ({"mask_time": "union", "pairs": "union"}, [1] * 3 * 5),
    ):  # fmt: skip
        with Counter(pipeline) as calls:
            calibrate(model, pipeline, "ink", PAIRS, Settings(**{**QUICK, **options}))
        assert calls.rows == drawn + 2 * looks
    with Counter(pipeline) as calls:
        calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK, trajectory="independent", guidance=1))
    assert calls.rows == [PROMPTS_PER_RUN] * 3 * 4 + 2 * [4, 1]


@pytest.mark.parametrize(
    "options", [{}, {"mask_time": "union"}, {"mask_time": "per_step", "guidance": 1.0}, {"trajectory": "independent"}]
)
def test_progress_adds_up_to_one(tiny: tuple[Model, Any], options: dict[str, Any]) -> None:
    parts: list[float] = []
    calibrate(*tiny, "ink", PAIRS, Settings(**{**QUICK, **options}), progress=parts.append)
    assert sum(parts) == pytest.approx(1)
    assert min(parts) > 0


def stop_after(part: float, parts: list[float]) -> Callable[[float], None]:
    def tell(more: float) -> None:
        parts.append(more)
        if sum(parts) > part:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("options", [{}, {"trajectory": "independent", "mask_time": "per_step"}], ids=said)
def test_an_interrupted_calibration_goes_on_where_it_was(
    tiny: tuple[Model, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model, pipeline = tiny
    chosen = Settings(**{**QUICK, "steps": 2, "mask_time": "union", "pairs": "union", **options})
    expected = calibrate(model, pipeline, "ink", PAIRS, chosen)
    # As if saving took no time: every mask is saved.
    monkeypatch.setattr(acterase, "monotonic", lambda: 0.0)
    with Counter(pipeline) as whole:
        calibrate(model, pipeline, "ink", PAIRS, chosen)
    run, drawn = chosen.steps * 2 * PROMPTS_PER_RUN, sum(rows for rows in whole.rows if rows > 1)
    for number, part in enumerate((0.45, 0.7, 0.9)):
        work = tmp_path / str(number)
        parts: list[float] = []
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, pipeline, "ink", PAIRS, chosen, work=work, progress=stop_after(part, parts))
        parts.clear()
        with Counter(pipeline) as calls:
            resumed = calibrate(model, pipeline, "ink", PAIRS, chosen, work=work, progress=parts.append)
        assert resumed == expected
        assert sum(parts) == pytest.approx(1)
        left, lost = (1 - part) * sum(whole.rows), run if part * sum(whole.rows) < drawn else 2
        assert 0 < sum(calls.rows) <= left + lost


def test_a_finished_calibration_runs_no_network_and_its_drawing_serves_other_masks(
    tiny: tuple[Model, Any], tmp_path: Path
) -> None:
    model, pipeline = tiny
    calibrate(model, pipeline, "ink", PAIRS, Settings(**QUICK), work=tmp_path)
    saved = {it.name for it in tmp_path.iterdir()}
    for options, rows in (
        ({}, []), ({"profile": "paper", "rows": "conditional"}, []), ({"tau": 0.2}, 2 * [4, 1]),
        ({"compare": "target"}, 2 * [4, 1]),
    ):  # fmt: skip
        chosen = Settings(**{**QUICK, **options})
        with Counter(pipeline) as calls:
            again = calibrate(model, pipeline, "ink", PAIRS, chosen, work=tmp_path)
        assert calls.rows == rows
        assert again == calibrate(model, pipeline, "ink", PAIRS, chosen)
    # One drawing, and the masks of three readings.
    assert len(saved) == 2
    assert len({*tmp_path.iterdir()}) == 4


@pytest.mark.parametrize(
    "change",
    ["seed", "size", "steps", "site", "granularity", "scheduler", "mask_time", "trajectory", "calls", "targets",
     "sources", "weights", "the model's scheduler", "broken"],
)  # fmt: skip
def test_what_was_kept_of_something_else_is_not_used(tiny_model: Path, tmp_path: Path, change: str) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float64)
    options, pairs = {**QUICK, "steps": 2, "mask_time": "per_step"}, PAIRS[:2]
    changes: dict[str, Any] = {
        "seed": 1, "size": (24, 16), "steps": 5, "site": "ffn1_input", "granularity": "feature", "scheduler": "model",
        "mask_time": "union", "trajectory": "independent", "calls": (1, 2),
    }  # fmt: skip
    calibrate(model, pipeline, "ink", pairs, Settings(**options), work=tmp_path)
    if change in changes:
        options[change] = changes[change]
    elif change == "targets":
        pairs = tuple(Pair(f"{pair.target}!", pair.reference) for pair in pairs)
    elif change == "sources":
        pairs = tuple(Pair(pair.target, f"{pair.reference}!") for pair in pairs)
    elif change == "the model's scheduler":
        pipeline = with_scheduler(pipeline, "DDIMScheduler", beta_end=0.02)
    elif change == "weights":
        with torch.no_grad():
            pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    else:
        for saved in tmp_path.iterdir():
            saved.write_bytes(saved.read_bytes()[:-1])
    with Counter(pipeline) as calls:
        found = calibrate(model, pipeline, "ink", pairs, Settings(**options), work=tmp_path)
    assert len(calls.rows) > 0
    assert found == calibrate(model, pipeline, "ink", pairs, Settings(**options))


def test_saving_takes_a_small_part_of_the_time(tiny: tuple[Model, Any], tmp_path: Path, monkeypatch: Any) -> None:
    model, pipeline = tiny
    chosen = Settings(**QUICK, mask_time="union", pairs="union")
    clock, saved = [0.0], []

    def save(path: Path, done: int, tensors: Mapping[str, Tensor]) -> None:
        clock[0] += 1.0
        saved.append(done)

    monkeypatch.setattr(acterase, "save_sums", save)
    # Each of the fifteen masks takes five seconds, saving them one.
    monkeypatch.setattr(acterase, "monotonic", lambda: clock[0])
    monkeypatch.setattr(acterase, "patch_mask", slowed(acterase.patch_mask, clock, len(model.sites_of("ffn2"))))
    calibrate(model, pipeline, "ink", PAIRS, chosen, work=tmp_path)
    assert saved == [1, 5, 9, 13, 15]


def slowed(function: Callable[..., Any], clock: list[float], sites: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        clock[0] += 5 / sites
        return function(*args)

    return run


def test_a_folder_that_cannot_be_written_is_refused(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*: make room there, or choose another output folder$"):
        calibrate(*tiny, "ink", PAIRS, Settings(**QUICK), work=tmp_path / "file")


def state_of(pipeline: Any) -> Any:
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    weights = [value.clone() for network in networks for value in network.state_dict().values()]
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for it in networks for module in it.modules()]
    return weights, hooks, dict(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler)), torch.get_rng_state()


@pytest.mark.parametrize("stops", [0.2, 0.95, 2])
def test_a_pipeline_comes_out_as_it_went_in(tiny_model: Path, stops: float) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    pipeline.scheduler.set_timesteps(7)
    before = state_of(pipeline)
    options = {**QUICK, "trajectory": "independent", "site": "ffn_output"}
    try:
        calibrate(model, pipeline, "ink", PAIRS, Settings(**options), progress=stop_after(stops, []))
    except KeyboardInterrupt:
        assert stops < 1
    after = state_of(pipeline)
    assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3]
    assert repr(before[3]) == repr(after[3])
    assert torch.equal(before[4], after[4])


def held(model: Model, pipeline: Any, options: Mapping[str, Any]) -> int:
    """The most bytes of tensors that a calibration holds when the UNet is called, beyond what was there before."""
    most = [0]

    def look(*_: object) -> None:
        tensors = [it for it in gc.get_objects() if type(it) is Tensor]
        most[0] = max(
            most[0], sum({it.untyped_storage().data_ptr(): it.untyped_storage().nbytes() for it in tensors}.values())
        )

    gc.collect()
    # Of what is frozen the collector tells nothing.
    gc.freeze()
    try:
        with pipeline.unet.register_forward_pre_hook(look):
            calibrate(model, pipeline, "ink", PAIRS, Settings(**{**QUICK, **options}))
    finally:
        gc.unfreeze()
    return most[0]


@pytest.mark.parametrize(("mask_time", "pairs"), [("last", "mean"), ("union", "union"), ("mean", "mean")])
def test_of_activations_only_three_sums_and_the_masks_are_kept(tiny_model: Path, mask_time: str, pairs: str) -> None:
    model = open_model(tiny_model)
    pipeline = model.pipeline("cpu", torch.float32)
    options = {"mask_time": mask_time, "pairs": pairs, "size": (64, 64), "guidance": 1.0}
    few, many = (held(model, pipeline, {**options, "steps": steps}) for steps in (2, 4))
    sums = sum(4 * (64 if ".mid." in site.name else 256) * site.d_in for site in model.sites_of("ffn2"))
    # Twice the latents of each call and pair, and texts.
    latents, texts = 2 * len(PAIRS) * 4 * 256 * 4, 100_000
    assert 2 * sums < few < 3.25 * sums + 2 * latents + texts
    assert many - few < (2 * latents if mask_time != "last" else 0) + sums / 8


def test_settings_take_a_profile_and_what_is_given_wins() -> None:
    paper, portable = Settings(), Settings(profile="portable")
    assert paper.model_dump() == {
        "profile": "paper", "site": "ffn2_input", "importance": "column", "signed": False, "tau": 0.01,
        "tau_mode": "fraction", "tau_scope": "layer", "compare": "source", "granularity": "token", "mask_time": "last",
        "pairs": "mean", "trajectory": "shared", "rows": "all", "calls": None, "steps": 30, "guidance": 7.5, "seed": 0,
        "scheduler": "dpm-solver", "size": None,
    }  # fmt: skip
    assert portable == Settings(**{**paper.model_dump(), "profile": "portable", "granularity": "feature"})
    assert Settings(profile="portable", granularity="token").granularity == "token"
    assert Settings(site="ffn_output").importance == "row"
    assert Settings(size=[512, 768], calls=[0, 3]) == Settings(size=(512, 768), calls=(0, 3))
    assert method("acterase").Settings is Settings


@pytest.mark.parametrize(
    "bad",
    [
        {"profile": "mine"}, {"profile": ["paper"]}, {"tau": 0}, {"tau": -1}, {"tau": float("nan")}, {"tau": "0.1"},
        {"tau": float("inf"), "tau_mode": "absolute"}, {"site": "ffn2"}, {"rows": "both"}, {"steps": 0},
        {"guidance": -1}, {"guidance": float("inf")}, {"seed": -1}, {"seed": 2**63}, {"calls": [1]},
        {"calls": [0.0, 2]}, {"size": 512}, {"size": [512.0, 512]}, {"size": [512, 512, 512]},
        {"signed": 1}, {"tao": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Settings(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"importance": "row"}, 'importance is "row", .* take "column" or "edge"'),
        ({"site": "ffn_output", "importance": "column"}, 'importance is "column", .* take "row"'),
        ({"site": "ffn_output", "importance": "edge", **FEATURE}, 'take "row"'),
        ({"importance": "edge"}, 'a weight is the same at every token: take granularity "feature"'),
        ({"importance": "edge", **FEATURE, "rows": "conditional"}, 'take importance "column", or rows "all"'),
        ({"importance": "edge", **FEATURE, "calls": [0, 1]}, "no calls"),
        ({"importance": "edge", **FEATURE, "mask_time": "per_step"}, "another mask_time"),
        ({"tau_scope": "token", **FEATURE}, 'take granularity "token"'),
        ({"tau_scope": "token", "tau_mode": "absolute"}, 'tau_mode "fraction"'),
        ({"tau": 1.5}, 'take at most 1, or tau_mode "absolute"'),
        ({"calls": [2, 2]}, "calls has none"),
        ({"calls": [-1, 2]}, "calls has none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0001}, r"tau 0\.0001 is too small: of \d+ importances of unet\.\S+ it takes none; take at least"),
        ({"tau": 0.01, **FEATURE}, r"of 64 importances of unet\.\S+ it takes none; take at least 0\.015625"),
        ({"tau": 0.01, "tau_scope": "token"}, "of 64 importances"),
        ({"tau": 0.01, "site": "ffn_output", **FEATURE}, "of 16 importances"),
        ({"tau": 0.0001, "importance": "edge", **FEATURE}, "of 1024 importances"),
        ({"steps": 5000}, "steps is 5000: this model was trained with 1000, so use at most as many"),
        ({"size": [20, 16]}, "size is 20 x 16, .* in multiples of 8 pixels up to 2048: take 16 x 16"),
        ({"size": [0, 16]}, "take 8 x 16"),
        ({"size": [16, -16]}, "take 16 x 8"),
        ({"size": [4096, 16]}, "take 2048 x 16"),
        ({"calls": [0, 5]}, "calls ends at 5, but 3 steps make 3 calls of the UNet"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(
    tiny: tuple[Model, Any], options: dict[str, Any], message: str
) -> None:
    chosen = Settings(**{**QUICK, **options})
    with Counter(tiny[1]) as calls:
        with pytest.raises(InputError, match=message):
            calibrate(*tiny, "ink", PAIRS, chosen)
        if "calls" not in options:
            with pytest.raises(InputError, match=message):
                acterase.check(*tiny, chosen)
    assert calls.rows == []


def test_no_pairs_are_refused(tiny: tuple[Model, Any]) -> None:
    with pytest.raises(InputError, match="no prompt pairs"):
        calibrate(*tiny, "ink", (), Settings(**QUICK))


@pytest.mark.parametrize("options", [{"mask_time": "per_step"}, {"calls": [0, 3]}, {"rows": "conditional"}], ids=said)
def test_what_no_artifact_can_hold_is_not_baked(tiny: tuple[Model, Any], options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} is for experiments in Python: an artifact does the same in every"):
        acterase.check(*tiny, Settings(**{**QUICK, **options}))


def test_what_can_be_baked_is_not_refused(tiny: tuple[Model, Any], folders: Callable[[str], Path]) -> None:
    with Counter(tiny[1]) as calls:
        acterase.check(*tiny, Settings(tau=0.02, size=(2048, 8)))
        acterase.check(*tiny, Settings(tau=1e-9, tau_mode="absolute", **FEATURE))
    assert calls.rows == []
    xl = open_model(folders("sdxl"))
    acterase.check(xl, xl.pipeline("cpu", torch.float32), Settings(site="attn", tau=0.1))


def test_only_features_at_every_token_fold() -> None:
    assert acterase.unfoldable(Settings()) == "its mask differs from token to token"
    assert acterase.unfoldable(Settings(site="ffn_output")) is not None
    assert acterase.unfoldable(Settings(profile="portable")) is None
    assert acterase.unfoldable(Settings(importance="edge", **FEATURE)) is None


@pytest.mark.parametrize("kind", acterase.PUBLISHED)
def test_published_settings_are_settings(kind: str) -> None:
    assert acterase.PUBLISHED[kind]
    assert all(Settings(**given) for given in acterase.PUBLISHED[kind].values())
