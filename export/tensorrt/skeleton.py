"""An ONNX file without its weights, and whether they are all there.

A graph with its weights in it may be of 2 GB, of which the nodes are a few MB. What is left out is described as ONNX
describes external data: in which file of the graph's folder, from where, and how many bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import onnx
from onnx import TensorProto, helper

from bakeout.editor.errors import InputError

# Fields of onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 7, 5, 9, 13, 14
# From a model to the fields that may be left out.
_PLAN: Final = {_GRAPH: {_INITIALIZER: {_RAW_DATA: None}}}
_VARINT, _DELIMITED = 0, 2
_FIXED: Final = {1: 8, 5: 4}
_MAX_VARINT: Final = 10
# Shapes, axes and the like are smaller, and are read.
_SMALL: Final = 1 << 13
# No graph has as many nodes; of SDXL's UNet it is 1 MB.
_MAX_SKELETON: Final = 1 << 28
# A protobuf is smaller than 2 GiB.
_MAX_FILE: Final = (1 << 31) - 1
_MAX_DIGITS: Final = 18


def skeleton(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file, its larger initializers as external data, those of the file itself too.

    Raises:
        InputError: it cannot be read, is no ONNX file, or is too large for one.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise InputError(f"{path} is larger than the 2 GiB that an ONNX file holds; keep its weights beside it")
        with path.open("rb") as file:
            content = _Reader(file, path.name).message(size, _PLAN)
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
        # ONNX's kind of protobuf gives text that is not UTF-8 as bytes.
        if any(isinstance(it, bytes) for it in _texts(model)):
            raise ValueError("a name in it is no text")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); export the model again") from error
    except InputError:
        raise
    except Exception as error:  # protobuf has a class for each of its faults, and documents none
        raise InputError(f"{path} is no ONNX graph ({error!s:.200}); export the model again") from error
    return model


def _texts(message: Any) -> Iterator[str | bytes]:
    """All text of a protobuf message."""
    for field, value in message.ListFields():
        several = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING:
            yield from several
        elif field.type == field.TYPE_MESSAGE:
            for it in several:
                yield from _texts(it)


class _Reader:
    """Reads protobuf messages of a file.

    Attributes:
        file: where it stands, the next message begins.
        name: of the file in its folder.
        left: how many bytes may still be kept.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file = file
        self.name = name
        self.left = _MAX_SKELETON

    def message(self, end: int, plan: Mapping[int, Any]) -> bytes:
        """What the file has up to `end`, without the large contents of the fields that `plan` leads to."""
        kept = bytearray()
        while (start := self.file.tell()) < end:
            number, kind = divmod(self._varint(), 8)
            size = self._varint() if kind == _DELIMITED else 0
            begin = self.file.tell()
            if begin + size > end:
                raise ValueError("a field is cut short")
            if kind == _DELIMITED and plan.get(number) is not None:
                inner = self.message(begin + size, plan[number])
                kept += _delimited(number, inner)
            elif kind == _DELIMITED and number in plan and size > _SMALL:
                kept += self._described(begin, size)
                self.file.seek(begin + size)
            else:
                kept += self._field(start, begin + size, kind)
        return bytes(kept)

    def _field(self, start: int, end: int, kind: int) -> bytes:
        if kind == _VARINT:
            self._varint()
            end = self.file.tell()
        elif kind in _FIXED:
            end += _FIXED[kind]
        elif kind != _DELIMITED:
            raise ValueError("it has a field of an unknown kind")
        self.left -= end - start
        if self.left < 0:
            raise ValueError("its nodes take more than 256 MiB")
        self.file.seek(start)
        return self.file.read(end - start)

    def _described(self, offset: int, length: int) -> bytes:
        entries = {"location": self.name, "offset": str(offset), "length": str(length)}
        described = b"".join(
            _delimited(_EXTERNAL_DATA, _delimited(1, key.encode()) + _delimited(2, value.encode()))
            for key, value in entries.items()
        )
        return described + _encoded(_DATA_LOCATION * 8 + _VARINT) + _encoded(TensorProto.EXTERNAL)

    def _varint(self) -> int:
        value = 0
        for place in range(_MAX_VARINT):
            byte = self.file.read(1)
            if not byte:
                break
            value |= (byte[0] & 0x7F) << 7 * place
            if byte[0] < 0x80:
                return value
        raise ValueError("a number is cut short")


def _encoded(value: int) -> bytes:
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def _delimited(number: int, content: bytes) -> bytes:
    return _encoded(number * 8 + _DELIMITED) + _encoded(len(content)) + content


def missing_data(path: Path, model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """The initializers of a `skeleton` whose values are not there, each with what is wrong.

    Of a file that cannot be used, the first tensor that is in it stands for all.
    """
    refused: set[str] = set()
    for tensor in model.graph.initializer:
        if min(tensor.dims, default=0) < 0:
            yield tensor.name, "has a negative size"
        elif tensor.data_location != TensorProto.EXTERNAL:
            if (problem := _inline_problem(tensor)) is not None:
                yield tensor.name, problem
        else:
            entries = {it.key: it.value for it in tensor.external_data}
            location = entries.get("location", "")
            problem = None if location in refused else _file_problem(path.parent, location)
            if problem is not None:
                refused.add(location)
                yield tensor.name, problem
            elif location not in refused and (problem := _range_problem(path.parent / location, entries, tensor)):
                yield tensor.name, problem


def _inline_problem(tensor: onnx.TensorProto) -> str | None:
    size = _nbytes(tensor)
    if size is None:
        return None
    if tensor.HasField("raw_data"):
        return None if len(tensor.raw_data) == size else f"has {len(tensor.raw_data)} bytes of data, not {size}"
    found = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    return None if found == prod(tensor.dims) else f"has {found} values, not {prod(tensor.dims)}"


def _file_problem(folder: Path, location: str) -> str | None:
    parts = PurePosixPath(location)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in location or "\\" in location:
        return f"has its data in {location!a:.100}, which is no file of the graph's folder"
    path = folder / location
    if os.path.realpath(path) != str(folder.resolve() / parts):
        return f"has its data in {location!a:.100}, which is a link"
    return None if path.is_file() else f"has its data in {location!a:.100}, which is missing"


def _range_problem(path: Path, entries: Mapping[str, str], tensor: onnx.TensorProto) -> str | None:
    held = path.stat().st_size
    offset, length = (_number(entries.get(key, "")) for key in ("offset", "length"))
    if (offset is None and entries.get("offset")) or (length is None and entries.get("length")):
        return "has its data at a place that is no number"
    offset = offset or 0
    length = held - offset if length is None else length
    if offset + length > held or length < 0:
        return f"has its data beyond the end of {path.name!a:.100}"
    size = _nbytes(tensor)
    return None if size in (None, length) else f"has {length} bytes of data, not {size}"


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def _nbytes(tensor: onnx.TensorProto) -> int | None:
    """How many bytes the values take; None of types that have no whole number of bytes, or none at all."""
    try:
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return None
    packed = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.STRING)
    return None if packed else size * prod(tensor.dims)
