from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bakeout.editor.model import open_model
from bakeout.generate import Request, complete, draw
from bakeout.validate.contract import contract, run_network
from bakeout.validate.metrics import relative_rms
from bakeout.validate.runners import (
    Settings,
    Trial,
    initial_latents,
    odd_prompts,
    of_two,
    one_more,
    pixels_from_png,
    run,
    smaller,
)

SETTINGS = Settings(steps=3, guidance=2.0, size=(16, 16), latents=(4, 4, 4), batch=2)
TRIALS = [Trial("a star", 7, "erased", "star"), Trial("a ring", 8, "kept"), Trial("a moon", 2**40, "kept")]


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return open_model(tiny_model).pipeline(dtype=torch.float32)


@pytest.fixture(scope="module")
def drawn(pipeline):
    return run(pipeline, TRIALS, SETTINGS, capture=True)


def test_pictures_are_those_that_generate_draws(pipeline, drawn):
    request = Request(("a star", "a ring"), steps=3, guidance=2.0, seed=7, batch=2)
    alone = [
        next(draw(pipeline, complete(Request((trial.prompt,), steps=3, guidance=2.0, seed=trial.seed), pipeline)))
        for trial in TRIALS
    ]
    assert complete(request, pipeline).size == SETTINGS.size
    for png, picture in zip(drawn.pictures, alone, strict=True):
        # In another batch, so to rounding.
        assert np.abs(pixels_from_png(png).astype(int) - np.asarray(picture.image)).max() <= 1


def test_latents_are_those_that_diffusers_draws(pipeline):
    seeds = [trial.seed for trial in TRIALS]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    own = initial_latents(SETTINGS, generators)
    again = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    theirs = pipeline.prepare_latents(3, 4, 16, 16, torch.float32, "cpu", again)
    assert torch.equal(own * pipeline.scheduler.init_noise_sigma, theirs)
    # What a stochastic scheduler draws next is the same as well.
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(generators, again, strict=True))


def test_every_step_is_kept_or_the_last_one_only(pipeline, drawn):
    assert drawn.latents.shape == (3, 3, 4, 4, 4)
    last = run(pipeline, TRIALS, SETTINGS, every_step=False)
    assert torch.equal(last.latents, drawn.latents[-1:])
    assert drawn.problems == (None,) * 3


def test_a_model_forced_along_its_own_path_stays_there(pipeline, drawn):
    assert torch.equal(run(pipeline, TRIALS, SETTINGS, forced=drawn.latents).latents, drawn.latents)


def test_forced_steps_begin_at_the_latents_given(pipeline, drawn):
    other = drawn.latents + 1
    forced = run(pipeline, TRIALS, SETTINGS, forced=other)
    assert forced.pictures == ()
    assert torch.equal(forced.latents[0], drawn.latents[0])
    assert not torch.equal(forced.latents[1], drawn.latents[1])
    # One step from the given latents, as the scheduler alone would do it.
    assert relative_rms(forced.latents[1], other[0]) < relative_rms(forced.latents[1], drawn.latents[0])


def test_a_batch_is_not_seen_in_what_is_drawn(pipeline, drawn):
    alone = run(pipeline, TRIALS[2:], SETTINGS)
    assert relative_rms(alone.latents[:, 0], drawn.latents[:, 2]) < 1e-5
    assert relative_rms(alone.latents[:, 0], drawn.latents[:, 1]) > 0.1


def test_calls_of_the_first_batch_are_kept(pipeline, drawn):
    networks = [call.network for call in drawn.calls]
    assert networks == ["text_encoder"] * 2 + ["unet"] * 3 + ["vae_decoder", "vae_encoder"]
    inputs = {call.network: {name: tuple(it.shape) for name, it in call.inputs.items()} for call in drawn.calls}
    assert inputs["text_encoder"] == {"input_ids": (2, 77)}
    assert inputs["unet"] == {"sample": (4, 4, 4, 4), "timestep": (), "encoder_hidden_states": (4, 77, 16)}
    assert inputs["vae_decoder"] == {"latent_sample": (2, 4, 4, 4)}
    assert inputs["vae_encoder"] == {"sample": (2, 3, 16, 16)}
    latents = drawn.latents[-1, :2] / pipeline.vae.config.scaling_factor
    assert torch.equal(drawn.calls[-2].inputs["latent_sample"], latents)


def test_kept_calls_of_many_steps_are_spread(pipeline):
    settings = Settings(20, 1.0, (16, 16), (4, 4, 4), 2)
    calls = run(pipeline, TRIALS[:1], settings, capture=True).calls
    assert [call.when for call in calls if call.network == "unet"] == [
        f"step {step} of 20" for step in (1, 6, 11, 15, 20)
    ]
    assert [call.when for call in calls if call.network == "text_encoder"] == ["prompts"]


def test_watching_leaves_nothing_behind(pipeline, drawn):
    assert "decode" not in vars(pipeline.vae)
    assert not pipeline.unet._forward_pre_hooks
    assert not pipeline.text_encoder._forward_pre_hooks


def test_networks_answer_as_in_the_pipeline(pipeline, drawn, tiny_model):
    interfaces = contract(open_model(tiny_model))
    for call in drawn.calls:
        found = run_network(pipeline, call.network, interfaces[call.network], call.inputs)
        assert list(found) == list(interfaces[call.network].outputs)
        assert [value.ndim for value in found.values()] == list(interfaces[call.network].outputs.values())
    decoded = run_network(pipeline, "vae_decoder", interfaces["vae_decoder"], drawn.calls[-2].inputs)["sample"]
    assert relative_rms(drawn.calls[-1].inputs["sample"], decoded.clamp(-1, 1)) < 1e-6


