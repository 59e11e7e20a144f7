"""The library of bakeout's operators for ONNX Runtime: which graphs have a use for it, and where it is.

A runtime without a kernel for an operator of ours runs its function body (`bakeout.export.custom_ops`): several passes
over memory where the library makes one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from bakeout.editor.errors import InputError
from bakeout.kernels.build import library
from bakeout.kernels.errors import KernelUnavailable

if TYPE_CHECKING:
    from bakeout.export.onnx_pipeline import SessionSettings

KERNELS: Final = ("auto", "library", "function")
_DOMAIN: Final = b"bakeout"
_CUDA: Final = "CUDAExecutionProvider"
_PROVIDERS: Final = frozenset({"CPUExecutionProvider", _CUDA})
# Of onnx.proto: `ModelProto.opset_import`, and in it `domain`.
_OPSET_IMPORT, _OPSET_DOMAIN = 8, 1
_LENGTH_DELIMITED: Final = 2
_FIXED: Final = {1: 8, 5: 4}
# No model has so many fields, and no import of operators so many bytes.
_MAX_FIELDS: Final = 1 << 14
_MAX_IMPORT: Final = 1 << 10
_MAX_VARINT: Final = 10
# A protobuf is smaller than 2 GiB.
_MAX_SEEK: Final = (1 << 31) - 1


class FunctionBodyWarning(UserWarning):
    """A graph's operators of ours run as their function bodies, which takes longer."""


def has_own_operators(path: Path) -> bool:
    """Whether an ONNX graph imports operators of ours; what is no graph does not. Of a large one little is read."""
    try:
        with path.open("rb") as file:
            return any(_DOMAIN in _fields(BytesIO(it), _OPSET_DOMAIN) for it in _fields(file, _OPSET_IMPORT))
    except OSError:
        return False


def op_library(paths: Iterable[Path], settings: SessionSettings) -> Path | None:
    """The library to register for these graphs, built if it is not there; None where there is none to register.

    Raises:
        InputError: `settings.kernels` is `library`, and it cannot be built or loaded, or has nothing for a provider. If
            it is `auto`, that is a FunctionBodyWarning.
    """
    if settings.kernels == "function" or not any(has_own_operators(path) for path in paths):
        return None
    try:
        return _loadable(settings.providers)
    except KernelUnavailable as error:
        if settings.kernels == "library":
            raise InputError(f"{error}; else choose the kernels 'function'") from error
        warnings.warn(
            f"the edit's operators run as plain ONNX, which can be slower: {error}", FunctionBodyWarning, stacklevel=2
        )
        return None


def _loadable(providers: Sequence[str]) -> Path:
    if others := [name for name in providers if name not in _PROVIDERS]:
        raise KernelUnavailable(
            f"there is no kernel for {others[0]!a:.100}; choose from {', '.join(sorted(_PROVIDERS))}"
        )
    path = library("cuda" if _CUDA in providers else "cpu")
    import onnxruntime

    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime has a class for each of its codes, and documents none
        said = str(error).partition("\n")[0][:300]
        raise KernelUnavailable(
            f"ONNX Runtime does not load {path} ({said}); remove it to have it built anew"
        ) from error
    return path


def _fields(file: BinaryIO, wanted: int) -> Iterator[bytes]:
    """The contents of a protobuf message's fields of one number that have a length, up to what is no protobuf."""
    for _ in range(_MAX_FIELDS):
        if (tag := _varint(file)) is None:
            return
        number, kind = divmod(tag, 8)
        if kind == 0:
            _varint(file)
        elif kind in _FIXED:
            file.seek(_FIXED[kind], 1)
        elif kind != _LENGTH_DELIMITED or (size := _varint(file)) is None or size > _MAX_SEEK:
            return
        elif number == wanted and size <= _MAX_IMPORT:
            content = file.read(size)
            if len(content) < size:
                return
            yield content
        else:
            file.seek(size, 1)


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for place in range(_MAX_VARINT):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << 7 * place
        if byte[0] < 0x80:
            return value
    return None
