"""CUDA C++: the kernel's own source on the CPU, what nvcc makes of it for each GPU, and, where there is one, a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bakeout.kernels import build, cuda, ops, reference
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.packing import pack_mask, unpack_mask

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = tuple(cuda.ENTRY_POINTS)
FORMS = tuple(product((True, False), (True, False)))  # packed or bool, a mask for each token or one for all
# Aligned and not, in both precisions and for both kinds of mask; more and fewer than a warp and a block take.
SHAPES = tuple(
    (*leading, tokens, width)
    for leading in ((), (3,), (2, 2), (0,))
    for tokens in (1, 2, 9, 17)
    for width in (1, 3, 8, 12, 16, 37, 136, 1280)
)


def example(
    shape: Sequence[int], dtype: torch.dtype, packed: bool, each: bool, density: float = 0.2, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """NaN where nothing may be seen: in values outside the mask, and in projections under it."""
    generator = torch.Generator(device).manual_seed(0)
    *leading, tokens, width = shape
    places = (tokens, width) if each else (width,)
    mask = torch.rand(places, generator=generator, device=device) < density
    proj = torch.randn((*leading, tokens, 2 * width), generator=generator, device=device) * 2
    value = torch.randn(places, generator=generator, device=device)
    proj, value = proj.masked_fill(torch.cat((mask, mask), -1), torch.nan), value.where(mask, torch.nan)
    return proj.to(dtype), pack_mask(mask) if packed else mask, value.to(dtype)


def error_of(found: Tensor, proj: Tensor, mask: Tensor, value: Tensor) -> float:
    """Against the definition in fp64, relative to a g and v; not a number counts as infinite."""
    expected = reference.masked_geglu(proj.double(), mask, value.double())
    if mask.dtype == torch.uint8:
        mask = unpack_mask(mask, value.shape[-1])
    a, g = proj.double().chunk(2, -1)
    scale = torch.where(mask, value.double(), a * g).norm()
    if found.shape != expected.shape or found.dtype != proj.dtype or not found.is_contiguous():
        return torch.inf
    error = (found.double() - expected).norm() / scale if found.numel() else scale
    return torch.inf if error.isnan() else float(error)


# On the CPU


def on_host(folder: Path, *changes: tuple[str, str]) -> ctypes.CDLL:
    """The kernel's source, changed or as it is, by the C++ compiler."""
    source = (build.CSRC / "masked_geglu.cu").read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "masked_geglu.cu").write_text(source, encoding="utf-8")
    stand_in = Path(__file__).parent / "cuda_on_host"
    done = subprocess.run(
        [build._cxx(), "-O1", "-std=c++17", "-shared", "-fPIC", "-include", stand_in / "cuda_runtime.h", "-I", stand_in,
         "-I", build.CSRC, "-x", "c++", folder / "masked_geglu.cu", "-o", folder / "masked_geglu.so"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cuda.with_signatures(ctypes.CDLL(str(folder / "masked_geglu.so")))


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    return on_host(tmp_path_factory.mktemp("host"))


def worst_error(library: ctypes.CDLL, dtype: torch.dtype, packed: bool, each: bool) -> float:
    examples = (example(shape, dtype, packed, each) for shape in SHAPES)
    return max(error_of(cuda.launch(library, *given, stream=0), *given) for given in examples)


@pytest.mark.parametrize(("packed", "each"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_definition(host, dtype, packed, each):
    assert worst_error(host, dtype, packed, each) <= torch.finfo(dtype).eps


FAULTS = {
    "the halves are swapped": [
        ("__ldcs(a[r].at(row))", "__ldcs(a[r].at(row + p.width))"),
        ("__ldcs(g[r].at(row + p.width))", "__ldcs(g[r].at(row))"),
    ],
    "the mask is dropped": [("bits[r] >> j & 1 ?", "false ?")],
    "the mask is that of the next feature": [("bits[r] >> j & 1 ?", "bits[r] >> (j + 1) & 1 ?")],
    "the mask is that of the first byte": [("column / 8", "0")],
    "the mask is that of the first token": [("p.mask + token[r] * p.mask_row_stride", "p.mask")],
    "the values are the first token's": [("token[r] * p.value_row_stride", "0")],
    "the projection is the first batch's": [("batch * p.batch_stride", "0")],
    "every other row is missing": [("token[r] = min(first + r, p.tokens - 1)", "token[r] = first")],
    "only some columns": [("const int64_t columns = ", "const int64_t columns = 1; //")],
    "only 8 rows": [("blocks(p.tokens, WARPS * ROWS), GRID_YZ)", "int64_t{1}, GRID_YZ)"), ("+= step", "+= p.tokens")],
    "GELU by tanh": [
        ("return fmaf(-x, exp2_flushed(power), positive);",
         "return g / 2 * (1 + tanhf(0.79788456f * (g + 0.044715f * g * g * g)));"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_with_a_fault_is_seen(fault, tmp_path):
    broken = on_host(tmp_path, *FAULTS[fault])
    assert worst_error(broken, torch.float32, packed=True, each=True) > 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("packed", "each"), FORMS)
@pytest.mark.parametrize("density", [0, 1])
def test_empty_and_full_masks(host, density, packed, each):
    for dtype, width in product(DTYPES, (37, 136)):
        given = example((2, 5, width), dtype, packed, each, density)
        assert error_of(cuda.launch(host, *given, stream=0), *given) <= torch.finfo(dtype).eps


def test_gelu_is_that_of_the_triton_kernel():
    def numbers(file: str, begin: str, end: str) -> list[float]:
        source = (build.CSRC.parent / file).read_text(encoding="utf-8")
        _, _, text = source.partition(begin)
        found = re.findall(r"(-?) ?(\d+\.\d+(?:e-\d+)?)", text.partition(end)[0])
        return [float(sign + digits) for sign, digits in found]

    ours = numbers("csrc/masked_geglu.cu", "POWER[] = {", "}")
    assert len(ours) == 11
    assert ours == numbers("masked_geglu.py", "14.0)", "return")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_every_magnitude(host, dtype):
    g = torch.cat([torch.linspace(-20, 20, 40_001), torch.logspace(-38, 4, 4_000), -torch.logspace(-38, 1, 4_000)])
    g = g.to(dtype)
    a, mask = torch.ones_like(g), torch.zeros(len(g), dtype=torch.bool)
    found = cuda.launch(host, torch.cat([a, g]), mask, g, stream=0).double()
    expected = torch.nn.functional.gelu(g.double())
    # Half a unit in the last place of the result, and 2 of fp32 of the argument; below what is normal, that of zero.
    finfo = torch.finfo(dtype)
    limit = finfo.eps / 2 * expected.abs() + 2 * 2**-24 * g.double().abs() + finfo.smallest_normal * finfo.eps
    assert ((found - expected).abs() <= limit).all()
    tanh = torch.nn.functional.gelu(g.double(), approximate="tanh")
    assert ((tanh - expected).abs() > limit).any() or dtype == torch.bfloat16


def test_what_is_not_finite_goes_through_and_what_is_masked_is_the_value_to_the_bit(host):
    g = torch.tensor([torch.inf, 65504, 0, -0.0, -65504, -torch.inf, torch.nan])
    found = cuda.launch(host, torch.cat([torch.ones(7), g]), torch.zeros(7, dtype=torch.bool), g, stream=0)
    assert torch.equal(found[:-1], g[:-1].clamp(min=0))
    assert found[-1].isnan()
    for dtype in DTYPES:
        value = torch.tensor([torch.inf, -torch.inf, torch.finfo(dtype).tiny / 4, -0.0, 1 / 3, 65504, -1, 0]).to(dtype)
        for mask in (torch.ones(8, dtype=torch.bool), torch.full((1,), 255, dtype=torch.uint8)):
            found = cuda.launch(host, torch.full((16,), torch.nan, dtype=dtype), mask, value, stream=0)
            assert torch.equal(found, value)
            assert torch.equal(found.signbit(), value.signbit())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "of wider rows": lambda it: torch.cat([it, it.flip(-1)], -1)[..., : it.shape[-1]],
    "of wider rows, not aligned": lambda it: torch.cat([it[..., :1], it, it], -1)[..., 1 : it.shape[-1] + 1],
    "at an odd place": lambda it: torch.cat([it.flatten()[:1], it.flatten()])[1:].view_as(it),
    "of other rows first": lambda it: it.transpose(0, -2).contiguous().transpose(0, -2),
    "of columns": lambda it: it.mT.contiguous().mT,
    "of every other feature": lambda it: it.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize(("packed", "each"), FORMS)
@pytest.mark.parametrize("view", VIEWS)
def test_rows_and_features_of_any_stride(host, view, packed, each):
    for dtype, which in product(DTYPES, range(3)):
        given = list(example((2, 3, 9, 136), dtype, packed, each))
        if given[which].ndim > 1:
            given[which] = VIEWS[view](given[which])
            assert error_of(cuda.launch(host, *given, stream=0), *given) <= torch.finfo(dtype).eps
    proj, mask, value = example((1, 9, 136), torch.float32, packed, each)
    proj = proj.expand(4, -1, -1)
    assert error_of(cuda.launch(host, proj, mask, value, stream=0), proj, mask, value) <= torch.finfo(torch.float32).eps


def test_rows_are_read_where_they_are():
    taken: list[int] = []
    recorder = SimpleNamespace(bakeout_masked_geglu_f32=lambda *given: taken.extend(given) or 0)
    proj = torch.zeros(5, 3, 40).transpose(0, 1)[..., :16]
    cuda.launch(recorder, proj, torch.zeros(5, 8, dtype=torch.bool), torch.zeros(5, 8), stream=7)
    assert taken[:3] == [proj.data_ptr(), 40, 120]
    assert taken[9:] == [3, 5, 8, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_byte_is_read_and_written_once_and_values_only_where_a_group_has_a_bit(host, dtype):
    def counts() -> dict[str, int]:
        return {name: ctypes.c_int64.in_dll(host, f"bytes_{name}").value for name in ("cached", "streamed", "written")}

    group = 16 // dtype.itemsize
    mask = torch.zeros(4, 128, dtype=torch.bool)
    for bit in (None, (0, 0), (0, 1), (3, 127), (2, group)):
        if bit is not None:
            mask[bit] = True
        groups = int(mask.reshape(4, -1, group).any(-1).sum())
        proj, value = torch.zeros(2, 4, 256, dtype=dtype), torch.zeros(4, 128, dtype=dtype)
        for given, mask_bytes in ((mask, mask.numel()), (pack_mask(mask), 4 * 128 // group)):
            before = counts()
            out = cuda.launch(host, proj, given, value, stream=0)
            found = {name: count - before[name] for name, count in counts().items()}
            assert found == {"cached": 2 * (mask_bytes + 16 * groups), "streamed": proj.nbytes, "written": out.nbytes}


@pytest.mark.parametrize("shape", [(65_537, 2, 1), (1, 8 * 65_535 + 3, 1)])
def test_more_blocks_than_a_grid_has(host, shape, tmp_path):
    given = example(shape, torch.float32, packed=True, each=True)
    assert error_of(cuda.launch(host, *given, stream=0), *given) <= torch.finfo(torch.float32).eps
    once = on_host(tmp_path, ("batch += gridDim.z", "batch += p.batch"), ("first += step", "first += p.tokens"))
    assert error_of(cuda.launch(once, *given, stream=0), *given) == torch.inf


def test_an_error_is_said_and_what_cannot_run_here_is_unavailable(host):
    given = example((2, 3, 8), torch.float32, packed=False, each=True)
    for code, expected in ((35, KernelUnavailable), (209, KernelUnavailable), (700, RuntimeError)):
        failing = SimpleNamespace(
            bakeout_masked_geglu_f32=lambda *_, code=code: code,
            bakeout_cuda_error=lambda code: f"error {code}".encode(),
        )
        with pytest.raises(RuntimeError, match=f"error {code}") as raised:
            cuda.launch(failing, *given, stream=0)
        assert raised.type is expected
    assert host.bakeout_masked_geglu_f32(*[0] * 9, -1, 1, 1, 0) == 1
    assert host.bakeout_masked_geglu_f32(*[0] * 9, 1, 0, 1, 0) == 0
    assert host.bakeout_masked_geglu_f32(*[0] * 9, 1, 1, 1 << 60, 0) == 1
    assert host.bakeout_cuda_error(1) == b"invalid argument"


def test_tensors_elsewhere_are_refused():
    with pytest.raises(KernelUnavailable, match=r"proj is on cpu, but .*; move them there"):
        cuda.masked_geglu(*example((2, 3, 8), torch.float32, packed=False, each=True))
    with pytest.raises(ValueError, match="does not end in"):
        cuda.masked_geglu(torch.zeros(2, 7), torch.zeros(3, dtype=torch.bool), torch.zeros(3))


def test_the_signatures_are_those_of_the_header(host):
    header = re.sub(r"//.*", "", (build.CSRC / "bakeout_kernels.h").read_text(encoding="utf-8"))
    types = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "const char*": ctypes.c_char_p}
    declared = re.findall(r"BAKEOUT_EXPORT ([\w *]+?) ?(bakeout_\w+)\((.*?)\);", header, re.DOTALL)
    assert {name for _, name, _ in declared} == {*cuda.ENTRY_POINTS.values(), "bakeout_cuda_error"}
    for result, name, parameters in declared:
        kinds = [parameter.split()[:-1] for parameter in parameters.split(",")]
        expected = [types.get(" ".join(kind), ctypes.c_void_p) for kind in kinds]
        function = getattr(host, name)
        assert (function.restype, list(function.argtypes)) == (types[result], expected)


# What nvcc makes of it


@dataclass
class Code:
    """One kernel for one GPU: its resources, as cuobjdump names them, and its instructions."""

    resources: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)

    def places(self, pattern: str) -> list[int]:
        return [place for place, text in enumerate(self.instructions) if re.match(pattern, text)]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The library, by the nvcc of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CUDA_HOME", str(Path(list(build._nvcc_places())[-1]).parents[1]))
        return build.library("cuda")


def cuobjdump(*arguments: str | Path) -> str:
    spec = find_spec("triton")
    assert spec
    assert spec.origin
    program = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def code(built) -> dict[tuple[int, str, int, bool], Code]:
    """By GPU, type, features at once, and whether the mask is packed."""
    found: dict[tuple[int, str, int, bool], Code] = {}
    gpu, current = 0, Code()
    for line in cuobjdump("-sass", "-res-usage", built).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            gpu = int(match[1])
        elif match := re.search(r"Function\s?:? .*masked_gegluI(?:4|8)?(\w+?)Li(\d+)ELb([01])E", line):
            current = found.setdefault((gpu, match[1], int(match[2]), match[3] == "1"), Code())
        elif "REG:" in line:
            current.resources = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", line)}
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            current.instructions.append(match[1])
    return found


def test_there_is_code_for_every_gpu(built, code):
    kernels = {(name, features) for name, group in (("f", 4), ("Half", 8), ("Bfloat16", 8)) for features in (1, group)}
    assert {*code} == {
        (gpu, *kernel, packed) for gpu in build.ARCHITECTURES for kernel in kernels for packed in (True, False)
    }
    assert re.findall(r"sm_(\d+)\.ptx", cuobjdump("-lptx", built)) == [str(build.ARCHITECTURES[0])]


@pytest.mark.parametrize("gpu", build.ARCHITECTURES)
def test_the_code_is_that_of_a_kernel_that_memory_bounds(code, gpu):
    for (of, _, features, _), kernel in code.items():
        if of != gpu:
            continue
        # 80 registers leave room for 6 blocks of 4 warps on a multiprocessor of 65,536. Nothing is spilled.
        assert kernel.resources["REG"] <= 80
        assert {kernel.resources[name] for name in ("STACK", "SHARED", "LOCAL")} == {0}
        assert not kernel.places(r"(@!?P\d )?(LDL|STL|LDS|STS)")
        wide = features > 1
        reads, writes = kernel.places(r"LDG\S*\.EF"), kernel.places("STG")
        values = kernel.places(r"@!?P\d LDG")
        masks = kernel.places(r"LDG\S*\.CONSTANT")
        # Two rows: both halves, the mask, the values where there are any, and the result.
        assert (len(reads), len(writes), len(values), len(masks)) == (4, 2, 2, 2)
        assert all((".128" in kernel.instructions[place]) == wide for place in (*reads, *writes, *values))
        assert all((".128" in kernel.instructions[place]) is False for place in masks)
        if wide:
            # All are on their way before any is computed with. An H100 that moves 3 TB/s issues 57 instructions in the
            # time of 6 bytes, which are an element in half precision.
            assert max(*reads, *masks) < min(kernel.places("MUFU"))
            assert len(kernel.instructions) <= 57 / 1.3 * 2 * features


def test_the_library_has_the_entry_points(built):
    library = cuda.with_signatures(ctypes.CDLL(str(built)))
    assert library.bakeout_cuda_error(1) == b"invalid argument"
    assert library.bakeout_masked_geglu_f16(*[0] * 9, -1, 1, 1, 0) == 1
    assert library.bakeout_masked_geglu_f16(*[0] * 9, 0, 1, 1, 0) == 0
    with pytest.raises(AttributeError):
        library.cudaLaunchKernelExC  # noqa: B018 - the runtime within it is its own


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("packed", "each"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_it_is_the_definition(dtype, packed, each):
    for shape in (*SHAPES, (2, 4096, 1280), (2, 256, 5120), (65_537, 2, 1), (8 * 65_535 + 3, 1)):
        given = example(shape, dtype, packed, each, device="cuda")
        assert error_of(ops.masked_geglu(*given, by="cuda"), *given) <= 2 * torch.finfo(dtype).eps
    proj, mask, value = example((2, 9, 136), dtype, packed, each, device="cuda")
    found = cuda.masked_geglu(proj, mask, value)
    shifted = mask ^ 1 if packed else mask.roll(1, -1)
    assert error_of(found, proj, shifted, value) > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_on_a_gpu_rows_and_features_of_any_stride(view):
    for dtype, (packed, each), which in product(DTYPES, FORMS, range(3)):
        given = list(example((2, 3, 9, 136), dtype, packed, each, device="cuda"))
        if given[which].ndim > 1:
            given[which] = VIEWS[view](given[which])
            assert error_of(cuda.masked_geglu(*given), *given) <= 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_gelu_of_every_magnitude(dtype):
    g = torch.cat([torch.linspace(-20, 20, 40_001), torch.logspace(-38, 4, 4_000)]).to("cuda", dtype)
    found = cuda.masked_geglu(torch.cat([torch.ones_like(g), g]), torch.zeros_like(g, dtype=torch.bool), g).double()
    expected = torch.nn.functional.gelu(g.double())
    finfo = torch.finfo(dtype)
    limit = finfo.eps / 2 * expected.abs() + 4 * 2**-24 * g.double().abs() + finfo.smallest_normal * finfo.eps
    assert ((found - expected).abs() <= limit).all()


@pytest.mark.gpu
def test_on_a_gpu_more_elements_than_32_bits_count():
    tokens, width = 420_000, 2_560
    proj = torch.randn(2 * width, device="cuda", dtype=torch.float16).expand(tokens, -1).contiguous()
    assert proj.numel() > 2**31
    given = example((1, width), torch.float16, packed=True, each=False, device="cuda")[1:]
    found = cuda.masked_geglu(proj, *given)
    assert error_of(found[-3:], proj[-3:], *given) <= 2 * torch.finfo(torch.float16).eps
    assert torch.equal(found[-1], found[0])


@pytest.mark.gpu
def test_on_a_gpu_it_keeps_to_the_stream_and_is_captured():
    given = example((2, 64, 1280), torch.float16, packed=True, each=True, device="cuda")
    proj = torch.full_like(given[0], torch.nan)
    cuda.masked_geglu(proj, *given[1:])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        proj.copy_(given[0])
        found = cuda.masked_geglu(proj, *given[1:])
    stream.synchronize()
    assert error_of(found, *given) <= 2 * torch.finfo(torch.float16).eps

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.masked_geglu(proj, *given[1:])
    proj.copy_(given[0] * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert error_of(captured, proj, *given[1:]) <= 2 * torch.finfo(torch.float16).eps
    assert error_of(captured, *given) > 0.1


@pytest.mark.gpu
def test_on_a_gpu_a_launch_that_is_refused_harms_nothing():
    given = example((2, 9, 136), torch.float32, packed=True, each=True, device="cuda")
    library = cuda.load()
    assert library.bakeout_masked_geglu_f32(*[0] * 9, 1, 1, 1 << 60, 0) == 1
    assert error_of(cuda.masked_geglu(*given), *given) <= 2 * torch.finfo(torch.float32).eps
    with pytest.raises(KernelUnavailable, match="mask is on cpu"):
        cuda.masked_geglu(given[0], given[1].cpu(), given[2])
    with pytest.raises(KernelUnavailable, match=r"has no torch\.float64"):
        cuda.masked_geglu(given[0].double(), given[1], given[2].double())
