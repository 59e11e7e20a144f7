"""The Edit: what a file keeps, what is refused, equality, and how several become one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.edit import (
    Edit,
    Origin,
    PatchActivation,
    PatchWeightInput,
    ShiftActivation,
    SteerLatents,
    check_fits,
)
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.sites import Site

FFN2 = "unet.down.0.attn.0.block.0.ffn2"
LAYER = "text_encoder.layer.9"
KEY = "bakeout.edit"


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def steer(seed: int = 0, neurons: tuple[int, ...] = (1, 4), strengths: tuple[float, ...] = (1.0, 0.8), **changes: Any):
    decoder = values(7, 5, seed=seed + 50)
    columns = torch.tensor(neurons, dtype=torch.int64)
    given = {
        "site": LAYER, "encoder": values(5, 7, seed=seed), "encoder_bias": values(5, seed=seed + 1),
        "center": values(7, seed=seed + 2), "k": 2, "neurons": columns, "directions": decoder[:, columns],
        "strengths": torch.tensor(strengths), **changes,
    }  # fmt: skip
    return SteerLatents(**given)


ORIGIN = Origin("conceptprune", "a dog, sitting", {"sparsity": 0.02, "first_calls": 10}, "ab" * 32, 20)
# Sizes that are no multiples of 8, so that the last byte of a mask is not full; every dtype that a value may have.
OPERATIONS = (
    PatchWeightInput(FFN2, mask(3, 7)),
    PatchWeightInput(FFN2, mask(3, 7, seed=1), values(7, dtype=torch.bfloat16)),
    PatchActivation(FFN2, "input", mask(7), values(7, dtype=torch.float16)),
    PatchActivation(FFN2, "output", mask(5, 3), values(5, 3, dtype=torch.float64)),
    PatchActivation(FFN2, "output", mask(6, 3), values(6, 3, dtype=torch.bfloat16), (2, 3), "conditional", (0, 5)),
    PatchActivation(FFN2, "output", mask(6, 3), values(6, 3), calls=(5, 6)),
    PatchActivation("z.b", "input", torch.zeros(9, dtype=torch.bool), values(9)),
    ShiftActivation(LAYER, values(7), "prompted", "0123:17", 1.2),
    ShiftActivation(LAYER, values(77, 7)),
    ShiftActivation(LAYER, values(7, seed=1), "conditional"),
    steer(),
    steer(1, rows="prompted", input_norm="layer_norm"),
)
EDIT = Edit(OPERATIONS, (ORIGIN, Origin("snce", "nudity")))


def tensors_of(operation: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(operation).items() if isinstance(value, torch.Tensor)}


def assert_same_bits(first: Any, second: Any) -> None:
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        assert torch.equal(tensor.view(torch.uint8), other[name].contiguous().view(torch.uint8))


def test_a_file_keeps_every_bit_dtype_and_shape(tmp_path):
    EDIT.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert loaded == EDIT
    assert loaded.digest == EDIT.digest
    assert loaded.origins == EDIT.origins
    for one, other in zip(EDIT.operations, loaded.operations, strict=True):
        assert type(one) is type(other)
        assert_same_bits(one, other)


@given(rows=st.integers(1, 19), columns=st.integers(1, 19), seed=st.integers(0, 10**6))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_masks_of_any_size_come_back(tmp_path_factory, rows, columns, seed):
    path = tmp_path_factory.mktemp("masks") / "edit.safetensors"
    patched = mask(rows, columns, seed=seed)
    Edit((PatchWeightInput("a", patched), PatchActivation("b", "input", patched[0], values(columns)))).save(path)
    weight, activation = Edit.load(path).operations
    assert torch.equal(weight.mask, patched)
    assert torch.equal(activation.mask, patched[0])
    assert read_header(path).tensors["0000.mask"].shape == ((rows * columns + 7) // 8,)


def test_negative_zero_and_the_smallest_numbers_come_back(tmp_path):
    value = torch.tensor([-0.0, 2**-149, -3.4028234e38])
    Edit((ShiftActivation("a", value),)).save(tmp_path / "e")
    (loaded,) = Edit.load(tmp_path / "e").operations
    assert torch.equal(loaded.value.view(torch.int32), value.view(torch.int32))


def test_an_empty_edit_comes_back(tmp_path):
    Edit(()).save(tmp_path / "e")
    assert Edit.load(tmp_path / "e") == Edit(())


def test_the_same_edit_gives_the_same_bytes_in_every_process(tmp_path):
    EDIT.save(tmp_path / "first")
    Edit(tuple(reversed(EDIT.operations)), tuple(reversed(EDIT.origins))).save(tmp_path / "second")
    program = (
        "import sys; from pathlib import Path; from bakeout.editor.edit import Edit\n"
        "Edit.load(Path(sys.argv[1])).save(Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "first", tmp_path / "third"], check=True)
    contents = {(tmp_path / name).read_bytes() for name in ("first", "second", "third")}
    assert len(contents) == 1


def test_a_file_is_its_bytes_and_a_full_disk_is_an_error_of_the_system(tmp_path):
    resource = pytest.importorskip("resource")
    edit = Edit((PatchWeightInput(FFN2, torch.ones(16, 64, dtype=torch.bool)),))
    edit.save(tmp_path / "edit")
    assert (tmp_path / "edit").read_bytes() == edit.to_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            edit.save(tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_tensors_that_share_memory_are_saved(tmp_path):
    value = values(4, 6)
    edit = Edit((
        ShiftActivation("a", value), ShiftActivation("b", value), ShiftActivation("c", value[1]),
        PatchActivation("d", "input", mask(6, 4), value.T),
    ))  # fmt: skip
    edit.save(tmp_path / "e")
    assert Edit.load(tmp_path / "e") == edit


def test_settings_come_back_as_they_compare(tmp_path):
    edit = Edit((), (Origin("conceptprune", "dog", {"sites": ("ffn2", "ffn1")}),))
    edit.save(tmp_path / "e")
    assert Edit.load(tmp_path / "e") == edit
    assert edit.origins[0].settings == {"sites": ["ffn2", "ffn1"]}


def test_settings_do_not_change_with_what_they_were_made_from():
    given = {"sparsity": 0.02}
    origin = Origin("conceptprune", "dog", given)
    given["sparsity"] = 0.5
    assert origin.settings == {"sparsity": 0.02}


def changes() -> dict[str, Any]:
    flipped = OPERATIONS[0].mask.clone()
    flipped[1, 2] ^= True
    return {
        "a bit": replace(OPERATIONS[0], mask=flipped),
        "the site": replace(OPERATIONS[0], site=FFN2.replace("0", "1")),
        "a value": replace(OPERATIONS[0], value=torch.zeros(7)),
        "the shape": replace(OPERATIONS[0], mask=OPERATIONS[0].mask.reshape(7, 3)),
    }


@pytest.mark.parametrize("what", changes())
def test_whatever_differs_makes_another_edit(what):
    other = changes()[what]
    assert other != OPERATIONS[0]
    assert Edit((other,)) != Edit(OPERATIONS[:1])
    assert Edit((other,)).digest != Edit(OPERATIONS[:1]).digest


def test_numbers_of_another_type_make_another_edit_or_the_same_digest():
    assert ShiftActivation("a", values(3), strength=1) == ShiftActivation("a", values(3), strength=1.0)
    assert Edit((), (Origin("snce", "x", {"a": 1}),)) != Edit((), (Origin("snce", "x", {"a": True}),))
    assert ShiftActivation("a", values(3)) != ShiftActivation("a", values(3).double())
    assert ShiftActivation("a", values(3)) != values(3)
    assert Edit(()) != ()


def test_an_edit_has_one_order(tmp_path):
    expected = Edit(OPERATIONS).operations
    for order in itertools.islice(itertools.permutations(OPERATIONS), 0, 5040, 97):
        assert Edit(order) == Edit(OPERATIONS)
        assert [it.digest for it in Edit(order).operations] == [it.digest for it in expected]
    names = ["text_encoder.layer.10", "text_encoder.layer.9.ffn2", "text_encoder.layer.9"]
    sites = [it.site for it in Edit(tuple(ShiftActivation(name, values(2)) for name in names)).operations]
    assert sites == ["text_encoder.layer.9", "text_encoder.layer.9.ffn2", "text_encoder.layer.10"]


@pytest.mark.parametrize("record", [*OPERATIONS, ORIGIN, EDIT])
def test_records_are_frozen(record):
    for name in vars(record).copy():
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)


def test_what_it_says_of_itself():
    removed = torch.zeros(320, 1280, dtype=torch.bool)
    removed[:, :16] = True
    edit = Edit((PatchWeightInput(FFN2, removed), steer()), (ORIGIN,))
    assert repr(edit).splitlines() == [
        "Edit[conceptprune 'a dog, sitting' (20 pairs)]",
        "  SteerLatents text_encoder.layer.9: 2 of 5 neurons (40.00%)",
        f"  PatchWeightInput {FFN2}: 5,120 of 409,600 weights (1.25%)",
    ]
    assert repr(Edit(())) == "Edit"
    assert repr(ShiftActivation("a", torch.tensor([0.0, 1.0]))) == "ShiftActivation a: 1 of 2 features (50.00%)"


BAD_RECORDS: dict[str, Callable[[], object]] = {
    "a mask of numbers": lambda: PatchWeightInput("a", values(3, 7)),
    "a mask of one dimension": lambda: PatchWeightInput("a", mask(3)),
    "a mask of nothing": lambda: PatchWeightInput("a", mask(0, 3)),
    "a value of another width": lambda: PatchWeightInput("a", mask(3, 7), values(3)),
    "a value of whole numbers": lambda: PatchWeightInput("a", mask(3, 7), torch.ones(7, dtype=torch.int64)),
    "an 8-bit value": lambda: PatchWeightInput("a", mask(3, 7), values(7).to(torch.float8_e4m3fn)),
    "a value of NaN": lambda: ShiftActivation("a", torch.tensor([1.0, torch.nan])),
    "an infinite value": lambda: PatchActivation("a", "input", mask(2), torch.tensor([1.0, torch.inf])),
    "a patch of some rows": lambda: PatchActivation("a", "input", mask(2), values(2), rows="prompted"),
    "features for one size of latents": lambda: PatchActivation("a", "input", mask(2), values(2), (8, 8)),
    "latents without a side": lambda: PatchActivation("a", "input", mask(4, 2), values(4, 2), (4, 0)),
    "latents beyond all": lambda: PatchActivation("a", "input", mask(4, 2), values(4, 2), (4097, 1)),
    "latents of three sides": lambda: PatchActivation("a", "input", mask(4, 2), values(4, 2), (4, 1, 1)),
    "a patch for no call": lambda: PatchActivation("a", "input", mask(2), values(2), calls=(3, 3)),
    "a patch from call -1 on": lambda: PatchActivation("a", "input", mask(2), values(2), calls=(-1, 3)),
    "a patch for half a call": lambda: PatchActivation("a", "input", mask(2), values(2), calls=(0, 1.5)),
    "a patch between": lambda: PatchActivation("a", "middle", mask(2), values(2)),
    "a shift of three dimensions": lambda: ShiftActivation("a", values(2, 2, 2)),
    "rows of no kind": lambda: ShiftActivation("a", values(2), "some"),
    "an infinite strength": lambda: ShiftActivation("a", values(2), strength=float("inf")),
    "a strength in words": lambda: ShiftActivation("a", values(2), strength="1"),
    "a numbered neuron": lambda: ShiftActivation("a", values(2), neuron=5),
    "a site with a line break": lambda: ShiftActivation("a\nb", values(2)),
    "a site that is no name": lambda: ShiftActivation(5, values(2)),
    "a site that leaves": lambda: ShiftActivation("../a", values(2)),
    "neurons that fall": lambda: steer(neurons=(4, 1)),
    "a neuron twice": lambda: steer(neurons=(4, 4)),
    "a neuron that is not": lambda: steer(neurons=(1, 4), encoder=values(4, 7), encoder_bias=values(4)),
    "no neurons": lambda: steer(neurons=(), strengths=()),
    "k of none": lambda: steer(k=0),
    "k of too many": lambda: steer(k=6),
    "k of a half": lambda: steer(k=1.5),
    "k as truth": lambda: steer(k=True),
    "an unknown norm": lambda: steer(input_norm="batch_norm"),
    "an encoder of another width": lambda: steer(center=values(6)),
    "a NaN strength": lambda: steer(strengths=(1.0, float("nan"))),
    "a method with a line break": lambda: Origin("a\nb", "dog"),
    "a concept of numbers": lambda: Origin("snce", 5),
    "settings in a list": lambda: Origin("snce", "dog", [1]),
    "settings of NaN": lambda: Origin("snce", "dog", {"a": float("nan")}),
    "half a pair": lambda: Origin("snce", "dog", pairs=0.5),
}


@pytest.mark.parametrize("what", BAD_RECORDS)
def test_a_record_that_means_nothing_is_refused(what):
    with pytest.raises(ValueError, match=r"."):
        BAD_RECORDS[what]()


def rewritten(path: Path, change: Callable[[Any, dict[str, torch.Tensor]], Any]) -> Path:
    """The file of EDIT with its JSON and tensors changed in place; `change` may return text for all of the JSON."""
    EDIT.save(path)
    said = json.loads(read_header(path).metadata[KEY])
    tensors = load_file(path)
    text = change(said, tensors)
    save_file(tensors, path, metadata={KEY: text if isinstance(text, str) else json.dumps(said)})
    return path


def first(said: Any, kind: str) -> Any:
    return next(it for it in said["operations"] if it["operation"] == kind)


def put(kind: str, key: str, value: object) -> Callable[[Any, Any], None]:
    return lambda said, tensors: first(said, kind).update({key: value})


def origin(key: str, value: object) -> Callable[[Any, Any], None]:
    return lambda said, tensors: said["origins"][0].update({key: value})


def number(kind: str) -> str:
    return f"{[type(it).__name__ for it in EDIT.operations].index(kind):04}"


def tensor(kind: str, name: str, value: torch.Tensor | None) -> Callable[[Any, Any], None]:
    key = f"{number(kind)}.{name}"
    return lambda said, tensors: tensors.pop(key) if value is None else tensors.update({key: value})


PATCHED = int(mask(7).sum())
HOSTILE: dict[str, Callable[[Any, dict[str, torch.Tensor]], Any]] = {
    "a newer version": lambda said, _: said.update(version=2),
    "a version in words": lambda said, _: said.update(version="1"),
    "a version that is true": lambda said, _: said.update(version=True),
    "a version of 1.0": lambda said, _: said.update(version=1.0),
    "no version": lambda said, _: said.pop("version"),
    "no operations": lambda said, _: said.pop("operations"),
    "no origins": lambda said, _: said.pop("origins"),
    "an operation of its own": put("PatchWeightInput", "operation", "RunCode"),
    "an operation in a list": put("PatchWeightInput", "operation", []),
    "an operation without a name": lambda said, _: first(said, "PatchWeightInput").pop("operation"),
    "operations by name": lambda said, _: said.update(operations={"0": {}}),
    "an operation that is text": lambda said, _: said.update(operations=["x"]),
    "an unknown field": put("PatchWeightInput", "extra", 1),
    "a missing field": lambda said, _: first(said, "ShiftActivation").pop("rows"),
    "more bits": put("PatchWeightInput", "mask", {"bits": [3, 9]}),
    "fewer bits": put("PatchWeightInput", "mask", {"bits": [2, 4]}),
    "a negative shape": put("PatchWeightInput", "mask", {"bits": [-3, -7]}),
    "a shape of nothing": put("PatchWeightInput", "mask", {"bits": [0, 10**30]}),
    "no dimensions": put("PatchWeightInput", "mask", {"bits": []}),
    "a huge shape": put("PatchWeightInput", "mask", {"bits": [2**62, 2**62]}),
    "a shape of huge numbers": put("PatchWeightInput", "mask", {"bits": [10**4000, 10**4000]}),
    "very many dimensions": put("PatchWeightInput", "mask", {"bits": [10**9] * 200_000}),
    "a nested shape": put("PatchWeightInput", "mask", {"bits": [[3], 7]}),
    "a shape of fractions": put("PatchWeightInput", "mask", {"bits": [3.0, 7]}),
    "a shape of truths": put("PatchWeightInput", "mask", {"bits": [True, 21]}),
    "a shape in words": put("PatchWeightInput", "mask", {"bits": "37"}),
    "neither bits nor tensor": put("PatchWeightInput", "mask", {"file": [3, 7]}),
    "both bits and tensor": put("PatchWeightInput", "mask", {"bits": [3, 7], "tensor": [3, 7]}),
    "an empty reference": put("PatchWeightInput", "mask", {}),
    "a mask in the JSON": put("PatchWeightInput", "mask", [[True]]),
    "a mask of nothing at all": put("PatchWeightInput", "mask", None),
    "a value as bits": put("PatchActivation", "value", {"bits": [7]}),
    "a value of another shape": put("ShiftActivation", "value", {"tensor": [1]}),
    "a value in the JSON": put("ShiftActivation", "value", 0.5),
    "a site of numbers": put("ShiftActivation", "site", 5),
    "a site in a list": put("ShiftActivation", "site", ["a"]),
    "a site with a terminal code": put("ShiftActivation", "site", "a\x1b[2J\nError: all is well"),
    "a site that is a tensor": put("ShiftActivation", "site", {"tensor": [7]}),
    "a strength of NaN": put("ShiftActivation", "strength", float("nan")),
    "a strength beyond a float": put("ShiftActivation", "strength", 10**400),
    "a strength in words": put("ShiftActivation", "strength", "1"),
    "rows of no kind": put("ShiftActivation", "rows", "few"),
    "rows in a list": put("ShiftActivation", "rows", ["all"]),
    "k of a half": put("SteerLatents", "k", 1.5),
    "a norm in a list": put("SteerLatents", "input_norm", ["none"]),
    "k beyond all": put("SteerLatents", "k", 10**30),
    "a value of NaN": tensor("ShiftActivation", "value", torch.full((7,), torch.nan)),
    "an infinite value": tensor("PatchActivation", "value", torch.full((PATCHED,), torch.inf)),
    "a value too few": tensor("PatchActivation", "value", torch.ones(PATCHED - 1)),
    "a value too many": tensor("PatchActivation", "value", torch.ones(PATCHED + 1)),
    "values of whole numbers": tensor("PatchActivation", "value", torch.ones(PATCHED, dtype=torch.int64)),
    "values in a table": tensor("PatchActivation", "value", torch.ones(PATCHED, 1)),
    "a value of the mask's shape": lambda said, tensors: (
        put("PatchActivation", "value", {"tensor": [7]})(said, tensors),
        tensor("PatchActivation", "value", torch.ones(7))(said, tensors),
    )[0],
    "values under another mask": put("PatchActivation", "value", {"masked": [8]}),
    "values under a mask in the JSON": put("PatchActivation", "mask", [True] * 7),
    "a shift under a mask": put("ShiftActivation", "value", {"masked": [7]}),
    "latents in words": put("PatchActivation", "latents", "64x64"),
    "latents in lists": put("PatchActivation", "latents", [[64], [64]]),
    "one side of latents": put("PatchActivation", "latents", 64),
    "latents beyond all": lambda said, _: next(it for it in said["operations"] if it.get("latents")).update(
        latents=[10**30, 64]
    ),
    "calls beyond all": put("PatchActivation", "calls", [0, 10**30]),
    "calls of truths": put("PatchActivation", "calls", [False, True]),
    "patched rows of no kind": put("PatchActivation", "rows", "prompted"),
    "a value of whole numbers": tensor("ShiftActivation", "value", torch.ones(7, dtype=torch.int64)),
    "an 8-bit value": tensor("ShiftActivation", "value", torch.ones(7).to(torch.float8_e4m3fn)),
    "a complex value": tensor("ShiftActivation", "value", torch.ones(7, dtype=torch.complex64)),
    "a mask of floats": tensor("PatchWeightInput", "mask", torch.zeros(3)),
    "a missing mask": tensor("PatchWeightInput", "mask", None),
    "a missing value": tensor("ShiftActivation", "value", None),
    "a tensor too many": lambda _, tensors: tensors.update({"0000.extra": torch.zeros(2)}),
    "a tensor of no operation": lambda _, tensors: tensors.update({"9999.mask": torch.zeros(2, dtype=torch.uint8)}),
    "a tensor without a number": lambda _, tensors: tensors.update({"mask": torch.zeros(2, dtype=torch.uint8)}),
    "neurons outside": tensor("SteerLatents", "neurons", torch.tensor([1, 10**9])),
    "negative neurons": tensor("SteerLatents", "neurons", torch.tensor([-1, 1])),
    "settings in a list": origin("settings", [1]),
    "settings of NaN": origin("settings", {"a": float("nan")}),
    "a method with a terminal code": origin("method", "\x1b[2J"),
    "pairs in words": origin("pairs", "many"),
    "an origin's unknown field": origin("extra", 1),
    "an origin that is text": lambda said, _: said.update(origins=["x"]),
    "not JSON": lambda *_: "{",
    "JSON of another sort": lambda *_: "[1]",
    "nothing": lambda *_: "",
    "deep JSON": lambda *_: "[" * 100_000,
    "deep settings": lambda said, _: json.dumps(said).replace('"sparsity": 0.02', '"a": ' + "[" * 990 + "]" * 990),
    "a number without end": lambda said, _: json.dumps(said).replace('"pairs": 20', '"pairs": ' + "9" * 5000),
}


def refusal(path: Path) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            Edit.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert peak < 50 * path.stat().st_size + 2_000_000
    assert message.isprintable()
    assert len(message) < 500 + len(str(path))
    assert str(path) in message
    assert "; " in message  # what is wrong; how to mend it
    return message


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_lies_is_refused_in_a_sentence(tmp_path, what):
    refusal(rewritten(tmp_path / "edit.safetensors", HOSTILE[what]))


def test_a_file_that_is_only_written_again_is_read(tmp_path):
    assert Edit.load(rewritten(tmp_path / "edit.safetensors", lambda *_: None)) == EDIT


def test_a_newer_version_says_so(tmp_path):
    message = refusal(rewritten(tmp_path / "e", HOSTILE["a newer version"]))
    assert "version 2" in message
    assert "install" in message


def test_an_unknown_operation_is_named(tmp_path):
    assert "RunCode" in refusal(rewritten(tmp_path / "e", HOSTILE["an operation of its own"]))


def test_another_safetensors_file_is_no_edit(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "e")
    assert "holds no Edit" in refusal(tmp_path / "e")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    EDIT.save(tmp_path / "e")
    (tmp_path / "e").write_bytes((tmp_path / "e").read_bytes()[:kept])
    refusal(tmp_path / "e")


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_a_changed_byte_is_refused_or_read(tmp_path_factory, position, byte):
    path = tmp_path_factory.getbasetemp() / "changed"
    EDIT.save(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    with suppress(InputError):  # and nothing else
        Edit.load(path)


# Merging, derived again from the rules: OR of masks, masked mean of values, the larger strength, shifts add.


def test_prunings_are_the_or_of_their_masks():
    masks = [mask(3, 7, seed=seed) for seed in range(3)]
    (merged,) = merge(Edit((PatchWeightInput(FFN2, it),)) for it in masks).operations
    assert torch.equal(merged.mask, masks[0] | masks[1] | masks[2])
    assert merged.value is None


def naive_mean(masks: list[torch.Tensor], given: list[torch.Tensor]) -> torch.Tensor:
    """Per feature, in Python's arithmetic, the mean over the edits that patch it; zero where none does."""
    flat = [
        [v for m, v in zip(ms, vs, strict=True) if m]
        for ms, vs in zip(
            zip(*(it.flatten().tolist() for it in masks), strict=True),
            zip(*(it.flatten().tolist() for it in given), strict=True),
            strict=True,
        )
    ]
    return torch.tensor([sum(vs) / len(vs) if vs else 0.0 for vs in flat], dtype=torch.float64).reshape(masks[0].shape)


