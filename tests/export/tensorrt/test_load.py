"""What draws with an artifact that has engines: chosen by name, and by nothing else than what it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import stand_in as trt
import torch
from click.testing import CliRunner
from engines import built, record
from PIL import Image

from bakeout.cli import main
from bakeout.editor.errors import InputError
from bakeout.editor.recipe import Range
from bakeout.export.artifact import Artifact
from bakeout.export.manifest import MANIFEST, File, Shapes, file_digest, read_manifest
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.export.tensorrt.shapes import shapes_of
from bakeout.generate import Request, complete
from bakeout.runtime import runtime_for


@pytest.fixture
def served(stand_in, exported, tmp_path) -> Path:
    """The artifact `exported` with the stand-in's engines: 16 px wide, 16 to 32 px high, one or two at a time."""
    folder = Path(shutil.copytree(exported, tmp_path / "artifact"))
    width = shapes_of(folder / "onnx", None).width
    shapes = Shapes(batch=Range(min=1, opt=1, max=2), width=width, height=Range(min=16, opt=16, max=32))
    (folder / "tensorrt").mkdir()
    built(folder / "onnx", folder / "tensorrt", shapes)
    manifest = read_manifest(folder)
    files = {
        path.relative_to(folder).as_posix(): File(bytes=path.stat().st_size, sha256=file_digest(path))
        for path in sorted((folder / "tensorrt").rglob("*"))
        if path.is_file()
    }
    changes = {"targets": (*manifest.targets, "tensorrt"), "files": {**manifest.files, **files}}
    made = manifest.model_copy(update={**changes, "tensorrt": record(shapes)})
    (folder / MANIFEST).write_bytes(made.to_json())
    return folder


def generate(folder: Path, output: Path, *options: str) -> tuple[int, str]:
    command = ["generate", str(folder), "--prompt", "a", "--steps", "3", "-o", str(output), *options]
    done = CliRunner().invoke(main, command)
    return done.exit_code, done.output


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), np.int16) for path in sorted(folder.glob("*.png"))])


@pytest.mark.claim("`bakeout generate --runtime tensorrt` draws what ONNX Runtime draws")
@pytest.mark.parametrize("start", [False, True])
def test_generate_draws_with_engines(served, tmp_path, start):
    options = ["-n", "3", "--seed", "7", "--guidance", "3"]
    if start:
        Image.effect_noise((16, 16), 120).convert("RGB").save(tmp_path / "start.png")
        options += ["--image", str(tmp_path / "start.png"), "--strength", "0.8"]
    code, said = generate(served, tmp_path / "ours", "--runtime", "tensorrt", *options)
    assert code == 0, said
    assert "3 pictures in" in said
    assert "drawn by tensorrt (cuda:0)" in said
    assert generate(served, tmp_path / "other", *options)[0] == 0
    ours, other = pixels(tmp_path / "ours"), pixels(tmp_path / "other")
    assert ours.shape == other.shape == (3, 16, 16, 3)
    assert np.abs(ours - other).max() <= 1
    # What a difference would look like.
    assert np.abs(ours - np.roll(other, 1, axis=0)).max() > 5
    recorded = json.loads((tmp_path / "ours" / "pictures.json").read_text())
    found = {name: recorded[name] for name in ("runtime", "device", "gpu")}
    assert found == {"runtime": "tensorrt", "device": "cuda:0", "gpu": "NVIDIA Stand-in"}
    assert json.loads((tmp_path / "other" / "pictures.json").read_text())["runtime"] == "onnxruntime"


def test_engines_draw_sizes_that_they_are_for(served, tmp_path):
    code, said = generate(served, tmp_path / "tall", "--runtime", "tensorrt", "--size", "16x32")
    assert code == 0, said
    assert pixels(tmp_path / "tall").shape == (1, 32, 16, 3)
    pipeline = runtime_for(Artifact.open(served), "tensorrt").load(Artifact.open(served))
    shapes = Artifact.open(served).manifest.tensorrt.shapes
    request = complete(Request(("a",), batch=8), pipeline, shapes=shapes)
    assert (request.size, request.batch) == ((16, 16), 2)
    assert complete(Request(("a",), batch=1), pipeline, shapes=shapes).batch == 1
    assert complete(Request(("a",), batch=8), pipeline).batch == 8


