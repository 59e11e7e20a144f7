"""The streaming pass: what observers see, whose sums they are, and that a pipeline is left as it was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from bakeout.editor import calibrate
from bakeout.editor.calibrate import (
    PROMPTS_PER_RUN,
    Sampling,
    call_timesteps,
    first_inputs,
    latent_size,
    latent_tokens,
    observe,
    sum_over_prompts,
)
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model

SAMPLING = Sampling(steps=5, guidance=7.5, seed=3)
PROMPTS = ("a cat", "a dog on a wall", "an owl", "the sea", "a red car", "nothing")


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> tuple[Model, Any]:
    model = open_model(tiny_model)
    return model, model.pipeline("cpu", torch.float64)


def pndm(pipeline: Any) -> Any:
    own = copy.copy(pipeline)
    own.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    return own


def seen_by(tiny: tuple[Model, Any], kind: str, prompts: Any, sampling: Sampling = SAMPLING, calls: int = 3) -> Any:
    """Everything that an observer of the sites of a kind is called with."""
    model, pipeline = tiny
    seen: list[tuple[str, int, str, Tensor]] = []

    def keep(site: Any, call: int, half: Any, x: Tensor) -> None:
        seen.append((site.name, call, half, x.clone()))

    observe(model, pipeline, model.sites_of(kind), prompts, sampling, keep, calls=calls)
    return seen


@pytest.mark.parametrize("kind", ["ffn2", "ffn1", "attn_key", "attn_value"])
def test_every_site_call_and_half_is_seen_once(tiny: tuple[Model, Any], kind: str) -> None:
    model, _ = tiny
    seen = seen_by(tiny, kind, PROMPTS[:3])
    expected = [
        (site.name, call, half)
        for site in model.sites_of(kind) for call in range(3) for half in ("conditional", "unconditional")
    ]  # fmt: skip
    assert sorted(it[:3] for it in seen) == sorted(expected)
    widths = {site.name: site.d_in for site in model.sites_of(kind)}
    assert all(x.ndim == 3 and (len(x), x.shape[2]) == (3, widths[name]) for name, _, _, x in seen)


def test_the_halves_are_not_exchanged(tiny: tuple[Model, Any]) -> None:
    _, pipeline = tiny
    first, second = (
        {half: x for _, _, half, x in seen_by(tiny, "attn_key", [prompt], calls=1)} for prompt in PROMPTS[:2]
    )
    assert torch.equal(first["unconditional"], second["unconditional"])
    assert not torch.equal(first["conditional"], second["conditional"])
    tokens = pipeline.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    empty = pipeline.text_encoder(tokens)[0]
    assert torch.allclose(first["unconditional"], empty, rtol=1e-12, atol=1e-12)


def test_without_guidance_there_is_only_the_conditional_half(tiny: tuple[Model, Any]) -> None:
    for kind in ("ffn2", "text_ffn2"):
        seen = seen_by(tiny, kind, PROMPTS[:2], Sampling(5, 1.0, 3))
        assert {half for _, _, half, _ in seen} == {"conditional"}


def test_a_text_encoder_runs_once_a_half_and_the_unet_not_at_all(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    calls = []
    handle = pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    seen = seen_by(tiny, "text_ffn2", PROMPTS[:2], calls=0)
    handle.remove()
    assert not calls
    assert Counter(it[:3] for it in seen) == {
        (site.name, 0, half): 1 for site in model.sites_of("text_ffn2") for half in ("conditional", "unconditional")
    }
    by_half = {(name, half): x for name, _, half, x in seen}
    name = model.sites_of("text_ffn2")[0].name
    assert torch.equal(*by_half[name, "unconditional"])
    assert not torch.equal(*by_half[name, "conditional"])


def test_all_prompts_share_one_latent_and_its_noise(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    own = copy.copy(pipeline)
    own.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    seen = seen_by((model, own), "ffn2", [PROMPTS[0]] * 3)
    # Fresh noise comes in at every step; equal prompts stay equal only if it is the same for all, in every run.
    for x, alone in zip(seen, seen_by((model, own), "ffn2", [PROMPTS[0]]), strict=True):
        assert x[:3] == alone[:3]
        assert all(torch.allclose(row, alone[3][0], rtol=1e-9, atol=1e-9) for row in x[3])
    other = seen_by((model, own), "ffn2", [PROMPTS[0]], Sampling(5, 7.5, 4))
    assert not torch.allclose(other[0][3], seen[0][3])


def test_pndm_makes_one_call_more_than_steps(tiny: tuple[Model, Any]) -> None:
    _, pipeline = tiny
    times = call_timesteps(pndm(pipeline), 50)
    assert len(times) == 51
    assert times[:4] == (981, 961, 961, 941)
    assert len(call_timesteps(pipeline, 50)) == 50


def test_only_the_calls_that_are_needed_are_made_and_nothing_is_decoded(
    tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipeline = tiny
    monkeypatch.setattr(pipeline.vae, "decode", lambda *_args, **_more: pytest.fail("decoded a picture"))
    made: list[int] = []
    handle = pipeline.unet.register_forward_hook(lambda *_: made.append(1))
    ticks: list[int] = []
    for calls in (1, 4, 5):
        made.clear()
        ticks.clear()
        observe(model, pipeline, (), PROMPTS[:1], SAMPLING, lambda *_: None, calls=calls, tick=lambda: ticks.append(1))
        assert (len(made), len(ticks)) == (calls, calls)
    handle.remove()


def test_outputs_can_be_seen_in_place_of_inputs(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    sites = model.sites_of("ffn2")
    seen: dict[str, list[Tensor]] = {"input": [], "output": []}
    for at, found in seen.items():
        observe(
            model, pipeline, sites, PROMPTS[:2], SAMPLING, lambda *it, found=found: found.append(it[3].clone()),
            calls=1, at=at,
        )  # fmt: skip
    modules = [model.module(pipeline, site) for site in sites for _half in range(2)]
    with torch.no_grad():
        expected = [module(x) for module, x in zip(modules, seen["input"], strict=True)]
    for y, right in zip(seen["output"], expected, strict=True):
        assert torch.allclose(y, right, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(seen["output"][0], expected[1], rtol=1e-3, atol=1e-3)


def test_pictures_are_drawn_at_the_size_and_by_the_scheduler_that_are_asked_for(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    own = copy.copy(pipeline)
    own.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    readings = (
        ("usual", pipeline, {}),
        ("its own size", pipeline, {"size": (16, 16)}),
        ("larger", pipeline, {"size": (24, 16)}),
        ("dpm-solver", pipeline, {"scheduler": "dpm-solver"}),
        ("made so", own, {}),
    )
    found = {
        name: seen_by((model, chosen), "ffn2", PROMPTS[:1], Sampling(5, 7.5, 3, **given))
        for name, chosen, given in readings
    }
    last = {name: seen[-1][3] for name, seen in found.items()}
    assert torch.equal(last["usual"], last["its own size"])
    assert last["larger"].shape[1] == 1.5 * last["usual"].shape[1]
    assert torch.equal(last["dpm-solver"], last["made so"])
    assert not torch.allclose(last["dpm-solver"], last["usual"])
    assert call_timesteps(pipeline, 5, "dpm-solver") == call_timesteps(own, 5) != call_timesteps(pipeline, 5)


def test_the_first_inputs_are_those_of_the_first_call_which_is_not_made(
    tiny: tuple[Model, Any], folders: Callable[[str], Path]
) -> None:
    xl = open_model(folders("sdxl"))
    for model, pipeline in (tiny, (xl, xl.pipeline("cpu", torch.float64))):
        calls: list[Any] = []
        with pipeline.unet.register_forward_hook(lambda *it, calls=calls: calls.append(it[1:3]), with_kwargs=True):
            found = first_inputs(pipeline, PROMPTS[:3], SAMPLING)
            assert not calls
            observe(model, pipeline, (), PROMPTS[:3], SAMPLING, lambda *_: None, calls=1)
        ((sample, timestep), given) = calls[0]
        conditional = slice(PROMPTS_PER_RUN, PROMPTS_PER_RUN + 3)
        assert torch.equal(found.sample, sample[conditional])
        assert float(found.timestep) == float(timestep)
        context, more = given["encoder_hidden_states"], given["added_cond_kwargs"] or {}
        assert torch.equal(found.conditions["encoder_hidden_states"], context[conditional])
        assert set(found.conditions) == {"encoder_hidden_states", *(["added_cond_kwargs"] if more else [])}
        for name, value in more.items():
            assert torch.equal(found.conditions["added_cond_kwargs"][name], value[conditional])
        # The unconditional rows are others.
        assert not torch.equal(found.conditions["encoder_hidden_states"], context[:3])
        assert torch.equal(first_inputs(pipeline, PROMPTS[:3], Sampling(5, 1.0, 3)).sample, found.sample)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_site_sees_as_many_tokens_as_its_level_has(folders: Callable[[str], Path], family: str) -> None:
    model = open_model(folders(family))
    pipeline = model.pipeline("cpu", torch.float32)
    size = (64, 32)
    height, width = latent_size(pipeline, size)
    assert (height, width) == (8, 16)
    sites = [site for kind in ("ffn1", "ffn2", "attn_out") for site in model.sites_of(kind)]
    seen: dict[str, int] = {}

    def keep(site: Any, _call: int, _half: Any, x: Tensor) -> None:
        seen[site.name] = x.shape[1]

    observe(model, pipeline, sites, PROMPTS[:1], Sampling(2, 1.0, 0, size=size), keep, calls=1)
    assert seen == {site.name: latent_tokens(pipeline, site, (height, width)) for site in sites}
    assert len(set(seen.values())) == (4 if family == "sd1" else 2)


def test_the_models_own_size_is_the_usual_one(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipeline = tiny
    assert latent_size(pipeline, None) == (4, 4)
    own = copy.copy(pipeline)
    own.unet = copy.copy(pipeline.unet)
    own.unet.register_to_config(sample_size=[4, 6])
    assert latent_size(own, None) == (4, 6)
    for size, cure in (((24, 20), "24 x 16"), ((0, 8), "8 x 8"), ((8, 2056), "8 x 2048")):
        with pytest.raises(InputError, match=f"in multiples of 8 pixels up to 2048: take {cure}$"):
            latent_size(pipeline, size)
        width, height = map(int, cure.split(" x "))
        assert latent_size(pipeline, (width, height)) == (height // 4, width // 4)


def state_of(pipeline: Any) -> Any:
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    weights = [value.clone() for network in networks for value in network.state_dict().values()]
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for it in networks for module in it.modules()]
    return weights, hooks, dict(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler)), torch.get_rng_state()


@pytest.mark.parametrize("ends", ["after the calls", "by an interrupt", "by an unknown site"])
def test_a_pipeline_comes_out_as_it_went_in(tiny_model: Path, ends: str) -> None:
    model = open_model(tiny_model)
    pipeline = pndm(model.pipeline("cpu", torch.float32))
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    # A scheduler in the middle of its work shows any step that is made with it.
    pipeline.scheduler.set_timesteps(7)
    pipeline.scheduler.step(torch.ones(1, 4, 4, 4), 1, torch.ones(1, 4, 4, 4))
    weights, hooks, attributes, scheduler, random = state_of(pipeline)
    sites = model.sites_of("ffn2")
    if ends == "after the calls":
        observe(model, pipeline, sites, PROMPTS[:2], SAMPLING, lambda *_: None, calls=2)
    elif ends == "by an interrupt":

        def interrupt(_site: Any, call: int, *_: Any) -> None:
            if call == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            observe(model, pipeline, sites, PROMPTS[:2], SAMPLING, interrupt, calls=2)
    else:
        alien = copy.copy(sites[0])
        object.__setattr__(alien, "module", "no.such.module")
        with pytest.raises(ValueError, match="has no module"):
            observe(model, pipeline, [*sites, alien], PROMPTS[:2], SAMPLING, lambda *_: None, calls=2)
    after = state_of(pipeline)
    assert all(torch.equal(old, new) for old, new in zip(weights, after[0], strict=True))
    assert hooks == after[1]
    assert attributes == after[2]
    assert repr(scheduler) == repr(after[3])
    assert torch.equal(random, after[4])


def token_means(x: Tensor) -> Tensor:
    return x.mean(1)


@pytest.mark.parametrize("reduce", [token_means, lambda x: x], ids=["features", "tokens x features"])
def test_sums_are_over_all_prompts_of_a_set_and_no_padding(
    tiny: tuple[Model, Any], reduce: Callable[[Tensor], Tensor]
) -> None:
    model, pipeline = tiny
    sites = model.sites_of("ffn2")
    sets = [PROMPTS[:5], PROMPTS[5:]]
    found = sum_over_prompts(model, pipeline, sites, sets, SAMPLING, reduce, moments=(0, 1, 1))
    for site in sites:
        for number, prompts in enumerate(sets):
            expected = [0.0, 0.0]
            for prompt in prompts:
                for name, call, _, x in seen_by(tiny, "ffn2", [prompt]):
                    if name == site.name:
                        expected[min(call, 1)] = expected[min(call, 1)] + reduce(x)[0]
            assert torch.allclose(found[site.name][number], torch.stack(expected), rtol=1e-9, atol=1e-9)
    # One prompt's worth apart is far outside of that tolerance.
    other = sum_over_prompts(model, pipeline, sites, [PROMPTS[:4], PROMPTS[5:]], SAMPLING, reduce, moments=(0, 1, 1))
    assert not torch.allclose(other[sites[0].name][0], found[sites[0].name][0], rtol=1e-9, atol=1e-9)


def test_halves_can_be_chosen(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    sites = model.sites_of("ffn2")
    halves = {
        chosen: sum_over_prompts(
            model, pipeline, sites, [PROMPTS[:2]], SAMPLING, token_means, moments=(0,), halves=chosen
        )[sites[0].name]
        for chosen in (("unconditional",), ("conditional",), ("unconditional", "conditional"))
    }  # fmt: skip
    one, other, both = halves.values()
    assert torch.equal(both, one + other)
    assert not torch.equal(one, other)


def test_progress_adds_up_to_one(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    for kind, count in (("ffn2", 3 * 3), ("text_ffn2", 3)):
        parts: list[float] = []
        sum_over_prompts(
            model, pipeline, model.sites_of(kind), [PROMPTS, PROMPTS[:1]], SAMPLING, token_means,
            moments=(0, 1, 2) if kind == "ffn2" else (0,), progress=parts.append,
        )  # fmt: skip
        assert len(parts) == count
        assert sum(parts) == pytest.approx(1)
        assert min(parts) > 0


def test_a_run_takes_no_more_prompts_than_it_can_hold(tiny: tuple[Model, Any]) -> None:
    model, pipeline = tiny
    for prompts in ([], ["a"] * (PROMPTS_PER_RUN + 1)):
        with pytest.raises(ValueError, match="prompts in a run of"):
            observe(model, pipeline, (), prompts, SAMPLING, lambda *_: None, calls=1)


@pytest.mark.parametrize(
    "changed", ["bakeout", "diffusers", "transformers", "tokens", "text encoder", "prompts", "said", "nothing"]
)
def test_a_fingerprint_depends_on_all_that_sums_do(
    tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    _, pipeline = tiny
    own = copy.copy(pipeline)
    prompts, said = [PROMPTS[:1], PROMPTS[1:]], {"seed": 1}
    before = calibrate.fingerprint(own, prompts, said)
    assert calibrate.fingerprint(own, prompts, dict(said)) == before
    if changed in ("bakeout", "diffusers", "transformers"):
        versions = dict.fromkeys(("bakeout", "torch", "diffusers", "transformers"), "1")
        others = {**versions, changed: "2"}
        monkeypatch.setattr(calibrate, "version", versions.__getitem__)
        before = calibrate.fingerprint(own, prompts, said)
        monkeypatch.setattr(calibrate, "version", others.__getitem__)
    elif changed == "tokens":
        own.tokenizer = copy.deepcopy(pipeline.tokenizer)
        own.tokenizer.add_tokens(["owl"])
    elif changed == "text encoder":
        monkeypatch.setattr(pipeline.text_encoder.config, "hidden_act", "gelu")
    elif changed == "prompts":
        prompts = [PROMPTS[:2], PROMPTS[2:]]
    elif changed == "said":
        said = {"seed": 2}
    assert (calibrate.fingerprint(own, prompts, said) == before) is (changed == "nothing")
