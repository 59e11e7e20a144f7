"""One size of latents: which graphs are loaded for it, what is drawn by default, and what is refused."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from bakeout.editor.errors import InputError
from bakeout.editor.pipeline import image_to_image
from bakeout.export.onnx_pipeline import SessionSettings, load_onnx_pipeline

FAMILIES = ("sd1", "sdxl")
ONE_THREAD = SessionSettings(threads=1)
# Height and width. The model's own are 8x8 and 4 pixels are a latent.
LATENTS = (8, 32)
PIXELS = {"height": 32, "width": 128}


def fix(path: Path, height: int | None, width: int | None) -> None:
    """Make the height and the width of the latents that a UNet takes and gives static; None leaves one dynamic."""
    model = onnx.load(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        for place, side in ((2, height), (3, width)):
            if side is not None:
                value.type.tensor_type.shape.dim[place].dim_value = side
    onnx.save(model, path)


@pytest.fixture(scope="module")
def static(onnx_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The ONNX folder of a family with a UNet for latents of one height and width."""

    @cache
    def folder(family: str, height: int | None = LATENTS[0], width: int | None = LATENTS[1]) -> Path:
        made = Path(shutil.copytree(onnx_folders(family), tmp_path_factory.mktemp("static") / family))
        fix(made / "unet" / "model.onnx", height, width)
        return made

    return folder


@pytest.fixture(scope="module")
def pipelines(static, onnx_folders) -> Callable[[str], tuple[Any, Any]]:
    """The pipelines of a family: of one size, and of any."""

    @cache
    def both(family: str) -> tuple[Any, Any]:
        held = load_onnx_pipeline(static(family), ONE_THREAD, latents=LATENTS)
        return held, load_onnx_pipeline(onnx_folders(family), ONE_THREAD)

    return both


def drawn(pipeline: Any, *args: Any, **settings: Any) -> torch.Tensor:
    prompts = args or (["a", "bc"],)
    seeds = torch.Generator().manual_seed(0)
    return pipeline(*prompts, num_inference_steps=2, output_type="pt", generator=seeds, **settings).images