@pytest.mark.parametrize("shape", [(7,), (5, 7)])
@pytest.mark.parametrize("count", [2, 3])
def test_patches_are_the_or_of_masks_and_the_masked_mean_of_values(shape, count):
    masks = [mask(*shape, seed=seed) for seed in range(count)]
    given = [values(*shape, seed=10 + seed, dtype=torch.float64) for seed in range(count)]
    edits = [Edit((PatchActivation(FFN2, "input", m, v),)) for m, v in zip(masks, given, strict=True)]
    (merged,) = merge(edits).operations
    expected = naive_mean(masks, given)
    assert torch.equal(merged.mask, torch.stack(masks).any(0))
    assert float((merged.value - expected).norm() / expected.norm()) <= 1e-15
    plain = sum(given) / count
    assert float((merged.value - plain).norm() / plain.norm()) > 1e-2


def test_values_of_weights_are_the_mean_over_edits_that_mask_the_column():
    masks = [torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(), torch.tensor([[0, 0, 0], [1, 0, 0]]).bool()]
    given = [torch.tensor([1.0, 5.0, 9.0]), torch.tensor([3.0, 7.0, 9.0])]
    (merged,) = merge(Edit((PatchWeightInput(FFN2, m, v),)) for m, v in zip(masks, given, strict=True)).operations
    assert merged.mask.tolist() == (masks[0] | masks[1]).tolist()
    assert merged.value.tolist() == [2.0, 5.0, 0.0]


