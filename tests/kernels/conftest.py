"""What the kernels' tests share. It stands alone: on a GPU machine these tests need torch, Triton and pytest only."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Puts the Triton functions of a module into Triton's interpreter, where they run on CPU tensors, for one test.

    TRITON_INTERPRET, the documented way, decides when a function is decorated, for good: nothing in that process could
    be compiled any more. Here each name that the module has for a Triton function, its own or imported, is bound to the
    interpreter's object of the same Python function, and bound back afterwards. A kernel finds the functions that it
    calls by these names too.
    """
    jit = pytest.importorskip("triton.runtime.jit")
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def interpret(module: ModuleType) -> None:
        for name, function in list(vars(module).items()):
            if isinstance(function, jit.JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(function.fn))

    return interpret


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty gives is NaN, so that an element which a kernel leaves out is seen."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs).fill_(torch.nan)

    original = torch.empty
    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """‖found - expected‖ / ‖expected‖ in fp64, of equal shapes; a NaN in either makes it NaN, which passes no bound."""

    def error(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        found, expected = found.double().cpu(), expected.double().cpu()
        return float((found - expected).norm() / expected.norm())

    return error