def test_one_more_repeats_the_first_row(drawn):
    (call,) = (call for call in drawn.calls if call.when == "step 2 of 3")
    more = one_more(call)
    assert more.inputs["sample"].shape[0] == call.inputs["sample"].shape[0] + 1
    assert torch.equal(more.inputs["sample"][-1], call.inputs["sample"][0])
    assert torch.equal(more.inputs["timestep"], call.inputs["timestep"])


def test_two_are_the_first_row_and_the_last(drawn):
    (call,) = (call for call in drawn.calls if call.when == "step 2 of 3")
    two = of_two(call)
    assert (call.rows, two.rows) == (len(call.inputs["sample"]), 2)
    assert call.rows > 2
    for name in ("sample", "encoder_hidden_states"):
        assert torch.equal(two.inputs[name], torch.stack([call.inputs[name][0], call.inputs[name][-1]]))
    assert torch.equal(two.inputs["timestep"], call.inputs["timestep"])


@pytest.mark.parametrize(
    ("fill", "problem"), [(float("nan"), "not all of its values are finite"), (0.5, "one colour"), (-9.0, "one colour")]
)
def test_what_is_no_picture_is_said(pipeline, monkeypatch, fill, problem):
    def decode(latents, **_):
        return (torch.full((len(latents), 3, 16, 16), fill),)

    monkeypatch.setattr(pipeline.vae, "decode", decode)
    (found,) = run(pipeline, TRIALS[:1], SETTINGS).problems
    assert problem in found


def test_the_contract_of_sdxl(folders):
    interfaces = contract(open_model(folders("sdxl")))
    assert list(interfaces) == ["text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder"]
    states = [f"hidden_states.{layer}" for layer in range(4)]
    assert list(interfaces["text_encoder"].outputs) == ["last_hidden_state", "pooler_output", *states]
    assert list(interfaces["text_encoder_2"].outputs) == ["text_embeds", "last_hidden_state", *states]
    assert list(interfaces["unet"].inputs) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]


def test_sdxl_is_watched_too(folders):
    model = open_model(folders("sdxl"))
    pipeline = model.pipeline(dtype=torch.float32)
    settings = Settings(2, 3.0, (32, 32), (4, 8, 8), 2)
    calls = run(pipeline, TRIALS[:2], settings, capture=True).calls
    interfaces = contract(model)
    assert {call.network for call in calls} == interfaces.keys()
    for call in calls:
        assert list(call.inputs) == list(interfaces[call.network].inputs)
        assert list(run_network(pipeline, call.network, interfaces[call.network], call.inputs)) == list(
            interfaces[call.network].outputs
        )


def test_a_network_with_run_is_asked_by_name():
    asked = {}

    def answer(inputs):
        asked.update(inputs)
        return {"sample": inputs["latent_sample"] * 2}

    pipeline = SimpleNamespace(vae=SimpleNamespace(decoder=SimpleNamespace(run=answer)))
    latents = torch.ones(1, 4, 2, 2)
    assert torch.equal(run_network(pipeline, "vae_decoder", None, {"latent_sample": latents})["sample"], latents * 2)
    assert asked.keys() == {"latent_sample"}


def test_smaller_is_the_first_row_and_half_of_it(drawn):
    (call,) = (call for call in drawn.calls if call.when == "step 2 of 3")
    inputs = smaller(call, 2).inputs
    assert torch.equal(inputs["sample"], call.inputs["sample"][:1, :, :2])
    assert torch.equal(inputs["encoder_hidden_states"], call.inputs["encoder_hidden_states"][:1])
    assert torch.equal(inputs["timestep"], call.inputs["timestep"])
    # There is no whole unit in a half.
    assert smaller(call, 4).inputs["sample"].shape == (1, 4, 4, 4)
    assert smaller(drawn.calls[-2], 1).inputs["latent_sample"].shape == (1, 4, 2, 4)
    assert smaller(drawn.calls[0], 1).inputs["input_ids"].shape == (1, 77)
    # Of a network for one size, the row alone.
    alone = smaller(call, None)
    assert torch.equal(alone.inputs["sample"], call.inputs["sample"][:1])
    assert "half as high" not in alone.when


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_odd_prompts_are_empty_ones_and_what_may_be_taken_for_one(folders, name):
    pipeline = open_model(folders("sdxl")).pipeline(dtype=torch.float32)
    tokenizer = pipeline.tokenizer_2 if name.endswith("2") else pipeline.tokenizer
    together, *alone = odd_prompts(pipeline, name, "a red star")
    assert {call.network for call in (together, *alone)} == {name}
    ids = together.inputs["input_ids"]
    assert (ids.dtype, ids.shape[1]) == (torch.int64, 77)
    assert [tuple(call.inputs["input_ids"].shape) for call in alone] == [(1, 77)] * 3
    assert len({call.when for call in (together, *alone)}) == 4
    blank = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    rows = [[token not in blank for token in row[1:]] for row in ids.tolist()]
    # Empty ones: nothing, spaces, an end mark, the padding in words.
    assert [any(row) for row in rows] == [True, False, False, False, False, True, True, True, True, True]
    assert rows[5] == [False, *rows[0][:-1]]
    words = sum(rows[0])
    assert rows[6][: 2 * words + 1] == [*[True] * words, False, *[True] * words]
    # Beyond what it reads, and one word.
    assert all(rows[7][:-1])
    assert sum(rows[8]) == 1
    for call, row in zip(alone, (1, 5, 8), strict=True):
        assert torch.equal(call.inputs["input_ids"][0], ids[row])
