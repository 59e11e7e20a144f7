"""A tokenizer's files for old and new versions of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from bakeout.editor.errors import InputError
from bakeout.editor.model import Part, open_model
from bakeout.export.tokenizer import tokenizer_files

OLD = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TEXTS = ["a red circle on grass", "Two BLUE stars, don't blur!", "", "日本 42 ☃"]


def written(part: Part, folder: Path, names: tuple[str, ...] | None = None) -> Any:
    """The tokenizer of the files of these names alone."""
    folder.mkdir()
    for name, content in tokenizer_files(part).items():
        if names is None or name in names:
            (folder / name).write_bytes(content)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_what_is_made_of_the_new_file_tokenizes_the_same(
    folders: Callable[[str], Path], tmp_path: Path, tokenizer: str
) -> None:
    part = open_model(folders("sdxl")).parts[tokenizer]
    assert not (part.folder / "vocab.json").exists()
    theirs = CLIPTokenizer.from_pretrained(part.folder)
    ours = written(part, tmp_path / "made", OLD)
    assert not (tmp_path / "made" / "tokenizer.json").exists()
    padding = {"padding": "max_length", "max_length": 20, "truncation": True}
    assert ours(TEXTS, **padding).input_ids == theirs(TEXTS, **padding).input_ids
    assert ours(TEXTS[:1]).input_ids != ours(TEXTS[1:2]).input_ids
    assert (ours.pad_token, ours.model_max_length) == (theirs.pad_token, theirs.model_max_length)


def test_a_files_own_bytes_stay() -> None:
    part = open_model("shapes").parts["tokenizer"]
    files = tokenizer_files(part)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert files[name] == (part.folder / name).read_bytes()
    assert json.loads(files["special_tokens_map.json"]) == {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }  # fmt: skip


def test_the_tokenizer_of_a_single_file_has_its_overrides(
    single_files: Callable[[str], Path], tiny_configs: None, tmp_path: Path
) -> None:
    part = open_model(single_files("sd2")).parts["tokenizer"]
    assert [part.config["pad_token"], written(part, tmp_path / "made").pad_token] == ["!", "!"]
    assert "NOTICE.txt" in tokenizer_files(part)


def changed(part: Part, folder: Path, **said: object) -> Part:
    """A copy of the part whose `tokenizer.json` has other values."""
    folder.mkdir()
    own = json.loads((part.folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps({**own, **said}))
    config = {**json.loads((part.folder / "tokenizer_config.json").read_bytes()), "name_or_path": "/home/me/model"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return replace(part, folder=folder)


def test_older_and_extended_files_are_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    part = open_model(folders("sd1")).parts["tokenizer"]
    model = json.loads((part.folder / "tokenizer.json").read_bytes())["model"]
    joined = {**model, "merges": [" ".join(pair) for pair in model["merges"]]}
    added = [{"id": 49408, "content": "<mine>"}, {"id": 49407, "content": "<|endoftext|>"}]
    files = tokenizer_files(changed(part, tmp_path / "joined", model=joined, added_tokens=added))
    assert files["merges.txt"] == tokenizer_files(part)["merges.txt"]
    assert json.loads(files["added_tokens.json"]) == {"<mine>": 49408}
    assert b"/home/me" not in files["tokenizer_config.json"]


@pytest.mark.parametrize("model", [None, [], {"vocab": {}}, {"vocab": 3, "merges": []}, {"vocab": {}, "merges": [1]}])
def test_another_kind_of_tokenizer_is_refused(folders: Callable[[str], Path], tmp_path: Path, model: object) -> None:
    part = open_model(folders("sd1")).parts["tokenizer"]
    with pytest.raises(InputError, match="is not that of a CLIP tokenizer"):
        tokenizer_files(changed(part, tmp_path / "other", model=model))
