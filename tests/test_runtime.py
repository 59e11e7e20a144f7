"""Which runtime draws, and that both draw the same."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.generate import SCHEDULERS, Request, complete, draw
from bakeout.recipe import open_any
from bakeout.runtime import Runtime, runtime_for


@pytest.fixture(scope="module")
def pipelines(exported):
    """The artifact's pipelines: ONNX Runtime's, and torch's."""
    opened = open_any(exported)
    return opened.load("onnxruntime", sessions=SessionSettings(threads=1)), opened.load("torch")


def pixels(pipeline, **settings) -> np.ndarray:
    request = complete(Request(**{"prompts": ("a", "bc"), "steps": 4, "count": 2} | settings), pipeline)
    return np.stack([np.asarray(picture.image, np.int16) for picture in draw(pipeline, request)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative_prompt": "d", "guidance": 9.0},
        {"guidance": 1.0, "size": (24, 16), "batch": 3},
        *({"scheduler": name} for name in SCHEDULERS),
    ],
)
@pytest.mark.parametrize("from_picture", [False, True])
def test_the_same_request_gives_the_same_pictures(pipelines, tmp_path, settings, from_picture):
    if from_picture:
        Image.effect_noise((32, 32), 120).convert("RGB").save(tmp_path / "start.png")
        settings = {**settings, "image": tmp_path / "start.png", "strength": 0.5}
    ours, eager = (pixels(pipeline, **settings) for pipeline in pipelines)
    assert np.abs(ours - eager).max() <= 1
    # What a difference would look like.
    assert np.abs(ours - pixels(pipelines[0], **settings, seed=50)).max() > 5


def test_a_picture_to_begin_with_reaches_the_encoder(pipelines, tmp_path):
    found = []
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{color}.png")
        found.append(pixels(pipelines[0], image=tmp_path / f"{color}.png", strength=0.5))
    assert np.abs(found[0] - found[1]).max() > 5


def test_batches_change_pictures_by_rounding_at_most(pipelines):
    together = pixels(pipelines[0], batch=4, scheduler="euler_a")
    for batch in (1, 3):
        assert np.abs(together - pixels(pipelines[0], batch=batch, scheduler="euler_a")).max() <= 1


def test_a_size_that_the_graph_cannot_take_is_refused(pipelines):
    with pytest.raises(InputError, match="multiples of 8 pixels"):
        pixels(pipelines[0], size=(20, 16))


def test_onnx_runtime_draws_where_it_can(exported, tiny_model, monkeypatch):
    opened = open_any(exported)
    chosen = runtime_for(opened)
    assert (chosen.name, str(chosen)) == ("onnxruntime", "onnxruntime (CPUExecutionProvider)")
    assert chosen.facts == {"runtime": "onnxruntime", "providers": "CPUExecutionProvider"}
    assert chosen.dtype is torch.float32
    chosen = runtime_for(opened, providers=("CPUExecutionProvider",), threads=2, arena=False)
    assert chosen.sessions == SessionSettings(threads=2, arena=False)
    assert runtime_for(opened, "torch", device="cpu").facts == {
        "runtime": "torch", "device": "cpu", "dtype": "torch.float32",
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(runtime_for(open_model(tiny_model))) == "torch (cpu)"


def test_the_gpu_that_draws_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {device}")
    facts = Runtime("torch", "cuda:1", torch.float16, None).facts
    assert facts == {"runtime": "torch", "device": "cuda:1", "dtype": "torch.float16", "gpu": "NVIDIA cuda:1"}
    assert "gpu" not in Runtime("torch", "cpu", torch.float32, None).facts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu"}, "--device belongs to torch, and onnxruntime draws: leave it out, or use --runtime torch"),
        ({"dtype": "fp16"}, "--dtype belongs to torch"),
        ({"name": "torch", "providers": ("CPUExecutionProvider",)}, "--provider belongs to ONNX Runtime"),
        ({"name": "torch", "threads": 2}, "--threads belongs to ONNX Runtime, and torch draws"),
        ({"name": "torch", "arena": False}, "--no-arena belongs to ONNX Runtime"),
        ({"threads": 0}, "threads is 0"),
        ({"name": "torch", "device": "gpu"}, "is no device"),
        ({"compiled": True}, "--compile belongs to torch, and onnxruntime draws"),
        ({"name": "torch", "kernels": "triton"}, "--kernels triton: this model has no operator that a kernel of ours"),
        ({"kernels": "library"}, "--kernels library: this model has no operator that a kernel of ours computes"),
    ],
)
def test_a_setting_of_the_other_runtime_is_refused(exported, settings, words):
    with pytest.raises(InputError, match=words):
        runtime_for(open_any(exported), **settings)


