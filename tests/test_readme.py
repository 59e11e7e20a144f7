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


def pages(root: Path) -> list[Path]:
    """README first: it makes what the other pages use."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """What is shown at a prompt, and what a CI system is shown to run."""
    return re.findall(r"^(?:\$ |\s+script: )(.+)$", text, re.MULTILINE)


def test_every_block_is_of_a_tested_kind(root):
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"", "sh", "console", "python", "yaml"}, page
        # `make` is shown with `sh`, and nothing runs that no test runs.
        assert all(line.startswith("make ") for block in blocks(text, "sh") for line in block.splitlines()), page
        assert all(line.startswith("$ ") for block in blocks(text, "console") for line in block.splitlines()), page


@pytest.mark.slow
def test_the_commands_and_programs_of_readme_and_docs_run(root, tmp_path, monkeypatch):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        assert commands(text) or page.name != "README.md"
        for line in commands(text):
            done = subprocess.run(
                shlex.split(line), cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, ""), line
    assert len(list((tmp_path / "more").glob("*.png"))) == 6
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "erased" / "1-0-compared.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "starless-validation" / "report.html").is_file()

    monkeypatch.chdir(tmp_path)
    programs = blocks((root / "README.md").read_text(encoding="utf-8"), "python")
    assert programs
    for program in programs:
        names = {}
        exec(compile(program, "<python of README.md>", "exec"), names)
        assert names["picture"].size == (64, 64)
        darkest, brightest = names["picture"].convert("L").getextrema()
        assert darkest < brightest
    assert names["report"].verdict == "pass"
