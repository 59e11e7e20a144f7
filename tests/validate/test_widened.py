"""Graphs in 16 bits told as graphs in fp32: conversions between the two are gone, and all else is as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bakeout.editor.edit import Edit
from bakeout.editor.model import open_model
from bakeout.export.onnx import write_onnx
from bakeout.validate.audit import MissingError, check_weights, names_of
from bakeout.validate.onnx_folder import OnnxFolder
from bakeout.validate.widened import edit_home, strange_types, wide_products, widen

FP16, FP32 = TensorProto.FLOAT16, TensorProto.FLOAT


def model(*nodes: onnx.NodeProto, x: int = FP32, y: int = FP32, **constants: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "it",
        [helper.make_tensor_value_info("x", x, ["n"])],
        [helper.make_tensor_value_info("y", y, ["n"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def cast(source: str, target: str, to: int, name: str = "") -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name, to=to)


def read(it: onnx.ModelProto) -> list[tuple[str, list[str], list[str]]]:
    return [(node.op_type, list(node.input), list(node.output)) for node in it.graph.node]


HALF = np.array([0.1, 0.2, 0.3], np.float16)


def test_conversions_between_the_two_are_gone():
    it = model(
        cast("x", "low", FP16),
        helper.make_node("Mul", ["low", "c"], ["product"]),
        cast("product", "wide", FP32),
        cast("wide", "again", FP16),
        helper.make_node("Add", ["again", "c"], ["sum"]),
        cast("sum", "out", FP32),
        helper.make_node("Softmax", ["out"], ["y"]),
        c=HALF,
    )
    assert strange_types(it, "it", "fp16") == []
    widen(it, "it", "fp16")
    assert read(it) == [
        ("Mul", ["x", "c"], ["product"]),
        ("Add", ["product", "c"], ["sum"]),
        ("Softmax", ["sum"], ["y"]),
    ]
    # Whose types are read is another matter: what is stored stays as it is.
    assert it.graph.initializer[0].data_type == FP16


def test_what_gives_an_output_stays_and_gives_fp32():
    it = model(helper.make_node("Mul", ["c", "c"], ["product"]), cast("product", "y", FP32), c=HALF)
    widen(it, "it", "fp16")
    assert read(it) == [("Mul", ["c", "c"], ["product"]), ("Cast", ["product"], ["y"])]


def test_other_conversions_stay_and_give_fp32():
    """Of truth values and whole numbers, which choose."""
    it = model(
        helper.make_node("Greater", ["x", "zero"], ["is"]),
        cast("is", "mask", FP16, "of truth"),
        helper.make_node("ConstantOfShape", ["shape"], ["full"], value=helper.make_tensor("", FP16, [1], [2.0])),
        helper.make_node("Mul", ["mask", "full"], ["product"]),
        cast("product", "y", FP32),
        zero=np.zeros((), np.float32), shape=np.array([3], np.int64),
    )  # fmt: skip
    widen(it, "it", "fp16")
    assert [(node.op_type, [a.i for a in node.attribute if a.name == "to"]) for node in it.graph.node] == [
        ("Greater", []), ("Cast", [FP32]), ("ConstantOfShape", []), ("Mul", []), ("Cast", [FP32]),
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(it.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([1, -1, 3], np.float32)})[0].tolist() == [2, 0, 2]


def test_what_an_edit_converts_inside_is_told():
    """Between its own nodes, of its constants, or by computing in 16 bits at all; not what it reads or gives."""
    home = "bakeout/text_encoder.layer.1/"

    def hidden(*inside: onnx.NodeProto, home: str = home) -> list[str]:
        first = helper.make_node("Mul", ["x", "tiny"], ["a"], f"{home}first")
        last = helper.make_node("Div", ["b", "tiny"], ["edited"], f"{home}edited")
        tiny = np.array(1e-12, np.float32)
        it = model(first, *inside, last, cast("edited", "low", FP16), cast("low", "y", FP32), tiny=tiny)
        it.graph.initializer.append(numpy_helper.from_array(HALF, "half"))
        return widen(it, "it", "fp16")

    def add(value: str, home: str = home) -> onnx.NodeProto:
        return helper.make_node("Add", ["a", value], ["b"], f"{home}add")

    raw = [cast("x", "x.low", FP16), cast("x.low", "x.wide", FP32)]
    assert hidden(*raw, add("x.wide")) == []
    rounded = [cast("a", "a.low", FP16), cast("a.low", "a.wide", FP32, "anything")]
    assert hidden(*rounded, helper.make_node("Neg", ["a.wide"], ["b"])) == []
    for inside in ([*rounded, add("a.wide")], [cast("half", "wide", FP32), add("wide")]):
        for own in (home, "bakeout/unet.mid.attn.0.block.0.ffn2/patch.input/"):
            assert hidden(*inside[:-1], add(inside[-1].input[1], own), home=own) == [
                f"'{own}add' reads what was converted inside the edit"
            ]
    low = [cast("x", "x.low", FP16), helper.make_node("Neg", ["x.low"], ["c"], f"{home}neg"), cast("c", "b", FP32)]
    faults = hidden(*low)
    assert f"'{home}neg' computes in fp16, where the edit must be exact" in faults
    assert f"'{home}edited' reads what was converted inside the edit" in faults


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("bakeout/text_encoder.layer.1/latents.0/add", "bakeout/text_encoder.layer.1/"),
        ("bakeout/unet.mid.ffn2/patch.input/edited", "bakeout/unet.mid.ffn2/patch.input/"),
        ("bakeout", None), ("", None), ("mid/bakeout/add", None),
    ],
)  # fmt: skip
def test_nodes_of_edits_are_told_by_their_names(name, home):
    assert edit_home(name) == home


def test_products_in_more_than_the_precision_are_found():
    """Those of edits are exact, and no fault."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        cast("a", "low", FP16),
        helper.make_node("MatMul", ["low", "half"], ["b"], "second"),
        cast("b", "wide", FP32),
        helper.make_node("MatMul", ["wide", "w"], ["y"], "bakeout/text_encoder.layer.1/product"),
    ]
    it = model(*nodes, w=np.zeros(3, np.float32), half=HALF)
    assert wide_products(it, "it", "fp16") == ["it computes 1 products in more than fp16, as 'first'"]
    del it.graph.node[0]
    it.graph.node[0].input[0] = "x"
    assert wide_products(it, "it", "fp16") == []


