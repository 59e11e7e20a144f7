"""`bakeout export`: a format is added to a finished artifact, on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bakeout import Artifact, Recipe, cli, open_model
from bakeout.cli import main
from bakeout.export import onnx as exporter


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="bakeout")


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_target_is_written_again_when_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = cli._progress_bar
    totals = []

    def recorded(total: int, doing: str) -> Any:
        totals.append((total, doing))
        return bar(total, doing)

    monkeypatch.setattr(cli, "_progress_bar", recorded)
    before = (copy / "bakeout.json").read_bytes()
    refused = invoke("export", copy, "--target", "onnx")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == f"Error: {copy} has onnx/ already; replace it with --force\n"
    written = invoke("export", copy, "--target", "onnx", "--force")
    assert (written.exit_code, written.stderr) == (0, "")
    assert written.stdout.startswith(f"{copy / 'onnx'} is written (")
    assert written.stdout.endswith(f" MB): draw with bakeout generate {copy}\n")
    assert (copy / "bakeout.json").read_bytes() == before
    assert totals == [(1, "exporting")] * 2


def test_what_draws_bf16_is_told(copy: Path) -> None:
    written = invoke("export", copy, "--target", "onnx", "--force", "--precision", "bf16")
    assert (written.exit_code, written.stderr) == (0, "")
    assert written.stdout.endswith(f": draw with bakeout generate {copy} --runtime onnxruntime-cuda\n")
    refused = invoke("generate", copy, "--prompt", "a", "-o", copy.parent / "pictures")
    assert refused.exit_code == 2
    assert "does not load in ONNX Runtime (Could not find an implementation for" in refused.stderr
    assert "export the model again in another --precision, or draw with another provider" in refused.stderr
    assert not (copy.parent / "pictures").exists()


def test_a_width_that_cannot_shrink_is_told(copy: Path) -> None:
    written = invoke("export", copy, "--target", "onnx", "--force", "--shrink", "8")
    assert written.exit_code == 0
    assert written.stdout.startswith("No hidden unit is left out: in no FFN does the edit make enough of them constant")


def test_a_broken_target_is_written_again_when_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copy / "bakeout.json").read_bytes()
    shutil.rmtree(copy / "onnx")
    refused = invoke("export", copy, "--target", "onnx")
    assert refused.exit_code == 2
    assert f"run `bakeout export {copy} --target onnx --force`" in refused.stderr
    assert invoke("export", copy, "--target", "onnx", "--force").exit_code == 0
    assert (copy / "bakeout.json").read_bytes() == before
    Artifact.open(copy).verify()
    monkeypatch.chdir(copy)
    refused = invoke("export", ".", "--target", "onnx", "--force")
    assert refused.exit_code == 2
    assert refused.stderr.endswith(" is replaced as a whole, and you are in it; go to another folder first\n")
    Artifact.open(".").verify()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--target", "onnx"], "is no artifact"),
        (["shapes", "--target", "onnx"], "is no artifact"),
        (["nowhere", "--target", "fax"], "'fax' is not one of 'onnx', 'tensorrt'"),
        (["nowhere"], "Missing option '--target'"),
    ],
)
def test_what_cannot_be_exported_is_exit_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("export", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_cure_with_a_space_in_it_can_be_pasted(copy: Path, tmp_path: Path) -> None:
    folder = copy.rename(tmp_path / "my model")
    (folder / "onnx" / "model_index.json").unlink()
    refused = invoke("inspect", folder)
    assert refused.exit_code == 2
    assert f"run `bakeout export '{folder}' --target onnx --force`" in refused.stderr


def test_a_recipe_bakes_its_targets(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: Any, folder: Path, progress: Any, _started: Any, **_changes: Any) -> None:
        assert model.path.name == "diffusers"
        folder.mkdir()
        (folder / "model_index.json").touch()
        progress(1.0)

    monkeypatch.setattr(exporter, "write_onnx", write)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{tiny_model}"\ntargets = ["diffusers", "onnx"]\n[[edits]]\nmethod = "conceptprune"\n'
        'concept = "star"\nprompts = { target = "a star", reference = "a thing" }\n'
        "settings = { steps = 2, first_calls = 1, sparsity = 0.1 }\n"
    )
    done: list[float] = []
    artifact = Recipe.load(recipe).bake(tmp_path / "made", device="cpu", progress=done.append)
    assert sum(done) == pytest.approx(2)
    assert artifact.manifest.targets == ("diffusers", "onnx")
    Artifact.open(tmp_path / "made").verify()
    assert open_model(tmp_path / "made" / "diffusers").family == "sd1"
