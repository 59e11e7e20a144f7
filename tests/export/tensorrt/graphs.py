"""Graphs for what stands for TensorRT: how an inspector would describe them, and small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

_DOMAIN = "bakeout"
_BF16, _FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
_LAYER_TYPES = {"Conv": "CaskConvolution", "MatMul": "gemm", "Gemm": "gemm", "MaskedGeglu": "PluginV3"}
# As the inspector calls them.
TYPES = {
    TensorProto.FLOAT: "Float",
    TensorProto.FLOAT16: "Half",
    TensorProto.BFLOAT16: "BFloat16",
    TensorProto.INT32: "Int32",
    TensorProto.INT64: "Int64",
    TensorProto.BOOL: "Bool",
}


def layers_of(facts: dict[str, Any], model: onnx.ModelProto) -> list[dict[str, Any]]:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    kinds = {it.name: it.type.tensor_type.elem_type for it in values}
    stored = {it.name: it.data_type for it in model.graph.initializer}
    faults = set(facts["faults"])

    def tensors(names: Any) -> list[dict[str, Any]]:
        return [
            {"Name": name, "Location": "Device", "Dimensions": [], "Format": "Row major linear",
             "DataType": TYPES[kinds[name]]}
            for name in names if name in kinds and name not in stored
        ]  # fmt: skip

    layers = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        named, taken = f"[ONNX Layer: {node.name}]", f"{_DOMAIN}::{node.op_type}" in facts["plugins"]
        kind = _LAYER_TYPES.get(node.op_type, "kgen")
        if node.domain == _DOMAIN and ("body" in faults or not taken):
            kind = "kgen"
            named = "\x1f".join(
                f"[ONNX Layer: {inner} | {node.name} ({node.op_type})]" for inner in ("split", "gelu", "patched")
            )
        layer = {
            "Name": node.name, "LayerType": kind, "Inputs": tensors(node.input), "Outputs": tensors(node.output),
            "TacticName": f"{kind}_0x1", "StreamId": 0, "Metadata": named,
        }  # fmt: skip
        if kind == "gemm" and "fp32-layer" in faults:
            lowered = [it for it in layer["Inputs"] + layer["Outputs"] if it["DataType"] in ("Half", "BFloat16")]
            for tensor in lowered:
                # As where a kernel in fp32 stands between two that convert.
                tensor.update(Name=f"Reformatted {tensor['Name']}", DataType="Float")
            faults -= {"fp32-layer"} if lowered else set()
        layers.append(layer)
        if "unnamed" in faults:
            layer.update(Name=f"__myl_{len(layers)}", Metadata="")
    return layers


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same in fp32 where it is in bf16, for which ONNX Runtime has no kernels on a CPU; weights stay rounded."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    tensors = list(wide.graph.initializer)
    for nodes in (wide.graph.node, *(function.node for function in wide.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    tensors.append(attribute.t)
                elif attribute.name in ("to", "dtype") and attribute.i == _BF16:
                    attribute.i = _FLOAT
    for tensor in tensors:
        if tensor.data_type == _BF16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    del wide.graph.value_info[:]
    assert not any(it.type.tensor_type.elem_type == _BF16 for it in (*wide.graph.input, *wide.graph.output))
    return wide


def stored_as(name: str, values: Any, dtype: int) -> TensorProto:
    """An initializer, its bytes as they are in memory."""
    rounded = helper.make_tensor(name, dtype, values.shape, values.ravel())
    return numpy_helper.from_array(numpy_helper.to_array(rounded), name)


def small_graph(path: Path, dtype: int = TensorProto.FLOAT, geglu: bool = False) -> Path:
    """A graph x [n, 4, 8] → y in fp32, whose product is in `dtype`, and so is the MaskedGeglu after it if asked for."""
    from bakeout.export.custom_ops import MASKED_GEGLU, PLUGIN, masked_geglu

    rng = np.random.default_rng(0)
    width = 16 if geglu else 8
    weight = rng.standard_normal((8, width)).astype(np.float32) / 3
    stored = [stored_as("w", weight, dtype)]
    nodes = [
        helper.make_node("Cast", ["x"], ["x.low"], "x.low/Cast", to=dtype),
        helper.make_node("MatMul", ["x.low", "w"], ["p"], "proj"),
    ]
    functions = []
    if geglu:
        stored += [
            numpy_helper.from_array(np.arange(32).reshape(4, 8) % 3 == 0, "mask"),
            stored_as("value", np.full((4, 8), 0.5, np.float32), dtype),
        ]
        nodes.append(
            helper.make_node(MASKED_GEGLU, ["p", "mask", "value"], ["h"], "ff.net.0", domain=_DOMAIN, **PLUGIN)
        )
        functions.append(ir.to_proto(masked_geglu(20)))
    nodes.append(helper.make_node("Cast", ["h" if geglu else "p"], ["y"], "y/Cast", to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size", 4, 8])], stored,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
