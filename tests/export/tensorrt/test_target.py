"""Engines as a target of an artifact, from the command to what is in the folder; with a stand-in for TensorRT."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bakeout.cli import main
from bakeout.editor.edit import Edit, PatchActivation
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.recipe import Range, Tensorrt
from bakeout.export.artifact import STALE, Artifact, making, validation_folder, write_artifact
from bakeout.export.checkpoint import plan_diffusers
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import MANIFEST, base_of
from bakeout.export.tensorrt import target


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="bakeout")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_over(folder: Path) -> list[str]:
    """What lies beside an artifact that is no test's."""
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def drop(folder: Path, target: str) -> None:
    """Take a target out of an artifact."""
    said = json.loads((folder / MANIFEST).read_bytes())
    said["targets"].remove(target)
    said[target] = None
    said["files"] = {name: file for name, file in said["files"].items() if not name.startswith(f"{target}/")}
    (folder / MANIFEST).write_text(json.dumps(said))
    shutil.rmtree(folder / target)


@pytest.fixture(scope="module")
def patched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with graphs alone, for pictures of one size, of a model of which only a folder is known."""
    model = open_model(tiny_model)
    site, side = model.sites_of("ffn2")[0], model.components["unet"].config["sample_size"]
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(side * side, site.d_in, generator=generator) < 0.1
    value = torch.randn(mask.shape, generator=generator) * mask
    edit = Edit((PatchActivation(site.name, "input", mask, value, (side, side)),))
    plan = plan_diffusers(model)
    facts: dict[str, Any] = {"recipe": {}, "calibration": {}, "tools": {}}
    folder = tmp_path_factory.mktemp("patched") / "patched"
    with making(folder, plan, force=False, targets=["onnx"]) as place:
        write_artifact(place, plan, base_of(model, "tiny"), edit, lower_onto(edit, model), facts, ["onnx"])
    return folder


@pytest.mark.claim("`bakeout export --target tensorrt` writes engines and what there is to know of them")
def test_the_command_adds_engines(stand_in: Any, copy: Path) -> None:
    before = content(copy)
    report = validation_folder(copy)
    report.mkdir()
    (report / "report.json").write_text("{}")
    done = invoke("export", copy, "--target", "tensorrt", "--precision", "bf16", "--batch", "1:2:3")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.endswith(f" MB): draw with bakeout generate {copy} --runtime tensorrt\n")
    artifact = Artifact.open(copy)
    artifact.verify()
    made = artifact.manifest.tensorrt
    assert made is not None
    assert artifact.manifest.targets == ("diffusers", "onnx", "tensorrt")
    assert (made.precision, made.shapes.batch) == ("bf16", Range(min=1, opt=2, max=3))
    assert (made.version, made.gpu) == (stand_in.__version__, stand_in.world.gpu)
    assert made.engines.keys() == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert all(it.layers > 0 and it.plugins == 0 and 0 <= it.error < 0.05 for it in made.engines.values())
    after = content(copy)
    assert {name: data for name, data in after.items() if not name.startswith("tensorrt/") and name != MANIFEST} == {
        name: data for name, data in before.items() if name != MANIFEST
    }
    own = {name.removeprefix("tensorrt/") for name in after if name.startswith("tensorrt/")}
    graphs = {name.removeprefix("onnx/") for name in before if name.startswith("onnx/")}
    assert own == {name.replace("model.onnx", "model.engine") for name in graphs}
    assert (report / STALE).is_file()
    assert left_over(copy) == []


def test_inspect_says_in_what_each_target_computes_and_where(stand_in: Any, copy: Path) -> None:
    made = Artifact.open(copy).export("tensorrt", serving=Tensorrt(batch=Range(min=1, opt=1, max=2))).manifest.tensorrt
    assert made is not None
    said = invoke("inspect", copy).stdout
    side = made.shapes.width.opt
    assert "\nonnx/ computes in fp32.\n" in said
    assert (
        f"\ntensorrt/ computes in fp16, by TensorRT {stand_in.__version__} on {stand_in.world.gpu} alone: "
        f"1 to 2 pictures of {side}x{side} pixels at a time.\n"
    ) in said


def test_the_recipes_word_counts_unless_another_is_given(stand_in: Any, copy: Path) -> None:
    said = json.loads((copy / MANIFEST).read_bytes())
    said["recipe"]["tensorrt"] = {"precision": "fp32", "width": None, "height": None, "batch": 2}
    (copy / MANIFEST).write_text(json.dumps(said))
    made = Artifact.open(copy).export("tensorrt").manifest.tensorrt
    assert made is not None
    assert (made.precision, made.shapes.batch.max) == ("fp32", 2)
    again = Artifact.open(copy).export("tensorrt", serving=Tensorrt(precision="fp16"), force=True).manifest.tensorrt
    assert again is not None
    assert (again.precision, again.shapes.batch.max) == ("fp16", 1)
    assert again.engines["unet"].key != made.engines["unet"].key
    # What was built before is in the cache, and its key is the same.
    third = Artifact.open(copy).export("tensorrt", serving=Tensorrt(precision="fp16"), force=True).manifest.tensorrt
    assert third is not None
    assert third.engines == again.engines


@pytest.mark.slow
def test_graphs_that_are_not_there_are_made_for_it_and_removed(stand_in: Any, copy: Path) -> None:
    expected = Artifact.open(copy).export("tensorrt").manifest.tensorrt
    drop(copy, "onnx")
    drop(copy, "tensorrt")
    artifact = Artifact.open(copy).export("tensorrt")
    assert artifact.manifest.targets == ("diffusers", "tensorrt")
    assert {path.name for path in copy.iterdir()} == {MANIFEST, "edit.safetensors", "diffusers", "tensorrt"}
    assert artifact.manifest.tensorrt == expected


@pytest.mark.slow
def test_graphs_that_are_not_in_fp32_are_no_source(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("graphs are made")

    before = (copy / "onnx" / "unet" / "model.onnx").stat().st_size
    done = invoke("export", copy, "--target", "onnx", "--precision", "fp16", "--force")
    assert (done.exit_code, done.stderr) == (0, "")
    artifact = Artifact.open(copy)
    assert artifact.manifest.onnx is not None
    assert artifact.manifest.onnx.precision == "fp16"
    assert (copy / "onnx" / "unet" / "model.onnx").stat().st_size < 0.8 * before
    monkeypatch.setattr("bakeout.export.artifact.with_onnx", refuse)
    assert invoke("export", copy, "--target", "tensorrt", "--check").stderr == "Error: graphs are made\n"


def test_an_edit_in_the_graph_needs_the_base_and_our_kernel(stand_in: Any, patched: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(patched, tmp_path / "patched"))
    done = invoke("export", folder, "--target", "tensorrt")
    assert (done.exit_code, done.stderr) == (0, "")
    artifact = Artifact.open(folder)
    assert artifact.manifest.tensorrt is not None
    assert {name: it.plugins for name, it in artifact.manifest.tensorrt.engines.items()} == {
        "text_encoder": 0, "unet": 1, "vae_encoder": 0, "vae_decoder": 0,
    }  # fmt: skip
    with pytest.raises(InputError, match="has no diffusers/ of which a target could be made: give the model"):
        artifact.export("onnx", precision="fp16", force=True)
    size = artifact.size
    drop(folder, "onnx")
    assert Artifact.open(folder).size == size == (16, 16)


@pytest.mark.claim("an engine that is not what was asked for is refused, and nothing of it is left")
@pytest.mark.parametrize("fault", ["fp32-layer", "nan", "constant", "wrong", "out-of-memory", "parser"])
def test_a_broken_engine_leaves_the_artifact_as_it_was(stand_in: Any, copy: Path, fault: str) -> None:
    before = content(copy)
    stand_in.world.faults.add(fault)
    done = invoke("export", copy, "--target", "tensorrt")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert content(copy) == before
    assert left_over(copy) == []


def test_an_inspector_that_is_not_understood_is_a_doubt_that_is_told_and_kept(stand_in: Any, copy: Path) -> None:
    stand_in.world.faults.add("unnamed")
    done = invoke("export", copy, "--target", "tensorrt")
    assert done.exit_code == 0
    assert "Warning: whether all layers of unet compute in the precision asked for is not known" in done.stderr
    made = Artifact.open(copy).manifest.tensorrt
    assert made is not None
    assert all("no layer says of what it is made" in it.doubt for it in made.engines.values())


@pytest.mark.claim("graphs are checked against TensorRT's published operators on any machine (`--check`)")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_check_needs_neither_tensorrt_nor_a_gpu_and_changes_nothing(copy: Path, precision: str) -> None:
    before = content(copy)
    done = invoke("export", copy, "--target", "tensorrt", "--check", "--precision", precision, "--batch", "1:1:4")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "1 to 4 pictures of" in done.stdout
    assert content(copy) == before
    assert left_over(copy) == []


def test_a_check_only_reads(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a place to write was asked for")

    monkeypatch.setattr("bakeout.export.artifact.workplace", refuse)
    # Engines that are to be replaced may be broken, and whoever is in the folder may stay there.
    (copy / "tensorrt").mkdir()
    (copy / "tensorrt" / "left").write_text("over")
    monkeypatch.chdir(copy)
    done = invoke("export", ".", "--target", "tensorrt", "--check")
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_check_of_graphs_that_are_there_needs_no_base(patched: Path) -> None:
    done = invoke("export", patched, "--target", "tensorrt", "--check")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "1 picture of 16x16 pixels at a time" in done.stdout
    refused = invoke("export", patched, "--target", "tensorrt", "--check", "--shrink", "0")
    assert refused.exit_code == 2
    assert "was made from 'tiny', a folder of which it knows no place" in refused.stderr


def test_a_check_without_room_for_temporary_files_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(copy / "nowhere"))
    done = invoke("export", copy, "--target", "tensorrt", "--check")
    assert done.exit_code == 2
    assert done.stderr.endswith("make room for temporary files, which go where TMPDIR says\n")
    assert left_over(copy) == []


def test_a_check_whose_graphs_do_not_fit_names_the_folder_and_how_to_have_another(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(copy, "onnx")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    usage = shutil.disk_usage(copy)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = invoke("export", copy, "--target", "tensorrt", "--check")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {temporary} needs ")
    assert done.stderr.endswith("make room, or set TMPDIR to another folder\n")
    assert [*temporary.iterdir()] == []


def test_what_a_check_finds_is_one_sentence(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("TensorRT has no such operator; mend it")

    monkeypatch.setattr(target, "check", refuse)
    done = invoke("export", copy, "--target", "tensorrt", "--check")
    assert (done.exit_code, done.stderr) == (2, "Error: TensorRT has no such operator; mend it\n")


def test_without_the_library_it_says_so_before_it_begins(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr(Artifact, "_exporting", refuse)
    before = content(copy)
    done = invoke("export", copy, "--target", "tensorrt")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: TensorRT is not installed; ")
    assert done.stderr.endswith(
        f"; what needs neither is checked by `bakeout export {copy} --target tensorrt --check`\n"
    )
    assert content(copy) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "onnx", "--check"], "--check is of tensorrt's engines; leave it out, or export to tensorrt"),
        (["--target", "onnx", "--size", "64"], "--size is of tensorrt's engines"),
        (["--target", "onnx", "--batch", "4"], "--batch is of tensorrt's engines"),
        (["--target", "onnx", "--device", "cuda"], "--device is of tensorrt's engines"),
        (["--target", "tensorrt", "--check", "--size", "33"], "sides are multiples of"),
        (["--target", "tensorrt", "--check", "--device", "cuda"], "--check needs no GPU: leave --device out"),
        (["--target", "tensorrt", "--check", "--batch", "none"], "--batch 'none' is none"),
        (["--target", "tensorrt", "--check", "--precision", "int8"], "'int8' is not one of"),
        (["--target", "tensorrt", "--check", "--shrink", "5"], "shrink is 5; choose of"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(copy: Path, options: list[str], said: str) -> None:
    before = content(copy)
    done = invoke("export", copy, *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert content(copy) == before


def test_what_cannot_be_asked_for_in_python_is_refused(copy: Path) -> None:
    artifact = Artifact.open(copy)
    with pytest.raises(InputError, match="'int8' is no precision; choose of fp32, fp16, bf16"):
        artifact.export("onnx", precision="int8", force=True)
    with pytest.raises(InputError, match="serving is of TensorRT's engines"):
        artifact.export("onnx", serving=Tensorrt(), force=True)
