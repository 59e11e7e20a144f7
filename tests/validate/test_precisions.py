"""Validations of graphs in 16 bits: what is honest passes by the limits of its precision, and what is not fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from bakeout.editor.edit import Edit, PatchWeightInput
from bakeout.editor.model import open_model
from bakeout.export.artifact import EDIT
from bakeout.export.manifest import MANIFEST, File, file_digest, read_manifest
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.validate.audit import unlike
from bakeout.validate.report.schema import Report
from bakeout.validate.tolerances import BF16, FP16, FP32, LIMITS, PARITY, TABLE, table_of
from bakeout.validate.validation import validate

OF_STEPS = {"step-parity", "final-parity", "step-rounding", "drift"}


def judged(folder: Path, **options: Any) -> Report:
    """The report on as few pictures as show something."""
    sessions = SessionSettings(threads=1)
    return validate(folder, targets=["onnx"], count=2, steps=2, device="cpu", sessions=sessions, **options)[0]


def judged_by_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report on what files say, where there is no memory to draw."""

    def short(*_: object) -> None:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr("bakeout.validate.validation._Validation._draw_baseline", short)
    return judged(folder)


def failed(report: Report) -> set[str]:
    return {it.name for it in report.checks if it.verdict == "fail"}


def sign_off(folder: Path, precision: str) -> None:
    """Make the manifest say that the files are as they are now, in a precision."""
    manifest = read_manifest(folder)
    assert manifest.onnx is not None
    files = {
        path.relative_to(folder).as_posix(): File(bytes=path.stat().st_size, sha256=file_digest(path))
        for target in manifest.targets
        for path in sorted((folder / target).rglob("*"))
        if path.is_file()
    }
    how = manifest.onnx.model_copy(update={"precision": precision})
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"files": files, "onnx": how}).to_json())


