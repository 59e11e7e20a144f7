"""`masked_geglu` ahead of time: its launch, run as it is described, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bakeout.kernels import aot, build, reference

pytest.importorskip("triton")
kernels = pytest.importorskip("bakeout.kernels.masked_geglu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Batches, tokens, width: FFNs of Stable Diffusion with few tokens, and what fills no block.
SHAPES = ((2, 5, 1280), (1, 3, 2560), (1, 9, 5120), (3, 1, 8), (2, 17, 20), (2, 9, 37))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def ceil_div(size: int, by: int) -> int:
    return (size + by - 1) // by


def example(
    batches: int, tokens: int, width: int, dtype: torch.dtype, each: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Values outside the mask and projections under it are NaN, which nobody may see."""
    generator = torch.Generator().manual_seed(tokens * width)
    places = (tokens, width) if each else (width,)
    mask = torch.rand(places, generator=generator) < 0.3
    value = torch.randn(places, generator=generator).where(mask, torch.nan)
    proj = torch.randn((batches, tokens, 2 * width), generator=generator) * 2
    proj = proj.masked_fill(torch.cat([mask, mask], -1), torch.nan)
    return proj.to(device, dtype), mask.to(device), value.to(device, dtype)


_ROOM = 64
Runner = Callable[[aot.Kernel, "aot.Launch[int]", list[Tensor], Tensor], None]


@pytest.fixture
def by_interpreter(interpreted) -> Runner:
    """Runs Triton's kernel on the CPU, with a launch's grid and integers."""
    interpreted(kernels)

    def run(kernel: aot.Kernel, launch: aot.Launch[int], tensors: list[Tensor], out: Tensor) -> None:
        proj, mask, value = tensors
        variant = kernels.Variant(kernel.width, kernel.dtype, packed=False, aligned=kernel.group > 1)
        given = (proj, mask.view(variant.word), value, *launch.integers, out)
        kernels.run(kernels.masked_geglu_kernel, launch.grid, given, variant.constants)

    return run


LAUNCHER = """
#include "masked_geglu.cu"
extern "C" int launch(const unsigned* g, const unsigned* b, void* proj, void* mask, void* value, const int* i,
                      void* out) {
  using T = BAKEOUT_AOT_TYPE;
  const cudaLaunchConfig_t config = {dim3(g[0], g[1], g[2]), dim3(b[0], b[1], b[2]), nullptr};
  return cudaLaunchKernelEx(&config, masked_geglu_aot, static_cast<const T*>(proj), static_cast<const uint8_t*>(mask),
                            static_cast<const T*>(value), i[0], i[1], i[2], i[3], i[4], i[5], static_cast<T*>(out));
}
"""


@pytest.fixture(scope="module")
def by_compiler(tmp_path_factory) -> Runner:
    """Runs CUDA C++'s kernel on the CPU, with a launch's grid, blocks and integers."""
    libraries: dict[tuple[torch.dtype, int], ctypes.CDLL] = {}
    stand_in = Path(__file__).parent / "cuda_on_host"

    def library(kernel: aot.Kernel) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("aot")
        (folder / "launch.cc").write_text(LAUNCHER)
        macros = (f"-DBAKEOUT_AOT_TYPE={aot._TYPES[kernel.dtype]}", f"-DBAKEOUT_AOT_GROUP={kernel.group}")
        command = [
            build._cxx(), "-O1", "-std=c++17", "-shared", "-fPIC", "-include", stand_in / "cuda_runtime.h", "-I",
            stand_in, "-I", build.CSRC, *macros, folder / "launch.cc", "-o", folder / "launch.so",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(folder / "launch.so"))

    def run(kernel: aot.Kernel, launch: aot.Launch[int], tensors: list[Tensor], out: Tensor) -> None:
        key = kernel.dtype, kernel.group
        libraries[key] = libraries.get(key) or library(kernel)
        grid, block = ((ctypes.c_uint * 3)(*it) for it in (launch.grid, launch.block))
        addresses = [ctypes.c_void_p(it.data_ptr()) for it in (*tensors, out)]
        integers = (ctypes.c_int * 6)(*launch.integers)
        assert libraries[key].launch(grid, block, *addresses[:3], integers, addresses[3]) == 0

    return run


