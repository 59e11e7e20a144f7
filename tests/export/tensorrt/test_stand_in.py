"""What stands for TensorRT has its names, arguments and numbers, as its own bindings have them."""

from __future__ import annotations

import inspect
import re
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest
import stand_in as module


def enumerations(found: ModuleType) -> dict[str, type[IntEnum]]:
    return {name: it for name, it in vars(found).items() if isinstance(it, type) and issubclass(it, IntEnum)} | {
        "ILogger.Severity": found.ILogger.Severity
    }


def classes(found: ModuleType) -> dict[str, type]:
    """Those that stand for one of TensorRT's, which all begin with a capital."""
    return {
        name: it
        for name, it in vars(found).items()
        if isinstance(it, type)
        and it.__module__.startswith("stand_in")
        and not issubclass(it, IntEnum)
        and name not in ("World", "CpuStream")
    }


def arguments(documented: str, name: str) -> list[list[str]]:
    """The names of the arguments of each form of a function that pybind11 documents, without `self`."""
    forms = re.findall(rf"{name}\(self: [\w.]+(?:, )?(.*)\) ->", documented)
    return [re.findall(r"(?:^|, )(\w+): ", form) for form in forms]


def differences(cls: type, real: Any) -> list[str]:
    """What `cls` has that `real` has not, or takes otherwise."""
    wrong = []
    for name, it in vars(cls).items():
        if name.startswith("_") and not (name == "__init__" and "def " in (real.__init__.__doc__ or "")):
            continue
        if not hasattr(real, name):
            wrong.append(name)
        elif inspect.isfunction(it):
            taken = list(inspect.signature(it).parameters)[1:]
            if taken not in arguments(getattr(real, name).__doc__ or "", name):
                wrong.append(f"{name}({', '.join(taken)})")
    return wrong


def test_enumerations_have_the_numbers_of_tensorrt(bindings):
    for name, enumeration in enumerations(module).items():
        real = bindings
        for part in name.split("."):
            real = getattr(real, part)
        assert {it.name: int(real.__members__[it.name]) for it in enumeration} == {
            it.name: int(it) for it in enumeration
        }


@pytest.mark.claim("the stand-in has the classes, arguments and numbers of TensorRT 11.4's own bindings")
def test_classes_have_the_methods_and_arguments_of_tensorrt(bindings):
    found = classes(module)
    assert {"Builder", "Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "OnnxParser"} <= found.keys()
    wrong = {name: bad for name, cls in found.items() if (bad := differences(cls, getattr(bindings, name)))}
    assert wrong == {}


def test_a_method_that_tensorrt_has_not_is_found(bindings):
    class Runtime:
        def deserialize(self, serialized_engine: bytes) -> None: ...
        def deserialize_cuda_engine(self, plan: bytes) -> None: ...

    assert differences(Runtime, bindings.Runtime) == ["deserialize", "deserialize_cuda_engine(plan)"]


def test_what_the_exporter_asks_of_the_library_is_there(bindings):
    """Names that this package uses, also those that the stand-in has not."""
    assert int(bindings.BuilderFlag.TF32) >= 0
    assert "STRONGLY_TYPED : [DEPRECATED]" in bindings.NetworkDefinitionCreationFlag.__doc__
    assert not {"FP16", "BF16", "STRONGLY_TYPED"} & bindings.BuilderFlag.__members__.keys()
    for name in ("builder_optimization_level", "profiling_verbosity", "progress_monitor"):
        assert isinstance(getattr(bindings.IBuilderConfig, name), property)


@pytest.mark.parametrize("name", ["ILogger", "IProgressMonitor"])
def test_what_the_exporter_derives_from_can_be_derived_from(bindings, name):
    base = getattr(bindings, name)

    class Derived(base):
        def __init__(self) -> None:
            base.__init__(self)

    assert isinstance(Derived(), base)