@pytest.mark.parametrize(
    ("least", "most", "asked", "count", "batch"),
    [(1, 2, 4, 3, 2), (2, 4, 4, 6, 4), (2, 4, 4, 5, 3), (2, 4, 1, 4, 2), (3, 4, 4, 7, 4), (4, 4, 1, 8, 4)],
)
def test_no_batch_is_smaller_than_engines_draw(served, least, most, asked, count, batch):
    pipeline = runtime_for(Artifact.open(served), "tensorrt").load(Artifact.open(served))
    shapes = Artifact.open(served).manifest.tensorrt.shapes
    shapes = shapes.model_copy(update={"batch": Range(min=least, opt=least, max=most)})
    assert complete(Request(("a",), count=count, batch=asked), pipeline, shapes=shapes).batch == batch
    for few in range(1, least):
        with pytest.raises(InputError, match=f"{least} pictures at a time or more, which does not go into {few};"):
            complete(Request(("a",), count=few), pipeline, shapes=shapes)


@pytest.mark.claim("engines that draw several pictures at a time also begin with a picture")
def test_engines_of_a_batch_begin_with_a_picture(served, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(served, folder, ignore=lambda _, names: {"tensorrt"} & {*names})
    (folder / "tensorrt").mkdir()
    shapes = Artifact.open(served).manifest.tensorrt.shapes
    shapes = shapes.model_copy(update={"batch": Range(min=2, opt=2, max=2)})
    built(folder / "onnx", folder / "tensorrt", shapes)
    manifest = read_manifest(folder)
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"tensorrt": record(shapes)}).to_json())
    Image.effect_noise((16, 16), 120).convert("RGB").save(tmp_path / "start.png")
    image = ["--image", str(tmp_path / "start.png")]
    code, said = generate(folder, tmp_path / "begun", "--runtime", "tensorrt", "-n", "4", *image)
    assert code == 0, said
    assert pixels(tmp_path / "begun").shape == (4, 16, 16, 3)
    for options, words in (
        (["-n", "3"], "draw a multiple of 2, or export again with another --batch"),
        (["-n", "2", "--clip-skip", "1"], "gives no hidden states, so no layer can be skipped"),
    ):
        code, said = generate(folder, tmp_path / "refused", "--runtime", "tensorrt", *options)
        assert (code, said.count("\n")) == (2, 1)
        assert words in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "32x32"], "size is 32x32: the engines were made for pictures of 16x16 to 16x32; leave it out"),
        (["--size", "16x48"], "export again with another --size"),
        (["--dtype", "fp16"], "--dtype belongs to another runtime, and tensorrt draws: leave it out"),
        (["--provider", "CUDAExecutionProvider"], "--provider belongs to another runtime"),
        (["--threads", "2"], "--threads belongs to another runtime"),
        (["--no-arena"], "--no-arena belongs to another runtime"),
        (["--kernels", "library"], "--kernels library belongs to another runtime"),
        (["--compile"], "--compile belongs to another runtime"),
    ],
)
def test_what_engines_do_not_have_is_refused(served, tmp_path, options, words):
    code, said = generate(served, tmp_path / "pictures", "--runtime", "tensorrt", *options)
    assert (code, said.count("\n")) == (2, 1)
    assert words in said
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("runtime", ["tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt"])
@pytest.mark.claim("without an NVIDIA GPU its runtimes are refused in one sentence, and nothing falls back to the CPU")
def test_without_a_gpu_nothing_is_drawn(exported, tmp_path, monkeypatch, runtime):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, said = generate(exported, tmp_path / "pictures", "--runtime", runtime)
    assert (code, said.count("\n")) == (2, 1)
    assert (
        "has no tensorrt/; run `bakeout export" if runtime == "tensorrt" else "there is no NVIDIA GPU cuda:0"
    ) in said
    code, said = generate(exported, tmp_path / "pictures", "--runtime", runtime, "--device", "cpu")
    assert code == 2
    assert runtime == "tensorrt" or "'cpu' is no NVIDIA GPU" in said
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("runtime", ["tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_of_a_target_that_is_not_there_the_cure_is_said(served, runtime):
    target = "tensorrt" if runtime == "tensorrt" else "onnx"
    manifest = read_manifest(served)
    left = {
        "targets": tuple(it for it in manifest.targets if it != target),
        "files": {name: file for name, file in manifest.files.items() if not name.startswith(f"{target}/")},
        target: None,
    }
    shutil.rmtree(served / target)
    (served / MANIFEST).write_bytes(manifest.model_copy(update=left).to_json())
    artifact = Artifact.open(served)
    with pytest.raises(InputError, match=rf"has no {target}/; run `bakeout export .* --target {target}`"):
        runtime_for(artifact, runtime).load(artifact)


def test_a_gpu_never_draws_unasked(served):
    artifact = Artifact.open(served)
    assert runtime_for(artifact).name == "onnxruntime"
    assert runtime_for(artifact).sessions.device == "cpu"
    assert runtime_for(artifact, "tensorrt").facts == {
        "runtime": "tensorrt", "device": "cuda:0", "gpu": "NVIDIA Stand-in",
    }  # fmt: skip
    assert str(runtime_for(artifact, "tensorrt", device="cuda:1")) == "tensorrt (cuda:1)"
    gpu = runtime_for(artifact, "onnxruntime-cuda", threads=2)
    assert gpu.sessions.providers == ("CUDAExecutionProvider",)
    assert gpu.sessions.threads == 2
    assert gpu.facts == {
        "runtime": "onnxruntime-cuda", "device": "cuda:0", "gpu": "NVIDIA Stand-in",
        "providers": "CUDAExecutionProvider",
    }  # fmt: skip
    assert gpu.shapes is None
    assert runtime_for(artifact, "onnxruntime-tensorrt").shapes == shapes_of(served / "onnx", None)


def test_an_artifact_loads_its_engines(served):
    artifact = Artifact.open(served)
    pipeline = artifact.load("tensorrt", device="cuda:0")
    assert type(pipeline.unet.graph).__name__ == "Engine"
    for settings, words in (
        ({"sessions": SessionSettings()}, "TensorRT has no sessions"),
        ({"dtype": torch.float16}, "leave dtype out, and choose a precision when you export"),
        ({"compile": True}, "compile are torch's"),
        ({"kernels": "triton"}, "kernels and compile are torch's"),
    ):
        with pytest.raises(InputError, match=words):
            artifact.load("tensorrt", **settings)
    trt.world.gpu = "NVIDIA Other"
    with pytest.raises(InputError, match=r"here are TensorRT .* and NVIDIA Other .*export the model again"):
        artifact.load("tensorrt")


@pytest.mark.tensorrt
@pytest.mark.claim("`bakeout generate --runtime tensorrt` draws what ONNX Runtime draws on a CPU")
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2), ("fp16", 8)])
def test_tensorrt_draws_what_onnx_runtime_draws(exported, tmp_path, precision, limit):
    """Of 255. In ONNX Runtime the cast graphs draw within 1 of those in fp32; TensorRT adds up in another order."""
    folder = Path(shutil.copytree(exported, tmp_path / "artifact"))
    Artifact.open(folder).export("tensorrt", precision=precision, device="cuda")
    options = ["-n", "3", "--seed", "7", "--guidance", "3"]
    code, said = generate(folder, tmp_path / "ours", "--runtime", "tensorrt", *options)
    assert code == 0, said
    assert generate(folder, tmp_path / "other", "--runtime", "onnxruntime", *options)[0] == 0
    ours, other = pixels(tmp_path / "ours"), pixels(tmp_path / "other")
    assert np.abs(ours - other).max() <= limit
    assert np.abs(ours - np.roll(other, 1, axis=0)).max() > 2 * limit
    assert json.loads((tmp_path / "ours" / "pictures.json").read_text())["gpu"] == torch.cuda.get_device_name()