@pytest.fixture
def runner(by_interpreter, by_compiler) -> Callable[[aot.Kernel], Runner]:
    return lambda kernel: by_interpreter if isinstance(kernel, aot.TritonKernel) else by_compiler


def result(run: Runner, kernel: aot.Kernel, launch: aot.Launch[int], *tensors: Tensor) -> Tensor:
    proj, _, value = tensors
    out = torch.full((*proj.shape[:2], value.shape[-1]), torch.nan, dtype=proj.dtype, device=proj.device)
    # A launch that reads or writes beyond the tensors does it where nothing else is.
    given = [torch.cat([it.flatten(), it.new_zeros(_ROOM * it.numel())]) for it in (*tensors, out)]
    run(kernel, launch, given[:3], given[3])
    return given[3][: out.numel()].view_as(out)


@pytest.mark.claim("the kernels, launched as described, are the definition (Triton's interpreter; CUDA C++ on the CPU)")
@pytest.mark.parametrize("name", aot.KERNELS)
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_launch_as_described_is_the_definition(dtype, each, name, runner, relative_error):
    for batches, tokens, width in SHAPES:
        kernel = aot.KERNELS[name](dtype, width)
        tensors = example(batches, tokens, width, dtype, each)
        launch = kernel.launch(batches, tokens, each, ceil_div)
        launch.check()
        found = result(runner(kernel), kernel, launch, *tensors)
        proj, mask, value = tensors
        right = reference.masked_geglu(proj.double(), mask, value.double())
        assert relative_error(found, right) <= torch.finfo(dtype).eps
        whole = mask.expand(right.shape)
        assert torch.equal(found[whole], value.expand(right.shape)[whole])


def swapped(launch: aot.Launch[int], first: int, second: int) -> aot.Launch[int]:
    integers = list(launch.integers)
    integers[first], integers[second] = integers[second], integers[first]
    return replace(launch, integers=tuple(integers))


@pytest.mark.parametrize("name", aot.KERNELS)
def test_another_order_or_grid_is_seen(name, runner, relative_error):
    kernel = aot.KERNELS[name](torch.float16, 32)
    tensors = [it.nan_to_num(3.0) for it in example(2, 9, 32, torch.float16, each=True)]
    launch = kernel.launch(2, 9, True, ceil_div)
    right = reference.masked_geglu(*tensors)
    assert relative_error(result(runner(kernel), kernel, launch, *tensors), right) <= torch.finfo(torch.float16).eps
    x, y, z = launch.grid
    wrong = [
        swapped(launch, 0, 1), swapped(launch, 2, 3),
        replace(launch, integers=(*launch.integers[:4], 0, launch.integers[5])),
        replace(launch, integers=(*launch.integers[:5], 0)),
    ]  # fmt: skip
    if name == "triton":
        wrong += [replace(launch, grid=(x - 1, y, z)), replace(launch, grid=(x, y - 1, z))]
    for it in wrong:
        assert not relative_error(result(runner(kernel), kernel, it, *tensors), right) <= 0.01
    proj, mask, value = tensors
    assert relative_error(result(runner(kernel), kernel, launch, proj, ~mask, value), right) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batches", "tokens", "width"), [(2, 4096, 1280), (16, 256, 5120), (3, 77, 37)])
def test_it_is_the_launch_of_triton_s_own_launcher(batches, tokens, width, dtype):
    proj = torch.empty(batches, tokens, 2 * width, dtype=dtype, device="meta")
    mask = torch.empty(tokens, width, dtype=torch.bool, device="meta")
    own = kernels.launch_of(proj, mask, torch.empty(tokens, width, dtype=dtype, device="meta"))
    launch = aot.TritonKernel(dtype, width).launch(batches, tokens, True, ceil_div)
    assert launch.integers == own.integers
    assert launch.grid == own.grid
    assert own.variant.aligned == (aot.TritonKernel(dtype, width).group > 1)