@pytest.fixture(scope="module")
def in_16_bits(
    starless: Path, narrowed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The artifact of `shapes` without stars, its graphs in a precision."""
    home = tmp_path_factory.mktemp("narrow")

    def made(precision: str) -> Path:
        folder = home / precision
        if not folder.exists():
            shutil.copytree(starless, folder, ignore=shutil.ignore_patterns("onnx"))
            narrowed(starless / "onnx", folder / "onnx", precision)
            sign_off(folder, precision)
        return folder

    return made


@pytest.fixture
def fp16(in_16_bits: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(in_16_bits("fp16"), tmp_path / "artifact"))


@contextmanager
def unet(folder: Path, precision: str = "fp16") -> Iterator[Any]:
    """The UNet's graph, to change; then it is signed off."""
    path = folder / "onnx" / "unet" / "model.onnx"
    model = onnx.load(path)
    yield model.graph
    onnx.save(model, path)
    sign_off(folder, precision)


def masks(folder: Path) -> dict[str, torch.Tensor]:
    """What the Edit prunes, by the weight's name."""
    model = open_model("shapes")
    operations = Edit.load(folder / EDIT).operations
    return {str(model.site(it.site).weight): it.mask for it in operations if isinstance(it, PatchWeightInput)}


def base_weights() -> dict[str, torch.Tensor]:
    (file,) = open_model("shapes").components["unet"].files
    return load_file(file)


def put(graph: Any, name: str, value: torch.Tensor) -> None:
    (initializer,) = (it for it in graph.initializer if it.name == name)
    initializer.CopyFrom(numpy_helper.from_array(value.half().numpy(), name))


@pytest.mark.slow
@pytest.mark.claim("`bakeout validate` passes an honest artifact in fp16, and fails another edit in it")
def test_an_honest_artifact_in_fp16_passes(in_16_bits):
    report = judged(in_16_bits("fp16"))
    assert failed(report) == set()
    assert report.verdict == "pass"
    assert report.settings["precisions"] == {"onnx": "fp16"}
    assert report.tolerances == table_of(["fp16"])
    assert {it.limit for it in report.tensors if it.component == "unet"} == {FP16.component.limit}
    # By the limits of fp32 it would not pass: it is in fp16 indeed.
    assert max(it.relative_rms or 0 for it in report.tensors if it.component == "unet") > FP32.component.limit
    assert max(it.measured or 0 for it in report.checks if it.name == "step-rounding") > FP32.step.limit
    assert {it.limit for it in report.checks if it.name in ("step-parity", "final-parity")} == {PARITY.limit}
    (seen,) = (it for it in report.checks if it.name == "edit-is-seen" and it.target == "onnx")
    assert (seen.limit, seen.verdict) == (FP16.far.limit, "pass")
    assert "anything of onnx in fp16" in seen.summary or "needed of onnx in fp16" in seen.summary


def test_what_a_manifest_says_of_precision_must_be_so(fp16, monkeypatch):
    sign_off(fp16, "fp32")
    report = judged_by_files(fp16, monkeypatch)
    (weights,) = (it for it in report.checks if it.name == "weights")
    assert (weights.verdict, "of the type FLOAT16" in weights.summary) == ("fail", True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_graph_in_fp32_is_not_judged_by_wider_limits(artifact, precision, monkeypatch):
    """Its weights are exact, and beside a coarser precision's rounding there would be room for anything."""
    sign_off(artifact, precision)
    report = judged_by_files(artifact, monkeypatch)
    (weights,) = (it for it in report.checks if it.name == "weights")
    assert failed(report) == {"weights"}
    for network in ("text_encoder", "unet"):
        assert re.search(rf"{network} computes [\d,]+ products in more than {precision}", weights.summary)


@pytest.mark.slow
@pytest.mark.claim("`bakeout validate` passes an honest artifact in fp16, and fails another edit in it")
@pytest.mark.parametrize("which", ["base", "rolled"])
def test_another_edit_in_fp16_fails(fp16, which):
    with unet(fp16) as graph:
        for name, mask in masks(fp16).items():
            weight = base_weights()[name].float()
            put(graph, name, weight if which == "base" else weight.masked_fill(mask.roll(1, dims=1), 0))
    assert failed(judged(fp16)) >= {"weights", "components", *OF_STEPS, "pictures"}


@pytest.mark.slow
def test_a_constant_picture_fails(fp16):
    path = fp16 / "onnx" / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    (out,) = (node for node in model.graph.node if "sample" in node.output)
    out.output[0] = "drawn"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    model.graph.node.append(helper.make_node("Mul", ["drawn", "nothing"], ["sample"]))
    onnx.save(model, path)
    sign_off(fp16, "fp16")
    assert failed(judged(fp16)) >= {"components", "pictures"}


def nearest_other(graph: Any) -> None:
    """One weight that is not the nearest of fp16 to the base's."""
    (name,) = [it.name for it in graph.initializer if it.name == "mid_block.resnets.0.conv1.weight"]
    value = base_weights()[name].half()
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(9.0).half())
    put(graph, name, value)


def through(graph: Any, type_: int) -> None:
    """What the first Linear of attention gives, for a moment in another type."""
    node = next(it for it in graph.node if it.op_type == "MatMul")
    inner = [f"{node.output[0]}.raw", f"{node.output[0]}.small"]
    place = list(graph.node).index(node)
    casts = [
        helper.make_node("Cast", [inner[0]], [inner[1]], "down", to=type_),
        helper.make_node("Cast", [inner[1]], [node.output[0]], "up", to=TensorProto.FLOAT16),
    ]
    node.output[0] = inner[0]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*rest[: place + 1], *casts, *rest[place + 1 :]])


def second_weights(graph: Any) -> None:
    """A weight of the base under another name, which could be taken instead."""
    name = next(it for it in base_weights() if it.endswith("ff.net.2.weight"))
    value = base_weights()[name].float()
    graph.initializer.append(numpy_helper.from_array(value.numpy(), f"{name}.fp32"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nearest_other, "1 of"),
        (lambda graph: through(graph, TensorProto.FLOAT8E4M3FN), "of the type FLOAT8E4M3FN"),
        (lambda graph: through(graph, TensorProto.INT8), "of the type INT8"),
        (lambda graph: through(graph, TensorProto.BFLOAT16), "of the type BFLOAT16"),
        (second_weights, "numbers that are no weights"),
    ],
)
def test_what_is_no_rounding_of_the_edited_weights_fails(fp16, change, said, monkeypatch):
    with unet(fp16) as graph:
        change(graph)
    report = judged_by_files(fp16, monkeypatch)
    (weights,) = (it for it in report.checks if it.name == "weights")
    assert (weights.verdict, said in weights.summary) == ("fail", True), weights.summary


