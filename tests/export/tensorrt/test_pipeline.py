"""TensorRT behind diffusers' pipelines: it draws what ONNX Runtime draws, with engines made for what is here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import stand_in as trt
import torch
from engines import built, record
from PIL import Image
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.pipeline import image_to_image
from bakeout.editor.recipe import Range
from bakeout.export.manifest import Shapes, Tensorrt
from bakeout.export.onnx_pipeline import SessionSettings, load_onnx_pipeline
from bakeout.export.tensorrt.engine import ENGINE
from bakeout.export.tensorrt.pipeline import load_tensorrt_pipeline
from bakeout.export.tensorrt.shapes import shapes_of

# fp32 in both, and what runs is ONNX Runtime.
LIMIT = 1e-6


@pytest.fixture
def engines(stand_in, onnx_folders, tmp_path) -> Callable[[str], tuple[Path, Tensorrt]]:
    """The engines of the tiny model of a family, for up to two pictures, and how they were made."""

    @cache
    def made(family: str) -> tuple[Path, Tensorrt]:
        source = onnx_folders(family)
        own = shapes_of(source, None)
        sides = {name: Range(min=32, opt=getattr(own, name).opt, max=64) for name in ("width", "height")}
        shapes = Shapes(batch=Range(min=1, opt=1, max=2), **sides)
        folder = tmp_path / family
        folder.mkdir()
        return built(source, folder, shapes), record(shapes)

    return made


def drawn(pipeline: Any, **settings: Any) -> Tensor:
    prompts = settings.setdefault("prompt", ["a", "bc"])
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipeline(**{"num_inference_steps": 3, "output_type": "pt", "generator": generators, **settings}).images


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative RMS; infinite for another shape, or what is not finite."""
    if found.shape != wanted.shape or not found.isfinite().all():
        return float("inf")
    return float((found - wanted).double().square().mean().sqrt() / wanted.double().square().mean().sqrt())


@pytest.mark.claim("a whole picture drawn by engines is that of ONNX Runtime")
@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_it_draws_what_onnx_runtime_draws(engines, onnx_folders, family):
    ours = load_tensorrt_pipeline(*engines(family))
    other = load_onnx_pipeline(onnx_folders(family), SessionSettings(threads=1))
    assert type(ours) is type(other)
    for settings in (
        {},
        {"guidance_scale": 1.0},
        {"prompt": ["a"], "negative_prompt": ["c"], "height": 32, "width": 64},
    ):
        assert error(drawn(ours, **settings), drawn(other, **settings)) < LIMIT
    # What a difference would look like.
    seeds = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    assert error(drawn(ours), drawn(other, generator=seeds)) > 1000 * LIMIT
    begun = {"image": [Image.effect_noise((32, 64), 90).convert("RGB")] * 2, "strength": 0.7}
    pictures = [drawn(image_to_image(pipeline), **begun) for pipeline in (ours, other)]
    assert error(*pictures) < LIMIT
    assert error(pictures[0], drawn(other, height=64, width=32)) > 1000 * LIMIT


def test_no_step_is_written_over_by_the_next(engines):
    """A scheduler of several steps keeps what the UNet gave before; a buffer that is reused would change it."""
    pipeline = load_tensorrt_pipeline(*engines("sd1"))
    kept: list[tuple[Tensor, Tensor]] = []
    hook = pipeline.unet.register_forward_hook(lambda *call: kept.append((call[2][0], call[2][0].clone())))
    drawn(pipeline, num_inference_steps=5)
    hook.remove()
    assert len(kept) >= 5
    assert all(torch.equal(held, then) for held, then in kept)
    assert len({held.data_ptr() for held, _ in kept}) == len(kept)


def test_every_network_is_asked_by_name_and_on_the_device(engines, onnx_folders):
    pipeline = load_tensorrt_pipeline(*engines("sdxl"))
    other = load_onnx_pipeline(onnx_folders("sdxl"), SessionSettings(threads=1))
    ids = torch.randint(5, 500, (2, 77), generator=torch.Generator().manual_seed(0))
    for name in ("text_encoder", "text_encoder_2"):
        states, wanted = (getattr(it, name).run({"input_ids": ids}) for it in (pipeline, other))
        assert states.keys() == wanted.keys()
        assert max(error(states[output], wanted[output]) for output in wanted) < LIMIT
        assert error(states["last_hidden_state"], states["last_hidden_state"].flip(0)) > 1000 * LIMIT
    found = pipeline.vae.decoder.run({"latent_sample": torch.ones(1, 4, 8, 8)})["sample"]
    assert found.shape[:2] == (1, 3)
    assert pipeline.vae.encoder.run({"sample": torch.ones(1, 3, 32, 32)})["latent_parameters"].shape[1] == 8
    graphs = [pipeline.text_encoder.graph, pipeline.unet.graph, pipeline.vae.encoder, pipeline.vae.decoder]
    # One stream and one memory, so that they never run beside one another.
    assert len({id(graph._lane) for graph in graphs}) == 1
    assert {graph.device for graph in graphs} == {pipeline.device}
    # What the text encoder of another folder would read without the edit is withheld as in any other runtime.
    guarded = load_tensorrt_pipeline(*engines("sdxl"), first_states={"text_encoder_2": 2})
    with pytest.raises(InputError, match="clip_skip 1 reads a hidden state of text_encoder_2"):
        drawn(guarded, clip_skip=1)


