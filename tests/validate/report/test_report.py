"""Reports are written whole and read strictly."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from bakeout.editor.errors import InputError
from bakeout.validate.report import read_report, write_report
from bakeout.validate.report.schema import Check, Drawn, verdict_of

SAMPLES = ("pass", "fail", "unjudged", "large")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_report_is_written_whole_and_read_again(samples, tmp_path, name):
    report, pictures = samples(name)
    write_report(report, pictures, tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"report.json", "junit.xml", "report.html", *pictures}
    assert all((tmp_path / file).read_bytes() == picture for file, picture in pictures.items())
    assert read_report(tmp_path / "report.json") == report


def test_the_same_report_gives_the_same_bytes(samples, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_report(*samples("fail"), tmp_path / folder)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_name_that_is_no_text_can_be_written(samples, remake, tmp_path):
    report, pictures = samples("pass")
    write_report(remake(report, artifact="a\udcff"), pictures, tmp_path)
    assert read_report(tmp_path / "report.json").artifact == "a?"


def test_what_cannot_be_drawn_leaves_nothing_behind(samples, tmp_path):
    report, pictures = samples("pass")
    with pytest.raises(OSError, match="cannot identify"):
        write_report(report, {**pictures, next(iter(pictures)): b"GIF89a"}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_pictures_that_are_not_the_report_s_are_refused(samples, tmp_path, change):
    report, pictures = samples("pass")
    first = next(iter(pictures))
    changed = dict(pictures)
    if change == "one less":
        del changed[first]
    else:
        changed["../outside.png"] = pictures[first]
    with pytest.raises(ValueError, match=r"outside\.png" if change == "one more" else first):
        write_report(report, changed, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file",
    ["../a.png", "pictures/../../a.png", "/a.png", "a.png", "pictures/.a.png", "pictures/a/b.png", "pictures\\a.png",
     "pictures/a.svg", "pictures/a.png\n", "pictures/ü.png", f"pictures/{'a' * 300}.png"],
)  # fmt: skip
def test_a_picture_s_name_does_not_leave_the_folder(file):
    values = {"psnr_db": None, "ssim": None, "max_difference": None, "problem": None, "seen": None}
    assert Drawn(file="pictures/03-base.png", **values)
    with pytest.raises(ValidationError):
        Drawn(file=file, **values)


@pytest.mark.parametrize(
    ("verdicts", "due"),
    [(["pass"], "pass"), (["pass", "unjudged"], "unjudged"), (["unjudged", "fail", "pass"], "fail"), ([], "unjudged")],
)
def test_the_verdict_is_that_of_the_checks(verdicts, due):
    checks = [Check(name=str(i), target=None, verdict=verdict, summary="") for i, verdict in enumerate(verdicts)]
    assert verdict_of(checks) == due


def test_a_report_that_contradicts_itself_is_no_report(samples, remake):
    report, _ = samples("fail")
    for verdict in ("pass", "unjudged"):
        with pytest.raises(ValidationError, match="the checks say fail"):
            remake(report, verdict=verdict)
    with pytest.raises(ValidationError):
        remake(report, verdict="unjudged", checks=())
    with pytest.raises(ValidationError, match="the same check"):
        remake(report, checks=(*report.checks, report.checks[0]))
    with pytest.raises(ValidationError, match="the same picture"):
        remake(report, scenes=(*report.scenes, report.scenes[0]))
    with pytest.raises(ValidationError):
        remake(report, seconds=float("nan"))
    with pytest.raises(ValidationError):
        remake(report, settings={"a": [float("inf")]})


@pytest.fixture
def written(samples, tmp_path):
    """Write a changed `report.json`."""
    said = json.loads(samples("fail")[0].to_json())

    def write(**changes):
        path = tmp_path / "report.json"
        path.write_text(json.dumps(said | changes), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 and this bakeout reads 1"),
        ({"version": True}, "version True"),
        ({"version": "1"}, "version '1'"),
        ({"verdict": "pass"}, "the checks say fail"),
        ({"extra": 1}, "extra"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": float("nan")}, "is no report"),
        ({"seconds": "1"}, "seconds"),
        ({"edit": "x"}, "edit"),
        ({"checks": []}, "checks"),
        ({"settings": {"a": [[[float("inf")]]]}}, "is no report"),
    ],
)
def test_an_odd_report_is_refused_in_one_sentence(written, changes, words):
    path = written(**changes)
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "run `bakeout validate` again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_not_changed_is_read(written):
    assert read_report(written()).verdict == "fail"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe\x00", b'{"version": 1}'])
def test_what_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(path)


def test_a_report_that_is_too_large_or_no_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        read_report(tmp_path / "report.json")
    with pytest.raises(InputError, match="is not a file"):
        read_report(tmp_path)
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        os.truncate(stream.fileno(), 2**40)
    with pytest.raises(InputError, match="more than"):
        read_report(large)


def test_reading_is_light():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'onnx', 'onnxruntime'}"
    program = f"import bakeout.validate.report, sys\nprint(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
