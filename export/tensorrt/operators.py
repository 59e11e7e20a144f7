"""Which ONNX operators TensorRT's parser reads, and in which element types.

From onnx-tensorrt, docs/operators.md of TensorRT 10.15, as it was read in November 2026. What TensorRT 11 has added
(Swish, DFT, GridSample of volumes, opset 25 with 11.5) is left out: no graph needs it that is to run in 11.0. The
restrictions of single operators are in `bakeout.export.tensorrt.restrictions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx
from onnx import TensorProto

SOURCE: Final = "TensorRT 10.15"
OPSETS: Final = range(9, 25)
# Those of the releases of ONNX that the opsets are of; 3 is the first that has opsets as they are now.
IR_VERSIONS: Final = range(3, 14)

# Element type of ONNX → its name in TensorRT, whether or not an operator takes it.
ELEMENTS: Final[Mapping[int, str]] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT8: "INT8",
    TensorProto.INT4: "INT4",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
}

_HALVES = ("FP32", "FP16")
_FLOATS = (*_HALVES, "BF16")
_NUMBERS = (*_FLOATS, "INT32", "INT64")
_ANY = (*_NUMBERS, "BOOL")
_CONSTANTS = (*_ANY, "FP8", "FP4", "INT4")

_TABLE: Final = (
    (_FLOATS, ("Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos "
              "Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
              "GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LRN LSTM "
              "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool "
              "MeanVarianceNormalization PRelu QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike "
              "RandomUniform RandomUniformLike Reciprocal Resize RotaryEmbedding Round Scan Selu Sigmoid Sin Sinh "
              "Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample")),
    (_NUMBERS, ("Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min "
               "Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean "
               "ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign "
               "SpaceToDepth Sub Sum TopK")),
    (_ANY, ("Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape "
           "ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where")),
    (_HALVES, "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign"),
    (("BOOL",), "And Not Or Xor"),
    ((*_ANY, "UINT8"), "Cast CastLike"),
    (_CONSTANTS, "Constant ConstantOfShape"),
    ((*_FLOATS, "INT8", "FP8"), "Attention"),
    (("INT8", "FP8", "FP4", "INT4"), "DequantizeLinear"),
    ((*_NUMBERS, "INT8"), "Gelu"),
    ((*_NUMBERS, "FP8"), "Mean"),
    (("FP32",), "STFT"),
    ((*_FLOATS, "INT32"), "TensorScatter"),
)  # fmt: skip

# Operator → the element types that it takes.
OPERATORS: Final[Mapping[str, tuple[str, ...]]] = {name: types for types, names in _TABLE for name in names.split()}

# Where the table's types are not those of the first input, or without one of the first output: the type variables of
# the operator's schema that they are of.
_TYPED: Final[Mapping[str, tuple[str, ...]]] = {
    "BlackmanWindow": ("T2",),
    "Cast": ("T1", "T2"),
    "CastLike": ("T1", "T2"),
    "ConstantOfShape": ("T2",),
    "EyeLike": ("T1", "T2"),
    "GridSample": ("T1", "T2"),
    "HammingWindow": ("T2",),
    "HannWindow": ("T2",),
    "If": ("V",),
    "Loop": ("V",),
    "OneHot": ("T3",),
    "Where": ("T",),
}


def is_built_in(op_type: str) -> bool:
    """Whether TensorRT takes an operator of this name for its own: one of ONNX, or of the parser's private ones."""
    return op_type in OPERATORS or op_type.startswith("TRT_") or op_type in _standard()


def is_standard(domain: str) -> bool:
    """Whether the domain is that of ONNX itself."""
    return domain in ("", "ai.onnx")


def typed_values(node: onnx.NodeProto, opset: int) -> tuple[str, ...]:
    """The inputs and outputs of a node of ONNX's own that the table's types are of.

    Raises:
        onnx.defs.SchemaError: the opset has no such operator.
    """
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    first = (*schema.inputs, *schema.outputs)[0].type_str
    wanted = _TYPED.get(node.op_type, (first,))
    sides = ((node.input, schema.inputs), (node.output, schema.outputs))
    return tuple(
        name
        for names, formal in sides
        for place, name in enumerate(names)
        if name and formal[min(place, len(formal) - 1)].type_str in wanted
    )


def _standard() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "")
