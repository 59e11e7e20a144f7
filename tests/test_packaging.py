"""The wheel, the source archive, and checkouts that cannot work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path

import pytest

FOLDERS = ("editor", "export", "kernels", "validate")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory) -> Path:
    """A copy of what the repository holds, links as links, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("tree") / "bakeout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "demo")
    shutil.copytree(root, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def archives(tree) -> tuple[Path, Path]:
    """The source archive, and the wheel that was built from that archive and nothing else."""
    done = run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    (wheel,) = (tree / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The programs' folder of a clean environment with the wheel.

    Its dependencies are links to those of the environment that runs the tests; the bakeout of that one stays out.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "bakeout" not in path.name and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    done = run(*pip, "install", "--no-deps", "--no-index", "--disable-pip-version-check", archives[1], cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return programs


@pytest.mark.slow
def test_the_wheel_holds_every_source_file_and_no_link(root, archives):
    package = root / "src" / "bakeout"
    with zipfile.ZipFile(archives[1]) as wheel:
        files = {entry.filename: entry for entry in wheel.infolist()}
    sources = {
        f"bakeout/{path.relative_to(package).as_posix()}"
        for top in (package, *(package / folder for folder in FOLDERS))
        for path in top.rglob("*")
        if path.is_file()
        and (
            path.parent.name == "csrc"
            or path.suffix in (".py", ".css", ".json", ".txt", ".gz", ".safetensors", ".typed")
        )
    }
    assert {"bakeout/editor/errors.py", "bakeout/kernels/csrc/masked_geglu.cu"} <= sources
    assert not sources - files.keys()
    assert not [name for name, entry in files.items() if entry.external_attr >> 28 == 0o12]
    assert not [name for name in files if not name.startswith("bakeout") or name.endswith(".pyc")]
    assert [name for name in files if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_the_source_archive_holds_files_and_no_link(archives):
    with tarfile.open(archives[0]) as sdist:
        entries = {entry.name.partition("/")[2]: entry for entry in sdist.getmembers()}
    files = {"pyproject.toml", "LICENSE", "README.md", "src/bakeout/editor/errors.py"}
    assert files | {"src/bakeout/kernels/csrc/masked_geglu.cu"} <= entries.keys()
    assert not [name for name, entry in entries.items() if entry.issym() or entry.islnk()]


@pytest.mark.slow
def test_the_installed_wheel_works(installed, tiny_model, tmp_path):
    where = run(installed / "python", "-c", "import bakeout.editor.errors as e; print(e.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed.parent)), where.stderr
    drawn = run(
        installed / "bakeout", "generate", tiny_model, "--prompt", "a", "--steps", "2", "-o", "out", cwd=tmp_path
    )
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert (tmp_path / "out" / "1-0.png").stat().st_size > 100


@pytest.fixture
def linkless(root, tmp_path) -> Path:
    """A clone that was made where git may not make links; its repository has only the front and the folders."""
    origin = tmp_path / "origin"
    for name in ("src/bakeout", *FOLDERS):
        shutil.copytree(
            root / name, origin / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "model", "configs")
        )
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
    for command in (("init", "-q"), ("add", "-A", "-f"), ("commit", "-q", "-m", "all")):
        assert run(*git, *command, cwd=origin).returncode == 0
    assert run(*git, "clone", "-q", "-c", "core.symlinks=false", origin, "clone", cwd=tmp_path).returncode == 0
    return tmp_path / "clone"


def test_a_checkout_without_links_says_so_and_how_to_mend_it(linkless):
    assert (linkless / "src/bakeout/editor").is_file()
    command = (sys.executable, "-c", "import bakeout.editor.errors")
    broken = run(*command, cwd=linkless, PYTHONPATH="src")
    last = broken.stderr.strip().splitlines()[-1]
    assert broken.returncode == 1
    assert "symbolic links" in last

    for cure in re.findall("`(.+?)`", last):
        mended = run(*cure.split(), cwd=linkless)
        assert mended.returncode == 0, mended.stderr
    assert run(*command, cwd=linkless, PYTHONPATH="src").returncode == 0


def test_no_constraint_contradicts_the_project(root):
    from packaging.requirements import Requirement

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    declared = [
        Requirement(text) for text in chain(project["dependencies"], *project["optional-dependencies"].values())
    ]
    # tensorrt comes from its vendor's index; triton is torch's own choice; bakeout is this project.
    checked = [requirement for requirement in declared if requirement.name not in ("tensorrt", "triton", "bakeout")]
    assert len(checked) > 10
    wrong = [str(r) for r in checked if not r.specifier.contains(pins.get(r.name.lower().replace("_", "-"), "0"))]
    assert not wrong
    # The one from the public index is a CUDA build and breaks beside a CPU build of torch.
    assert "torchvision" not in {*pins, *(requirement.name for requirement in declared)}
