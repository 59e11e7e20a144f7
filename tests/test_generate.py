"""Drawing: seeds, batches, schedulers, what is written, and what is refused before anything is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bakeout import generate
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.export.hidden_states import guard
from bakeout.generate import (
    SCHEDULERS,
    Request,
    complete,
    device_from_text,
    draw,
    draw_to_folder,
    dtype_from_text,
    recommended_settings,
    reserved,
    size_from_text,
)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return open_model(tiny_model).pipeline()


def pixels(pipeline, **settings) -> np.ndarray:
    request = complete(Request(**{"prompts": ("a", "b"), "steps": 2, "count": 3} | settings), pipeline)
    return np.stack([np.asarray(picture.image, np.int16) for picture in draw(pipeline, request)])


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(pipeline):
    first = pixels(pipeline, seed=5)
    assert np.array_equal(first, pixels(pipeline, seed=5))
    # Picture i has the seed of the first plus i.
    assert np.array_equal(first[1::3], pixels(pipeline, seed=6, count=1))
    assert np.abs(first - pixels(pipeline, seed=50)).mean() > 5
    assert len({picture.tobytes() for picture in first}) == 6


def test_a_picture_is_the_one_that_the_pipeline_draws_alone(pipeline):
    ours = pixels(pipeline, prompts=("a",), seed=3, count=1, guidance=5.0)
    alone = pipeline("a", num_inference_steps=2, guidance_scale=5.0, generator=torch.Generator("cpu").manual_seed(3))
    assert np.array_equal(ours[0], np.asarray(alone.images[0], np.int16))


# Schedulers that draw noise at every step must take it from each picture's own generator.
@pytest.mark.parametrize("scheduler", [None, "euler_a"])
def test_the_batch_size_changes_pictures_by_rounding_at_most(pipeline, scheduler):
    together = pixels(pipeline, batch=6, scheduler=scheduler)
    for batch in (1, 4):
        assert np.abs(together - pixels(pipeline, batch=batch, scheduler=scheduler)).max() <= 1


def test_the_batch_size_does_not_change_the_latents_at_all(pipeline, monkeypatch):
    def latents(batch: int) -> torch.Tensor:
        seen = []
        prepare = pipeline.prepare_latents

        def spy(*args):
            seen.append(prepare(*args))
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "prepare_latents", spy)
            pixels(pipeline, batch=batch)
        return torch.cat(seen)

    expected = [torch.randn(1, 4, 4, 4, generator=torch.Generator("cpu").manual_seed(seed)) for seed in (0, 1, 2)]
    assert torch.equal(latents(1), torch.cat(expected * 2))
    assert torch.equal(latents(4), latents(1))


@pytest.mark.parametrize(
    "change",
    [
        {"negative_prompt": "c"},
        {"clip_skip": 1},
        {"clip_skip": 2},
        {"guidance": 1.0},
        {"steps": 4},
        {"scheduler": "heun"},
        {"prompts": ("a", "c")},
    ],
)
def test_every_setting_reaches_the_pictures(pipeline, change):
    assert not np.array_equal(pixels(pipeline, guidance=9.0), pixels(pipeline, **{"guidance": 9.0} | change))


def test_the_size_is_width_times_height(pipeline):
    assert pixels(pipeline, size=(16, 24), count=1).shape == (2, 24, 16, 3)
    assert pixels(pipeline, count=1).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("name", [*SCHEDULERS, "EulerDiscreteScheduler", "Euler-A"])
def test_every_scheduler_draws_and_the_pipeline_keeps_its_own(pipeline, name):
    own = pipeline.scheduler
    request = complete(Request(("a",), steps=4, scheduler=name), pipeline)
    (picture,) = draw(pipeline, request)
    assert picture.problem is None
    assert pipeline.scheduler is own


def test_a_scheduler_is_of_the_class_that_its_name_says(pipeline):
    for name, (class_name, overrides) in SCHEDULERS.items():
        scheduler = generate.scheduler_for(pipeline, name)
        assert type(scheduler).__name__ == class_name
        assert overrides.items() <= scheduler.config.items()
        assert scheduler.config.beta_start == pipeline.scheduler.config.beta_start


def test_too_few_steps_for_a_scheduler_are_refused(pipeline):
    request = complete(Request(("a",), steps=1, scheduler="pndm"), pipeline)
    with pytest.raises(InputError, match="PNDMScheduler cannot draw in 1 steps"):
        list(draw(pipeline, request))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"count": 0}, "count is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63 - 1, "count": 2}, "seed is"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"size": (0, 64)}, "size is 0x64"),
        ({"scheduler": "eular"}, "no scheduler 'eular': use one of ddim"),
        ({"image": Path("a.png"), "strength": 0.0}, "strength is 0"),
        ({"image": Path("a.png"), "strength": 1.5}, "strength is 1.5"),
        ({"image": Path("a.png"), "strength": float("nan")}, "strength is nan"),
        ({"strength": 0.5}, "give one with --image"),
        ({"clip_skip": 0}, "clip_skip is 0: it must be 1 or more"),
        ({"clip_skip": -2}, "clip_skip is -2"),
    ],
)
def test_a_bad_request_is_refused_at_once(settings, words):
    with pytest.raises(InputError, match=words):
        Request(**{"prompts": ("a",)} | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (20, 16)}, "multiples of 8 pixels, for example 16x16"),
        ({"size": (16, 3)}, "multiples of 8 pixels, for example 16x8"),
        ({"steps": 1001}, "trained with 1000"),
        ({"clip_skip": 3}, "clip_skip is 3: this model has 2 layers to skip, so use at most 2"),
    ],
)
def test_what_the_model_cannot_draw_is_refused(pipeline, settings, words):
    with pytest.raises(InputError, match=words):
        complete(Request(("a",), **settings), pipeline)


def test_settings_come_from_the_request_then_the_recommendation_then_the_pipeline(pipeline):
    own = complete(Request(("a",)), pipeline)
    assert (own.steps, own.guidance, own.size) == (50, 7.5, (16, 16))
    recommended = {"steps": 20, "guidance": 4.0, "prompts": 300}
    advised = complete(Request(("a",)), pipeline, recommended)
    assert (advised.steps, advised.guidance, advised.prompts) == (20, 4.0, ("a",))
    asked = complete(Request(("a",), steps=3, guidance=0.0), pipeline, recommended)
    assert (asked.steps, asked.guidance) == (3, 0.0)


def test_an_edit_for_one_size_is_drawn_at_that_size(pipeline, start):
    for request in (Request(("a",)), Request(("a",), size=(32, 16)), Request(("a",), image=start)):
        assert complete(request, pipeline, only=(32, 16)).size == (32, 16)
    for size, image in (((16, 32), None), ((16, 16), None), ((17, 17), None), ((24, 8), start)):
        words = rf"size is {size[0]}x{size[1]}: this edit is for pictures of 32x16 only \(latents of 8x4\), so leave"
        with pytest.raises(InputError, match=words):
            complete(Request(("a",), size=size, image=image), pipeline, only=(32, 16))


def test_only_a_built_in_model_recommends_settings(tiny_model, tmp_path):
    opened = open_model(tiny_model)
    assert recommended_settings(opened) == {}
    (tmp_path / "accuracy.json").write_text('{"settings": {"steps": 20}, "accuracy": {}}', encoding="utf-8")
    assert recommended_settings(replace(opened, path=tmp_path)) == {}
    assert recommended_settings(replace(opened, path=tmp_path, format="builtin")) == {"steps": 20}


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_the_prompt_does_without_the_layers_that_are_skipped(pipeline, clip_skip):
    ours = pixels(pipeline, prompts=("a",), count=1, guidance=5.0, clip_skip=clip_skip)
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    with torch.inference_mode():
        prompt, empty = (tokenizer([text], padding="max_length", return_tensors="pt").input_ids for text in ("a", ""))
        states = encoder(prompt, output_hidden_states=True).hidden_states
        embeddings = {
            "prompt_embeds": encoder.final_layer_norm(states[len(states) - 1 - clip_skip]),
            "negative_prompt_embeds": encoder(empty).last_hidden_state,
        }
    generator = torch.Generator("cpu").manual_seed(0)
    alone = pipeline(**embeddings, num_inference_steps=2, guidance_scale=5.0, generator=generator)
    assert np.array_equal(ours[0], np.asarray(alone.images[0], np.int16))
    # It is by this attribute that diffusers tells the names in a LoRA.
    assert not hasattr(encoder, "text_model")


def test_of_two_text_encoders_none_skips_more_layers_than_it_has(folders):
    pipeline = open_model(folders("sdxl")).pipeline("cpu", torch.float32)
    assert complete(Request(("a",), clip_skip=2), pipeline).clip_skip == 2
    with pytest.raises(InputError, match="clip_skip is 3: this model has 2 layers to skip, so use at most 2"):
        complete(Request(("a",), clip_skip=3), pipeline)


@pytest.mark.parametrize("from_picture", [False, True])
def test_layers_are_not_skipped_past_an_edit(tiny_model, start, from_picture):
    edited = open_model(tiny_model).pipeline()
    guard(edited, {"text_encoder": 1})
    settings = {"image": start, "steps": 4} if from_picture else {}
    assert np.ptp(pixels(edited, count=1, clip_skip=1, **settings)) > 0
    for clip_skip in (2, 3):
        with pytest.raises(InputError, match=f"clip_skip {clip_skip} reads .*; use at most 1, or leave it out"):
            complete(Request(("a",), clip_skip=clip_skip, **settings), edited)
    assert not hasattr(edited.text_encoder, "text_model")


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("512x768", (512, 768)), ("512X768", (512, 768))])
def test_a_size_is_read(text, size):
    assert size_from_text(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "64x64x64", "-64", "6.4", "²"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="size is"):
        size_from_text(text)


def test_a_device_is_read(monkeypatch):
    assert device_from_text("cpu") == "cpu"
    for devices, auto in ((0, "cpu"), (1, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda devices=devices: devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        assert device_from_text("auto") == auto
    assert device_from_text("cuda:0") == "cuda:0"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused = {"cuda:1": "is not here", "mps": "is not here", "gpu": "no device", "xpu": "not supported"}
    for text, words in refused.items():
        with pytest.raises(InputError, match=words):
            device_from_text(text)


def test_a_dtype_is_read():
    assert dtype_from_text("auto", "cpu") is torch.float32
    assert dtype_from_text("auto", "cuda:1") is torch.float16
    assert dtype_from_text("bf16", "cpu") is torch.bfloat16


def draw_into(folder: Path, pipeline, **settings) -> list[dict]:
    request = complete(Request(**{"prompts": ("a", "b ü"), "steps": 2, "count": 2} | settings), pipeline)
    with reserved(folder, request):
        return draw_to_folder(pipeline, request, folder, {"model": "tiny"})


def test_what_is_written_says_what_it_was_drawn_from(pipeline, tmp_path):
    entries = draw_into(tmp_path, pipeline, seed=7, negative_prompt="c", clip_skip=1)
    assert {path.name for path in tmp_path.iterdir()} == {"1-7.png", "1-8.png", "2-7.png", "2-8.png", "pictures.json"}
    index = json.loads((tmp_path / "pictures.json").read_text(encoding="utf-8"))
    assert index["pictures"] == entries
    assert entries[3] == {"file": "2-8.png", "prompt": "b ü", "seed": 8, "problem": None}
    with Image.open(tmp_path / "2-8.png") as picture:
        text = picture.text
    assert (text["prompt"], text["seed"], text["negative_prompt"]) == ("b ü", "8", "c")
    assert {name: text[name] for name in ("steps", "guidance", "size", "scheduler", "clip_skip", "model")} == {
        "steps": "2", "guidance": "7.5", "size": "[16, 16]", "scheduler": "DDIMScheduler", "clip_skip": "1",
        "model": "tiny",
    }  # fmt: skip
    assert (index["steps"], index["clip_skip"]) == (2, 1)
    assert index["bakeout"]


def test_the_same_request_writes_the_same_bytes(pipeline, tmp_path):
    for name in ("one", "two"):
        draw_into(tmp_path / name, pipeline)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 5
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_the_numbers_of_many_prompts_sort_as_names():
    files = Request(tuple("abcdefghijkl")).files
    assert files == sorted(files)


def test_pictures_are_not_overwritten_unless_forced(tmp_path):
    request = Request(("a",))
    with reserved(tmp_path, request):
        pass
    for name in ("1-0.png", "pictures.json"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=r"exists already.*--force"), reserved(tmp_path, request):
            pass
        with reserved(tmp_path, request, force=True):
            pass
        (tmp_path / name).unlink()


def test_a_folder_that_was_made_and_stays_empty_goes_again(tmp_path):
    request, old, new = Request(("a",)), tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for folder in (old, new):
        with reserved(folder, request):
            assert folder.is_dir()
    assert (old.is_dir(), new.exists()) == (True, False)
    with reserved(new, request):
        (new / "1-0.png").write_bytes(b"")
    assert (new / "1-0.png").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="choose another folder"), reserved(folder, Request(("a",))):
            pass


def test_an_interrupted_run_leaves_whole_pictures_only(pipeline, tmp_path, monkeypatch):
    save = Image.Image.save

    def interrupted(image, path, **options):
        save(image, path, **options)
        if path.name.startswith(".1-1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_into(tmp_path, pipeline)
    assert [path.name for path in tmp_path.iterdir()] == ["1-0.png"]


def test_a_full_disk_is_one_sentence(pipeline, tmp_path, monkeypatch):
    def full(image, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        draw_into(tmp_path, pipeline)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("decoded", "blanked", "problem"),
    [
        (np.full((8, 8, 3), np.nan), False, "overflowed"),
        (np.zeros((8, 8, 3)), False, "one colour"),
        (np.full((8, 8, 3), 0.5), False, "one colour"),
        (np.zeros((8, 8, 3)), True, "safety checker"),
        (np.linspace(0, 1, 192).reshape(8, 8, 3), False, None),
    ],
)
def test_what_is_no_picture_is_said(decoded, blanked, problem):
    output = SimpleNamespace(images=decoded[None].astype(np.float32), nsfw_content_detected=[blanked])

    class Pipeline(SimpleNamespace):
        def __call__(self, **settings):
            return output

    pipeline = Pipeline(scheduler=SimpleNamespace(set_timesteps=lambda steps: None))
    (picture,) = draw(pipeline, Request(("a",), steps=1, guidance=1.0, size=(8, 8)))
    assert picture.problem is None if problem is None else problem in picture.problem


def test_a_full_gpu_is_one_sentence_and_the_scheduler_is_put_back(pipeline, monkeypatch):
    def full(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(pipeline), "__call__", full)
    own = pipeline.scheduler
    with pytest.raises(InputError, match="smaller --batch"):
        list(draw(pipeline, Request(("a",), steps=2, scheduler="euler")))
    assert pipeline.scheduler is own


@pytest.mark.parametrize("side", [2**23, 2**40])
def test_pictures_that_fit_into_no_memory_are_one_sentence(pipeline, side):
    with pytest.raises(InputError, match="do not fit into memory: use a smaller --batch or --size"):
        list(draw(pipeline, Request(("a",), steps=2, guidance=1.0, size=(side, side))))


def test_another_failure_is_told_as_it_is(pipeline, monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(type(pipeline), "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(draw(pipeline, Request(("a",), steps=2)))


def test_progress_adds_up_to_the_pictures(pipeline):
    done = []
    request = complete(Request(("a",), count=3, steps=3, batch=2, scheduler="heun"), pipeline)
    list(draw(pipeline, request, done.append))
    assert sum(done) == pytest.approx(3)
    assert len(done) > 2 * 3


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A picture, twice as wide as high."""
    path = tmp_path_factory.mktemp("start") / "start.png"
    values = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_a_picture_is_drawn_from_a_picture(pipeline, start, tmp_path):
    own = pipeline.scheduler
    settings = {"image": start, "strength": 0.6, "steps": 5, "prompts": ("a",), "guidance": 3.0}
    first = pixels(pipeline, **settings)
    assert np.array_equal(first, pixels(pipeline, **settings))
    assert first.shape == (3, 8, 24, 3)
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    changes = [{"image": tmp_path / "red.png"}, {"strength": 1.0}, {"seed": 9}, {"prompts": ("b",)}, {"guidance": 9.0}]
    for change in changes:
        assert not np.array_equal(first, pixels(pipeline, **settings | change))
    assert pipeline.scheduler is own
    assert type(pipeline).__name__ == "StableDiffusionPipeline"