@pytest.mark.claim("engines made for another GPU or TensorRT are refused before any is loaded")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA Other"}, r"for NVIDIA Other \(compute capability 8.9\), and here are TensorRT .*export the"),
        ({"version": "11.3.0.99"}, r"with TensorRT 11.3.0.99 for NVIDIA Stand-in .* here are TensorRT 11.4.0.106"),
        ({"capability": (9, 0)}, r"\(compute capability 9.0\), and here are .*\(compute capability 8.9\)"),
    ],
)
def test_engines_of_another_machine_are_refused(engines, monkeypatch, change, words):
    folder, made = engines("sd1")
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", None)
    with pytest.raises(InputError, match=words) as refused:
        load_tensorrt_pipeline(folder, made.model_copy(update=change))
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_whole_is_refused(engines):
    folder, made = engines("sd1")
    unet, text = folder / "unet" / ENGINE, folder / "text_encoder" / ENGINE
    kept = unet.read_bytes()
    unet.unlink()
    with pytest.raises(InputError, match=r"unet/model.engine is missing; export the model again"):
        load_tensorrt_pipeline(folder, made)
    shutil.copyfile(text, unet)
    with pytest.raises(InputError, match=r"unet/model.engine has no input sample; export the model again"):
        load_tensorrt_pipeline(folder, made)
    unet.write_bytes(b"another format " + kept)
    with pytest.raises(InputError, match=r"does not load .*unet/model.engine .*export the model again"):
        load_tensorrt_pipeline(folder, made)
    unet.write_bytes(kept)
    drawn(load_tensorrt_pipeline(folder, made))


def test_pictures_that_the_engines_are_not_for_are_refused(engines):
    pipeline = load_tensorrt_pipeline(*engines("sd1"))
    with pytest.raises(InputError, match=r"was made for input_ids of shape \[1, 77\] to \[2, 77\], not \[3, 77\]"):
        drawn(pipeline, prompt=["a", "b", "c"], num_inference_steps=1)
    with pytest.raises(InputError, match="export again with another --size or --batch"):
        drawn(pipeline, prompt=["a"], height=128, width=128, num_inference_steps=1)


@pytest.mark.parametrize("told", [True, False])
def test_an_edit_for_one_size_of_latents_needs_engines_for_it(
    stand_in, onnx_folders, engines, tmp_path, monkeypatch, told
):
    """Whether TensorRT tells a size that the profile has, or that it was dynamic in the graph."""
    one = Range(min=32, opt=32, max=32)
    shapes = Shapes(batch=Range(min=1, opt=1, max=2), width=one, height=one)
    folder = tmp_path / "one size"
    folder.mkdir()
    folder = built(onnx_folders("sd1"), folder, shapes)

    def said(engine: Any, name: str) -> tuple[int, ...]:
        least, _, most = engine.get_tensor_profile_shape(name, 0)
        return tuple(low if low == high else -1 for low, high in zip(least, most, strict=True))

    if told:
        monkeypatch.setattr(trt.ICudaEngine, "get_tensor_shape", said)
    for latents in (None, (8, 8)):
        assert drawn(load_tensorrt_pipeline(folder, record(shapes), latents=latents), prompt=["a"]).shape[2:] == (
            32,
            32,
        )
    with pytest.raises(InputError, match="takes latents of 8x8, and the artifact is for latents of 8x16; export the"):
        load_tensorrt_pipeline(folder, record(shapes), latents=(16, 8))
    with pytest.raises(InputError, match="takes latents of several sizes, and the artifact is for latents of 8x8"):
        load_tensorrt_pipeline(*engines("sd1"), latents=(8, 8))


def test_without_tensorrt_it_is_said(engines, monkeypatch):
    folder, made = engines("sd1")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(InputError, match=r"TensorRT is not installed.*pip install 'bakeout\[gpu,tensorrt\]'"):
        load_tensorrt_pipeline(folder, made)
