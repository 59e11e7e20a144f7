"""`masked_geglu_linear` in Triton: a GEMM with bias, GELU, product and patch in its epilogue.

A program has a tile of the result and two accumulators for it: x times some rows of the weight, and x times the same
rows of its second half. The weight is read as it is, and the projection, which has twice as many features as the
result, never reaches memory.

Tiles are read through plain pointers. Triton keeps several of them in flight by cp.async on every architecture since
sm_80, in the layout that wgmma (sm_90) and tcgen05 (sm_100) read. Tensor descriptors would ask for strides of whole 16
bytes, are in hardware on sm_90 and later alone, and their interface differs from one Triton to another.

The tile is a function of the shapes and the GPU alone (`config_for`). Nothing is tuned when the kernel is called: that
would make first calls slow, break the capture of CUDA graphs, and let the noise of timings choose another program on
another day. Benchmarks measure every candidate of `CONFIGS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.masked_geglu import CAPABILITY, POINTERS, Grouped, check_runs, gelu, run, stride_of
from bakeout.kernels.reference import check_masked_geglu_linear

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise KernelUnavailable("Triton is not installed: run `pip install triton`, on Linux") from error

_BYTES: Final = 16
# Rows of tiles that are walked together, column by column, so that a weight that L2 holds is read from there by all.
_BAND: Final = 8


@dataclass(frozen=True)
class Config:
    """A tile, and how it is computed.

    Attributes:
        block_m: how many tokens it has; at least 16, and a power of two, as the next two.
        block_n: how many features it has, each of which is two rows of the weight.
        block_k: how many inputs are read at a time.
        num_warps: how many warps compute it.
        num_stages: how many reads of inputs are under way, in Triton's counting.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# The candidates by what multiplies (`unit_for`). Two accumulators are at most 128 registers a thread, which leaves as
# many for addresses, fragments of the inputs and the epilogue.
#
# wgmma, and tcgen05: 64 inputs are rows of 128 bytes, the widest that these read from shared memory without conflicts.
#   128 x 128 has the fewest bytes to read for a product, but fills the registers of a multiprocessor, and nothing is
#   multiplied during its epilogue. Of 128 x 64, with 96 KB, there are two, and one multiplies while the other has its
#   epilogue. 64 x 64 is for few tokens.
# mma: two blocks of at most 48 KB and the 1 KB that each costs, since sm_86, sm_89 and sm_120 have 100 KB.
# fma: fp32. Of four warps some of Triton's versions spill the tile of 64 x 64; of eight none does.
# unaligned: rows that do not start at whole 16 bytes go through registers, element by element.
CONFIGS: Final[Mapping[str, tuple[Config, ...]]] = {
    "wgmma": (
        Config(128, 128, 64, 8, 4),
        Config(128, 64, 64, 4, 3),
        Config(64, 64, 64, 4, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 8, 3),
        Config(64, 128, 32, 4, 5),
    ),
    "mma": (
        Config(128, 64, 32, 4, 4),
        Config(64, 64, 32, 4, 4),
        Config(128, 64, 32, 4, 3),
        Config(128, 64, 32, 8, 4),
        Config(128, 64, 64, 8, 3),
        Config(64, 64, 64, 4, 3),
    ),
    "fma": (Config(64, 64, 32, 8, 3), Config(64, 32, 32, 4, 3), Config(64, 64, 16, 8, 3)),
    "unaligned": (Config(64, 64, 32, 8, 2), Config(32, 32, 32, 4, 2)),
}

_UNSPECIALIZED = [
    "mask", "batches", "tokens", "width", "inputs", "x_batch", "x_token", "weight_row", "mask_token", "value_token",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)  # type: ignore[untyped-decorator, unused-ignore]