def test_a_type_that_nobody_knows_is_found():
    it = model(helper.make_node("MatMulNBits", ["x"], ["a"], domain="com.microsoft"), cast("a", "y", FP32))
    it.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert strange_types(it, "it", "fp16") == strange_types(it, "it", "fp32")
    assert strange_types(it, "it", "fp16") == ["it has 'a' of a type that cannot be told"]


def test_fp32_is_left_alone():
    it = model(cast("x", "low", FP16), cast("low", "y", FP32))
    before = it.SerializeToString()
    widen(it, "it", "fp32")
    assert it.SerializeToString() == before
    assert strange_types(it, "it", "fp32") != []


@pytest.mark.parametrize(
    "type_", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.BFLOAT16, TensorProto.DOUBLE,
              TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4],
)  # fmt: skip
def test_another_type_is_found(type_):
    name = TensorProto.DataType.Name(type_)
    it = model(cast("x", "odd", type_, "to it"), cast("odd", "y", FP32))
    assert any(name in fault for fault in strange_types(it, "it", "fp16"))
    # What the file itself says of its values is not believed.
    it.graph.value_info.append(helper.make_tensor_value_info("odd", FP16, ["n"]))
    assert any("'odd'" in fault and name in fault for fault in strange_types(it, "it", "fp16"))
    like = model(helper.make_node("CastLike", ["x", "c"], ["odd"]), cast("odd", "y", FP32))
    like.graph.initializer.append(helper.make_tensor("c", type_, [1], [0]))
    assert any(f"'c' of the type {name}" in fault for fault in strange_types(like, "it", "fp16"))


def test_quantisation_without_a_conversion_is_found():
    it = model(
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    )
    assert any("'q' of the type UINT8" in fault for fault in strange_types(it, "it", "fp32"))


def test_a_graph_whose_types_contradict_is_missing():
    it = model(helper.make_node("Add", ["x", "c"], ["y"]), c=HALF)
    it.graph.input.append(helper.make_tensor_value_info("c", FP32, ["n"]))
    (fault,) = strange_types(it, "it", "fp16")
    assert fault.startswith("it is no graph of which types can be told")
    with pytest.raises(MissingError, match="it is no graph of which types can be told"):
        widen(it, "it", "fp16")


@pytest.mark.slow
def test_every_weight_of_the_largest_family_is_the_nearest(folders, narrowed, tmp_path):
    base = open_model(folders("sdxl"))
    write_onnx(base, tmp_path / "wide")
    names = names_of(base)
    for precision in ("fp16", "bf16"):
        graphs = OnnxFolder(narrowed(tmp_path / "wide", tmp_path / precision, precision), base, precision)
        beside = [*graphs.beside(), *graphs.strange(), *graphs.unaccounted(names)]
        assert beside == []
        assert graphs.check_interface("onnx").verdict == "pass"
        check = partial(check_weights, "onnx", base, Edit(()), names, partial(graphs.read, names), beside, (), {})
        assert check(graphs.dtype).verdict == "pass"
        assert check().verdict == "fail"


def test_bits_are_read_as_they_are_stored(tmp_path: Path, tiny_model: Path):
    """In raw bytes and in the field that ONNX has for 16 bits, of both types."""
    base = open_model(tiny_model)
    values = torch.tensor([1.5, -0.0, 3e-7, 65504.0])
    for dtype, name, precision in ((torch.float16, "FLOAT16", "fp16"), (torch.bfloat16, "BFLOAT16", "bf16")):
        bits = values.to(dtype).view(torch.int16).numpy().view(np.uint16)
        raw = onnx.TensorProto(
            name="raw", data_type=TensorProto.DataType.Value(name), dims=[4], raw_data=bits.tobytes()
        )
        field = onnx.TensorProto(name="field", data_type=raw.data_type, dims=[4], int32_data=bits.tolist())
        it = model(helper.make_node("Identity", ["x"], ["y"]))
        it.graph.initializer.extend([raw, field])
        (tmp_path / precision / "unet").mkdir(parents=True)
        onnx.save(it, tmp_path / precision / "unet" / "model.onnx")
        graphs = OnnxFolder(tmp_path / precision, base, precision)
        for own in ("raw", "field"):
            found = graphs.tensor("unet", own)
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.int16), values.to(dtype).view(torch.int16))
            assert numpy_helper.to_array(graphs.whole("unet", own)).dtype == np.float32
        with pytest.raises(MissingError, match="in place of FLOAT"):
            OnnxFolder(tmp_path / precision, base).tensor("unet", "raw")
