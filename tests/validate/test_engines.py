"""Validations of TensorRT's engines, which nobody can read: by what they answer, on the engines that ship.

The library is the stand-in of the exporter's tests: its engines run in ONNX Runtime on the CPU.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "export" / "tensorrt"))

from stand_in import stand_in

from bakeout.editor.model import open_model
from bakeout.editor.recipe import Range
from bakeout.export.manifest import MANIFEST, Engine, File, Shapes, Tensorrt, file_digest, read_manifest
from bakeout.export.tensorrt.shapes import profile_of
from bakeout.validate import contract
from bakeout.validate.contract import Interface
from bakeout.validate.engines import of_size, run_in_pieces, settings_of, why_not_of_size
from bakeout.validate.parity import Expected
from bakeout.validate.report.schema import Report
from bakeout.validate.runners import Call, Settings, Trial, run
from bakeout.validate.validation import validate

__all__ = ["stand_in"]

SIDE = Range(min=64, opt=64, max=64)
# Fewer than validations draw at once, and more than the odd one is.
SHAPES = Shapes(batch=Range(min=2, opt=2, max=2), width=SIDE, height=SIDE)
DRAWN = {"components", "step-parity", "final-parity", "step-rounding", "drift", "pictures"}


def plan(trt: Any, graph: Path, shapes: Any) -> bytes:
    """The engine of a graph."""
    logger = trt.Logger()
    builder = trt.Builder(logger)
    network, config = builder.create_network(), builder.create_builder_config()
    assert trt.OnnxParser(network, logger).parse_from_file(str(graph))
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    config.add_optimization_profile(profile)
    built: bytes = builder.build_serialized_network(network, config)
    return built


def add_engines(trt: Any, folder: Path) -> None:
    """Engines of an artifact's graphs, in fp16; the manifest says so."""
    (folder / "tensorrt").mkdir(exist_ok=True)
    for path in (folder / "onnx").iterdir():
        if path.is_file() or not (path / "model.onnx").exists():
            (shutil.copyfile if path.is_file() else shutil.copytree)(path, folder / "tensorrt" / path.name)
            continue
        home = folder / "tensorrt" / path.name
        home.mkdir()
        shutil.copyfile(path / "config.json", home / "config.json")
        (home / "model.engine").write_bytes(
            plan(trt, path / "model.onnx", profile_of(folder / "onnx", path.name, SHAPES))
        )
    sign_off(folder, trt)


def sign_off(folder: Path, trt: Any, **changes: Any) -> None:
    """Make the manifest say that the files are as they are now."""
    manifest = read_manifest(folder)
    assert manifest.onnx is not None
    engines = {
        path.parent.name: Engine(key=file_digest(path), layers=1, plugins=0, error=0.0)
        for path in sorted((folder / "tensorrt").glob("*/model.engine"))
    }
    facts = {"gpu": trt.world.gpu, "capability": (8, 9), "driver": "580.65.06", "version": trt.world.version}
    facts |= {"precision": "fp16", "shapes": SHAPES, "shrink": 0, "widths": {}, "tools": {}, "engines": engines}
    files = {
        path.relative_to(folder).as_posix(): File(bytes=path.stat().st_size, sha256=file_digest(path))
        for path in sorted(it for target in ("diffusers", "onnx", "tensorrt") for it in (folder / target).rglob("*"))
        if path.is_file()
    }
    own = {"targets": ("diffusers", "onnx", "tensorrt"), "files": files, "tensorrt": Tensorrt(**(facts | changes))}
    (folder / MANIFEST).write_bytes(manifest.model_copy(update=own).to_json())


def judged(folder: Path, **options: Any) -> Report:
    given = {"targets": ["tensorrt"], "count": 2, "steps": 2, **options}
    return validate(folder, device="cpu", **given)[0]


def failed(report: Report) -> set[str]:
    return {it.name for it in report.checks if it.verdict == "fail"}


def verdict_of(report: Report, name: str) -> tuple[str, str]:
    (check,) = (it for it in report.checks if (it.name, it.target) == (name, "tensorrt"))
    return check.verdict, check.summary


