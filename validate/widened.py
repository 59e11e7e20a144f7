"""A graph in 16 bits, as the graph in fp32 of which it is a rounding.

Between fp32 and its own precision a graph may convert wherever it likes but inside an edit. So what its nodes read and
mean is told without such conversions, and of any other type nothing may be in it. Inside an edit a conversion is found:
there a small number that is rounded to 0, or a large one to infinity, could undo what the nodes otherwise do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import torch

from bakeout.validate.audit import MissingError

# What PyTorch calls a precision, and ONNX.
DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TYPES: Final[Mapping[str, str]] = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
# Beside numbers of the precision and of fp32: what shapes, tokens and masks are.
_WHOLE: Final = ("BOOL", "INT32", "INT64")
# Bytes of an initializer that may be a shape, which decides of no type.
_SMALL = 1024
_PRODUCTS: Final = ("Conv", "Gemm", "MatMul")


def onnx_type(precision: str) -> int:
    """ONNX's number of it."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(_TYPES[precision]))


def edit_home(name: str) -> str | None:
    """What the name of a node begins with that is of an edit: bakeout/S/, and of a patch bakeout/S/patch.<at>/."""
    parts = name.split("/")
    if parts[0] != "bakeout" or len(parts) == 1:
        return None
    return "/".join(parts[: 3 if parts[2:] and parts[2].startswith("patch.") else 2]) + "/"


def strange_types(model: Any, name: str, precision: str) -> list[str]:
    """In words, what in an ONNX model is of a type that is neither fp32 nor of its precision, and no whole number.

    Or of a type that ONNX does not know, as it does not of what operators of other domains give.
    """
    from onnx import TensorProto

    allowed = {onnx_type(precision), *(TensorProto.DataType.Value(it) for it in ("FLOAT", *_WHOLE))}
    try:
        types = _types(model, name)
    except MissingError as missing:
        return [str(missing)]
    found = [
        *types.items(),
        *((it.name, it.data_type) for it in (*model.graph.initializer, *_tensors(model))),
        *((node.name or node.output[0], it.i) for node, it in _conversions(model)),
    ]
    names = dict(map(reversed, TensorProto.DataType.items()))
    untold = {value for node in model.graph.node for value in node.output if value} - types.keys()
    return [
        *(f"{name} has {value!a:.100} of a type that cannot be told" for value in sorted(untold)),
        *(
            f"{name} has {value!a:.100} of the type {names.get(type_, type_)}"
            for value, type_ in found
            if type_ not in allowed
        ),
    ]


def wide_products(model: Any, name: str, precision: str) -> list[str]:
    """In words, which products of matrices an ONNX model computes in fp32, though its precision is another.

    Those of edits are not among them. Raises MissingError where types cannot be told.
    """
    narrow = onnx_type(precision)
    types = {**_types(model, name), **{it.name: it.data_type for it in model.graph.initializer}}
    wide = [
        node.name
        for node in model.graph.node
        if node.op_type in _PRODUCTS and edit_home(node.name) is None and types.get(node.input[0]) != narrow
    ]
    if not wide:
        return []
    return [f"{name} computes {len(wide):,} products in more than {precision}, as {wide[0]!a:.100}"]


def widen(model: Any, name: str, precision: str) -> list[str]:
    """Turn the nodes of an ONNX model in 16 bits into those of the model in fp32, without conversions between the two.

    Its initializers stay as they are. Raises MissingError where types cannot be told.

    Returns:
        In words, where that hides something: an edit converts what its own nodes give or its constants, or one that is
        no patch computes in 16 bits.
    """
    narrow, wide = onnx_type(precision), onnx_type("fp32")
    if narrow == wide:
        return []
    types = _types(model, name)
    types |= {it.name: it.data_type for it in model.graph.initializer}
    outputs = {it.name for it in model.graph.output}
    # Of constants, which no node gives, there is none.
    homes = {it.name: None for it in model.graph.input}
    homes |= {value: edit_home(node.name) for node in model.graph.node for value in node.output}
    instead: dict[str, str] = {}
    kept, hidden = [], []
    for node in model.graph.node:
        converts, home = _converts(node, (narrow, wide), types), edit_home(node.name)
        if home is not None and not converts:
            if any(homes.get(instead[value], home) == home for value in node.input if value in instead):
                hidden.append(f"{node.name!a:.200} reads what was converted inside the edit")
            if "/patch." not in home and narrow in map(types.get, (*node.input, *node.output)):
                hidden.append(f"{node.name!a:.200} computes in {precision}, where the edit must be exact")
        node.input[:] = [instead.get(value, value) for value in node.input]
        if converts and node.output[0] not in outputs:
            instead[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    del model.graph.value_info[:]
    for _, attribute in _conversions(model):
        attribute.i = wide if attribute.i == narrow else attribute.i
    for tensor in _tensors(model):
        if tensor.data_type == narrow:
            _widen_tensor(tensor)
    return hidden


def _converts(node: Any, floats: Collection[int], types: Mapping[str, int]) -> bool:
    if node.op_type != "Cast" or node.domain not in ("", "ai.onnx"):
        return False
    to = {it.i for it in node.attribute if it.name == "to"}
    return to <= set(floats) and types.get(node.input[0]) in floats


def _widen_tensor(tensor: Any) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))


def _types(model: Any, name: str) -> dict[str, int]:
    """Of each value, what ONNX infers; what the file itself says of them is not believed."""
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(_without_data(model))
    except Exception as error:  # noqa: BLE001 - ONNX raises anything on a graph that is none
        raise MissingError(f"{name} is no graph of which types can be told ({type(error).__name__})") from None
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {it.name: it.type.tensor_type.elem_type for it in values if it.type.tensor_type.elem_type}


def _without_data(model: Any) -> Any:
    """The model without what the file says of values, and without the data of large initializers."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for it in model.graph.initializer:
        if it.ByteSize() <= _SMALL:
            bare.graph.initializer.append(it)
        else:
            own = bare.graph.initializer.add(name=it.name, data_type=it.data_type, dims=it.dims)
            own.data_location = onnx.TensorProto.EXTERNAL
    return bare


def _nodes(model: Any) -> Iterator[Any]:
    """Of the graph, of what its nodes hold, and of functions."""
    holders = [model.graph, *model.functions]
    while holders:
        holder = holders.pop()
        yield from holder.node
        for attribute in (it for node in holder.node for it in node.attribute):
            holders += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors(model: Any) -> Iterator[Any]:
    """Those that nodes hold."""
    for attribute in (it for node in _nodes(model) for it in node.attribute):
        yield from (it for it in (attribute.t, *attribute.tensors) if it.data_type)


def _conversions(model: Any) -> Iterator[tuple[Any, Any]]:
    """Nodes that give a type by number, and the attribute that has it."""
    for node in _nodes(model):
        yield from ((node, it) for it in node.attribute if it.name == "to")