def test_prunings_and_patches_of_weights_stay_apart():
    edit = Edit(OPERATIONS[:2])
    assert merge([edit]) == edit


def test_a_patch_of_features_merges_as_one_at_every_token():
    features = PatchActivation(FFN2, "input", mask(7), values(7, dtype=torch.float64))
    tokens = PatchActivation(FFN2, "input", mask(6, 7, seed=1), values(6, 7, seed=1, dtype=torch.float64), (2, 3))
    masks = [features.mask.repeat(6, 1), tokens.mask]
    expected = naive_mean(masks, [features.value.repeat(6, 1), tokens.value])
    for pair in ((features, tokens), (tokens, features)):
        (merged,) = merge(Edit((it,)) for it in pair).operations
        assert torch.equal(merged.mask, masks[0] | masks[1])
        assert float((merged.value - expected).norm() / expected.norm()) <= 1e-15
        assert merged.latents == (2, 3)


def test_patches_for_other_latents_do_not_merge():
    square, wide, unknown = (
        PatchActivation(FFN2, "input", mask(16, 7), values(16, 7), it) for it in ((4, 4), (2, 8), None)
    )
    with pytest.raises(InputError, match="for latents of 8x2 and 4x4; calibrate all of them at one picture size"):
        merge([Edit((square,)), Edit((wide,))])
    (merged,) = merge([Edit((unknown,)), Edit((wide,))]).operations
    assert merged.latents == (2, 8)