def test_only_torch_draws_with_a_model(tiny_model):
    with pytest.raises(InputError, match="is no artifact, so only torch"):
        runtime_for(open_model(tiny_model), "onnxruntime")


def without_weights(artifact, how: str):
    """An artifact of ONNX graphs alone, whose edit was realised as `how` says."""
    lowering = tuple(it.model_copy(update={"how": how}) for it in artifact.manifest.lowering)
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"targets": ("onnx",), "lowering": lowering}))


@pytest.mark.parametrize("how", ["graph", "folded"])
def test_of_graphs_alone_torch_draws_with_the_base(exported, tiny_model, pipelines, how):
    graphs = without_weights(open_any(exported), how)
    assert runtime_for(graphs).name == "onnxruntime"
    with pytest.raises(InputError, match=r"made from 'tiny', a folder of which it knows no place; give .* \(--base\)$"):
        runtime_for(graphs, "torch")
    chosen = runtime_for(graphs, "torch", device="cpu", base=str(tiny_model))
    assert (chosen.kernels, chosen.base.path) == (None, tiny_model)
    assert np.array_equal(pixels(chosen.load(graphs)), pixels(pipelines[1]))
    # All of it folds.
    with pytest.raises(InputError, match="no operator of this artifact needs a fused kernel"):
        runtime_for(graphs, "torch", device="cpu", base=str(tiny_model), kernels="reference")
    with pytest.raises(InputError, match=r"--device belongs to torch, and onnxruntime draws: leave it out, or use"):
        runtime_for(graphs, device="cpu")


def test_the_unet_of_a_model_is_compiled_where_it_is_asked_for(tiny_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: compiled.append((type(self), settings)))
    for asked in (False, True):
        chosen = runtime_for(open_model(tiny_model), device="cpu", compiled=asked)
        chosen.load(open_model(tiny_model))
        assert chosen.facts.get("compiled") == ("unet" if asked else None)
        assert str(chosen) == ("torch (cpu; compiled)" if asked else "torch (cpu)")
    ((kind, settings),) = compiled
    assert (kind.__name__, settings) == ("UNet2DConditionModel", {"fullgraph": True})


def test_an_artifact_is_loaded_by_what_it_has(exported, tmp_path, monkeypatch):
    artifact = open_any(exported)
    with pytest.raises(InputError, match=r"'openvino' is no runtime; choose from torch, onnxruntime, .*, tensorrt"):
        artifact.load("openvino")
    with pytest.raises(InputError, match=r"has no tensorrt/; run `bakeout export .* --target tensorrt`"):
        artifact.load("tensorrt")
    with pytest.raises(InputError, match="torch has no sessions"):
        artifact.load("torch", sessions=SessionSettings())
    for settings in ({"device": "cuda"}, {"dtype": torch.float16}):
        with pytest.raises(InputError, match="device and dtype are torch's"):
            artifact.load("onnxruntime", **settings)
    with pytest.raises(InputError, match="no 'NoExecutionProvider'"):
        artifact.load("onnxruntime", sessions=SessionSettings(("NoExecutionProvider",)))
    manifest = artifact.manifest.model_copy(update={"targets": ("diffusers",)})
    without = type(artifact)(Path("art"), manifest)
    with pytest.raises(InputError, match="art has no onnx/; run `bakeout export art --target onnx`"):
        without.load("onnxruntime")
    assert runtime_for(without, device="cpu").name == "torch"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="onnxruntime is not installed"):
        artifact.load("onnxruntime")


def test_the_graphs_draw_and_not_the_weights_beside_them(exported, tmp_path, pipelines):
    """Had ONNX Runtime's pipeline any of torch's weights in it, changing the graphs would change nothing."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    import onnx
    from onnx import numpy_helper

    path = copy / "onnx" / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    weight = next(it for it in model.graph.initializer if it.name == "decoder.conv_out.weight")
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)
    changed = open_any(copy).load("onnxruntime", sessions=SessionSettings(threads=1))
    assert np.abs(pixels(changed) - pixels(pipelines[0])).max() > 5
