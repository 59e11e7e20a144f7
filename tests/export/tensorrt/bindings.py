"""TensorRT's own Python bindings without TensorRT: its classes, its decorators, and nothing that computes.

The bindings need nine symbols of three libraries. Where these are not there, a stub has them: factories that give
nothing. Enumerations, signatures and the checks of `tensorrt.plugin`, which is Python, are the real ones.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

import pytest

_FACTORIES = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry",
)  # fmt: skip
_STUB = "\n".join(f"void *{name}(void) {{ return 0; }}" for name in _FACTORIES) + (
    "\nint getNvOnnxParserVersion(void) { return 0; }\nint initLibNvInferPlugins(void) { return 1; }\n"
)
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


def _leave_out(reason: str) -> NoReturn:
    """Skip the test; fail it where nothing may be left out."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def loaded_bindings(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The bindings, imported once: what they are made of can be neither unloaded nor loaded again."""
    if find_spec("tensorrt_bindings") is None:
        _leave_out("TensorRT's bindings are not installed: pip install tensorrt-cu13-bindings==11.4.0.106")
    try:
        return importlib.import_module("tensorrt_bindings")
    except ImportError:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        _leave_out("there is no C compiler for the stub of TensorRT's libraries")
    folder = tmp_path_factory.mktemp("stub")
    source = folder / "stub.c"
    source.write_text(_STUB)
    for name in _LIBRARIES:
        path = folder / name
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", path, source], check=True)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_bindings")


@pytest.fixture
def bindings(loaded_bindings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The bindings as the module `tensorrt`, with `tensorrt.plugin` as if just imported: no plugin is registered."""

    def forget() -> None:
        for name in list(sys.modules):
            if name.startswith("tensorrt_bindings.plugin"):
                del sys.modules[name]

    for name in list(sys.modules):
        if name.split(".")[0] == "tensorrt":
            monkeypatch.delitem(sys.modules, name)
    forget()
    monkeypatch.setitem(sys.modules, "tensorrt", loaded_bindings)
    with warnings.catch_warnings():
        # Its docstrings have backslashes that mean nothing, which Python says when it compiles them.
        warnings.filterwarnings("ignore", "invalid escape sequence")
        plugin = importlib.import_module("tensorrt_bindings.plugin")
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    yield loaded_bindings
    forget()
    del loaded_bindings.plugin
