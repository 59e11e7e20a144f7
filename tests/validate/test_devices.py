"""What computes is what was asked for, and exactly; a provider that cannot start is known before it is needed."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
import torch

from bakeout.editor.errors import InputError
from bakeout.export.onnx_pipeline import SessionSettings
from bakeout.validate.devices import check_providers, why_not_started, with_exact_products, without_tf32

GPU = SessionSettings(("CUDAExecutionProvider",))


def test_products_are_exact_inside_and_as_before_outside():
    backends: Any = torch.backends
    before = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    with without_tf32():
        assert {backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision} == {"ieee"}
    assert before == (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)


def test_the_cuda_provider_multiplies_exactly_unless_told_otherwise():
    asked = with_exact_products
    cuda = "CUDAExecutionProvider"
    assert asked(SessionSettings((cuda,))).provider_options[cuda] == {"use_tf32": "0"}
    told = SessionSettings((cuda,), {cuda: {"use_tf32": "1"}})
    assert asked(told) == told
    assert asked(None) is None
    assert asked(SessionSettings()) == SessionSettings()


def test_a_provider_that_is_not_here_is_refused():
    with pytest.raises(InputError, match="has no 'NoProvider'"):
        check_providers(SessionSettings(("NoProvider",)))
    check_providers(SessionSettings())
    check_providers(None)


def test_the_cpu_starts():
    assert why_not_started(SessionSettings(threads=1)) is None


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : libcudnn.so.9: cannot open shared object file")


def falls_back(session: type, *arguments: Any, **_: Any) -> Any:
    return session(*arguments, providers=["CPUExecutionProvider"])


def test_a_provider_that_raises_or_gives_way_did_not_start(monkeypatch):
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(GPU.providers))
    monkeypatch.setattr(onnxruntime, "InferenceSession", raises)
    assert "libcudnn.so.9" in str(why_not_started(GPU))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **more: falls_back(session, *given, **more))
    assert "could not start it" in str(why_not_started(GPU))