def test_patches_for_other_rows_or_calls_stay_apart():
    both = tuple(
        PatchActivation(FFN2, "input", mask(7), values(7), **own)
        for own in ({}, {"rows": "conditional"}, {"calls": (0, 3)}, {"calls": (3, 6)})
    )
    assert merge(Edit((it,)) for it in both) == Edit(both)


def test_what_lies_outside_a_mask_is_nothing(tmp_path):
    patched, there, elsewhere = mask(5, 7), values(5, 7), values(5, 7, seed=1)
    one, other = (PatchActivation("a", "input", patched, torch.where(patched, there, it)) for it in (there, elsewhere))
    assert one == other
    assert torch.equal(other.value, there.where(patched, torch.zeros(())))
    Edit((one,)).save(tmp_path / "edit.safetensors")
    stored = read_header(tmp_path / "edit.safetensors").tensors["0000.value"]
    assert stored.shape == (int(patched.sum()),)
    assert torch.equal(load_file(tmp_path / "edit.safetensors")["0000.value"], there[patched])


def test_patches_at_input_and_output_stay_apart():
    both = (PatchActivation(FFN2, "input", mask(7), values(7)), PatchActivation(FFN2, "output", mask(7), values(7)))
    assert len(merge([Edit(both)]).operations) == 2


