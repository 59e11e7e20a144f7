"""Which graphs the library of operators is registered for, and what happens where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bakeout.editor.errors import InputError
from bakeout.export import op_library as module
from bakeout.export.custom_ops import masked_geglu
from bakeout.export.onnx_pipeline import OnnxGraph, SessionSettings
from bakeout.export.op_library import FunctionBodyWarning, has_own_operators, op_library
from bakeout.kernels.errors import KernelUnavailable


def write_graph(path: Path, *, own: bool = True, weights: int = 0, outside: bool = False) -> Path:
    """A graph whose operator of ours, or plain ONNX in its place, is given constants for four tokens."""
    constants = [
        numpy_helper.from_array(np.arange(40).reshape(4, 10) % 3 == 0, "mask"),
        numpy_helper.from_array(np.ones((4, 10), np.float32), "value"),
        numpy_helper.from_array(np.zeros(weights, np.float32), "weights"),
    ]
    nodes = [helper.make_node("MaskedGeglu", ["proj", "mask", "value"], ["out"], domain="bakeout")]
    if not own:
        nodes = [
            helper.make_node("Split", ["proj"], ["a", "g"], axis=-1, num_outputs=2),
            helper.make_node("Where", ["mask", "value", "a"], ["out"]),
        ]
    proj = helper.make_tensor_value_info("proj", TensorProto.FLOAT, ["b", "n", 20])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid("bakeout", 1)] if own else [])]
    functions = [ir.serde.serialize_function(masked_geglu(20))] if own else []
    made = helper.make_graph(nodes, "bakeout", [proj], [out], constants)
    model = helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=10, producer_name="bakeout")
    onnx.save(model, path, save_as_external_data=outside, location="data", size_threshold=0)
    return path


def run(path: Path, tokens: int, kernels: str) -> torch.Tensor:
    graph = OnnxGraph(path, ["proj"], ["out"], SessionSettings(threads=1, kernels=kernels))
    generator = torch.Generator().manual_seed(0)
    return graph.run({"proj": torch.randn(2, tokens, 20, generator=generator)})["out"]


@pytest.mark.parametrize("outside", [False, True])
def test_own_operators_are_told_by_imports(tmp_path: Path, outside: bool) -> None:
    assert has_own_operators(write_graph(tmp_path / "own", weights=100_000, outside=outside))
    # The graph and what made it are called bakeout as well.
    assert not has_own_operators(write_graph(tmp_path / "other", own=False, weights=100_000, outside=outside))


def test_exports_are_told_apart(exported: Path, tmp_path: Path) -> None:
    folded = list((exported / "onnx").glob("*/model.onnx"))
    assert len(folded) == 4
    assert not any(map(has_own_operators, folded))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        b"bakeout",
        b"\x42\xff\xff\xff\xff\xff\xff\xff\xff\x7fbakeout",  # an import of 2^63 bytes
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a graph of as many
        b"\x42\x09\x0a\x7fbakeout",  # a domain of more bytes than there are
        b"\x43",
    ],
)
def test_what_is_no_graph_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not has_own_operators(tmp_path / "file")
    assert not has_own_operators(tmp_path / "missing")


def test_little_of_a_large_graph_is_read(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "own", weights=1_000_000)
    with path.open("rb", buffering=0) as file:
        fields = list(module._fields(file, 8))
        assert file.tell() == path.stat().st_size
    assert [len(it) for it in fields] == [len(it.SerializeToString()) for it in onnx.load(path).opset_import]


@pytest.mark.parametrize("unit", [b"\x08\x00", b"\x42\x00"])
def test_little_of_what_is_nothing_but_fields_is_read(tmp_path: Path, unit: bytes) -> None:
    (tmp_path / "file").write_bytes(unit * 1_000_000)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        assert not any(map(len, module._fields(file, 8)))
        assert file.tell() < 50_000


def test_the_library_runs_unless_function_bodies_are_asked_for(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "own")
    answers = {kernels: run(path, 4, kernels) for kernels in ("auto", "library", "function")}
    assert torch.equal(answers["auto"], answers["library"])
    error = (answers["library"] - answers["function"]).norm() / answers["function"].norm()
    assert error < 2e-7
    # By what only the body does, it is seen that this is another program: one token is taken for four.
    assert run(path, 1, "function").shape == (2, 4, 10)
    for kernels in ("auto", "library"):
        with pytest.raises(InputError, match="proj of MaskedGeglu is"):
            run(path, 1, kernels)


def unavailable(kind: str) -> Path:
    raise KernelUnavailable(f"there is no compiler for {kind}; install one")


def test_without_a_compiler_function_bodies_run_and_that_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    path, plain = write_graph(tmp_path / "own"), write_graph(tmp_path / "plain", own=False)
    monkeypatch.setattr(module, "library", unavailable)
    with pytest.warns(FunctionBodyWarning, match="as plain ONNX, which can be slower: there is no compiler for cpu"):
        assert run(path, 1, "auto").shape == (2, 4, 10)
    with pytest.raises(InputError, match="no compiler for cpu; install one; else choose the kernels 'function'"):
        run(path, 4, "library")
    assert run(path, 4, "function").shape == (2, 4, 10)
    # A graph without operators of ours needs none.
    assert run(plain, 4, "library").shape == (2, 4, 10)


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: Any) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(module, "library", lambda kind: broken)
    with pytest.raises(
        InputError, match=r"ONNX Runtime does not load .*broken\.so .*; remove it to have it built anew"
    ):
        run(write_graph(tmp_path / "own"), 4, "library")


def test_which_library_serves_which_providers(tmp_path: Path, monkeypatch: Any) -> None:
    path, asked = write_graph(tmp_path / "own"), []
    monkeypatch.setattr(module, "library", lambda kind: asked.append(kind) or unavailable(kind))
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    for providers, kind in (((cpu,), "cpu"), ((cuda,), "cuda"), ((cuda, cpu), "cuda")):
        with pytest.raises(InputError, match=f"no compiler for {kind}"):
            op_library([path], SessionSettings(providers, kernels="library"))
    assert asked == ["cpu", "cuda", "cuda"]
    other = SessionSettings(("TensorrtExecutionProvider", cuda), kernels="library")
    with pytest.raises(InputError, match="there is no kernel for 'TensorrtExecutionProvider'; choose from CPU"):
        op_library([path], other)


def test_other_kernels_are_refused() -> None:
    with pytest.raises(InputError, match="ONNX Runtime has no kernels 'triton'; choose from auto, library, function"):
        SessionSettings(kernels="triton")
