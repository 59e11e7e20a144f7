"""The Makefile and `.ci/run`: what they do once, what they do again, and what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def project(root, tmp_path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(root / name, tmp_path / name)
    shutil.copytree(root / ".ci", tmp_path / ".ci")
    return tmp_path


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without what a make that runs the tests hands down to this one.
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    command = (shutil.which("make") or "", *arguments)
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False)


def test_a_second_make_installs_nothing(project):
    assert "pip install" in make(project, "-n", "test").stdout
    (project / ".venv").mkdir()
    (project / ".venv" / "installed").touch()
    for target, does in (("test", "pytest"), ("demo", "bakeout demo"), ("lint", "ruff check"), ("types", "mypy")):
        again = make(project, "-n", target)
        assert does in again.stdout
        assert "pip" not in again.stdout


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_what_is_declared_anew_is_installed_anew(project, name):
    (project / ".venv").mkdir()
    (project / ".venv" / "installed").touch()
    os.utime(project / name, (2**32, 2**32))
    assert "pip install" in make(project, "-n", "test").stdout


def test_torch_is_installed_first(project):
    installs = [line for line in make(project, "-n", "test").stdout.splitlines() if "pip install" in line]
    assert [" torch" in line for line in installs] == [True, False]
    assert all("--constraint constraints.txt" in line for line in installs)


@pytest.mark.parametrize(("arguments", "extra"), [((), "cpu"), (("EXTRA=gpu",), "gpu")])
def test_the_runtime_is_chosen(project, arguments, extra):
    installs = [line for line in make(project, "-n", "test", *arguments).stdout.splitlines() if "--editable" in line]
    assert [f"'.[dev,{extra}]'" in line for line in installs] == [True]


def test_tensorrt_is_installed_with_what_builds_it(project):
    installs = [line for line in make(project, "-n", "gpu").stdout.splitlines() if "pip install" in line]
    names = [line.rpartition("--constraint constraints.txt ")[2] for line in installs]
    assert names == ["setuptools torch", "tensorrt", "--no-build-isolation --editable '.[dev,gpu,tensorrt]'"]


def test_no_python_is_one_sentence(project, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sh").symlink_to(shutil.which("sh") or "")
    done = make(project, "test", PATH=str(programs))
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (project / ".venv").exists()


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("failing", ["nothing", "pytest", "what_ran.py", "gpu_kernels.py", "gpu.py"])
def test_on_a_gpu_every_part_runs_and_any_may_fail(project, failing):
    program(project / ".venv-gpu", "installed", "")
    os.utime(project / ".venv-gpu" / "installed", (2**32, 2**32))
    (project / ".venv-gpu" / "bin").mkdir()
    program(project / ".venv-gpu" / "bin", "python", f'echo "ran $@"\ncase "$*" in *{failing}*) exit 3;; esac')
    done = make(project, "gpu")
    ran = [line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert [line.split()[0] for line in ran] == [
        "-m", "tests/what_ran.py", "benchmarks/gpu_kernels.py", "benchmarks/gpu.py",
    ]  # fmt: skip
    # Ten minutes, a part's own limit, are short for SDXL's engines.
    assert ran[-1] == "benchmarks/gpu.py runs/gpu --seconds 3600"
    assert (done.returncode != 0) == (failing != "nothing")


@pytest.mark.parametrize("failing", ["nothing", "test", "lint", "types", "slow"])
def test_ci_runs_every_check_and_fails_with_any(project, tmp_path, failing):
    programs = tmp_path / "programs"
    program(programs, "chromium", "exit 1")
    program(programs, "make", f'echo "ran $1 with CI=$CI"\ntest "$1" != {failing}')
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([project / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    assert [f"ran {check} with CI=true" in done.stdout for check in ("test", "lint", "types", "slow")] == [True] * 4
    assert done.returncode == (failing != "nothing")
    assert failing == "nothing" or f"failed: {failing}" in done.stderr


@pytest.mark.parametrize(
    ("there", "status", "missing"),
    [
        (("chromium", "g++"), 0, []), (("google-chrome", "clang++"), 0, []), (("g++",), 0, ["chromium"]),
        (("chromium",), 0, ["g++"]), ((), 1, ["chromium", "g++"]),
    ],
)  # fmt: skip
def test_ci_installs_a_browser_and_a_compiler_where_there_is_none(project, tmp_path, there, status, missing):
    programs = tmp_path / "programs"
    for name in there:
        program(programs, name, "exit 1")
    program(programs, "make", "exit 0")
    program(programs, "sudo", '"$@"')
    program(programs, "apt-get", f'echo "apt-get $@"\nexit {status}')
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name) or "")
    environment = {"PATH": str(programs)}
    done = subprocess.run([project / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    begin = "apt-get install -y --no-install-recommends "
    assert [line.removeprefix(begin) for line in done.stdout.splitlines() if line.startswith(begin)] == missing
    assert done.returncode == status
    assert ("failed: browser compiler" in done.stderr) == bool(status)
