"""The demo, from the command line, as a new user runs it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from PIL import Image

from bakeout import demo
from bakeout.artifact import Artifact
from bakeout.builtin.shapes.scenes import mentioned
from bakeout.cli import main
from bakeout.editor.methods import METHODS
from bakeout.editor.recipe import Recipe
from bakeout.validate.report import read_report


def test_the_recipe_of_the_demo_is_one(tmp_path):
    (tmp_path / "recipe.toml").write_text(demo.RECIPE, encoding="utf-8")
    recipe = Recipe.load(tmp_path / "recipe.toml")
    assert [edit.concept for edit in recipe.edits] == ["star", "striped", "yellow", "night"]
    assert {edit.method for edit in recipe.edits} == METHODS.keys()
    assert recipe.written == ("onnx",)
    assert len(recipe.edits) + len(recipe.written) == demo.BAKES


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert done.stderr.endswith("choose another folder with -o\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_demo_erases_four_concepts_and_proves_it(tmp_path):
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "shapes-erased passed" in done.stdout.splitlines()[0]
    assert str(tmp_path / "report" / "report.html") in done.stdout
    assert Artifact.open(tmp_path / "shapes-erased").manifest.targets == ("onnx",)
    report = read_report(tmp_path / "report" / "report.json")
    assert len(report.scenes) == demo.COUNT
    # So the picture says of each of its first prompts what is erased from it, and how.
    for scene, line in zip(report.scenes, report.erased, strict=False):
        assert mentioned(scene.prompt) >= {line.split()[0]}
    found = {(it.model, it.concept, it.kind): it for it in report.detections}
    for concept in ("star", "striped", "yellow", "night"):
        base, artifact = (found[model, concept, "erased"] for model in ("base", "onnx"))
        assert base.detected == base.pictures == 4
        assert artifact.detected <= 2
        assert 0 <= artifact.low <= artifact.detected / artifact.pictures <= artifact.high <= 1
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > picture.height > 300
