"""Graphs in fp16 and bf16 as a strongly typed runtime computes them, and how far apart what two graphs give is.

ONNX Runtime on a CPU has few kernels for either and takes casts out again, so that what it computes is better than what
such a runtime does. `emulated` does as one: each operator in fp32, its result rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import InlinePass

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# A rounding to fp16 or bf16 is off by up to half of this part.
UNIT = {"fp16": 2.0**-10, "bf16": 2.0**-7}
SIZES = {"batch_size": 2, "sequence_length": 77}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def farthest(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The one comparison of these tests, which the negative controls go through as well. NaN is far."""
    distances = [relative_rms(found[name], expected[name]) for name in expected]
    return max(np.inf if np.isnan(it) else it for it in distances)


def plain(path: Path, taps: Iterable[str] = ()) -> onnxruntime.InferenceSession:
    return session(onnx.load(path), taps)


def session(graph: onnx.ModelProto, taps: Iterable[str] = (), *, exactly: bool = False) -> Any:
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if exactly:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def emulated(path: Path, taps: Iterable[str] = ()) -> Any:
    """A session of the graph in which each value in fp16 or bf16 is computed in fp32 and then rounded."""
    model = ir.load(path)
    InlinePass()(model)
    typed = onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    low = {it.name: it.type.tensor_type.elem_type for it in typed.graph.value_info}
    low |= {it.name: it.data_type for it in typed.graph.initializer}
    low = {name: dtype for name, dtype in low.items() if dtype in LOW.values()}
    wide = ir.to_proto(model)
    # What is in bf16 here is in operators that take it only since 22.
    del wide.opset_import[:], wide.graph.value_info[:]
    wide.opset_import.append(helper.make_opsetid("", 20))
    nodes = list(wide.graph.node)
    del wide.graph.node[:]
    for initializer in wide.graph.initializer:
        if initializer.name in low:
            name, initializer.name = initializer.name, f"{initializer.name}/stored"
            wide.graph.node.append(helper.make_node("Cast", [initializer.name], [name], to=TensorProto.FLOAT))
    for node in nodes:
        rounded = [name for name in node.output if name in low]
        for name in rounded:
            node.output[list(node.output).index(name)] = f"{name}/exact"
        for attribute in node.attribute if rounded else ():
            if node.op_type == "Cast":
                attribute.i = TensorProto.FLOAT
            elif node.op_type == "ConstantOfShape":
                value = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(value))
        wide.graph.node.append(node)
        for name in rounded:
            there = helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], to=low[name])
            back = helper.make_node("Cast", [f"{name}/rounded"], [name], to=TensorProto.FLOAT)
            wide.graph.node.extend([there, back])
    return session(wide, taps, exactly=True)


def inputs_of(ran: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a graph of a tiny model."""
    random, given = np.random.default_rng(seed), {}
    for it in ran.get_inputs():
        shape = [size if isinstance(size, int) else SIZES.get(size, 16) for size in it.shape]
        given[it.name] = random.standard_normal(shape).astype(np.float32)
        if it.type == "tensor(int64)":
            given[it.name] = random.integers(0, 500, shape)
    if "timestep" in given:
        given["timestep"] = np.array(999, np.float32)
    if "time_ids" in given:
        given["time_ids"] = np.array([[1024, 768, 0, 0, 1024, 768]] * 2, np.float32)
    return given


def outputs_of(ran: Any, inputs: Mapping[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    wanted = names or tuple(it.name for it in ran.get_outputs())
    return dict(zip(wanted, ran.run(wanted, dict(inputs)), strict=True))


@cache
def typed(path: Path) -> dict[str, int]:
    """The element type of every value, as ONNX infers it."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True).graph
    named = {it.name: it.type.tensor_type.elem_type for it in (*graph.input, *graph.value_info, *graph.output)}
    return named | {it.name: it.data_type for it in graph.initializer}


def small(nodes: Iterable[onnx.NodeProto], *constants: onnx.TensorProto) -> onnx.ModelProto:
    """A graph from x to y, [2, 4, 8, 8]."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4, 8, 8]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "main", ends[:1], ends[1:], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def constant(name: str, value: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)
