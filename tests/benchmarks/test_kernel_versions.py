"""The model with one node of ours gives what the definition gives, by its function body and by our library."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from budget import Shape
from kernel_versions import draw, masked_geglu_in_onnxruntime, model_of
from onnx import numpy_helper

from bakeout.kernels import reference
from bakeout.kernels.errors import KernelUnavailable

SHAPE = Shape("tiny", 2, 5, 8)


def test_the_model_has_one_node_its_body_and_constants():
    model = onnx.load_from_string(model_of(SHAPE))
    onnx.checker.check_model(model, full_check=True)
    assert [(it.domain, it.op_type) for it in model.graph.node] == [("bakeout", "MaskedGeglu")]
    assert [it.name for it in model.functions] == ["MaskedGeglu"]
    assert {it.name: list(it.dims) for it in model.graph.initializer} == {"mask": [5, 32], "value": [5, 32]}


@pytest.mark.slow
def test_both_give_what_the_definition_gives(monkeypatch):
    monkeypatch.setattr("kernel_versions.DENSITY", 0.25)
    given = draw(SHAPE, torch.device("cpu"))
    model = model_of(SHAPE)
    monkeypatch.setattr("kernel_versions.model_of", lambda shape: model)
    patch = {it.name: torch.tensor(numpy_helper.to_array(it)) for it in onnx.load_from_string(model).graph.initializer}
    expected = reference.masked_geglu(given.proj.double(), patch["mask"], patch["value"].double())
    unpatched = reference.masked_geglu(given.proj.double(), torch.zeros_like(patch["mask"]), patch["value"].double())
    versions = masked_geglu_in_onnxruntime(SHAPE, stream=None)
    for run in (*versions.baselines.values(), *versions.fused.values()):
        out = run(given).double()
        assert (out - expected).norm() / expected.norm() <= torch.finfo(torch.float16).eps
        assert (out - unpatched).norm() / unpatched.norm() > 0.01


def test_without_a_cuda_provider_that_is_said(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(KernelUnavailable, match=r"^this ONNX Runtime has no CUDA provider: install onnxruntime-gpu"):
        masked_geglu_in_onnxruntime(SHAPE, stream=1)
