"""The builder: which compilers it takes, what it trusts, and that an unfinished library is never seen."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bakeout.kernels import build
from bakeout.kernels.errors import KernelUnavailable

ANSWER = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A library of one function, and a cache of its own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cc").write_text(ANSWER + 'extern "C" int secret() { return 0; }\n')
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cu").write_text("this is not C++\n")
    monkeypatch.setattr(build, "CSRC", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def cache(sources, tmp_path) -> Path:
    return tmp_path / "cache" / "bakeout" / "kernels"


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def counting(tmp_path: Path) -> tuple[Path, Path]:
    """A compiler, and a file of a line for each library that it was asked for."""
    log = tmp_path / "log"
    real = build._cxx()
    return program(tmp_path / "c++", f'case "$*" in *-shared*) echo "$*" >> {log};; esac\nexec {real} "$@"'), log


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def test_it_builds_once_and_again_where_a_source_or_a_header_or_the_compiler_is_another(
    sources, cache, tmp_path, monkeypatch
):
    compiler, log = counting(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    first = build.library("cpu")
    assert build.library("cpu") == first
    assert answer(first) == 42
    assert len(log.read_text().splitlines()) == 1
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    second = build.library("cpu")
    (sources / "answer.cc").write_text(ANSWER)
    third = build.library("cpu")
    monkeypatch.setenv("CXX", str(program(tmp_path / "other" / "c++", f'exec {compiler} "$@"')))
    fourth = build.library("cpu")
    assert len({first, second, third, fourth}) == 4
    assert [answer(path) for path in (first, second, third, fourth)] == [42, 43, 43, 43]
    assert {*cache.iterdir()} == {first, second, third, fourth}


def test_only_what_is_exported_is_seen_and_nobody_else_may_write_it(sources, cache):
    before = os.umask(0)
    try:
        path = build.library("cpu")
    finally:
        os.umask(before)
    assert not hasattr(ctypes.CDLL(str(path)), "secret")
    assert path.stat().st_mode & 0o777 == 0o600
    assert {folder.stat().st_mode & 0o777 for folder in (cache, cache.parent)} == {0o700}


def test_without_a_compiler_it_says_what_to_install(sources, cache, tmp_path, monkeypatch):
    compiler = build._cxx()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelUnavailable, match=r"no C\+\+ compiler .*; install g\+\+ or clang\+\+"):
        build.library("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelUnavailable, match=r"'no-such-compiler' of \$CXX is not there"):
        build.library("cpu")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(KernelUnavailable, match=r"no nvcc .*`pip install 'bakeout\[nvcc\]'`"):
        build.library("cuda")
    assert not cache.exists()


def test_nvcc_is_that_of_cuda_home_then_that_on_path_then_that_of_the_package(sources, tmp_path, monkeypatch):
    home, path = (program(tmp_path / place / "nvcc", "exit 1") for place in ("home/bin", "path"))
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build._nvcc() == str(home)
    monkeypatch.delenv("CUDA_HOME")
    assert build._nvcc() == str(path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(build._nvcc()).parts[-4] == "nvidia"


def test_nvcc_is_asked_for_the_gpus_that_it_knows(tmp_path):
    nvcc = program(tmp_path / "bin" / "nvcc", "echo compute_75; echo compute_80; echo compute_90; echo compute_90a")
    codes = [word for word in build._nvcc_command(str(nvcc), "c++") if word.startswith("-gencode")]
    assert codes == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_80,code=compute_80",
    ]  # fmt: skip
    with pytest.raises(KernelUnavailable, match="knows no GPU"):
        build._nvcc_command(str(program(nvcc, "echo compute_50")), "c++")


def test_what_a_compiler_complains_of_is_said_and_nothing_is_left(sources, cache):
    (sources / "answer.cc").write_text("int answer() { return nothing; }\n")
    with pytest.raises(KernelUnavailable, match=r"answer\.cc:1:.*error: .*nothing") as raised:
        build.library("cpu")
    assert "\n" not in str(raised.value)
    assert not [*cache.iterdir()]


@pytest.mark.parametrize("script", ["exit 0", "kill -9 $$", "echo >&2; exit 3"])
def test_a_compiler_that_gives_nothing_is_said(sources, cache, tmp_path, monkeypatch, script):
    monkeypatch.setenv("CXX", str(program(tmp_path / "c++", script)))
    with pytest.raises(KernelUnavailable, match=r"c\+\+ cannot build the kernel \(it does not say why\)"):
        build.library("cpu")
    assert not [*cache.iterdir()]


def test_a_compiler_that_does_not_start_is_said(sources, tmp_path, monkeypatch):
    (tmp_path / "c++").write_bytes(b"\x7fELF of nothing")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(KernelUnavailable, match="does not start"):
        build.library("cpu")


def _writable(path: Path) -> None:
    path.chmod(0o666)


def _linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("tamper", [_writable, _linked, _a_folder])
def test_a_library_that_others_could_have_written_is_not_taken(sources, tamper):
    path = build.library("cpu")
    tamper(path)
    with pytest.raises(KernelUnavailable, match=r"somebody else.*; remove it") as raised:
        build.library("cpu")
    assert str(path) in str(raised.value)


def test_a_library_of_another_user_is_not_taken(sources, monkeypatch):
    build.library("cpu")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(KernelUnavailable, match="somebody else"):
        build.library("cpu")


@pytest.mark.parametrize("above", [False, True])
def test_a_folder_that_others_can_write_is_not_taken(sources, cache, above):
    build.library("cpu")
    folder = cache.parent if above else cache
    folder.chmod(0o777)
    with pytest.raises(KernelUnavailable, match="somebody else"):
        build.library("cpu")
    elsewhere = folder.rename(folder.parent / "elsewhere")
    elsewhere.chmod(0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(KernelUnavailable, match="somebody else"):
        build.library("cpu")


def test_where_the_cache_is(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert build.library("cpu").parent == tmp_path / "home/.cache/bakeout/kernels"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelUnavailable, match="let XDG_CACHE_HOME name one that you can write"):
        build.library("cpu")


@pytest.mark.parametrize("failing", ["TemporaryDirectory", "Path.replace"])
def test_a_cache_that_cannot_be_written_is_said(sources, monkeypatch, failing):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(f"bakeout.kernels.build.{failing}", refuse)
    with pytest.raises(KernelUnavailable, match=r"Read-only file system.*; let XDG_CACHE_HOME name a folder that you"):
        build.library("cpu")


def test_several_may_build_at_the_same_time(sources, cache):
    with ThreadPoolExecutor(4) as pool:
        paths = {*pool.map(build.library, ["cpu"] * 4)}
    assert {*cache.iterdir()} == paths
    assert answer(paths.pop()) == 42


def test_a_build_that_was_killed_leaves_nothing_that_opens(sources, cache, tmp_path, monkeypatch):
    slow = program(
        tmp_path / "c++",
        f'[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done\nhead -c 99 /dev/zero > $2\n'
        f"echo > {tmp_path}/written\nsleep 60",
    )
    code = f"import pathlib, bakeout.kernels.build as b; b.CSRC = pathlib.Path({str(sources)!r}); b.library('cpu')"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"CXX": str(slow)}, process_group=0
    ) as building:
        deadline = time.monotonic() + 30
        while not (tmp_path / "written").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(building.pid, signal.SIGKILL)
    (unfinished,) = cache.iterdir()
    assert unfinished.is_dir()
    # The command line, and with it the name, is that of the build that was killed.
    program(slow, f'[ "$1" = --version ] && exit\nexec {build._cxx()} "$@"')
    monkeypatch.setenv("CXX", str(slow))
    assert answer(build.library("cpu")) == 42
