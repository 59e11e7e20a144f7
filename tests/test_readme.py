"""Every command and every program that README shows is run, in the order in which it is shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def make_targets(root: Path) -> set[str]:
    return set(re.findall(r"^(\w+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_make_targets_exist(root, name):
    shown = [
        line.split("#")[0].split()
        for block in blocks((root / name).read_text(encoding="utf-8"), "sh")
        for line in block.splitlines()
    ]
    assert shown
    assert all(command[0] == "make" and command[1] in make_targets(root) for command in shown)


def test_every_block_is_of_a_tested_kind(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) == {"", "sh", "console", "python"}


def test_the_commands_and_programs_of_the_readme_run(root, tmp_path, monkeypatch):
    text = (root / "README.md").read_text(encoding="utf-8")
    lines = [line for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    assert lines
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for line in lines:
        done = subprocess.run(
            shlex.split(line[2:]),
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), line
    assert len(list((tmp_path / "more").glob("*.png"))) == 6
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.chdir(tmp_path)
    programs = blocks(text, "python")
    assert programs
    for program in programs:
        names = {}
        exec(compile(program, "<python of README.md>", "exec"), names)
        assert names["picture"].size == (64, 64)
        darkest, brightest = names["picture"].convert("L").getextrema()
        assert darkest < brightest
