"""Reading an ONNX file without its weights, and whether they are all there."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bakeout.editor.errors import InputError
from bakeout.export.tensorrt.preflight import preflight
from bakeout.export.tensorrt.skeleton import missing_data, skeleton

LARGE = np.arange(4000, dtype=np.float32)
SMALL = np.arange(4, dtype=np.int64)


def model_of(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4000]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", edges[:1], edges[1:], initializer=list(tensors)
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def weights() -> onnx.TensorProto:
    return numpy_helper.from_array(LARGE, "w")


def test_small_tensors_are_whole_and_large_ones_are_described(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(model_of(weights(), numpy_helper.from_array(SMALL, "s")), path)
    found = skeleton(path)
    large, small = found.graph.initializer
    assert numpy_helper.to_array(small).tolist() == SMALL.tolist()
    assert not large.HasField("raw_data")
    # The description leads to the very values.
    assert (numpy_helper.to_array(large, base_dir=str(tmp_path)) == LARGE).all()
    assert list(missing_data(path, found)) == []
    whole = onnx.load(path)
    del whole.graph.initializer[:], found.graph.initializer[:]
    assert found == whole


def test_of_a_large_file_little_is_read(tmp_path):
    path = tmp_path / "model.onnx"
    size = 1_500_000_000
    head = b"\x08" + varint(size // 2) + b"\x10\x0a" + b"\x42\x01w" + b"\x4a" + varint(size)
    inner = b"\x2a" + varint(len(head) + size) + head
    with path.open("wb") as file:
        file.write(b"\x08\x0a\x3a" + varint(len(inner) + size) + inner)
        file.truncate(file.tell() + size)
    tracemalloc.start()
    found = skeleton(path)
    (_, peak), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
    assert peak < 1 << 20
    assert found.ir_version == 10
    assert list(found.graph.initializer[0].dims) == [size // 2]
    assert list(missing_data(path, found)) == []


def varint(value: int) -> bytes:
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def outside(folder: Path, **changes: str) -> tuple[Path, onnx.TensorProto]:
    """A graph whose weights are beside it, described as told."""
    (folder / "weights").write_bytes(LARGE.tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=LARGE.shape, data_location=TensorProto.EXTERNAL)
    entries = {"location": "weights", "offset": "0", "length": str(LARGE.nbytes)} | changes
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model_of(tensor).SerializeToString())
    return path, tensor


def linked(folder: Path) -> Path:
    path, _ = outside(folder, location="link")
    (folder / "link").symlink_to(folder / "weights")
    return path


def wide(folder: Path) -> Path:
    path, tensor = outside(folder)
    tensor.dims[0] -= 1
    path.write_bytes(model_of(tensor).SerializeToString())
    return path


def inline(folder: Path, tensor: onnx.TensorProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model_of(tensor).SerializeToString())
    return path


def negative(folder: Path) -> Path:
    return inline(folder, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4], raw_data=b"1234"))


FAULTS: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda it: outside(it, location="none")[0], "in 'none', which is missing"),
    "elsewhere": (lambda it: outside(it, location="../weights")[0], "no file of the graph's folder"),
    "absolute": (lambda it: outside(it, location="/etc/hostname")[0], "no file of the graph's folder"),
    "of another system": (lambda it: outside(it, location="..\\weights")[0], "no file of the graph's folder"),
    "nowhere": (lambda it: outside(it, location="")[0], "no file of the graph's folder"),
    "a folder": (lambda it: outside(it, location=".")[0], "no file of the graph's folder"),
    "a link": (linked, "in 'link', which is a link"),
    "cut short": (lambda it: outside(it, offset="4")[0], "beyond the end of 'weights'"),
    "far out": (lambda it: outside(it, offset="9" * 18)[0], "beyond the end of 'weights'"),
    "at no number": (lambda it: outside(it, offset="-4")[0], "at a place that is no number"),
    "at a number that is too long": (lambda it: outside(it, offset="9" * 5000)[0], "at a place that is no number"),
    "of another size": (wide, "has 16000 bytes of data, not 15996"),
    "less in the file": (
        lambda it: inline(it, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4000], raw_data=b"1234")),
        "has 4 bytes of data, not 16000",
    ),
    "fewer numbers": (
        lambda it: inline(it, TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4000], float_data=[1, 2])),
        "has 2 values, not 4000",
    ),
    "negative": (negative, "has a negative size"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_missing_weights_are_named(fault, tmp_path):
    build, said = FAULTS[fault]
    folder = tmp_path / "graph"
    folder.mkdir()
    (tmp_path / "weights").write_bytes(LARGE.tobytes())
    path = build(folder)
    ((name, problem),) = missing_data(path, skeleton(path))
    assert name == "w"
    assert said in problem
    assert any(said in it.problem and it.op_type == "initializer" for it in preflight(path, None))


@pytest.mark.parametrize("left_out", [(), ("offset",), ("length",), ("offset", "length")])
def test_weights_beside_the_graph_are_found(left_out, tmp_path):
    path, _ = outside(tmp_path, **dict.fromkeys(left_out, ""))
    assert list(missing_data(path, skeleton(path))) == []
    assert preflight(path, None) == ()


def test_a_missing_file_is_named_once(tmp_path):
    path, tensor = outside(tmp_path, location="none")
    other = TensorProto()
    other.CopyFrom(tensor)
    other.name = "v"
    path.write_bytes(model_of(tensor, other).SerializeToString())
    assert [name for name, _ in missing_data(path, skeleton(path))] == ["w"]


def test_a_file_beyond_2_gib_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, 2**31)
    with pytest.raises(InputError, match="larger than the 2 GiB"):
        skeleton(path)


def test_nodes_beyond_256_mib_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    size = (1 << 28) + 1
    with path.open("wb") as file:
        file.write(b"\x12" + varint(size))
        file.truncate(file.tell() + size)
    with pytest.raises(InputError, match="more than 256 MiB"):
        skeleton(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\xff\xff\xff\xff\x7f",
        b"\x0b",
        b"\xff" * 20,
        b"\x3a\x80",
        b"\x0f",
        b"\x08",
        b"GIF89a",
        b"\x3a\x02\x0a\x05",
        b"\x12\x01\xff",
    ],
)
def test_what_is_no_protobuf_is_refused(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no ONNX graph"):
        skeleton(path)