def test_it_is_the_one_that_the_image_to_image_pipeline_draws_alone(pipeline, start):
    from diffusers import StableDiffusionImg2ImgPipeline

    ours = pixels(pipeline, image=start, strength=0.7, steps=4, seed=3, size=(16, 24), prompts=("a",), count=1)
    alone = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with Image.open(start) as picture:
        drawn = alone(
            "a", image=picture.resize((16, 24)), strength=0.7, num_inference_steps=4, guidance_scale=7.5,
            generator=torch.Generator("cpu").manual_seed(3),
        )  # fmt: skip
    assert np.array_equal(ours[0], np.asarray(drawn.images[0], np.int16))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_from_a_picture_and_batches_change_nothing(pipeline, start, name):
    settings = {"image": start, "strength": 0.5, "steps": 6, "scheduler": name, "prompts": ("a",), "count": 3}
    together = pixels(pipeline, **settings, batch=3)
    assert np.ptp(together) > 0
    assert np.abs(together - pixels(pipeline, **settings, batch=2)).max() <= 1


def test_the_defaults_of_image_to_image_are_those_of_its_pipeline(pipeline, start):
    own = complete(Request(("a",), image=start), pipeline)
    assert (own.strength, own.size) == (0.8, (24, 8))
    assert complete(Request(("a",)), pipeline).strength is None
    asked = complete(Request(("a",), image=start, strength=0.2, size=(16, 16)), pipeline)
    assert (asked.strength, asked.size) == (0.2, (16, 16))
    with pytest.raises(InputError, match=r"strength 0.1 leaves none of 9 steps"):
        complete(Request(("a",), image=start, strength=0.1, steps=9), pipeline)
    with pytest.raises(InputError, match="is no file"):
        complete(Request(("a",), image=start.with_name("none.png")), pipeline)


def test_what_it_was_drawn_from_is_written_without_its_folder(pipeline, start, tmp_path):
    draw_into(tmp_path, pipeline, image=start, strength=1.0)
    index = json.loads((tmp_path / "pictures.json").read_text(encoding="utf-8"))
    assert (index["image"], index["strength"]) == ("start.png", 1.0)
    with Image.open(tmp_path / "1-0.png") as picture:
        assert picture.text["image"] == "start.png"
    assert not any(str(start.parent).encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_progress_adds_up_from_a_picture_too(pipeline, start):
    done = []
    request = complete(Request(("a",), count=3, steps=5, batch=2, image=start, strength=0.6), pipeline)
    list(draw(pipeline, request, done.append))
    assert sum(done) == pytest.approx(3)
