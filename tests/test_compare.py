"""Side by side: which pictures, where they stand in the sheet, and which base is taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bakeout.compare import Comparison, comparison_for, sheet
from bakeout.editor.errors import InputError
from bakeout.editor.model import BUILTIN, open_model
from bakeout.export.base import open_base
from bakeout.generate import Request, complete, draw, draw_to_folder
from bakeout.recipe import open_any
from bakeout.runtime import runtime_for
from bakeout.validate.reference import applied

REQUEST = Request(("a", "b"), steps=3, count=2, guidance=4.0, size=(16, 24))


def values(picture: Image.Image) -> NDArray[np.int16]:
    return np.asarray(picture, np.int16)


def columns(made: Image.Image, size: tuple[int, int], factor: int) -> list[NDArray[np.int16]]:
    """The pictures in a sheet of three, made small again."""
    width, height = factor * size[0], factor * size[1]
    cut = [made.crop((left, 43, left + width, 43 + height)) for left in (16, 32 + width, 48 + 2 * width)]
    return [values(picture.resize(size, Image.Resampling.NEAREST)) for picture in cut]


@pytest.mark.parametrize(("size", "factor"), [((16, 24), 16), ((64, 64), 4), ((300, 20), 1), ((512, 256), 1)])
def test_pictures_stand_side_by_side_pixel_for_pixel(size, factor):
    pictures = [Image.effect_noise(size, 90).convert("RGB") for _ in range(3)]
    made = sheet(dict(zip(("base", "reference", "artifact"), pictures, strict=True)), "a prompt")
    assert made.width == 3 * (factor * size[0] + 16) + 16
    assert made.height == 43 + factor * size[1] + 16 + 27 + 8
    for found, picture in zip(columns(made, size, factor), pictures, strict=True):
        assert np.array_equal(found, values(picture))


def test_labels_and_caption_are_written_outside_of_the_pictures():
    pictures = {name: Image.new("RGB", (64, 64), "red") for name in ("base", "reference", "artifact")}
    made = values(sheet(pictures, "a prompt"))
    dark = made.max(axis=2) < 100
    assert dark[:40, 16:272].any()
    assert dark[:40, 288:544].any()
    assert dark[40 + 256 :].any()
    assert not dark[43 : 43 + 256].any()


@pytest.mark.parametrize(("caption", "lines"), [("", 0), ("a " * 60, 2), ("W" * 5000, 6), ("many words " * 500, 6)])
def test_a_long_caption_takes_lines_and_has_an_end(caption, lines):
    pictures = {name: Image.new("RGB", (64, 64)) for name in ("base", "reference", "artifact")}
    assert sheet(pictures, caption).height == 43 + 256 + 16 + 27 * lines + 8


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_what_is_compared_is_what_each_draws(exported, tiny_model, tmp_path, name):
    opened = open_any(exported)
    comparison = comparison_for(opened, str(tiny_model))
    runtime = runtime_for(opened, name, **({"threads": 1} if name == "onnxruntime" else {"device": "cpu"}))
    pipeline = runtime.load(opened)
    request = complete(REQUEST, pipeline)
    draw_to_folder(pipeline, request, tmp_path, {})
    done: list[float] = []
    comparison.write(request, tmp_path, replace(runtime, device="cpu"), done.append)
    assert sum(done) == pytest.approx(2 * 4)

    eager = open_model(tiny_model).pipeline("cpu", torch.float32)
    base = [values(picture.image) for picture in draw(eager, request)]
    with applied(comparison.artifact.edit, comparison.base, eager):
        reference = [values(picture.image) for picture in draw(eager, request)]
    assert Comparison.files(request) == [f"{n}-{seed}-compared.png" for n in (1, 2) for seed in (0, 1)]
    for number, file in enumerate(Comparison.files(request)):
        with Image.open(tmp_path / file) as made, Image.open(tmp_path / request.files[number]) as own:
            found = columns(made, (16, 24), 16)
            assert made.text == {"prompt": request.pictures[number][1], "seed": str(request.pictures[number][2])}
            assert np.array_equal(found[2], values(own))
        assert np.array_equal(found[0], base[number])
        assert np.array_equal(found[1], reference[number])
        assert np.abs(found[2] - found[1]).max() <= 1
        assert np.abs(found[0] - found[1]).max() > 1


def test_graphs_alone_are_compared_with_eager_base_and_reference(exported, tiny_model, tmp_path):
    copy = Path(shutil.copytree(exported, tmp_path / "graphs"))
    shutil.rmtree(copy / "diffusers")
    whole = open_any(exported)
    opened = replace(whole, folder=copy, manifest=whole.manifest.model_copy(update={"targets": ("onnx",)}))
    runtime = runtime_for(opened, threads=1)
    comparison = comparison_for(opened, str(tiny_model))
    pipeline = runtime.load(opened)
    request = complete(REQUEST, pipeline)
    draw_to_folder(pipeline, request, tmp_path, {})
    comparison.write(request, tmp_path, replace(runtime, device="cpu"))
    for file in Comparison.files(request):
        with Image.open(tmp_path / file) as made:
            base, reference, artifact = columns(made, (16, 24), 16)
        assert np.abs(artifact - reference).max() <= 1
        assert np.abs(base - reference).max() > 1


def test_base_and_reference_skip_the_layers_that_the_artifact_skips(exported, tiny_model, tmp_path):
    opened = open_any(exported)
    comparison, runtime = comparison_for(opened, str(tiny_model)), runtime_for(opened, "torch", device="cpu")
    sheets = []
    pipeline = runtime.load(opened)
    for clip_skip in (None, 1):
        request = complete(replace(REQUEST, clip_skip=clip_skip), pipeline)
        draw_to_folder(pipeline, request, tmp_path, {})
        comparison.write(request, tmp_path, runtime)
        with Image.open(tmp_path / Comparison.files(request)[0]) as made:
            sheets.append(columns(made, (16, 24), 16))
    for usual, skipped in zip(*sheets, strict=True):
        assert np.abs(usual - skipped).max() > 1
    assert np.abs(sheets[1][1] - sheets[1][2]).max() <= 1


def test_the_base_must_be_given_where_only_its_name_is_known(exported, tiny_model):
    artifact = open_any(exported)
    with pytest.raises(InputError, match=r"made from 'tiny', a folder of which it knows no place; give .* \(--base\)"):
        open_base(artifact)
    assert open_base(artifact, tiny_model).path == tiny_model


def test_another_base_is_refused(exported, tiny_model, tmp_path, folders):
    artifact = open_any(exported)
    with pytest.raises(InputError, match=r"is not the model 'tiny' from which .* was made; give that model as"):
        open_base(artifact, folders("sd1"))
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="is not the model 'tiny'"):
        comparison_for(artifact, str(other))


def test_a_built_in_base_is_found_by_its_name(exported, tiny_model, monkeypatch):
    artifact = open_any(exported)
    base = artifact.manifest.base.model_copy(update={"name": "toy", "format": "builtin"})
    named = replace(artifact, manifest=artifact.manifest.model_copy(update={"base": base}))
    monkeypatch.setitem(BUILTIN, "toy", tiny_model)
    assert open_base(named).source == "toy"
    monkeypatch.setitem(BUILTIN, "toy", BUILTIN["shapes"])
    with pytest.raises(InputError, match="toy is not the model 'toy'"):
        open_base(named)


def test_what_cannot_be_compared_is_refused_at_once(exported, tiny_model, tmp_path):
    with pytest.raises(InputError, match="is no artifact, so there is nothing to compare"):
        comparison_for(open_model(tiny_model))
    released = Path(shutil.copytree(exported, tmp_path / "released"))
    (released / "edit.safetensors").unlink()
    opened: Any = open_any(released)
    with pytest.raises(InputError, match=r"released without its edit.safetensors"):
        comparison_for(opened, str(tiny_model))
