"""Patches with their masks and values written out: the same network, and nothing left to compute of constants."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from bakeout.editor.edit import Edit, PatchActivation
from bakeout.editor.errors import InputError
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import write_onnx
from bakeout.export.precision import cast_file
from bakeout.export.tensorrt.dense import write_out

EXPANDING = {"ScatterND", "ConstantOfShape"}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    """A UNet alone."""
    whole = open_model(tiny_model)
    return replace(whole, components={"unet": whole.components["unet"]})


@pytest.fixture(scope="module")
def patches(model: Model) -> Edit:
    """A patch of tokens in an FFN, and one before a Linear of the cross-attention, which is no node of ours."""
    side = model.components["unet"].config["sample_size"]
    generator = torch.Generator().manual_seed(0)
    operations = []
    for kind in ("ffn2", "attn_out"):
        site = model.sites_of(kind)[0]
        mask = torch.rand(side * side, site.d_in, generator=generator) < 0.1
        value = torch.randn(mask.shape, generator=generator) * mask
        operations.append(PatchActivation(site.name, "input", mask, value, (side, side)))
    return Edit(tuple(operations))


@pytest.fixture(scope="module")
def graph(model: Model, patches: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "onnx"
    write_onnx(model, folder, remaining=lower_onto(patches, model).remaining)
    return folder / "unet" / "model.onnx"


def run(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    sizes = {"batch_size": 2, "sequence_length": 7}
    shapes = {it.name: [sizes.get(size, size) for size in it.shape] for it in session.get_inputs()}
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return session.run(None, given)[0]


@pytest.mark.claim("patches reach TensorRT as constants, and compute the same")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_computes_the_same_with_masks_and_values_as_constants(
    graph: Path, patches: Edit, tmp_path: Path, precision: str
) -> None:
    cast_file(graph, tmp_path / "sparse.onnx", precision, "unet")
    cast_file(graph, tmp_path / "dense.onnx", precision, "unet", then=write_out)
    sparse, dense = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("sparse", "dense"))
    assert {node.op_type for node in sparse.node} >= EXPANDING
    assert not EXPANDING & {node.op_type for node in dense.node}
    stored = {it.name: onnx.numpy_helper.to_array(it) for it in dense.initializer}
    node = next(it for it in dense.node if it.op_type == "MaskedGeglu")
    patch = next(it for it in patches.operations if it.site.endswith("ffn2"))
    assert isinstance(patch, PatchActivation)
    mask, value = (stored[name] for name in node.input[1:])
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, patch.mask.numpy())
    assert value.dtype == (np.float16 if precision == "fp16" else np.float32)
    assert np.array_equal(value, patch.value.numpy().astype(value.dtype))
    # The places that nobody reads now are gone.
    assert not [name for name in stored if name.endswith(".indices")]
    assert np.array_equal(run(tmp_path / "sparse.onnx"), run(tmp_path / "dense.onnx"))


def test_bf16_is_written_out_as_it_is_rounded(graph: Path, patches: Edit, tmp_path: Path) -> None:
    cast_file(graph, tmp_path / "dense.onnx", "bf16", "unet", then=write_out)
    model = ir.load(tmp_path / "dense.onnx")
    node = next(it for it in model.graph if it.op_type == "MaskedGeglu")
    value = node.inputs[2].const_value
    patch = next(it for it in patches.operations if it.site.endswith("ffn2"))
    assert isinstance(patch, PatchActivation)
    assert value.dtype == ir.DataType.BFLOAT16
    assert np.array_equal(value.numpy().astype(np.float32), patch.value.bfloat16().float().numpy())


def test_a_graph_without_patches_stays_as_it_is(model: Model, tmp_path: Path) -> None:
    write_onnx(model, tmp_path / "onnx")
    source = tmp_path / "onnx" / "unet" / "model.onnx"
    cast_file(source, tmp_path / "plain.onnx", "fp16", "unet")
    cast_file(source, tmp_path / "dense.onnx", "fp16", "unet", then=write_out)
    plain, dense = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("plain", "dense"))
    assert list(plain.node) == list(dense.node)
    assert [it.name for it in plain.initializer] == [it.name for it in dense.initializer]


def test_what_depends_on_an_input_is_left_alone() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    shape = ir.Value(name="shape", const_value=ir.tensor(np.array([2, 1], np.int64)))
    reshape = ir.node("Reshape", [x, shape])
    node = ir.node("Relu", [reshape.outputs[0]], name="bakeout/a/patch.input/edited")
    graph = ir.Graph([x], [node.outputs[0]], nodes=[reshape, node], initializers=[shape], opset_imports={"": 20})
    write_out(ir.Model(graph, ir_version=10))
    assert [it.op_type for it in graph] == ["Reshape", "Relu"]
    assert [*graph.initializers] == ["shape"]


def scattered(shape: list[int], indices: list[list[int]], updates: list[float]) -> onnx.ModelProto:
    """A graph to which a constant is added, as a patch has it."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ScatterND", ["zeros", "indices", "updates"], ["value"]),
        helper.make_node("Add", ["x", "value"], ["y"], name="bakeout/a/patch.input/edited"),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 4]) for name in "xy"]
    constants = [
        onnx.numpy_helper.from_array(np.array(shape, np.int64), "shape"),
        onnx.numpy_helper.from_array(np.array(indices, np.int64), "indices"),
        onnx.numpy_helper.from_array(np.array(updates, np.float32), "updates"),
    ]
    graph = helper.make_graph(nodes, "main", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("shape", "indices", "updates", "said"),
    [
        ([1 << 20, 1 << 9], [[0, 0]], [1.0], "has 536870912 elements, more than 268435456; export the model again"),
        ([1 << 40, 1 << 40], [[0, 0]], [1.0], "elements, more than 268435456"),
        ([-2, 4], [[0, 0]], [1.0], "cannot be read as a graph"),
        ([2, 4], [[2, 0]], [1.0], "cannot be read as a graph"),
        ([2, 4], [[0, 0, 0]], [1.0], "cannot be read as a graph"),
        ([2, 4], [[0, 0], [0, 1]], [1.0, 2.0, 3.0], "cannot be read as a graph"),
    ],
)
def test_constants_that_no_picture_has_are_refused_before_memory_is_taken(
    tmp_path: Path, shape: list[int], indices: list[list[int]], updates: list[float], said: str
) -> None:
    onnx.save(scattered([2, 4], [[1, 2]], [3.0]), tmp_path / "model.onnx")
    cast_file(tmp_path / "model.onnx", tmp_path / "made.onnx", "fp32", "unet", then=write_out)
    (value,) = (onnx.numpy_helper.to_array(it) for it in onnx.load(tmp_path / "made.onnx").graph.initializer)
    assert value.tolist() == [[0, 0, 0, 0], [0, 0, 3, 0]]
    onnx.save(scattered(shape, indices, updates), tmp_path / "model.onnx")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=said):
            cast_file(tmp_path / "model.onnx", tmp_path / "made.onnx", "fp32", "unet", then=write_out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