def masked_geglu_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor | None,
    mask: tl.tensor,
    value: tl.tensor,
    batches: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    inputs: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    weight_row: tl.tensor,
    mask_token: tl.tensor,
    value_token: tl.tensor,
    out: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """`bakeout.kernels.reference.masked_geglu_linear` of [batches, tokens, inputs GROUP], into a contiguous `out`.

    Sizes and strides of floats are in groups of GROUP: width, inputs, x_batch, x_token, weight_row and value_token. The
    mask is words of WORD features each, from the lowest bit, BITS bits a feature, the lowest of which counts;
    mask_token is its stride, in words. The strides of mask and value are 0 where all tokens share them. EVEN_N and
    EVEN_K say that the blocks divide the features and the inputs.
    """
    row_tiles = (tokens - 1) // BLOCK_M + 1
    band = BAND * ((width * GROUP - 1) // BLOCK_N + 1)
    above = tl.program_id(0) // band * BAND
    height = tl.minimum(batches * row_tiles - above, BAND)
    row_tile = above + tl.program_id(0) % band % height
    column_tile = tl.program_id(0) % band // height
    batch = (row_tile // row_tiles).to(tl.int64)
    first = row_tile % row_tiles * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    unit = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Past the last token and feature the last ones are read again: no mask is needed, and nothing of them is stored.
    there = tl.minimum(row, tokens - first - 1).to(tl.int64)
    if not EVEN_N:
        unit = tl.minimum(unit, width * GROUP - 1)
    x += (batch * x_batch + first.to(tl.int64) * x_token) * GROUP
    x_at = x + (there * x_token)[:, None] * GROUP + k[None, :]
    a_at = weight + (unit.to(tl.int64) * weight_row)[None, :] * GROUP + k[:, None]
    g_at = a_at + width.to(tl.int64) * weight_row * GROUP * GROUP

    # The bias goes in first: in the epilogue its registers would be too many.
    a = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    g = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if bias is not None:
        a += tl.load(bias + unit).to(tl.float32)[None, :]
        g += tl.load(bias + width * GROUP + unit).to(tl.float32)[None, :]
    for start in range(0, inputs * GROUP, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_at)
            a_tile = tl.load(a_at)
            g_tile = tl.load(g_at)
        else:
            inside_k = k < inputs * GROUP - start
            x_tile = tl.load(x_at, mask=inside_k[None, :], other=0.0)
            a_tile = tl.load(a_at, mask=inside_k[:, None], other=0.0)
            g_tile = tl.load(g_at, mask=inside_k[:, None], other=0.0)
        # The default would round fp32 to the 10 bits of tf32, which PyTorch's own Linear does not.
        a = tl.dot(x_tile, a_tile, a, input_precision="ieee")
        g = tl.dot(x_tile, g_tile, g, input_precision="ieee")
        x_at += BLOCK_K
        a_at += BLOCK_K
        g_at += BLOCK_K

    # With an axis for groups, the compiler chooses where the patch is: after the result is brought into rows for its
    # stores of 16 bytes. Without, it brings the mask and the values into the layout of the accumulators instead.
    result = tl.reshape((a * gelu(g)).to(value.dtype.element_ty), (BLOCK_M, BLOCK_N // GROUP, GROUP))
    group = column_tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    inside = (row < tokens - first)[:, None]
    if not EVEN_N:
        inside = inside & (group < width)[None, :]
    token = first.to(tl.int64) + row
    share: tl.constexpr = WORD // GROUP if WORD > GROUP else 1
    word = tl.load(mask + (token * mask_token)[:, None] + (group // share)[None, :], mask=inside, other=0)
    if share > 1:
        word = (word >> (group % share * GROUP * BITS)[None, :]) & ((1 << GROUP * BITS) - 1)
    lane = tl.arange(0, GROUP)[None, None, :]
    feature = group[None, :, None] * GROUP + lane
    v_at = value + (token * value_token)[:, None, None] * GROUP + feature
    v = tl.load(v_at, mask=(inside & (word != 0))[:, :, None])
    is_set = (word[:, :, None] >> (lane * BITS)) & 1 != 0
    out_at = out + ((batch * tokens + token) * width)[:, None, None] * GROUP + feature
    tl.store(out_at, tl.where(is_set, v, result), mask=inside[:, :, None])


@dataclass(frozen=True)
class Variant(Grouped):
    """What one compilation of the kernel is for.

    Attributes:
        config: its tile.
        dtype: fp16, bf16 or fp32.
        packed: whether the mask is packed, and not bool.
        aligned: whether every row of floats, and of a mask that is not packed, starts at a multiple of a group: 16
            bytes of floats, and as many features of the mask.
        biased: whether there is a bias.
        even_n: whether the tile's width divides the features.
        even_k: whether what is read at a time divides the inputs.
    """

    config: Config
    dtype: torch.dtype
    packed: bool
    aligned: bool
    biased: bool
    even_n: bool
    even_k: bool

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's constants, by name."""
        config = self.config
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BAND": _BAND}
        word, bits = (8, 1) if self.packed else (self.group, 8)
        mask = {"GROUP": self.group, "WORD": word, "BITS": bits}
        return {**blocks, "EVEN_N": self.even_n, "EVEN_K": self.even_k, **mask}

    @property
    def signature(self) -> dict[str, str]:
        """The type of every argument of the kernel, by name, in their order. A bias that is not there is a constant."""
        types = dict.fromkeys(("x", "weight", "bias", "value", "out"), POINTERS[self.dtype])
        types |= {"mask": POINTERS[self.word]} | dict.fromkeys(self.constants, "constexpr")
        types |= {} if self.biased else {"bias": "constexpr"}
        return {name: types.get(name, "i32") for name in masked_geglu_linear_kernel.arg_names}

    @property
    def divisors(self) -> dict[str, int]:
        """By what the addresses of some arguments are divisible, in bytes."""
        floats = ("x", "weight", *(("bias",) if self.biased else ()), "value", "out")
        return dict.fromkeys(floats, _BYTES) if self.aligned else {}


@dataclass(frozen=True)
class Launch:
    """How the kernel is called for tensors of some shapes and strides.

    Attributes:
        variant: what is compiled.
        batches: how many there are; 1 where the rows of all have one stride and need no mask of their own.
        tokens: how many a batch has.
        width: how many features there are, in groups; h.
        inputs: how many inputs there are, in groups; d.
        x_batch: stride of x in groups, as the next.
        x_token: stride.
        weight_row: stride of the weight in groups.
        mask_token: stride of the mask in words; 0 where it is the same for every token.
        value_token: stride of the values in groups; 0 as the mask's.
    """

    variant: Variant
    batches: int
    tokens: int
    width: int
    inputs: int
    x_batch: int
    x_token: int
    weight_row: int
    mask_token: int
    value_token: int

    @property
    def grid(self) -> tuple[int]:
        """How many programs there are: one a tile."""
        return (_tiles(self.variant.config, self.batches, self.tokens, self.width * self.variant.group),)

    @property
    def integers(self) -> tuple[int, ...]:
        """The kernel's arguments between the value and the result."""
        sizes = (self.batches, self.tokens, self.width, self.inputs)
        return (*sizes, self.x_batch, self.x_token, self.weight_row, self.mask_token, self.value_token)


def launch_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    value: Tensor,
    capability: tuple[int, int],
    multiprocessors: int,
    config: Config | None = None,
) -> Launch:
    """How the kernel is called for these. Of their shapes, strides, dtypes and addresses, and of the GPU.

    Args:
        x: [batches, tokens, d], of fp16, bf16 or fp32. In it, and in the others, a row's elements are adjacent.
        weight: as the definition has it.
        bias: as the definition has it.
        mask: as the definition has it, for `tokens` tokens.
        value: as the definition has it.
        capability: the GPU's compute capability.
        multiprocessors: how many it has.
        config: the tile; without one, that of `config_for`.
    """
    (batches, tokens, inputs), width = x.shape, value.shape[-1]
    x_batch, x_token, weight_row = stride_of(x, 0), stride_of(x, 1), stride_of(weight, 0)
    mask_token, value_token = (stride_of(it, 0) if it.ndim == 2 else 0 for it in (mask, value))
    if mask_token == value_token == 0 and (tokens == 1 or x_batch == tokens * x_token):
        batches, tokens, x_batch, x_token = 1, batches * tokens, 0, x_token if tokens > 1 else x_batch

    packed = mask.dtype == torch.uint8
    group = _BYTES // x.dtype.itemsize
    floats = (x, weight, value) if bias is None else (x, weight, value, bias)
    aligned = (
        not any(size % group for size in (width, inputs, x_batch, x_token, weight_row, value_token))
        and not any(it.data_ptr() % _BYTES for it in floats)
        and (packed or not any(size % group for size in (mask.data_ptr(), *mask.stride()[:-1])))
    )
    unit = unit_for(capability, x.dtype, aligned)
    config = config or config_for(unit, multiprocessors, batches, tokens, width, inputs * x.dtype.itemsize)
    even = width % config.block_n == 0, inputs % config.block_k == 0
    variant = Variant(config, x.dtype, packed, aligned, bias is not None, *even)
    group, word = variant.group, variant.word.itemsize
    return Launch(
        variant, batches, tokens, width // group, inputs // group, x_batch // group, x_token // group,
        weight_row // group, mask_token // word, value_token // group,
    )  # fmt: skip


def unit_for(capability: tuple[int, int], dtype: torch.dtype, aligned: bool) -> str:
    """What multiplies, the key of `CONFIGS`, on a GPU of a compute capability."""
    if not aligned:
        return "unaligned"
    if dtype == torch.float32:
        return "fma"
    # 9.0 has wgmma, 10.x and 11.x have tcgen05, and 12.x has neither.
    return "wgmma" if 9 <= capability[0] < 12 else "mma"


def config_for(unit: str, multiprocessors: int, batches: int, tokens: int, width: int, row_bytes: int) -> Config:
    """The configuration of `CONFIGS` with the fewest `clocks`; of equal ones the first.

    Args:
        unit: what multiplies.
        multiprocessors: as `clocks` has it, and the rest.
        batches: how many there are.
        tokens: how many a batch has.
        width: how many features there are.
        row_bytes: how many bytes a row of x has.
    """
    return min(CONFIGS[unit], key=lambda it: clocks(it, multiprocessors, batches, tokens, width, row_bytes))


def clocks(config: Config, multiprocessors: int, batches: int, tokens: int, width: int, row_bytes: int) -> float:
    """The clocks that a launch takes, in a model of three numbers.

    A multiprocessor takes ⌈tiles / multiprocessors⌉ of them. Each reads its rows of x and of both halves of the weight,
    27 bytes a clock, about what L2 gives to each when all read: 6 TB/s of an H100 at 1.7 GHz. Its epilogue, 24
    instructions an element, 128 a clock, is hidden behind the products of another block, unless its accumulators take
    half of the 64 Ki registers, so that there is no other.

    Args:
        config: the tile.
        multiprocessors: how many the GPU has.
        batches: how many there are.
        tokens: how many a batch has.
        width: how many features there are; h.
        row_bytes: how many bytes a row of x has.
    """
    area = config.block_m * config.block_n
    reading = (config.block_m + 2 * config.block_n) * row_bytes / 27
    epilogue = area * 24 / 128 if 2 * area >= 64 * 1024 // 2 else 0
    return math.ceil(_tiles(config, batches, tokens, width) / multiprocessors) * (reading + epilogue)


def masked_geglu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, value: Tensor, *, config: Config | None = None
) -> Tensor:
    """`bakeout.kernels.reference.masked_geglu_linear`, in fp16, bf16 or fp32, in one kernel; contiguous.

    Sums, GELU and product are in fp32, and rounded once; inputs of fp32 are not rounded to tf32. Rows may have any
    strides. What is copied first: a tensor whose rows are not of adjacent elements, and an x whose leading dimensions
    are not one with one stride.

    Args:
        x: as the definition has it, and the next four.
        weight: W.
        bias: b.
        mask: M.
        value: v.
        config: the tile, for those who measure; without one, that of `config_for`.

    Raises:
        KernelUnavailable: as `check_runs` raises it.
        TypeError, ValueError: as the definition raises them.
    """
    check_masked_geglu_linear(x, weight, bias, mask, value)
    check_runs(masked_geglu_linear_kernel, x, weight, mask, value, *(() if bias is None else (bias,)))
    out = torch.empty((*x.shape[:-1], value.shape[-1]), dtype=x.dtype, device=x.device)
    if out.numel():
        x, weight, mask, value = (it if it.stride(-1) == 1 else it.contiguous() for it in (x, weight, mask, value))
        bias = None if bias is None else bias.contiguous()
        *batches, tokens, inputs = (1, *x.shape)
        x = x.reshape(math.prod(batches), tokens, inputs)
        launch = launch_of(x, weight, bias, mask, value, *_gpu(x.device), config)
        variant = launch.variant
        arguments = (x, weight, bias, mask.view(variant.word), value, *launch.integers, out)
        run(masked_geglu_linear_kernel, launch.grid, arguments, variant.constants, variant.config.options)
    return out


def _tiles(config: Config, batches: int, tokens: int, width: int) -> int:
    return batches * math.ceil(tokens / config.block_m) * math.ceil(width / config.block_n)


@functools.cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Its compute capability, and how many multiprocessors it has. The interpreter is the least of all GPUs."""
    if device.type != "cuda":
        return CAPABILITY, 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