@pytest.fixture
def served(stand_in: Any, starless: Path, narrowed: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes an artifact of `shapes` without stars with engines in fp16, of graphs that may be changed before."""

    def make(change: Callable[[Any], None] | None = None) -> Path:
        folder = tmp_path / "artifact"
        shutil.copytree(starless, folder, ignore=shutil.ignore_patterns("onnx"))
        narrowed(starless / "onnx", folder / "onnx", "fp16")
        path = folder / "onnx" / "unet" / "model.onnx"
        honest = path.read_bytes()
        if change is not None:
            model = onnx.load(path)
            change(model.graph)
            onnx.save(model, path)
        add_engines(stand_in, folder)
        path.write_bytes(honest)
        manifest = read_manifest(folder)
        onnx_in_fp16 = manifest.onnx.model_copy(update={"precision": "fp16"})
        (folder / MANIFEST).write_bytes(manifest.model_copy(update={"onnx": onnx_in_fp16}).to_json())
        sign_off(folder, stand_in)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.claim("`bakeout validate` passes engines with the edit, and fails others")
def test_honest_engines_pass(served):
    report = judged(served(), count=3)
    assert {it.name: it.verdict for it in report.checks if it.verdict != "pass"} == {}
    assert {it.name for it in report.checks if it.target == "tensorrt"} >= {*DRAWN, "configuration", "engines", "runs"}
    assert "weights" not in {it.name for it in report.checks}
    summary = verdict_of(report, "engines")[1]
    assert "fp16 by TensorRT 11.4.0.106 for NVIDIA Stand-in (compute capability 8.9)" in summary
    assert "opaque" in summary
    engines = report.settings["engines"]
    assert isinstance(engines, dict)
    assert (engines["gpu"], engines["version"]) == ("NVIDIA Stand-in", "11.4.0.106")
    assert set(engines["keys"]) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}  # type: ignore[arg-type]
    # Every network was asked, the UNet also with more rows than its engine takes at once.
    assert {it.component for it in report.tensors} == set(engines["keys"])  # type: ignore[arg-type]
    assert max(it.shape[0] for it in report.tensors if it.component == "unet") > 2 * SHAPES.batch.max


def of_base(graph: Any) -> None:
    """The weights of the base in place of the edited ones."""
    (file,) = open_model("shapes").components["unet"].files
    weights = load_file(file)
    for it in graph.initializer:
        if it.name.endswith("ff.net.2.weight"):
            it.CopyFrom(numpy_helper.from_array(weights[it.name].half().numpy(), it.name))


@pytest.mark.slow
@pytest.mark.claim("`bakeout validate` passes engines with the edit, and fails others")
def test_an_engine_without_the_edit_fails(served):
    assert failed(judged(served(of_base))) >= DRAWN


@pytest.mark.slow
def test_an_engine_without_the_edit_in_one_layer_fails(served):
    def restore(graph: Any) -> None:
        (file,) = open_model("shapes").components["unet"].files
        name = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight"
        (it,) = (it for it in graph.initializer if it.name == name)
        it.CopyFrom(numpy_helper.from_array(load_file(file)[name].half().numpy(), name))

    assert failed(judged(served(restore))) >= {"step-parity", "final-parity"}


@pytest.mark.parametrize("fault", ["nan", "constant", pytest.param("wrong", marks=pytest.mark.slow)])
def test_a_broken_engine_fails(served, stand_in, fault):
    stand_in.world.faults.add(fault)
    assert failed(judged(served())) >= {"components", "pictures"}


@pytest.mark.slow
def test_engines_for_another_gpu_are_not_judged(served, stand_in):
    folder = served()
    stand_in.world.gpu = "NVIDIA Another"
    report = judged(folder)
    assert report.verdict == "unjudged"
    verdict, summary = verdict_of(report, "runs")
    assert verdict == "unjudged"
    assert "NVIDIA Stand-in" in summary
    assert "NVIDIA Another" in summary
    assert str(folder) not in summary
    assert verdict_of(report, "engines")[0] == "pass"


@pytest.mark.slow
def test_without_the_library_the_other_targets_are_judged(served, monkeypatch):
    folder = served()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    report = judged(folder, targets=["diffusers", "tensorrt"])
    assert (report.verdict, verdict_of(report, "runs")[0]) == ("unjudged", "unjudged")
    assert {it.verdict for it in report.checks if it.target == "diffusers"} == {"pass"}


@pytest.mark.slow
def test_a_size_that_engines_do_not_draw_is_not_judged(served):
    report = judged(served(), size=(48, 64))
    verdict, summary = verdict_of(report, "runs")
    assert (report.verdict, verdict) == ("unjudged", "unjudged")
    assert "64x64 to 64x64 pixels, and not of 48x64" in summary


@pytest.mark.slow
def test_what_the_manifest_says_of_engines_must_be_so(served, stand_in, monkeypatch):
    def short(*_: object) -> None:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr("bakeout.validate.validation._Validation._draw_baseline", short)
    folder = served()
    engines = read_manifest(folder).tensorrt.engines

    def said(**changes: Any) -> str:
        sign_off(folder, stand_in, **changes)
        report = judged(folder)
        assert failed(report) == {"engines"}
        return verdict_of(report, "engines")[1]

    assert "unet is not in the manifest" in said(engines={it: own for it, own in engines.items() if it != "unet"})
    assert "names 'fax' too" in said(engines={**engines, "fax": engines["unet"]})
    plugged = engines["unet"].model_copy(update={"plugins": 3})
    assert "counts 3 plugins, and the edit needs 0" in said(engines={**engines, "unet": plugged})
    doubtful = engines["unet"].model_copy(update={"doubt": "it has no layers"})
    sign_off(folder, stand_in, engines={**engines, "unet": doubtful})
    verdict, summary = verdict_of(judged(folder), "engines")
    assert verdict == "unjudged"
    assert "of unet: it has no layers" in summary
    sign_off(folder, stand_in, engines=engines)
    (folder / "tensorrt" / "unet" / "model.onnx").write_text("x")
    assert "unet/model.onnx lies beside the weights" in said()


def settings(batch: int, size: tuple[int, int] = (64, 64)) -> Settings:
    return Settings(1, 1.0, size, (4, 8, 8), batch)


@pytest.mark.parametrize(("rows", "asked"), [(1, [2]), (4, [4]), (5, [4, 2]), (9, [4, 4, 2])])
def test_networks_are_asked_as_many_rows_at_a_time_as_engines_take(monkeypatch, rows, asked):
    seen = []

    def answer(_pipeline: Any, _name: str, _interface: Interface, inputs: Any) -> dict[str, torch.Tensor]:
        seen.append(len(inputs["sample"]))
        assert inputs["timestep"].ndim == 0
        return {"out_sample": inputs["sample"] + inputs["timestep"]}

    monkeypatch.setattr(contract, "run_network", answer)
    monkeypatch.setattr("bakeout.validate.engines.run_network", answer)
    sample = torch.arange(float(rows)).reshape(rows, 1)
    inputs = {"sample": sample, "timestep": torch.tensor(2.0)}
    found = run_in_pieces(SHAPES, None, "unet", Interface({}, {}), inputs)
    assert torch.equal(found["out_sample"], sample + 2)
    assert seen == asked


def test_calls_of_other_sizes_are_left_out():
    def of(network: str, name: str, *shape: int) -> Expected:
        return Expected("erased", Call(network, "now", {name: torch.zeros(shape)}), {}, {})

    fitting = [
        of("unet", "sample", 9, 4, 8, 8), of("vae_encoder", "sample", 1, 3, 64, 64),
        of("vae_decoder", "latent_sample", 1, 4, 8, 8), of("text_encoder", "input_ids", 3, 77),
    ]  # fmt: skip
    others = [of("unet", "sample", 9, 4, 4, 8), of("vae_encoder", "sample", 1, 3, 64, 32)]
    assert of_size(SHAPES, [*others, *fitting], 8) == fitting


def test_settings_are_held_to_what_engines_take():
    found = settings_of(SHAPES, settings(12))
    assert (found.batch, found.least) == (2, 2)
    assert why_not_of_size(SHAPES, settings(1)) is None
    assert "not of 64x72" in str(why_not_of_size(SHAPES, settings(1, (64, 72))))


def test_what_a_batch_lacks_is_drawn_for_nothing():
    """The pictures and latents are those of the trials alone, also along another model's path."""

    def pipeline(latents: torch.Tensor, callback_on_step_end: Any, prompt: list[str], **_: Any) -> Any:
        assert len(prompt) == len(latents) == 3
        own = SimpleNamespace(num_timesteps=1)
        after = callback_on_step_end(own, 0, None, {"latents": latents + 1})["latents"]
        assert len(after) == 3
        return SimpleNamespace(images=after[:, :3].permute(0, 2, 3, 1).numpy())

    trials = [Trial("a", 1, "erased"), Trial("b", 2, "erased")]
    callable_ = type("P", (), {"device": "cpu", "__call__": staticmethod(pipeline)})()
    done: list[float] = []
    three = Settings(1, 1.0, (8, 8), (4, 8, 8), 3, 3)
    found = run(callable_, trials, three, progress=done.append)
    assert found.latents.shape == (1, 2, 4, 8, 8)
    assert (len(found.pictures), len(found.problems), done) == (2, 2, [2])
    forced = run(callable_, trials, three, forced=torch.zeros(1, 2, 4, 8, 8))
    assert torch.equal(forced.latents, found.latents)
