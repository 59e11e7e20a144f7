"""TensorRT's Python module and the GPU that it works on, or one sentence that says what is missing."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import torch
from packaging.version import InvalidVersion, Version

from bakeout.editor.errors import InputError
from bakeout.export.tensorrt import device as devices

_OLDEST: Final = Version("11.0")
_INSTALL: Final = "run `pip install 'bakeout[gpu,tensorrt]'` on a machine with an NVIDIA GPU"
# What CUDA 13, with which TensorRT 11 comes, compiles for: nothing before Turing.
_LEAST_CAPABILITY: Final = (7, 5)
_NVML: Final = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
# Of NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE.
_DRIVER_BYTES: Final = 80


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as the driver has it.
        capability: its compute capability, major and minor.
        driver: the driver's version.
        total: bytes of its memory.
        free: bytes of it that nobody uses.
    """

    name: str
    capability: tuple[int, int]
    driver: str
    total: int
    free: int


def tensorrt() -> ModuleType:
    """The module `tensorrt`.

    Raises:
        InputError: it is not installed, does not load, or is of a version whose interface or plugins are not those
            that engines are built with here.
    """
    try:
        library = import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise _not_loading(error) from error
        library = None
    except (ImportError, OSError) as error:
        raise _not_loading(error) from error
    # To Python any folder of that name is a module, without a file: an artifact has one, and Python may start there.
    if library is None or getattr(library, "__file__", None) is None:
        raise InputError(f"TensorRT is not installed; {_INSTALL}")
    _check_version(str(getattr(library, "__version__", "")))
    return library


def gpu(device: str | torch.device) -> Gpu:
    """The GPU that torch calls so.

    Raises:
        InputError: it is none, is not here, or is older than TensorRT supports.
    """
    found = _read(devices.torch_device(device))
    if found.capability < _LEAST_CAPABILITY:
        raise InputError(
            f"{found.name} has compute capability {_dotted(found.capability)} and TensorRT 11 needs "
            f"{_dotted(_LEAST_CAPABILITY)}, that of Turing, or more; take a newer GPU"
        )
    return found


def logger() -> Any:
    """A `tensorrt.ILogger` that prints nothing.

    Attribute `said` is the first error that TensorRT reported to it, on one line, or empty.

    Raises:
        InputError: as `tensorrt`.
    """
    return _logger_class(tensorrt())()


@cache
def _logger_class(library: Any) -> Any:
    errors = (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR)

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.said = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors and not self.said:
                self.said = " ".join(msg.split())[:400]

    return Logger


def _check_version(version: str) -> None:
    try:
        found = Version(version)
    except InvalidVersion:
        raise InputError(f"TensorRT has no version but {version!a:.50}; {_INSTALL}") from None
    if found.release[:2] == (10, 14):
        raise InputError(
            f"TensorRT {version} has a fault in plugins that are written in Python, as ours is; upgrade it: {_INSTALL}"
        )
    if found < _OLDEST:
        raise InputError(
            f"TensorRT {version} is too old: before {_OLDEST} networks are not typed strongly; upgrade it: {_INSTALL}"
        )


def _not_loading(error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0][:300]
    return InputError(
        f"TensorRT is installed but does not load ({reason}); install it again with all that it needs: {_INSTALL}"
    )


def _read(device: torch.device) -> Gpu:
    facts = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(facts.name, (facts.major, facts.minor), _driver(), total, free)


def _driver() -> str:
    """The driver's version; where its management library is not at hand, as in some containers, its version of CUDA."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL(_NVML)
        version = ctypes.create_string_buffer(_DRIVER_BYTES)
        if nvml.nvmlInit_v2() == 0:
            try:
                if nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(_DRIVER_BYTES)) == 0:
                    return version.value.decode("ascii", "replace")
            finally:
                nvml.nvmlShutdown()
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
