"""The table of operators, against lines of what NVIDIA publishes and against ONNX's own schemas."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from bakeout.export.custom_ops import MASKED_GEGLU
from bakeout.export.tensorrt.operators import ELEMENTS, OPERATORS, OPSETS, is_built_in, is_standard, typed_values

# As they stand in docs/operators.md.
PUBLISHED = {
    "Abs": "FP32, FP16, BF16, INT32, INT64",
    "And": "BOOL",
    "Cast": "FP32, FP16, BF16, INT32, INT64, UINT8, BOOL",
    "Clip": "FP32, FP16, BF16",
    "ConstantOfShape": "FP32, FP16, BF16, FP8, FP4, INT4, INT32, INT64, BOOL",
    "Equal": "FP32, FP16, BF16, INT32, INT64",
    "Gelu": "FP32, FP16, BF16, INT8, INT32, INT64",
    "GridSample": "FP32, FP16",
    "InstanceNormalization": "FP32, FP16, BF16",
    "LayerNormalization": "FP32, FP16, BF16",
    "NonZero": "FP32, FP16",
    "Resize": "FP32, FP16, BF16",
    "ScatterND": "FP32, FP16, BF16, INT32, INT64",
    "Where": "FP32, FP16, BF16, INT32, INT64, BOOL",
}
# Rows that say N.
UNREAD = """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad Compress
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
    SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_types_are_those_that_are_published(name):
    assert set(OPERATORS[name]) == set(PUBLISHED[name].split(", "))


def test_what_is_not_read_is_not_in_the_table():
    assert not OPERATORS.keys() & set(UNREAD.split())


def test_names_are_those_of_onnx_and_none_is_there_twice():
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert OPERATORS.keys() <= standard
    # 158 rows say Y; ImageScaler, ParametricSoftplus and ScaledTanh are of no ONNX that has opsets.
    assert len(OPERATORS) == 158 - 3
    assert {name for types in OPERATORS.values() for name in types} <= set(ELEMENTS.values())


def test_every_operator_has_a_typed_value_in_every_opset():
    for opset in (OPSETS[0], 13, 20, OPSETS[-1]):
        for name in OPERATORS:
            try:
                schema = onnx.defs.get_schema(name, opset, "")
            except onnx.defs.SchemaError:
                continue
            inputs = [f"i{place}" for place in range(max(1, len(schema.inputs)))] if schema.inputs else []
            node = helper.make_node(name, inputs, [f"o{place}" for place in range(max(1, len(schema.outputs)))])
            assert typed_values(node, opset), (name, opset)


@pytest.mark.parametrize(
    ("name", "inputs", "typed"),
    [
        ("Where", ("c", "x", "y"), ("x", "y", "o")),
        ("Gather", ("x", "i"), ("x", "o")),
        ("Reshape", ("x", "shape"), ("x", "o")),
        ("Cast", ("x",), ("x", "o")),
        ("ConstantOfShape", ("shape",), ("o",)),
        ("Concat", ("x", "y", "z"), ("x", "y", "z", "o")),
        ("ScatterND", ("x", "i", "u"), ("x", "u", "o")),
        ("Equal", ("x", "y"), ("x", "y")),
        ("Clip", ("x", "", "high"), ("x", "high", "o")),
        ("OneHot", ("i", "depth", "values"), ("values", "o")),
        ("Constant", (), ("o",)),
    ],
)
def test_indices_shapes_and_conditions_have_types_of_their_own(name, inputs, typed):
    assert typed_values(helper.make_node(name, inputs, ["o"]), 20) == typed


def test_our_operators_have_names_of_their_own():
    assert not is_built_in(MASKED_GEGLU)
    for name in ("Gelu", "Swish", "DFT", "BitShift", "TRT_Attention"):
        assert is_built_in(name)


def test_onnx_has_two_names_for_its_domain():
    assert is_standard("")
    assert is_standard("ai.onnx")
    assert not is_standard("bakeout")
    assert not is_standard("ai.onnx.ml")
