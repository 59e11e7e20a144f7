"""A tokenizer's files as every version of transformers reads them.

transformers 5 saves `tokenizer.json` alone; transformers 4 wants the vocabulary, merges and special tokens beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bakeout.editor.errors import InputError
from bakeout.editor.model import Part
from bakeout.editor.model_files import read_json

# Copied as they are.
_OWN = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json", "NOTICE.txt")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where it once lay on somebody's machine, and how it was loaded there.
_LOCAL = ("name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file", "is_local", "local_files_only")


def tokenizer_files(part: Part) -> dict[str, bytes]:
    """Name → content of the files of a tokenizer's folder: its own, and those that it lacks made from `tokenizer.json`.

    Raises:
        InputError: `tokenizer.json` is needed and is not that of a CLIP tokenizer.
    """
    files = {name: path.read_bytes() for name in _OWN if (path := part.folder / name).is_file()}
    if not {"vocab.json", "merges.txt"} <= files.keys():
        files = {**_from_fast(part), **files}
    own = {name: read_json(path) if (path := part.folder / name).is_file() else {}
           for name in ("tokenizer_config.json", "special_tokens_map.json")}  # fmt: skip
    config = {key: value for key, value in {**own["tokenizer_config.json"], **part.config}.items() if key not in _LOCAL}
    tokens = {key: config[key] for key in _SPECIAL if config.get(key) is not None}
    # transformers 4 lets this file win over the other.
    said = {**own["special_tokens_map.json"], **tokens}
    return {**files, "tokenizer_config.json": as_json(config), "special_tokens_map.json": as_json(said)}


def as_json(value: Mapping[str, Any]) -> bytes:
    """UTF-8, indented, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _from_fast(part: Part) -> dict[str, bytes]:
    path = part.folder / "tokenizer.json"
    said: Mapping[str, Any] = read_json(path)
    try:
        vocabulary = dict(said["model"]["vocab"])
        # A pair, or in older files both in one string.
        merges = [it if isinstance(it, str) else " ".join(it) for it in said["model"]["merges"]]
        added = {str(it["content"]): int(it["id"]) for it in said.get("added_tokens", ())}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not that of a CLIP tokenizer ({type(error).__name__}: {error!s:.200}); "
            "take it from the model again"
        ) from None
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }
    if beyond := {token: number for token, number in added.items() if token not in vocabulary}:
        files["added_tokens.json"] = as_json(beyond)
    return files
