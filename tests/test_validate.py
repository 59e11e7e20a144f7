"""`bakeout.Artifact.validate`, `bakeout validate` and what `bakeout inspect` says of it; what is found, is given."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import bakeout
from bakeout.artifact import report_folder, validate_folder
from bakeout.cli import main
from bakeout.describe import describe_report, describe_validation
from bakeout.editor.errors import InputError
from bakeout.export.manifest import file_digest
from bakeout.recipe import open_any
from bakeout.validate import validation
from bakeout.validate.report import read_report
from bakeout.validate.report.schema import REPORT_VERSION, Check, Detection, Report, verdict_of


def report_of(folder: Path, *verdicts: str) -> Report:
    """A report whose checks have these verdicts."""
    checks = tuple(
        Check(name=f"check-{n}", target="onnx", verdict=it, summary=f"What {n} found.", measured=0.25, limit=0.5)
        for n, it in enumerate(verdicts)
    )
    seen = Detection(
        concept="star", kind="erased", model="onnx", detected=1, pictures=12, low=0.002, high=0.38, confidence=0.95
    )
    return Report(
        version=REPORT_VERSION, verdict=verdict_of(checks), artifact=folder.name,
        manifest=file_digest(folder / "bakeout.json"), base="shapes", edit="0" * 64, erased=("star (conceptprune)",),
        profile="quick", settings={}, tools={}, checks=checks, tensors=(), curves=(), scenes=(), detections=(seen,),
        detector="the detector of shapes", tolerances=(), seconds=1.5,
    )  # fmt: skip


@pytest.fixture
def folder(exported, tmp_path):
    """An artifact, to be validated beside it."""
    link = tmp_path / "artifact"
    link.mkdir()
    for path in exported.rglob("*"):
        target = link / path.relative_to(exported)
        target.mkdir(exist_ok=True) if path.is_dir() else os.link(path, target)
    return link


@pytest.fixture
def found(monkeypatch, folder):
    """What the next validation finds: a list of verdicts; and what it was asked."""
    state = {"verdicts": ["pass"], "asked": None}

    def validate(artifact, **options):
        state["asked"] = options
        options.get("progress", lambda _: None)(1.0)
        return report_of(Path(artifact), *state["verdicts"]), {}

    monkeypatch.setattr(validation, "validate", validate)
    return state


def test_the_public_artifact_validates_beside_itself(folder, found):
    report = bakeout.Artifact.open(folder).validate(count=4)
    assert found["asked"] == {"count": 4}
    home = folder.with_name("artifact-validation")
    assert read_report(home / "report.json") == report
    assert {path.name for path in home.iterdir()} == {"report.json", "report.html", "junit.xml"}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_an_earlier_report_is_replaced_whole(folder, found):
    home = report_folder(folder)
    validate_folder(folder)
    (home / "STALE").write_text("It is old.")
    (home / "pictures").mkdir()
    (home / "pictures" / "1-base.png").touch()
    found["verdicts"] = ["fail"]
    validate_folder(folder)
    assert read_report(home / "report.json").verdict == "fail"
    assert {path.name for path in home.iterdir()} == {"report.json", "report.html", "junit.xml"}


@pytest.mark.parametrize("name", ["notes.txt", "pictures/sub/1.png", "pictures/notes.txt", "report.json/x"])
def test_a_folder_with_anything_else_is_never_replaced(folder, found, tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(InputError, match="never overwritten"):
        validate_folder(folder, tmp_path / "mine")
    assert found["asked"] is None
    assert path.read_text() == "precious"


def test_links_and_files_are_never_replaced(folder, found, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder"):
        validate_folder(folder, tmp_path / "file")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "report.json").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match="never overwritten"):
        validate_folder(folder, tmp_path / "home")


@pytest.mark.parametrize("place", [".", "..", "report", "onnx"])
def test_a_report_is_never_in_the_artifact_nor_around_it(folder, found, place):
    with pytest.raises(InputError, match="lie in one another"):
        validate_folder(folder, folder / place)


def test_an_empty_folder_may_be_given(folder, found, tmp_path):
    (tmp_path / "empty").mkdir()
    validate_folder(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "report.html").is_file()


def test_a_validation_that_breaks_off_leaves_the_earlier_report(folder, found, monkeypatch):
    validate_folder(folder)

    def breaks(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "validate", breaks)
    with pytest.raises(KeyboardInterrupt):
        validate_folder(folder)
    assert read_report(report_folder(folder) / "report.json").verdict == "pass"


def test_a_folder_that_cannot_be_written_is_one_sentence(folder, found, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another folder with -o"):
        validate_folder(folder, tmp_path / "file" / "under")


@pytest.mark.parametrize(
    ("verdicts", "code", "said"),
    [
        (["pass", "pass"], 0, "passed"),
        (["pass", "fail", "unjudged"], 1, "failed"),
        (["pass", "unjudged"], 3, "could not be judged"),
    ],
)
def test_the_exit_code_is_the_verdict(folder, found, tmp_path, verdicts, code, said):
    found["verdicts"] = verdicts
    done = CliRunner().invoke(main, ["validate", str(folder), "-o", str(tmp_path / "out")])
    assert done.exit_code == code
    assert done.output.startswith(f"artifact {said}: shapes without star (conceptprune)\n")
    assert f"The report is {tmp_path / 'out' / 'report.html'}" in done.output
    assert ("- check-1 of onnx: What 1 found." in done.output) == (verdicts[1] != "pass")


def test_what_cannot_be_used_is_exit_2(tmp_path):
    done = CliRunner().invoke(main, ["validate", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no artifact" in done.output
    assert len(done.output.splitlines()) == 1


def test_options_reach_the_validation(folder, found, tmp_path):
    words = (
        f"validate {folder} --base b --edit e --profile release --target onnx --target diffusers --prompts p --count 6"
        " --seed 3 --steps 4 --guidance 2.5 --size 64x48 --scheduler euler --device cpu"
        " --provider CPUExecutionProvider --threads 2 --kernels library"
    )
    assert CliRunner().invoke(main, words.split()).exit_code == 0
    asked = found["asked"]
    sessions = asked.pop("sessions")
    assert (sessions.providers, sessions.threads, sessions.kernels) == (("CPUExecutionProvider",), 2, "library")
    assert callable(asked.pop("progress"))
    assert asked == {
        "base": "b", "edit": Path("e"), "profile": "release", "targets": ("onnx", "diffusers"), "prompts": Path("p"),
        "count": 6, "seed": 3, "steps": 4, "guidance": 2.5, "size": (64, 48), "scheduler": "euler", "device": "cpu",
    }  # fmt: skip
    CliRunner().invoke(main, ["validate", str(folder)])
    assert found["asked"]["sessions"] is None
    assert found["asked"]["targets"] is None


def test_the_table_is_short_and_faults_come_first(folder):
    text = describe_report(report_of(folder, "fail", "pass"))
    lines = text.splitlines()
    assert lines[2] == "- check-0 of onnx: What 0 found."
    assert "1 of 12   0.2% to 38.0% (95%)" in text
    assert max(map(len, lines)) < 100


def test_inspect_tells_of_the_validation(folder, found):
    artifact = bakeout.Artifact.open(folder)
    assert describe_validation(artifact).startswith("Not validated: run")
    artifact.validate()
    assert describe_validation(artifact).startswith("Validated, profile quick: it passed")
    assert "Validated, profile quick: it passed" in CliRunner().invoke(main, ["inspect", str(folder)]).output
    path = report_folder(folder) / "report.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "manifest": "f" * 64}))
    assert describe_validation(artifact).startswith("Not validated as it is now (an earlier state passed)")
    path.write_text("{}")
    assert describe_validation(artifact).startswith("Not validated: ")


def test_what_is_opened_anywhere_can_be_validated(folder):
    assert isinstance(open_any(folder), bakeout.Artifact)
    assert isinstance(bakeout.Artifact.open(folder), bakeout.Artifact)