@pytest.mark.parametrize("family", FAMILIES)
def test_its_size_is_the_default(pipelines, family):
    held, free = pipelines(family)
    wanted = drawn(free, **PIXELS)
    assert wanted.shape[-2:] == (PIXELS["height"], PIXELS["width"])
    assert torch.equal(drawn(held), wanted)
    for given in (PIXELS, {"height": 32}, {"width": 128}, {"height": None, "width": None}):
        assert torch.equal(drawn(held, **given), wanted)
    latents = torch.randn(2, 4, *LATENTS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(held, latents=latents), drawn(free, latents=latents, **PIXELS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [{"guidance_scale": 1.0}, {"prompt": ["a"]}, {"prompt": ["a", "b", "c"], "negative_prompt": ["d"] * 3}],
)
def test_batch_and_guidance_are_free(pipelines, family, settings):
    held, free = pipelines(family)
    prompts = [settings["prompt"]] if "prompt" in settings else []
    others = {name: value for name, value in settings.items() if name != "prompt"}
    assert torch.equal(drawn(held, *prompts, **others), drawn(free, *prompts, **others, **PIXELS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # As many tokens.
        ({"height": 64, "width": 64}, "not 64x64; leave height and width out$"),
        ({"height": 128, "width": 32}, "not 32x128; leave height and width out$"),
        ({"height": 64}, "not 128x64; leave"),
        ({"width": 32}, "not 32x32; leave"),
        ({"latents": torch.zeros(2, 4, 32, 8)}, "not from latents of 8x32; leave latents out$"),
        ({"latents": torch.zeros(2, 4, 16, 16), **PIXELS}, "not from latents of 16x16; leave latents out$"),
    ],
)
def test_another_size_is_refused_before_anything_is_computed(pipelines, family, settings, words):
    held, _ = pipelines(family)
    calls: list[object] = []
    with ExitStack() as stack:
        for name in ("text_encoder", "unet"):
            hook = getattr(held, name).register_forward_pre_hook(lambda *_: calls.append(1))
            stack.callback(hook.remove)
        with pytest.raises(InputError, match=words) as refused:
            drawn(held, **settings)
        assert str(refused.value).startswith("this model draws 128x32 only (latents of 32x8)")
        assert not calls
        drawn(held)
        assert calls


def test_a_size_that_is_given_by_place_is_refused_too(pipelines):
    with pytest.raises(InputError, match="not 64x64"):
        drawn(pipelines("sd1")[0], ["a"], 64, 64)
    with pytest.raises(InputError, match="not 64x64"):
        drawn(pipelines("sdxl")[0], ["a"], None, 64, 64)
    assert drawn(pipelines("sd1")[0], ["a"], 32, 128).shape[-2:] == (32, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_itself_takes_no_others(pipelines, family):
    unet = pipelines(family)[0].unet
    names = {it: [side if isinstance(side, int) else 2 for side in unet.graph.inputs[it].shape]
             for it in unet.graph.inputs if it not in ("sample", "timestep")}  # fmt: skip
    inputs = {name: torch.zeros(shape) for name, shape in names.items()}
    text = inputs.pop("encoder_hidden_states")

    def answer(*sides: int) -> torch.Tensor:
        return unet(torch.zeros(2, 4, *sides), 1, text, added_cond_kwargs=inputs).sample

    assert answer(*LATENTS).shape == (2, 4, *LATENTS)
    for sides in ((32, 8), (16, 16), (8, 8)):
        with pytest.raises(InputError, match=r"takes sample of shape \[any, 4, 8, 32\] only, not"):
            answer(*sides)
        with pytest.raises(InputError, match=r"takes sample of shape \[any, 4, 8, 32\] only, not"):
            unet.run({"sample": torch.zeros(2, 4, *sides), "timestep": torch.tensor(1.0),
                      "encoder_hidden_states": text, **inputs})  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_picture_to_begin_with_must_have_its_size(pipelines, family):
    held, free = (image_to_image(it) for it in pipelines(family))
    right, turned = (Image.effect_noise(size, 90).convert("RGB") for size in ((128, 32), (32, 128)))
    settings = {"strength": 1.0}
    assert torch.equal(drawn(held, ["a"], image=right, **settings), drawn(free, ["a"], image=right, **settings))
    with pytest.raises(InputError, match=r"\[any, 4, 8, 32\] only"):
        drawn(held, ["a"], image=turned, **settings)
    drawn(free, ["a"], image=turned, **settings)


def test_it_is_still_a_pipeline_of_diffusers(pipelines):
    held, free = pipelines("sd1")
    assert isinstance(held, type(free))
    assert type(held).__name__ == type(free).__name__
    assert inspect.signature(type(held).__call__) == inspect.signature(type(free).__call__)
    assert type(AutoPipelineForImage2Image.from_pipe(held)) is type(AutoPipelineForImage2Image.from_pipe(free))


@pytest.mark.parametrize(
    ("graph", "latents", "words"),
    [
        # As many tokens.
        ((32, 8), (8, 32), "takes latents of 8x32, and the artifact is for latents of 32x8"),
        ((16, 16), (8, 32), "takes latents of 16x16, and the artifact is for latents of 32x8"),
        ((None, None), (8, 32), "takes latents of several sizes, and the artifact is for latents of 32x8"),
        ((8, None), (8, 32), "takes latents of several sizes, and the artifact is for latents of 32x8"),
        ((8, 32), None, "takes latents of 32x8, and the artifact is for latents of any size"),
        ((None, 32), None, "takes latents of several sizes, and the artifact is for latents of any size"),
    ],
)
def test_a_graph_of_another_size_is_not_loaded(static, graph, latents, words):
    with pytest.raises(InputError, match=rf"unet/model.onnx {words}; export the model again$"):
        load_onnx_pipeline(static("sd1", *graph), ONE_THREAD, latents=latents)
