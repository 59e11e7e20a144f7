from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bakeout.editor.checkpoint_header import DTYPE_BYTES, read_header
from bakeout.editor.errors import InputError

GOOD = {"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}


def file_of(header: object, data: bytes = b"\0" * 12) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    tensors = {
        "first": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "second": torch.tensor([1.5, -2.0]),
        "none": torch.zeros(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "first": ("F16", (2, 3)), "second": ("F32", (2,)), "none": ("BF16", (0, 4)), "scalar": ("I64", ()),
    }  # fmt: skip
    raw = path.read_bytes()
    for name, dtype in (("first", torch.float16), ("second", torch.float32), ("scalar", torch.int64)):
        stored = header.tensors[name]
        assert stored.file == path
        values = torch.frombuffer(bytearray(raw[stored.begin : stored.end]), dtype=dtype).reshape(stored.shape)
        assert torch.equal(values, tensors[name])


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_each_dtype_is_sized(tmp_path: Path, dtype: str) -> None:
    size = DTYPE_BYTES[dtype] * 6
    entry = {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, size]}
    assert read_header(written(tmp_path / "m", file_of({"a": entry}, b"\0" * size))).tensors["a"].dtype == dtype
    with pytest.raises(InputError, match="offsets give"):
        read_header(written(tmp_path / "n", file_of({"a": {**entry, "shape": [2, 4]}}, b"\0" * size)))


def entry(**change: object) -> dict[str, object]:
    return {"a": {**GOOD["a"], **change}}


TWO = {"a": GOOD["a"], "b": {"dtype": "F16", "shape": [1], "data_offsets": [12, 14]}}
BROKEN = {
    "empty": (b"", "is empty"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "pickle in a zip": (b"PK\x03\x04" + b"\0" * 60, "PyTorch pickle"),
    "old pickle": (b"\x80\x02\x8a\x0al\xfc" + b"\0" * 60, "PyTorch pickle"),
    "gguf": (b"GGUF\x03" + b"\0" * 60, "GGUF"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "seven bytes": (b"\x01\0\0\0\0\0\0", "too short"),
    "header longer than file": (struct.pack("<Q", 100) + b"{}", "truncated: its header has 100 bytes but only 2"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "would be 9223372036854775808 bytes"),
    "header above the limit": (struct.pack("<Q", 100_000_001) + b"{}", "would be 100000001 bytes"),
    "no JSON": (file_of(b"not json"), "not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "deep JSON": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not JSON"),
    "long number": (file_of(b'{"a":' + b"1" * 10_000 + b"}"), "not JSON"),
    "list": (file_of([]), "not a JSON object"),
    "duplicate tensor": (file_of(b'{"a":1,"a":2}'), "twice"),
    "duplicate field": (file_of(b'{"a":{"dtype":"F16","dtype":"F32"}}'), "twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "metadata a list": (file_of({"__metadata__": []}, b""), "__metadata__"),
    "entry no object": (file_of({"a": 1}), "not an object"),
    "no dtype": (file_of({"a": {"shape": [2, 3], "data_offsets": [0, 12]}}), "dtype None"),
    "4-bit dtype": (file_of(entry(dtype="F4")), "dtype 'F4', which is not supported"),
    "dtype a list": (file_of(entry(dtype=["F16"])), "not supported"),
    "negative shape": (file_of(entry(shape=[-2, -3])), r"shape \[-2, -3\]"),
    "fractional shape": (file_of(entry(shape=[2.0, 3])), "shape"),
    "boolean shape": (file_of(entry(shape=[True, 6])), "shape"),
    "shape no list": (file_of(entry(shape=6)), "shape"),
    "huge dimension": (file_of(entry(shape=[2**63, 0])), "shape"),
    "too many dimensions": (file_of(entry(shape=[1] * 17)), "shape"),
    "overflowing product": (file_of(entry(shape=[2**62, 2**62, 3])), "offsets give 12"),
    "product mismatch": (file_of(entry(shape=[2, 4])), "needs 16 bytes, its offsets give 12"),
    "reversed offsets": (file_of(entry(data_offsets=[12, 0])), "offsets"),
    "negative offsets": (file_of(entry(data_offsets=[-12, 0])), "offsets"),
    "three offsets": (file_of(entry(data_offsets=[0, 6, 12])), "offsets"),
    "overlap": (file_of({**TWO, "b": {"dtype": "F16", "shape": [1], "data_offsets": [10, 12]}}), "overlaps"),
    "the same place twice": (file_of({**TWO, "b": GOOD["a"]}), "overlaps"),
    "hole": (file_of({**TWO, "b": {"dtype": "F16", "shape": [1], "data_offsets": [14, 16]}}, b"\0" * 16), "hole"),
    "hole at the start": (file_of(entry(data_offsets=[2, 14]), b"\0" * 14), "hole"),
    "truncated data": (file_of(GOOD, b"\0" * 11), "truncated: 12 bytes of data expected, 11 found"),
    "offsets far outside": (file_of(entry(shape=[2**40], data_offsets=[0, 2**41])), "truncated"),
    "bytes after the end": (file_of(GOOD, b"\0" * 13), "1 bytes after its last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_sentence(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    path = written(tmp_path / "m.safetensors", content)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_good_file_of_these_cases_is_read(tmp_path: Path) -> None:
    assert list(read_header(written(tmp_path / "m", file_of(TWO, b"\0" * 14))).tensors) == ["a", "b"]


def test_names_that_would_garble_a_terminal_are_escaped(tmp_path: Path) -> None:
    header = {"\x1b[2J\n\ud800": {**GOOD["a"], "dtype": "X"}}
    with pytest.raises(InputError, match=r"\\x1b\[2J\\n\\ud800"):
        read_header(written(tmp_path / "m", file_of(header)))


def test_a_missing_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_header(tmp_path / "no")
    with pytest.raises(InputError, match="is not a file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        read_header(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a path"):
        read_header(Path("a\0b"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
sizes = st.integers(-1, 4) | json_values
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F16", "F32", "BOOL", "?"]) | json_values,
     "shape": st.lists(sizes, max_size=3) | json_values,
     "data_offsets": st.lists(sizes, max_size=3) | json_values}
)  # fmt: skip


@given(content=st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_only_input_errors(tmp_path_factory.getbasetemp() / "random", content)


@given(header=st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), entries | json_values, max_size=3),
       data=st.binary(max_size=20))  # fmt: skip
def test_random_headers_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], data: bytes
) -> None:
    check_only_input_errors(tmp_path_factory.getbasetemp() / "random", file_of(header, data))


def check_only_input_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with suppress(InputError):
        assert all(8 <= t.begin <= t.end <= len(content) for t in read_header(path).tensors.values())