@pytest.mark.parametrize(
    ("dtype", "shape", "grid"),
    [
        (torch.float16, (2, 4096, 1280), (5, 512, 2)), (torch.float32, (2, 4096, 1280), (10, 512, 2)),
        (torch.bfloat16, (3, 77, 37), (2, 10, 3)), (torch.float16, (1, 8, 256), (1, 1, 1)),
        (torch.float16, (1, 9, 264), (2, 2, 1)),
    ],
)  # fmt: skip
def test_cuda_s_launch_has_no_more_threads_than_groups_of_rows(dtype, shape, grid):
    # Its loops over rows and batches would hide a grid that is too small, and its bounds one that is too large.
    batches, tokens, width = shape
    launch = aot.CudaKernel(dtype, width).launch(batches, tokens, True, ceil_div)
    assert (launch.grid, launch.block) == (grid, (32, 4, 1))
    source = (build.CSRC / "masked_geglu.cu").read_text(encoding="utf-8")
    constants = dict(re.findall(r"^constexpr int (\w+) = (\d+);", source, re.MULTILINE))
    assert (constants["LANES"], constants["WARPS"], constants["ROWS"]) == ("32", "4", "2")


class Symbol:
    """An expression of the sizes, that can be multiplied, and not compared or read."""

    def __init__(self, value: Callable[[int, int], int]) -> None:
        self.value = value

    def __mul__(self, other: int) -> Symbol:
        return Symbol(lambda *sizes: self.value(*sizes) * other)


@pytest.mark.parametrize("name", aot.KERNELS)
@pytest.mark.parametrize("each", [True, False])
def test_expressions_give_what_integers_give(each, name):
    kernel = aot.KERNELS[name](torch.float16, 1280)
    symbolic = kernel.launch(
        Symbol(lambda batches, _: batches),
        Symbol(lambda _, tokens: tokens),
        each,
        lambda it, by: Symbol(lambda *sizes: ceil_div(it.value(*sizes), by)),
    )

    def values(part: tuple[Any, ...], *sizes: int) -> tuple[int, ...]:
        return tuple(it.value(*sizes) if isinstance(it, Symbol) else it for it in part)

    for batches, tokens in ((1, 1), (2, 4096), (7, 77)):
        launch = kernel.launch(batches, tokens, each, ceil_div)
        assert values(symbolic.grid, batches, tokens) == launch.grid
        assert values(symbolic.integers, batches, tokens) == launch.integers
        assert symbolic.block == launch.block


@pytest.mark.parametrize("name", aot.KERNELS)
def test_what_no_gpu_launches_and_no_integer_holds_is_refused(name):
    kernel = aot.KERNELS[name](torch.float16, 1280)
    for batches, tokens in ((65_535, 4096), (16, 16_384)):
        kernel.launch(batches, tokens, True, ceil_div).check()
    # The stride from one batch to the next is of 320 groups a token.
    for batches, tokens in ((65_536, 1), (1, 2**31 // 320 + 1)):
        with pytest.raises(ValueError, match="make the batch or the pictures smaller"):
            kernel.launch(batches, tokens, True, ceil_div).check()


# On a GPU


def by_driver(kernel: aot.Kernel, launch: aot.Launch[int], tensors: list[Tensor], out: Tensor) -> None:
    """Launches the PTX as a host does that knows the description alone: by CUDA's driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    code = aot.compiled(kernel)
    torch.cuda.synchronize()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), code.ptx.encode()) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, code.name.encode()) == 0
    pointers = [ctypes.c_void_p(it.data_ptr()) for it in (*tensors, out)]
    arguments = [*pointers[:3], *map(ctypes.c_int, launch.integers), pointers[3]]
    places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(it) for it in arguments))
    assert driver.cuLaunchKernel(function, *launch.grid, *launch.block, code.shared, None, places, None) == 0
    torch.cuda.synchronize()
    assert driver.cuModuleUnload(module) == 0


@pytest.mark.claim("the kernels' PTX, launched as described by the driver of a GPU, is the definition")
@pytest.mark.gpu
@pytest.mark.parametrize("name", aot.KERNELS)
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ptx_launched_by_the_driver_is_the_definition(dtype, each, name, relative_error):
    for batches, tokens, width in (*SHAPES, (2, 4096, 1280), (2, 256, 5120)):
        kernel = aot.KERNELS[name](dtype, width)
        proj, mask, value = example(batches, tokens, width, dtype, each, "cuda")
        launch = kernel.launch(batches, tokens, each, ceil_div)
        found = result(by_driver, kernel, launch, proj, mask, value)
        right = reference.masked_geglu(proj.double(), mask, value.double())
        # The error of a GPU's power of two is seen whole in fp32 where few elements are all there is.
        assert relative_error(found, right) <= (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
        whole = mask.expand(right.shape)
        assert torch.equal(found[whole], value.expand(right.shape)[whole])