def test_of_a_neuron_chosen_twice_the_larger_strength_counts():
    weak = ShiftActivation(LAYER, -0.8 * values(7), "all", "sae:17", 0.8)
    strong = ShiftActivation(LAYER, -1.2 * values(7), "all", "sae:17", 1.2)
    other = ShiftActivation(LAYER, values(7, seed=3), "all", "sae:18", 0.1)
    assert merge([Edit((weak, other)), Edit((strong,))]) == Edit((strong, other))
    latents = merge([
        Edit((steer(neurons=(0, 3), strengths=(1.0, 0.5)),)), Edit((steer(neurons=(2, 3), strengths=(0.3, 0.9)),)),
    ])  # fmt: skip
    assert latents == Edit((steer(neurons=(0, 2, 3), strengths=(1.0, 0.3, 0.9)),))


def test_of_a_neuron_chosen_twice_for_other_rows_one_counts():
    """Both would take it out twice of the rows that they share."""
    strong = ShiftActivation(LAYER, -1.2 * values(7), "prompted", "sae:17", 1.2)
    weak, even = (ShiftActivation(LAYER, -it * values(7), "all", "sae:17", it) for it in (0.8, 1.2))
    longer = ShiftActivation(LAYER, -2 * values(7), "all", "sae:17", 1.2)
    for pair, expected in (((strong, weak), strong), ((strong, even), even), ((even, longer), longer)):
        assert merge([Edit((pair[0],)), Edit((pair[1],))]) == merge([Edit(pair[::-1])]) == Edit((expected,))
    one = steer(neurons=(0, 3), strengths=(1.0, 0.5))
    two = steer(neurons=(0, 2, 3), strengths=(1.0, 0.3, 0.9), rows="prompted")
    expected = (
        steer(neurons=(0,), strengths=(1.0,)), steer(neurons=(2, 3), strengths=(0.3, 0.9), rows="prompted")
    )  # fmt: skip
    assert merge([Edit((one,)), Edit((two,))]) == merge([Edit((two, one))]) == Edit(expected)


