"""The table of docs/tensorrt.md is what the records give, and these are of the claims that tests make."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import what_ran

PLUGIN = f"""
import sys
sys.path.append({str(Path(what_ran.__file__).parent)!r})
from what_ran import *
"""
TESTS = """
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError

@pytest.mark.claim("one")
@pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.gpu)])
def test_one(number):
    assert number

@pytest.mark.claim("one")
def test_one_more():
    pytest.skip("no | time")

@pytest.mark.claim("two")
@pytest.mark.gpu
@pytest.mark.tensorrt
def test_two():
    pass

@pytest.mark.claim("three")
@pytest.mark.parametrize("right", [True, False])
def test_three(right):
    assert right

@pytest.mark.claim("four")
def test_four(broken):
    pass

@pytest.fixture
def stand_in():
    pass

@pytest.fixture
def engine(stand_in):
    pass

@pytest.mark.claim("five")
def test_five(engine):
    pass

def test_nothing():
    pass
"""


def claims_in(source: str) -> dict[str, set[str]]:
    """Claim → names of the functions that have it as a marker."""
    found = defaultdict(set)
    for function in ast.walk(ast.parse(source)):
        for mark in getattr(function, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.claim":
                [text] = mark.args
                assert isinstance(text, ast.Constant)
                found[text.value].add(function.name)
    return found


def counts(passed=0, stood_in=0, failed=0, not_run=None):
    return {"passed": passed, "passed with a stand-in": stood_in, "failed": failed, "not run": not_run or {}}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tests")
    (folder / "conftest.py").write_text(PLUGIN)
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    claim\n    gpu\n    tensorrt\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--what-ran",
        "ran.json",
    ]
    subprocess.run(command, cwd=folder, env={"CUDA_VISIBLE_DEVICES": ""}, check=False, capture_output=True)
    return json.loads((folder / "ran.json").read_text(encoding="utf-8"))


def test_what_became_of_each_case_is_recorded(record):
    assert record["claims"] == {
        "five": {"test_it.py::test_five": counts(stood_in=1)},
        "four": {"test_it.py::test_four": counts(failed=1)},
        "one": {
            "test_it.py::test_one": counts(passed=2, not_run={"needs an NVIDIA GPU": 1}),
            "test_it.py::test_one_more": counts(not_run={"no | time": 1}),
        },
        "three": {"test_it.py::test_three": counts(passed=1, failed=1)},
        "two": {"test_it.py::test_two": counts(not_run={"needs an NVIDIA GPU and TensorRT": 1})},
    }
    assert record["machine"]["gpu"] == "none"
    assert record["machine"]["tensorrt"] == "not installed"
    assert record["machine"]["torch"][0].isdigit()


def test_a_gpu_is_told(monkeypatch):
    from bakeout.export.tensorrt import library

    monkeypatch.setattr(what_ran, "_lacking", lambda needs: [])
    monkeypatch.setattr(library, "gpu", lambda device: SimpleNamespace(name="NVIDIA X", driver="1.2"))
    found = what_ran.machine()
    assert (found["gpu"], found["driver"]) == ("NVIDIA X", "1.2")


def test_the_table_has_what_ran_first_and_a_column_for_each_record(record):
    claims = {"two": {"test_it.py::test_two": counts(passed=1)}}
    other = {"machine": {"gpu": "NVIDIA X", "driver": "1.2"}, "claims": claims}
    one, both = what_ran.table([record]).splitlines(), what_ran.table([record, other]).splitlines()
    names = [line.split(" | ")[0][2:] for line in one[3:]]
    assert sorted(names[:2]) == ["one", "three"]
    assert names[2] == "five"
    assert sorted(names[3:]) == ["four", "two"]
    assert "| five | passed with a stand-in (1) | [test_it.py](../test_it.py) |" in one
    assert "| one | passed (2); not run: needs an NVIDIA GPU; not run: no / time | [test_it.py](../test_it.py) |" in one
    assert "| three | **failed** (1); passed (1) | [test_it.py](../test_it.py) |" in one
    assert "| two | not run: needs an NVIDIA GPU and TensorRT | passed (1) | [test_it.py](../test_it.py) |" in both
    assert "NVIDIA X" in both[0]
    assert any(line.startswith("| four |") and "not run: claimed later" in line for line in both)


def test_the_table_goes_between_its_marks(record):
    page = what_ran.with_table(f"above\n{what_ran.BEGIN}\nold\n{what_ran.END}\nbelow\n", [record])
    assert page.startswith(f"above\n{what_ran.BEGIN}\n| what is claimed |")
    assert page.endswith(f"|\n{what_ran.END}\nbelow\n")
    assert "old" not in page
    assert what_ran.with_table(page, [record]) == page
    with pytest.raises(ValueError, match="once each"):
        what_ran.with_table(page + what_ran.END, [record])


def test_the_page_has_the_table_of_the_records():
    page = what_ran.PAGE.read_text(encoding="utf-8")
    assert what_ran.with_table(page, what_ran.read_records()) == page, "run `python tests/what_ran.py`"


def test_the_record_is_of_the_claims_that_tests_make(root):
    claimed = defaultdict(set)
    for path in sorted((root / "tests").rglob("test_*.py")):
        for claim, names in claims_in(path.read_text(encoding="utf-8")).items():
            claimed[claim] |= {f"{path.relative_to(root).as_posix()}::{name}" for name in names}
    first, *_ = what_ran.read_records()
    assert first["machine"]["gpu"] == "none"
    assert {claim: set(tests) for claim, tests in first["claims"].items()} == claimed, (
        "run `python -m pytest -m claim --what-ran=docs/what-ran-cpu.json`, then `python tests/what_ran.py`"
    )


def test_a_claim_is_read_from_a_marker_alone():
    source = "@pytest.mark.claim('a')\n@pytest.mark.claim('b')\ndef f(): claim('c')\n@pytest.mark.slow\ndef g(): ...\n"
    assert claims_in(source) == {"a": {"f"}, "b": {"f"}}
