"""What TensorRT asks of single operators: each with a node that has it, and one that has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import helper

from bakeout.export.tensorrt.operators import OPERATORS
from bakeout.export.tensorrt.restrictions import _RESTRICTIONS, Use, restrictions_of

X = "x"
# Constants: 0, 1, false and true, small and large; a vector is an axis.
VALUES = {
    "zero": np.array(0, np.int8), "one": np.array(1, np.int8), "false": np.array(False), "true": np.array(True),
    "few": np.array([3839]), "many": np.array([3840]), "axes": np.array([1]),
}  # fmt: skip
SHAPES = {"x": (2, 3, 4, 5), "flat": (6, 7), "open": (None, 3, None), "cube": (2, 3, 4), "complex": (1, 9, 2),
          "real": (1, 9, 1), "unknown": None}  # fmt: skip


def said(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...] = ("o",), **attributes: Any) -> list[str]:
    node = helper.make_node(name, inputs, outputs, **attributes)
    return restrictions_of(Use(node, SHAPES, VALUES.keys(), VALUES))


def branch(output: str, *shape: int) -> Any:
    """A graph of one output, whose shape is known if there is one."""
    info = helper.make_tensor_value_info(output, 1, shape) if shape else helper.make_empty_tensor_value_info(output)
    return helper.make_graph([], "branch", [], [info])


Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def call(name: str, *inputs: str, outputs: tuple[str, ...] = ("o",), **attributes: Any) -> Call:
    return (name, inputs, outputs), attributes


BOTH = {"direction": "bidirectional"}
# What is taken, what is not, and what is said of that.
PAIRS: list[tuple[Call, Call, str]] = [
    (call("Attention", X, X, X), call("Attention", X, X, "cube"), "3 dimensions, not 4"),
    (call("Attention", X, X, X, X), call("Attention", X, X, X, "", X), "has past_key"),
    (call("Attention", X, X, X), call("Attention", X, X, X, outputs=("o", "k")), "more than 1 output"),
    (call("Attention", X, X, X, softcap=0.0), call("Attention", X, X, X, softcap=2.0), "softcap = 2.0"),
    (call("Attention", X, X, X), call("Attention", X, X, X, qk_matmul_output_mode=1), "qk_matmul_output_mode"),
    (call("AveragePool", X, dilations=[1, 1]), call("AveragePool", X, dilations=[2, 1]), "dilations other than 1"),
    (call("AveragePool", X), call("AveragePool", "cube"), "3 dimensions, not 4 or 5"),
    (call("Constant", value_int=1), call("Constant", value_string="a"), "the attribute value_string"),
    (call("Constant", value_ints=[1]), call("Constant", value_strings=["a"]), "the attribute value_strings"),
    (call("CumSum", X, "one"), call("CumSum", X, "unknown"), "computes its axis"),
    (call("DeformConv", X, pads=[1, 2, 1, 2]), call("DeformConv", X, pads=[1, 2, 2, 1]), "pads that differ"),
    (call("DequantizeLinear", X, X, "zero"), call("DequantizeLinear", X, X, "one"), "zero point other than zero"),
    (call("QuantizeLinear", X, X), call("QuantizeLinear", X, X, X), "computes its zero point"),
    (call("Dropout", X, "", "false"), call("Dropout", X, "", "true"), "drops at random"),
    (call("Dropout", X), call("Dropout", X, "", X), "computes its training_mode"),
    (call("EyeLike", "flat"), call("EyeLike", "open"), "a dynamic dimension"),
    (call("GRU", X, X, X, activations=["Sigmoid", "Tanh"] * 2, **BOTH),
     call("GRU", X, X, X, activations=["Sigmoid", "Tanh", "Sigmoid", "Relu"], **BOTH), "other activations backwards"),
    (call("LSTM", X, X, X), call("LSTM", X, X, X, input_forget=1), "input_forget = 1"),
    (call("LSTM", X, X, X, layout=0), call("LSTM", X, X, X, layout=1), "layout = 1"),
    (call("RNN", X, X, X, activations=["Tanh", "Relu"]),
     call("RNN", X, X, X, activations=["Tanh", "Relu"], **BOTH), "other activations backwards"),
    (call("GridSample", X, X), call("GridSample", "cube", X), "3 dimensions, not 4"),
    (call("Hardmax", "open", axis=1), call("Hardmax", "open"), "along a dynamic dimension"),
    (call("If", X, then_branch=branch("a"), else_branch=branch("b")),
     call("If", X, then_branch=branch("a"), else_branch=branch("a")), "an output of one name"),
    (call("If", X, then_branch=branch("a", 2, 3), else_branch=branch("b", 3, 4)),
     call("If", X, then_branch=branch("a", 2, 3), else_branch=branch("b", 6)), "different numbers of dimensions"),
    (call("If", X, then_branch=branch("a", 2, 3), else_branch=branch("b")),
     call("If", X, then_branch=branch("a", 1), else_branch=branch("b", 1, 1)), "different numbers of dimensions"),
    (call("LayerNormalization", X, X), call("LayerNormalization", X, X, outputs=("o", "", "d")), "more than 1 output"),
    (call("LpPool", X), call("LpPool", X, dilations=[1, 2]), "dilations other than 1"),
    (call("MaxPool", X), call("MaxPool", X, outputs=("o", "i")), "more than 1 output"),
    (call("OneHot", X, "one", X), call("OneHot", X, X, X), "computes its depth"),
    *((call(f"Reduce{name}", X, "axes"), call(f"Reduce{name}", X, "flat"), "computes its axes")
      for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")),
    (call("Resize", X, mode="linear"), call("Resize", X, mode="cubic"), "mode = 'cubic'"),
    (call("Resize", X, coordinate_transformation_mode="asymmetric"),
     call("Resize", X, coordinate_transformation_mode="tf_crop_and_resize"), "coordinate_transformation_mode"),
    (call("Resize", X, nearest_mode="floor"), call("Resize", X, nearest_mode="odd"), "nearest_mode = 'odd'"),
    (call("Resize", X), call("Resize", X, keep_aspect_ratio_policy="not_larger"), "keep_aspect_ratio_policy"),
    (call("Resize", X, antialias=0), call("Resize", X, antialias=1), "antialias = 1"),
    (call("Resize", X, "", X, axes=[0, 1, 2, 3]), call("Resize", X, "", X, axes=[2, 3]), "some of the axes"),
    (call("STFT", "real", "one", "axes"), call("STFT", "real", X, "axes"), "computes its frame_step"),
    (call("STFT", "real", "one", "axes"), call("STFT", "real", "one", X), "computes its window"),
    (call("STFT", "real", "one"), call("STFT", "complex", "one"), "complex numbers"),
    (call("ScatterND", X, X, X), call("ScatterND", X, X, X, reduction="add"), "reduction = 'add'"),
    (call("Squeeze", X, "axes"), call("Squeeze", X, X), "computes its axes"),
    (call("Squeeze", X, axes=[1]), call("Squeeze", X), "has no axes"),
    (call("Unsqueeze", X, "axes"), call("Unsqueeze", X, X), "computes its axes"),
    (call("TensorScatter", X, X, X, axis=-2), call("TensorScatter", X, X, X, axis=1), "axis = 1"),
    (call("TensorScatter", X, X), call("TensorScatter", X, "cube"), "3 dimensions, not 4"),
    (call("TopK", X, "few", outputs=("v", "i")), call("TopK", X, "many", outputs=("v", "i")), "asks for 3840"),
    (call("TopK", X, "few", sorted=1), call("TopK", X, "few", sorted=0), "sorted = 0"),
]  # fmt: skip


@pytest.mark.parametrize(("taken", "refused", "problem"), PAIRS, ids=[f"{it[0][0][0]}: {it[2]}" for it in PAIRS])
def test_what_is_not_taken_is_named(taken, refused, problem):
    assert said(*taken[0], **taken[1]) == []
    (found,) = said(*refused[0], **refused[1])
    assert problem in found


def test_every_operator_with_a_restriction_is_tried_and_in_the_table():
    assert _RESTRICTIONS.keys() == {refused[0][0] for _, refused, _ in PAIRS}
    assert _RESTRICTIONS.keys() <= OPERATORS.keys()


def test_what_has_no_restriction_has_no_problem():
    assert said("Relu", ("unknown",)) == []
