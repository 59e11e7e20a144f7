"""Graphs made by hand in fp16 and bf16: what is cast, what is rounded, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from emulation import LOW, UNIT, constant, emulated, farthest, outputs_of, plain, small, values
from onnx import TensorProto, helper, numpy_helper

from bakeout.editor.errors import InputError
from bakeout.export import graph_file
from bakeout.export.precision import cast, cast_file

WEIGHT = constant("w", values(4, 4, 1, 1).numpy())


def test_a_normalisation_in_fp16_is_lost_where_ours_is_not(tmp_path):
    nodes = [
        helper.make_node("InstanceNormalization", ["x", "one", "zero"], ["n"], name="norm"),
        helper.make_node("Conv", ["n", "w"], ["y"], name="conv"),
    ]
    model = small(nodes, constant("one", np.ones(4)), constant("zero", np.zeros(4)), WEIGHT)
    onnx.save(model, tmp_path / "model.onnx")
    cast_file(tmp_path / "model.onnx", tmp_path / "ours.onnx", "fp16", "unet")
    x = {"x": values(2, 4, 8, 8).numpy() * 1e5}
    expected = outputs_of(plain(tmp_path / "model.onnx"), x)
    assert farthest(outputs_of(emulated(tmp_path / "ours.onnx"), x), expected) <= UNIT["fp16"]
    entered = helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16)
    nodes[0].input[0], nodes[1].output[0] = "x16", "y16"
    left = helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT)
    low = [constant(it.name, numpy_helper.to_array(it), np.float16) for it in model.graph.initializer]
    onnx.save(small([entered, *nodes, left], *low), tmp_path / "low.onnx")
    assert not np.isfinite(outputs_of(emulated(tmp_path / "low.onnx"), x)["y"]).all()


def test_a_constant_that_two_types_want_is_there_in_both(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Mul", ["c", "half"], ["m"], name="low"),
        helper.make_node("Exp", ["m"], ["e"], name="exp"),
        helper.make_node("Mul", ["e", "half"], ["y"], name="high"),
    ]
    onnx.save(small(nodes, WEIGHT, constant("half", 0.5)), tmp_path / "model.onnx")
    cast_file(tmp_path / "model.onnx", tmp_path / "low.onnx", "bf16", "unet")
    graph = onnx.load(tmp_path / "low.onnx").graph
    assert {it.name: it.data_type for it in graph.initializer} == {
        "w": TensorProto.BFLOAT16, "half": TensorProto.FLOAT, "half.bf16": TensorProto.BFLOAT16
    }  # fmt: skip
    used = {it.name: list(it.input) for it in graph.node}
    assert (used["low"][1], used["high"][1]) == ("half.bf16", "half")


def test_weights_are_read_when_they_are_written_and_not_before(tmp_path):
    model = ir.from_proto(small([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], WEIGHT))
    read = []

    def weight() -> ir.TensorProtocol:
        read.append("w")
        return ir.tensor(values(4, 4, 1, 1).numpy())

    model.graph.initializers["w"].const_value = ir.LazyTensor(weight, ir.DataType.FLOAT, ir.Shape([4, 4, 1, 1]))
    cast(model, "fp16", "unet")
    assert not read
    graph_file.save_graph(model, tmp_path / "model.onnx")
    assert read == ["w"]


def test_small_weights_lose_digits_as_in_any_checkpoint(tmp_path):
    weight = np.float32([2.0**-14, 2.0**-24 * 1.4, 2.0**-26, -(2.0**-26)]).reshape(4, 1, 1, 1)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=4)
    onnx.save(small([node], constant("w", weight)), tmp_path / "model.onnx")
    cast_file(tmp_path / "model.onnx", tmp_path / "low.onnx", "fp16", "unet")
    (found,) = (numpy_helper.to_array(it) for it in onnx.load(tmp_path / "low.onnx").graph.initializer)
    assert found.ravel().tolist() == [2.0**-14, 2.0**-24, 0, 0]


def test_what_is_not_in_fp32_is_refused(tmp_path):
    onnx.save(small([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], WEIGHT), tmp_path / "model.onnx")
    for name in LOW:
        cast_file(tmp_path / "model.onnx", tmp_path / "once.onnx", name, "unet")
        with pytest.raises(InputError, match="only graphs in fp32 are cast"):
            cast_file(tmp_path / "once.onnx", tmp_path / "twice.onnx", name, "unet")
    nodes = [helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE, name="wide"),
             helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT, name="narrow")]  # fmt: skip
    onnx.save(small(nodes), tmp_path / "double.onnx")
    with pytest.raises(InputError, match=r"^'wide gives DOUBLE', and only"):
        cast_file(tmp_path / "double.onnx", tmp_path / "made.onnx", "fp16", "unet")


def test_an_unknown_precision_and_a_file_that_is_no_graph_are_refused(tmp_path):
    onnx.save(small([helper.make_node("Relu", ["x"], ["y"], name="relu")]), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="'fp8' is no precision; choose from fp32, fp16, bf16"):
        cast_file(tmp_path / "model.onnx", tmp_path / "made.onnx", "fp8", "unet")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    onnx.save(small([helper.make_node("Cast", ["x"], ["y"], name="to what")]), tmp_path / "incomplete.onnx")
    elsewhere = constant("w", values(4, 4, 1, 1).numpy())
    onnx.external_data_helper.set_external_data(elsewhere, "../weights", 0, 64)
    elsewhere.ClearField("raw_data")
    escaping = small([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], elsewhere)
    (tmp_path / "escaping.onnx").write_bytes(escaping.SerializeToString())
    for broken in ("broken.onnx", "missing.onnx", "incomplete.onnx", "escaping.onnx"):
        with pytest.raises(InputError, match=f"{broken} cannot be read as a graph"):
            cast_file(tmp_path / broken, tmp_path / "made.onnx", "fp16", "unet")


def _short() -> onnx.ModelProto:
    """Its weight is said to be longer than the file that has it."""
    weight = constant("w", values(4, 4, 1, 1).numpy())
    onnx.external_data_helper.set_external_data(weight, "data", 0, 64)
    weight.ClearField("raw_data")
    return small([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], weight)


def _without_operators() -> onnx.ModelProto:
    graph = small([helper.make_node("Strange", ["x"], ["y"], domain="strange", name="strange")])
    graph.opset_import[0].domain = "strange"
    return graph


# Each passes the check of ONNX without inference of types; the name of one is that of a cast that is made.
HOSTILE = {
    "no such type": small([helper.make_node("Cast", ["x"], ["y"], to=99, name="cast")]),
    "no standard operators": _without_operators(),
    "weights cut short": _short(),
    "another type": small(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        numpy_helper.from_array(np.array([b"a"], object), "w"),
    ),
    "a name taken": small(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            helper.make_node("Exp", ["c"], ["e"], name="exp"),
            helper.make_node("Relu", ["e"], ["c.bf16"], name="relu"),
            helper.make_node("Exp", ["c.bf16"], ["c.fp32"], name="other"),
            helper.make_node("Add", ["c", "c.fp32"], ["y"], name="sum"),
        ],
        WEIGHT,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_graph_that_nobody_would_write_is_refused_in_one_sentence(case, tmp_path):
    (tmp_path / "data").write_bytes(b"short")
    (tmp_path / "model.onnx").write_bytes(HOSTILE[case].SerializeToString())
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match=r"model\.onnx cannot be read as a graph \(.*\); export it again$"):
        cast_file(tmp_path / "model.onnx", tmp_path / "made" / "model.onnx", "bf16", "unet")
