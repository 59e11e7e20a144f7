"""The library of operators for ONNX Runtime on the CPU: its arithmetic, and that ONNX Runtime runs it."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.special import ndtr

from bakeout.kernels import build
from bakeout.kernels.build import library
from bakeout.kernels.packing import pack_mask

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - where it is installed

# Portable code, AVX2 and AVX-512; a processor without one takes the next before it.
INSTRUCTIONS = (0, 1, 2)
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
# Measured: 0.98 of it, and 0.93 with fused multiply-adds.
GELU_ERROR = 2.0**-23


@pytest.fixture(scope="module")
def path() -> Path:
    return library("cpu")


@pytest.fixture(scope="module")
def entries(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def computed(entries: Any, proj: Tensor, mask: Tensor, value: Tensor, isa: int = 2, skip: int = 0) -> Tensor:
    """The entry point's answer, NaN in the first `skip` rows, which it is not asked for."""
    width = value.shape[-1]
    rows = proj.numel() // (2 * width)
    bits, out = pack_mask(mask), torch.full((*proj.shape[:-1], width), torch.nan, dtype=proj.dtype)
    pointers = [ctypes.c_void_p(it.data_ptr()) for it in (proj, bits, value, out)]
    sizes = [ctypes.c_int64(it) for it in (value.numel() // width, width, skip, rows)]
    entries[f"bakeout_masked_geglu_cpu_{DTYPES[proj.dtype]}"](*pointers, *sizes, isa)
    return out


def unpatched(entries: Any, a: Tensor, g: Tensor, isa: int = 2) -> Tensor:
    """a gelu(g)."""
    mask = torch.zeros(len(a), dtype=torch.bool)
    return computed(entries, torch.cat([a, g]), mask, torch.full_like(a, torch.nan), isa)


def numbers() -> Tensor:
    """Of every size that a float has, of both signs."""
    generator = torch.Generator().manual_seed(0)
    near = torch.rand(400_000, generator=generator, dtype=torch.float64) * 28 - 14
    sizes = 10 ** (torch.rand(200_000, generator=generator, dtype=torch.float64) * 83 - 45)
    return torch.cat([near, sizes, -sizes]).float()


def gelu_error(found: Tensor, g: Tensor) -> float:
    exact = g.double() * ndtr(g.double())
    # Denormals are as far apart as the smallest of them.
    return float(((found.double() - exact).abs() / g.double().abs().clamp_min(2.0**-126)).max())


@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_gelu_of_every_size(entries: Any, isa: int) -> None:
    g = numbers()
    assert gelu_error(unpatched(entries, torch.ones_like(g), g, isa), g) < GELU_ERROR
    # What another GELU is off by.
    assert gelu_error(torch.nn.functional.gelu(g, approximate="tanh"), g) > 100 * GELU_ERROR


@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_gelu_of_the_largest_the_least_and_no_number(entries: Any, isa: int) -> None:
    """As g (1 + erf(g / sqrt 2)) / 2 has it, which is no number at -inf; and no product overflows."""
    g = torch.tensor([torch.inf, 3e38, 0.0, -0.0, -3e38, 1e-45, -torch.inf, torch.nan])
    found = unpatched(entries, torch.ones_like(g), g, isa)
    assert found[:5].tolist() == [torch.inf, g[1].item(), 0.0, 0.0, 0.0]
    assert found[:5].signbit().tolist() == [False, False, False, True, True]
    assert 0 <= found[5] <= g[5]
    assert found[6:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_half_precision_is_read_and_rounded_exactly(entries: Any, dtype: torch.dtype, isa: int) -> None:
    """Where gelu(g) is g, what is left is the reading of every number, and the rounding of products."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    for factor in (8.0, 13.5, 1001.0):
        g = torch.full_like(every, factor)
        found, wanted = unpatched(entries, every, g, isa), (every.float() * g.float()).to(dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int16), wanted.nan_to_num().view(torch.int16))
    assert not torch.equal(found.nan_to_num(), (every.float() * 8).to(dtype).nan_to_num())


def naive(proj: Tensor, mask: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The answer in fp64, and the size of what was multiplied."""
    a, g = proj.double().chunk(2, -1)
    product = a * g * ndtr(g)
    return torch.where(mask, value.double(), product), a.abs() * g.abs()


def masks(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "some":
        return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.2
    mask = torch.full(shape, kind == "full")
    if kind == "last":
        mask.view(-1)[-1] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["empty", "full", "some", "last"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 7), (2, 64), (5, 65), (4, 200), (None, 130), (None, 8)])
def test_masked_geglu(entries: Any, tokens: int | None, width: int, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (width,) if tokens is None else (tokens, width)
    mask = masks(kind, shape)
    proj = torch.randn(3, tokens or 4, 2 * width, generator=generator)
    value = torch.randn(shape, generator=generator)
    # Neither may be seen.
    proj[..., :width][mask.expand(3, tokens or 4, width)] = torch.nan
    value[~mask] = torch.nan
    proj, value = proj.to(dtype), value.to(dtype)
    exact, size = naive(proj, mask, value)
    where = mask.expand_as(exact)
    for isa in INSTRUCTIONS:
        found = computed(entries, proj, mask, value, isa)
        assert torch.equal(found[where], value.expand_as(found)[where])
        error = (found.double() - exact)[~where].abs() / size[~where]
        # One rounding of the product to the dtype, beyond those of fp32.
        assert bool((error < torch.finfo(dtype).eps / 2 + 2 * GELU_ERROR).all())
        if width > 1 and kind == "some":
            other = computed(entries, proj, mask.roll(1, -1), value, isa)
            assert not torch.equal(other.nan_to_num(), found.nan_to_num())


def test_rows_are_those_asked_for(entries: Any) -> None:
    proj, mask, value = torch.randn(6, 20), masks("some", (3, 10)), torch.randn(3, 10)
    whole, part = (computed(entries, proj, mask, value, skip=skip) for skip in (0, 4))
    assert torch.equal(part[4:], whole[4:])
    assert part[:4].isnan().all()


@pytest.mark.parametrize("width", [1, 8, 13, 64, 77])
def test_masks_are_packed_as_everywhere(entries: Any, width: int) -> None:
    mask = masks("some", (5, width)).to(torch.uint8) * 6  # whatever is not zero is set
    bits = torch.full((5, -(-width // 8)), 255, dtype=torch.uint8)
    entries.bakeout_pack_mask(
        ctypes.c_void_p(mask.data_ptr()), ctypes.c_void_p(bits.data_ptr()), ctypes.c_int64(5), ctypes.c_int64(width)
    )
    assert torch.equal(bits, pack_mask(mask.to(torch.bool)))


def test_rows_of_nothing_take_no_time(tmp_path: Path) -> None:
    """Without optimisation, in which a compiler may drop a loop that does nothing."""
    plain = tmp_path / "plain.so"
    command = [build._cxx(), "-O0", "-std=c++17", "-shared", "-fPIC", "-o", plain, build.CSRC / "masked_geglu_cpu.cc"]
    subprocess.run(command, check=True)
    call = f"from ctypes import *; CDLL({str(plain)!r}).bakeout_pack_mask(None, None, c_int64(1 << 62), c_int64(0))"
    subprocess.run([sys.executable, "-c", call], check=True, timeout=10)


def function() -> Any:
    """The operator in plain ONNX."""
    nodes = [
        helper.make_node("Split", ["proj"], ["a", "g"], axis=-1, num_outputs=2),
        helper.make_node("Gelu", ["g"], ["gate"]),
        helper.make_node("Mul", ["a", "gate"], ["hidden"]),
        helper.make_node("Where", ["mask", "value", "hidden"], ["out"]),
    ]
    opset = [helper.make_opsetid("", 20)]
    return helper.make_function("bakeout", "MaskedGeglu", ["proj", "mask", "value"], ["out"], nodes, opset)


def graph(dtype: Any = np.float32, constant: tuple[Any, Any] | None = None, shape: Any = ("b", "n", "w")) -> bytes:
    """The operator and a node after it; mask and value are inputs, of any shape, unless they are `constant`."""
    kind = TYPES[dtype]
    inputs = [helper.make_tensor_value_info("proj", kind, shape)]
    constants = []
    if constant is None:
        inputs += [
            helper.make_tensor_value_info(name, it, None) for name, it in (("mask", TensorProto.BOOL), ("value", kind))
        ]
    else:
        constants = [numpy_helper.from_array(it, name) for name, it in zip(("mask", "value"), constant, strict=True)]
    plugin = {"plugin_namespace": "bakeout", "plugin_version": "1", "aot": 1}
    nodes = [
        helper.make_node("MaskedGeglu", ["proj", "mask", "value"], ["patched"], domain="bakeout", **plugin),
        helper.make_node("Neg", ["patched"], ["out"]),
    ]
    out = helper.make_tensor_value_info("out", kind, None)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("bakeout", 1)]
    made = helper.make_graph(nodes, "one", inputs, [out], constants)
    return bytes(
        helper.make_model(made, opset_imports=opsets, functions=[function()], ir_version=10).SerializeToString()
    )


def session(
    model: bytes,
    path: Path | None,
    threads: int = 1,
    profile: Path | None = None,
    provider: str = "CPUExecutionProvider",
) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if path is not None:
        options.register_custom_ops_library(str(path))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def feeds(batch: int = 2, tokens: int = 4, width: int = 10, dtype: Any = np.float32) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "proj": generator.standard_normal((batch, tokens, 2 * width)).astype(dtype),
        "mask": generator.random((tokens, width)) < 0.3,
        "value": generator.standard_normal((tokens, width)).astype(dtype),
    }


def relative_rms(found: Any, wanted: Any) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def test_the_library_runs_in_place_of_the_function_body(path: Path, tmp_path: Path) -> None:
    given = feeds()
    answers, ran = [], []
    for name, own in (("library", path), ("function", None)):
        running = session(graph(), own, profile=tmp_path / name)
        answers += running.run(None, given)
        events = json.loads(Path(running.end_profiling()).read_text())
        ran.append({event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")})
    assert ran[0] == {"MaskedGeglu", "Neg"}
    assert ran[1] >= {"Split", "Where"}
    assert "MaskedGeglu" not in ran[1]
    assert relative_rms(*answers) < 2e-7
    assert relative_rms(answers[0], answers[1][::-1]) > 0.1


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-7), (np.float16, 4e-4)])
@pytest.mark.parametrize("is_constant", [False, True])
def test_it_computes_what_the_definition_says(path: Path, dtype: Any, limit: float, is_constant: bool) -> None:
    given = feeds(dtype=dtype)
    constant = (given["mask"], given["value"]) if is_constant else None
    fed = {"proj": given["proj"]} if is_constant else given
    [found] = session(graph(dtype, constant), path).run(None, fed)
    wanted = naive(*(torch.from_numpy(it) for it in given.values()))[0].numpy()
    assert found.dtype == dtype
    assert relative_rms(-found, wanted) < limit
    assert relative_rms(found, wanted) > 1


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_a_mask_of_features(path: Path, shape: tuple[int, ...]) -> None:
    proj = np.random.default_rng(0).standard_normal((*shape, 20)).astype(np.float32)
    mask, value = np.arange(10) % 3 == 0, np.arange(10, dtype=np.float32)
    ranks = [f"axis{axis}" for axis in range(proj.ndim)]
    [found] = session(graph(shape=ranks), path).run(None, {"proj": proj, "mask": mask, "value": value})
    assert found.shape == (*shape, 10)
    assert relative_rms(-found, naive(*map(torch.from_numpy, (proj, mask, value)))[0].numpy()) < 1e-7


@pytest.mark.parametrize(("batch", "tokens", "width"), [(0, 4, 10), (2, 0, 10), (2, 4, 0)])
def test_nothing_gives_nothing(path: Path, batch: int, tokens: int, width: int) -> None:
    for constant in (False, True):
        given = feeds(batch, tokens, width)
        patch = (given["mask"], given["value"]) if constant else None
        fed = {"proj": given["proj"]} if constant else given
        assert session(graph(constant=patch), path).run(None, fed)[0].shape == (batch, tokens, width)


def test_threads_share_the_rows(path: Path, tmp_path: Path) -> None:
    given = feeds(2, 256, 1280)  # twenty blocks
    one, four = (session(graph(), path, threads).run(None, given)[0] for threads in (1, 4))
    assert np.array_equal(one, four)
    assert relative_rms(one, session(graph(), None).run(None, given)[0]) < 2e-7


@pytest.mark.parametrize(
    ("proj", "mask", "value", "words"),
    [
        ((2, 4, 20), (3, 10), (4, 10), r"mask of MaskedGeglu is \[3, 10\] and the value \[4, 10\], not both"),
        ((2, 4, 20), (10,), (4, 10), r"mask of MaskedGeglu is \[10\]"),
        ((2, 4, 20), (4, 1), (4, 10), r"mask of MaskedGeglu is \[4, 1\]"),
        ((2, 4, 20), (2, 4, 10), (2, 4, 10), "not both"),
        ((2, 4, 20), (), (), "not both"),
        ((2, 4, 20), (4, 11), (4, 11), r"proj of MaskedGeglu is \[2, 4, 20\], which does not end in \[N, 2h\]"),
        ((2, 4, 20), (11,), (11,), r"does not end in \[2h\] for a value of \[11\]"),
        ((2, 5, 20), (4, 10), (4, 10), "does not end in"),
        ((2, 1, 20), (4, 10), (4, 10), "does not end in"),
        ((2, 4, 21), (4, 10), (4, 10), "does not end in"),
        ((20,), (1, 10), (1, 10), "does not end in"),
        ((), (10,), (10,), "does not end in"),
    ],
)
def test_other_shapes_are_refused(path: Path, proj: Any, mask: Any, value: Any, words: str) -> None:
    given = {
        "proj": np.zeros(proj, np.float32), "mask": np.zeros(mask, np.bool_), "value": np.zeros(value, np.float32)
    }  # fmt: skip
    ranks = [f"axis{axis}" for axis in range(len(proj))]
    with pytest.raises(Exception, match=words):
        session(graph(shape=ranks), path).run(None, given)
    with pytest.raises(Exception, match=words):
        session(graph(shape=ranks, constant=(given["mask"], given["value"])), path).run(None, {"proj": given["proj"]})


def test_shapes_after_it_are_known(path: Path) -> None:
    given = feeds()
    constant = (given["mask"], given["value"])
    for shape, patch, wanted in (
        (("b", 4, 20), constant, ["b", 4, 10]),
        (("b", "n", "w"), constant, ["b", "n", 10]),
        (("b", 4, 20), None, ["b", 4, 10]),
    ):
        [out] = session(graph(shape=shape, constant=patch), path).get_outputs()
        assert (out.shape, out.type) == (wanted, "tensor(float)")


def test_sessions_come_and_go(path: Path) -> None:
    given = feeds()
    first, second = (session(graph(), path) for _ in range(2))
    [wanted] = first.run(None, given)
    del first
    gc.collect()
    assert np.array_equal(second.run(None, given)[0], wanted)
    del second
    gc.collect()
    assert np.array_equal(session(graph(), path).run(None, given)[0], wanted)


def test_an_older_onnx_runtime_is_told_so(entries: Any) -> None:
    """One whose interface has version 1 only, of which the first entry makes a status of a text."""
    said: list[tuple[int, bytes]] = []
    status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    create = status(lambda code, text: said.append((code, text)) or 1)
    table = (ctypes.c_void_p * 102)(ctypes.cast(create, ctypes.c_void_p).value)
    choose = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_api = choose(lambda version: ctypes.addressof(table) if version == 1 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value)
    register = entries.RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base))
    assert said == [(1, b"bakeout's operators need ONNX Runtime 1.17 or newer")]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-7), (np.float16, 4e-4)])
@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_it_computes_the_same_on_a_gpu(
    dtype: Any, limit: float, is_constant: bool, by_token: bool, tmp_path: Path
) -> None:
    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is for the CPU: onnxruntime-gpu is needed")
    given = feeds(3, 77, 200, dtype)
    if not by_token:
        given |= {"mask": given["mask"][0], "value": given["value"][0]}
    constant = (given["mask"], given["value"]) if is_constant else None
    running = session(graph(dtype, constant), library("cuda"), profile=tmp_path / "gpu", provider=provider)
    fed = {"proj": given["proj"]} if is_constant else given
    for _ in range(2):
        [found] = running.run(None, fed)
        assert relative_rms(-found, naive(*(torch.from_numpy(it) for it in given.values()))[0].numpy()) < limit
    events = json.loads(Path(running.end_profiling()).read_text())
    ran = [event["args"] for event in events if event["args"].get("op_name") == "MaskedGeglu"]
    assert ran
    assert {it["provider"] for it in ran} == {provider}