def test_latents_of_other_autoencoders_rows_or_k_stay_apart():
    rows = steer(neurons=(0, 2), rows="prompted")
    others = (steer(), steer(seed=7), rows, steer(k=3), steer(input_norm="layer_norm"))
    assert merge(Edit((it,)) for it in others) == Edit(others)


def test_shifts_without_a_neuron_stay_apart_and_add_up():
    one, other = ShiftActivation(LAYER, values(7)), ShiftActivation(LAYER, values(7, seed=1))
    assert merge([Edit((one,)), Edit((other,))]) == Edit((one, other))


@pytest.mark.parametrize("neuron", ["", "sae:1"])
def test_the_very_same_shift_given_twice_counts_once(neuron):
    same = [ShiftActivation(FFN2, torch.ones(16), neuron=neuron) for _ in range(2)]
    assert merge(Edit((it,)) for it in same) == merge([Edit(tuple(same))]) == Edit((same[0],))
    other = ShiftActivation(FFN2, torch.ones(16), strength=2.0)
    assert merge([Edit((same[0], other))]) == Edit((same[0], other))


def test_the_order_of_edits_changes_no_bit():
    everywhere = torch.ones(500, dtype=torch.bool)
    edits = [
        Edit((
            PatchWeightInput(FFN2, mask(3, 7, seed=seed)),
            PatchActivation(FFN2, "input", mask(7, seed=seed), values(7, seed=seed, dtype=dtype)),
            # A sum that is not exact depends on its order.
            PatchActivation(FFN2, "output", everywhere, values(500, seed=seed, dtype=torch.float64) / 3),
            ShiftActivation(LAYER, values(7, seed=seed), neuron="sae:1", strength=0.5 * (seed % 3)),
            steer(neurons=(seed, seed + 1), strengths=(1.0, 0.1 * seed)),
        ), (Origin("conceptprune", f"concept {seed}"),))
        for seed, dtype in enumerate((torch.float16, torch.float32, torch.float64, torch.bfloat16))
    ]  # fmt: skip
    merged = [merge(order) for order in itertools.permutations(edits)]
    assert {it.digest for it in merged} == {merged[0].digest}
    assert all(it == merged[0] for it in merged)
    assert merge(edits[:3]) != merged[0]
    assert len(merged[0].origins) == 4


