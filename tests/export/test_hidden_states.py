"""What an edit does not reach cannot be read by skipping layers, and everything else reads as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.pipeline import image_to_image
from bakeout.export.hidden_states import Guard, ReachedStates, guard

FAMILIES = ("sd1", "sd2", "sdxl")
# Of every text encoder of the tiny models.
LAYERS = 3
KEYS = [*range(-6, 5), *(slice(first, last, step) for first in (None, -5, -2, 0, 2) for last in (None, -3, 1, 4)
                         for step in (None, -1, 2))]  # fmt: skip


@pytest.fixture(scope="module")
def pipeline_of(folders) -> Callable[[str], Any]:
    """An eager pipeline of a family with fresh text encoders, which skip layers also in SD 1.x and 2.x."""

    @cache
    def loaded(family: str) -> Any:
        pipeline = open_model(folders(family)).pipeline("cpu", torch.float32)
        if family != "sdxl":
            norm = pipeline.text_encoder.final_layer_norm
            # Where diffusers looks for it, and transformers 5 has it no more.
            pipeline.text_encoder.text_model = SimpleNamespace(final_layer_norm=norm)
        return pipeline

    def fresh(family: str) -> Any:
        pipeline = copy.copy(loaded(family))
        for name in ("text_encoder", "text_encoder_2"):
            if name in pipeline.components:
                setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
        return pipeline

    return fresh


@torch.inference_mode()
def encoded(pipeline: Any, clip_skip: int | None = None) -> Tensor:
    settings: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return torch.stack(pipeline.encode_prompt("a", negative_prompt="b", **settings, clip_skip=clip_skip)[:2])


def states_read(pipeline: Any, clip_skip: int | None) -> dict[str, int]:
    """Which hidden state of each text encoder diffusers reads for the prompt; of an SD 1.x without clip_skip none."""
    read: dict[str, int] = {}

    class Recorded(tuple[Tensor, ...]):
        name: str

        def __getitem__(self, key: Any) -> Any:
            read.setdefault(self.name, range(len(self))[key])
            return super().__getitem__(key)

    hooks = []
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipeline.components:

            def record(_module: Any, _args: Any, output: Any, name: str = name) -> Any:
                if output.hidden_states is not None:
                    output.hidden_states = Recorded(output.hidden_states)
                    output.hidden_states.name = name
                return output

            hooks.append(pipeline.components[name].register_forward_hook(record))
    encoded(pipeline, clip_skip)
    for hook in hooks:
        hook.remove()
    return read


@pytest.mark.parametrize("first", [0, 2, 4])
def test_what_is_withheld_cannot_be_read_by_index_or_slice(first):
    plain = tuple(torch.full((1,), float(n)) for n in range(5))
    states = ReachedStates(plain, Guard("text_encoder", "sd1", 4, first, 4 - first))
    refused = 0
    for key in KEYS:
        if isinstance(key, int) and key > -6:
            wanted = [key % 5]
        else:
            wanted = [-1] if isinstance(key, int) else list(range(5))[key]
        if any(n < first for n in wanted):
            refused += 1
            with pytest.raises(InputError, match="reads a hidden state of text_encoder that the edit does not reach"):
                states[key]
        elif isinstance(key, int):
            assert states[key] is plain[key]
        else:
            assert [id(it) for it in states[key]] == [id(plain[n]) for n in wanted]
    assert (refused > 1) == (first > 0)
    with pytest.raises(IndexError):
        states[5]
    with pytest.raises(TypeError):
        states["0"]


def test_it_is_a_tuple_for_whoever_takes_any_and_what_is_withheld_is_not_in_it():
    plain = tuple(torch.full((1,), float(n)) for n in range(4))
    states = ReachedStates(plain, Guard("text_encoder", "sd1", 3, 2, 1))
    assert isinstance(states, tuple)
    assert len(states) == 4
    for view in (tuple(states), list(states), tuple.__add__(states, ())):
        assert [it if it is None else float(it) for it in view] == [None, None, 2.0, 3.0]
    again = copy.deepcopy(states)
    assert float(again[-1]) == 3
    with pytest.raises(InputError):
        again[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", range(1, LAYERS + 1))
def test_the_clip_skips_that_are_refused_are_those_that_read_around_the_edit(pipeline_of, family, first):
    pipeline, plain = pipeline_of(family), pipeline_of(family)
    guard(pipeline, {"text_encoder": first})
    usual = encoded(plain)
    assert torch.equal(encoded(pipeline), usual)
    read = {n: states_read(plain, n)["text_encoder"] for n in range(1, LAYERS + (family != "sdxl"))}
    allowed = [n for n, state in read.items() if state >= first]
    cure = f"use at most {max(allowed)}, or leave it out$" if allowed else "; leave clip_skip out$"
    for n in read:
        if n in allowed:
            skipped = encoded(pipeline, n)
            assert torch.equal(skipped, encoded(plain, n))
            assert not torch.equal(skipped[0], usual[0])
        else:
            with pytest.raises(InputError, match=f"clip_skip {n} reads .*{cure}"):
                encoded(pipeline, n)
    with pytest.raises(InputError, match=cure):
        encoded(pipeline, 9)


@pytest.mark.parametrize(
    "firsts",
    [{"text_encoder": 1, "text_encoder_2": 1}, {"text_encoder": 1, "text_encoder_2": 4}, {"text_encoder_2": 3},
     {"text_encoder_2": 5}],
)  # fmt: skip
def test_of_two_encoders_the_smaller_bound_counts(pipeline_of, firsts):
    pipelines = [pipeline_of("sdxl") for _ in range(2)]
    for pipeline in pipelines:
        small = pipeline.text_encoder_2.config
        config = CLIPTextConfig(**{**small.to_dict(), "num_hidden_layers": 6})
        torch.manual_seed(0)
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(config).float().eval()
    plain, guarded = pipelines
    guard(guarded, firsts)
    read = {n: states_read(plain, n) for n in (1, 2)}
    allowed = [n for n, states in read.items() if all(states[name] >= first for name, first in firsts.items())]
    for n in (1, 2, 3):
        if n in allowed:
            assert torch.equal(encoded(guarded, n), encoded(plain, n))
        else:
            with pytest.raises(InputError, match=f"use at most {max(allowed)}" if allowed else "leave clip_skip out"):
                encoded(guarded, n)


def test_what_is_read_without_clip_skip_is_never_refused(pipeline_of):
    """SDXL reads the last layer but one; an edit of the last reaches nothing but the pooled text."""
    pipeline = pipeline_of("sdxl")
    usual = encoded(pipeline)
    assert states_read(pipeline, None) == {"text_encoder": LAYERS - 1, "text_encoder_2": LAYERS - 1}
    guard(pipeline, {"text_encoder_2": LAYERS})
    assert torch.equal(encoded(pipeline), usual)
    with pytest.raises(InputError, match=r"clip_skip 1 reads a hidden state of text_encoder_2 .*; leave clip_skip out"):
        encoded(pipeline, 1)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_form_of_an_output_is_guarded(pipeline_of, family):
    pipeline = pipeline_of(family)
    encoder = pipeline.text_encoder
    ids = torch.arange(77)[None]
    before = encoder(ids, output_hidden_states=True)
    guard(pipeline, {"text_encoder": 2})
    after = encoder(ids, output_hidden_states=True)
    assert after.keys() == before.keys()
    bare = encoder(ids, output_hidden_states=True, return_dict=False)
    assert len(bare) == len(before)
    for states in (after.hidden_states, after["hidden_states"], after[-1], after.to_tuple()[-1], bare[-1]):
        assert torch.equal(states[-1], before.hidden_states[-1])
        with pytest.raises(InputError):
            states[1]
    assert torch.equal(after[0], before[0])
    assert torch.equal(bare[0], before[0])
    assert encoder(ids).hidden_states is None
    assert len(encoder(ids, return_dict=False)) == len(before) - 1


def test_attentions_are_left_alone():
    hook = Guard("text_encoder", "sd1", 3, 2, 1)
    states, attentions = (tuple(torch.zeros(count)) for count in (4, 3))
    last, guarded, seen = hook(torch.nn.Identity(), (), (torch.zeros(1), states, attentions))
    assert isinstance(last, Tensor)
    assert isinstance(guarded, ReachedStates)
    assert seen is attentions


def test_other_pipelines_of_the_same_components_and_copies_are_guarded(pipeline_of):
    pipeline = pipeline_of("sdxl")
    guard(pipeline, {"text_encoder": 2})
    ids = torch.arange(77)[None]
    for encoder in (image_to_image(pipeline).text_encoder, copy.deepcopy(pipeline.text_encoder)):
        with pytest.raises(InputError):
            encoder(ids, output_hidden_states=True).hidden_states[-3]


def test_without_an_edited_encoder_nothing_is_withheld(pipeline_of):
    pipeline = pipeline_of("sd1")
    guard(pipeline, {})
    states = pipeline.text_encoder(torch.arange(77)[None], output_hidden_states=True).hidden_states
    assert type(states) is tuple
    assert all(state is not None for state in states)


@pytest.mark.parametrize("name", ["text_encoder_2", "unet", "x\ny"])
def test_an_encoder_that_is_not_there_is_refused(pipeline_of, name):
    with pytest.raises(InputError, match="which is no text encoder of this model") as refused:
        guard(pipeline_of("sd1"), {name: 2})
    assert "\n" not in str(refused.value)