@pytest.mark.slow
def test_what_nothing_here_computes_is_not_judged(in_16_bits):
    report = judged(in_16_bits("bf16"))
    assert failed(report) == set()
    assert report.verdict == "unjudged"
    (runs,) = (it for it in report.checks if it.verdict == "unjudged")
    assert runs.name == "runs"
    assert "cannot compute in bf16 with CPUExecutionProvider" in runs.summary
    assert "--provider CUDAExecutionProvider" in runs.summary
    assert {it.name for it in report.checks if it.target == "onnx"} == {"configuration", "interface", "weights", "runs"}


@pytest.mark.slow
def test_a_provider_without_kernels_for_bf16_is_no_verdict(in_16_bits, monkeypatch):
    """One that starts, and lacks some of what the graph needs."""
    monkeypatch.setattr("bakeout.validate.validation.why_not_here", lambda *_: None)
    report = judged(in_16_bits("bf16"))
    (runs,) = (it for it in report.checks if it.verdict != "pass")
    assert (report.verdict, runs.name, runs.verdict) == ("unjudged", "runs", "unjudged")
    assert "has no kernels for it in bf16" in runs.summary
    # In any other precision it is the graph that no runtime takes.
    monkeypatch.setattr("bakeout.validate.validation.precision_of", lambda *_: "fp16")
    assert "runs" in failed(judged(in_16_bits("bf16")))


def test_files_in_bf16_are_judged_where_nothing_computes_them(in_16_bits, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(in_16_bits("bf16"), tmp_path / "artifact"))
    with unet(folder, "bf16") as graph:
        (weight,) = (it for it in graph.initializer if it.name == "mid_block.resnets.0.conv1.weight")
        assert weight.data_type == TensorProto.BFLOAT16
        weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    report = judged_by_files(folder, monkeypatch)
    assert (report.verdict, failed(report)) == ("fail", {"weights"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounding_is_told_from_the_next_number(dtype):
    stored = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    stored[0, 0] = 0
    narrow = stored.to(dtype)
    assert unlike(narrow, stored, stored, dtype) == 0
    assert unlike(narrow, stored, stored) > 0
    off = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    assert unlike(off, stored, stored, dtype) == stored.numel()
    # Of an edited layer what is zero or as before is exact, and what is another value is rounded.
    expected = stored.double().masked_fill(stored > 1, 0)
    expected[0] += 1 / 3
    assert unlike(expected.float().to(dtype), expected, stored, dtype) == 0
    off = expected.float().to(dtype)
    off[1] = torch.nextafter(off[1], torch.full_like(off[1], torch.inf))
    assert unlike(off, expected, stored, dtype) == 64
    off = expected.float().to(dtype) * 1.05
    assert unlike(off, expected, stored, dtype) >= (expected != 0).sum()


def test_what_16_bits_do_not_hold_is_no_rounding():
    stored = torch.tensor([1.0, 70000.0])
    assert unlike(stored.half(), stored, stored, torch.float16) == 1
    assert unlike(stored.half(), stored.double() + torch.tensor([0, 1]), stored, torch.float16) == 1


def test_the_limits_of_a_precision_are_wider_and_prove_what_they_say():
    for narrow, wide in ((FP16, FP32), (BF16, FP16)):
        for name in ("component", "vae", "step", "drift", "far_step", "far", "disagreement"):
            assert getattr(narrow, name).limit >= getattr(wide, name).limit
        assert narrow.psnr.limit < wide.psnr.limit
    for limits in LIMITS.values():
        share = max(limits.step.limit / limits.far_step.limit, limits.drift.limit / limits.far.limit)
        assert share <= {"fp32": PARITY.limit, "fp16": PARITY.limit, "bf16": 0.25}[limits.precision]
    assert table_of([]) == table_of(["fp32"]) == TABLE
    whole = table_of(LIMITS)
    assert len({it.name for it in whole}) == len(whole) > len(table_of(["fp16"])) > len(TABLE)
    assert all(it.reason.endswith(".") and it.limit > 0 for it in whole)