def test_merging_one_edit_changes_nothing():
    edit = Edit(OPERATIONS, (ORIGIN,))
    assert merge([edit]) == edit
    twice = Edit(OPERATIONS[:1] + OPERATIONS[4:])
    assert merge([twice, twice]) == twice
    assert merge([]) == Edit(())


def test_a_mean_is_as_exact_as_its_most_exact_value():
    half, double = values(7, dtype=torch.float16), values(7, seed=1, dtype=torch.float64)
    everywhere = torch.ones(7, dtype=torch.bool)
    edits = [Edit((PatchActivation("a", "input", everywhere, it),)) for it in (half, double)]
    (merged,) = merge(edits).operations
    assert torch.equal(merged.value, (half.double() + double) / 2)


@pytest.mark.parametrize(
    "pair",
    [
        [PatchActivation("a", "input", mask(tokens, 7), values(tokens, 7)) for tokens in (4, 5)],
        [PatchActivation("a", "input", mask(*shape), values(*shape)) for shape in ((4, 7), (6,))],
        [PatchWeightInput("a", mask(rows, 7)) for rows in (3, 4)],
    ],
)
def test_edits_of_other_sizes_do_not_merge(pair):
    with pytest.raises(InputError, match="calibrate all of them"):
        merge(Edit((it,)) for it in pair)


