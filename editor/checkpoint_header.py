"""Read the header of a safetensors file: what it stores and where, without reading any weights.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the length of the header as a little-endian
u64; the header, a JSON object `name -> {dtype, shape, data_offsets: [begin, end]}` with an optional `__metadata__` of
strings; then the data, to which the offsets are relative and which they cover without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from bakeout.editor.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 16
MAX_SIZE = 2**63
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
DOWNLOAD_AGAIN = "download or copy the file again"

# Bytes per element. The sub-byte types of quantised checkpoints have none, so they are unknown here on purpose.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

# First bytes of what people rename to .safetensors, and what it really is.
OTHER_FORMATS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a PyTorch pickle; download the .safetensors version",
    b"\x80\x02": "a PyTorch pickle; download the .safetensors version",
    b"GGUF": "a GGUF file; download the .safetensors version",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies on disk; `begin` and `end` are byte offsets from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors by name, in the order of their data, and its metadata."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


class _InvalidError(Exception):
    """A fault of the header; `read_header` adds the file's name."""


def read_header(path: Path) -> Header:
    """The header of the safetensors file `path`, every offset checked against the file's size.

    Raises InputError if the file is missing, empty, truncated, a Git LFS pointer, or not well-formed.
    """
    try:
        # A FIFO or a device would block or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a file; give a .safetensors file")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(max(8, len(LFS_POINTER)))
            length = _header_length(start, size)
            stream.seek(8)
            raw = stream.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path!s:.200} is not a path ({error}); check it") from None
    except _InvalidError as fault:
        raise InputError(f"{path} {fault}") from None
    try:
        return _parse(raw, path, data_start=8 + length, data_bytes=size - 8 - length)
    except _InvalidError as fault:
        raise InputError(f"{path} {fault}") from None


def _header_length(start: bytes, size: int) -> int:
    if not start:
        raise _InvalidError(f"is empty; {DOWNLOAD_AGAIN}")
    if start.startswith(LFS_POINTER):
        raise _InvalidError("is a Git LFS pointer in place of the weights; run `git lfs pull` in its repository")
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise _InvalidError(f"is not a safetensors file but {what}")
    if len(start) < 8:
        raise _InvalidError(f"is too short ({size} bytes) to be a safetensors file; {DOWNLOAD_AGAIN}")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _InvalidError(f"is not a safetensors file (its header would be {length} bytes long); {DOWNLOAD_AGAIN}")
    if length > size - 8:
        raise _InvalidError(f"is truncated: its header has {length} bytes but only {size - 8} follow; {DOWNLOAD_AGAIN}")
    return length


def _parse(raw: bytes, path: Path, data_start: int, data_bytes: int) -> Header:
    entries = _json_object(raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _InvalidError(f"has a broken header (its __metadata__ is not an object of strings); {DOWNLOAD_AGAIN}")
    tensors = [_tensor(name, entry, path, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(tensors, data_start, data_bytes)
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def _json_object(raw: bytes) -> dict[str, object]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise _InvalidError(f"has a broken header (it is not JSON); {DOWNLOAD_AGAIN}") from None
    if not isinstance(entries, dict):
        raise _InvalidError(f"has a broken header (it is not a JSON object); {DOWNLOAD_AGAIN}")
    return entries


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Readers differ in which of the two they take, so what one of them checked is not what another loads.
        raise _InvalidError(f"has a broken header (it names the same thing twice); {DOWNLOAD_AGAIN}")
    return found


def _tensor(name: str, entry: object, path: Path, data_start: int) -> StoredTensor:
    label = f"{name!a:.200}"  # as ASCII: a name may hold line breaks, terminal codes or lone surrogates
    if not isinstance(entry, dict):
        raise _InvalidError(f"has a broken header (tensor {label} is not an object); {DOWNLOAD_AGAIN}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _InvalidError(
            f"stores tensor {label} in dtype {dtype!a:.50}, which is not supported; take a float16 version"
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _InvalidError(f"has a broken header (tensor {label} has shape {shape!a:.100}); {DOWNLOAD_AGAIN}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _InvalidError(f"has a broken header (tensor {label} has offsets {offsets!a:.100}); {DOWNLOAD_AGAIN}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if needed != end - begin:
        raise _InvalidError(
            f"has a broken header (tensor {label} of shape {shape} in {dtype} needs {needed} bytes, its offsets give "
            f"{end - begin}); {DOWNLOAD_AGAIN}"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    # bool is an int to isinstance; type() tells them apart.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_SIZE for item in value)


def _check_layout(tensors: list[StoredTensor], data_start: int, data_bytes: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps another" if tensor.begin < position else "leaves a hole before it"
            raise _InvalidError(f"has a broken header (tensor {tensor.name!a:.200} {fault}); {DOWNLOAD_AGAIN}")
        position = tensor.end
    declared = position - data_start
    if declared > data_bytes:
        raise _InvalidError(f"is truncated: {declared} bytes of data expected, {data_bytes} found; {DOWNLOAD_AGAIN}")
    if declared < data_bytes:
        raise _InvalidError(f"has {data_bytes - declared} bytes after its last tensor; {DOWNLOAD_AGAIN}")