LINEAR = Site(FFN2, "ffn2", "unet", "m", "w", "b", d_in=7, d_out=3)
OUTPUT = Site(LAYER, "text_layer", "text_encoder", "m", None, None, d_in=7, d_out=7)


@pytest.mark.parametrize(
    ("operation", "site"),
    [
        (PatchWeightInput(FFN2, mask(3, 7)), LINEAR),
        (PatchActivation(FFN2, "input", mask(7), values(7)), LINEAR),
        (PatchActivation(FFN2, "output", mask(9, 3), values(9, 3)), LINEAR),
        (ShiftActivation(FFN2, values(3)), LINEAR),
        (ShiftActivation(LAYER, values(77, 7), "prompted"), OUTPUT),
        (steer(rows="prompted"), OUTPUT),
    ],
)
def test_an_operation_fits_its_site(operation, site):
    check_fits(operation, site)


@pytest.mark.parametrize(
    ("operation", "site", "message"),
    [
        (PatchWeightInput(FFN2, mask(7, 3)), LINEAR, "7 x 3 where the model has 3 x 7"),
        (PatchActivation(FFN2, "input", mask(3), values(3)), LINEAR, "another model"),
        (PatchActivation(FFN2, "output", mask(9, 7), values(9, 7)), LINEAR, "another model"),
        (ShiftActivation(FFN2, values(7)), LINEAR, "another model"),
        (steer(), replace(OUTPUT, d_out=8), "another model"),
        (PatchWeightInput(LAYER, mask(7, 7)), OUTPUT, "no Linear"),
        (PatchActivation(LAYER, "output", mask(7), values(7)), OUTPUT, "no Linear"),
        (ShiftActivation(FFN2, values(3), "prompted"), LINEAR, "no prompts"),
        (ShiftActivation(FFN2, values(3), "conditional"), LINEAR, "no prompts"),
    ],
)
def test_an_operation_that_does_not_fit_its_site_is_refused(operation, site, message):
    with pytest.raises(InputError, match=message):
        check_fits(operation, site)
