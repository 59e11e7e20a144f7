"""`masked_geglu` in Triton: one pass over memory, 16 bytes a thread.

A program has BLOCK features of ROWS tokens; a thread has one group of GROUP features of one token, 16 bytes. It reads
the group in both halves of the projection and the word of the mask that has it; the values only where the mask has a
bit of the group. One group a thread, with all 2048 threads of a multiprocessor, keeps more bytes in flight than memory
needs; given two, the assembler reads the second after it has computed the first.

Where rows do not start at multiples of 16 bytes, a group is one feature and the same kernel is slower.
"""

from __future__ import annotations

import functools
import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.reference import check_masked_geglu

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise KernelUnavailable("Triton is not installed: run `pip install triton`, on Linux") from error

# The pointer type of each dtype.
POINTERS: Final[Mapping[torch.dtype, str]] = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
# The first with bf16, and with a maximum that keeps NaN.
CAPABILITY: Final = (8, 0)
OPTIONS: Final[Mapping[str, Any]] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
_THREADS: Final = 32 * OPTIONS["num_warps"]
_BYTES: Final = 16
# Of one token: 512 adjacent bytes in fp16, for a warp. The FFNs of Stable Diffusion have multiples of it.
_FEATURES: Final = 256
_GRID_LIMIT: Final = 65535


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def gelu(g: tl.tensor) -> tl.tensor:
    """The GELU of fp32, g (1 + erf(g / √2)) / 2, with an error of at most 2⁻²² |g|.

    It is computed as max(g, 0) - |g| erfc(|g| / √2) / 2. The logarithm of the last factor, to the base 2, is smooth: a
    polynomial of degree 10 here, fitted on [0, 5.6] for the least |error| / (1 + |logarithm|)², which is 4.3e-9. From
    there on, where the factor is below 2⁻²⁶, it falls faster. The error is at most 1.6 2⁻²⁴ |g|, and that of the GPU's
    power of two. That of the formula with erf, in fp32, is up to 5.9 2⁻²⁴ |g|.
    """
    # At infinity the product would be NaN.
    x = tl.minimum(tl.abs(g), 14.0)
    power = -2.8286632812112097e-08 * x + 8.355015221976057e-07
    power = power * x - 1.0623505519263797e-05
    power = power * x + 7.395667726887855e-05
    power = power * x - 0.0002695751533400262
    power = power * x - 2.3314559849368905e-05
    power = power * x + 0.006977189897350794
    power = power * x - 0.05246202642201864
    power = power * x - 0.4592143040038446
    power = power * x - 1.1511048584704582
    power = power * x - 1.0
    return tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL) - x * tl.exp2(power)


# Specialized on the alignment of the floats' pointers alone; what else is known of alignment is in the constants.
_UNSPECIALIZED: Final = ("mask", "batches", "tokens", "proj_batch", "proj_token", "mask_token", "value_token")


@triton.jit(do_not_specialize=_UNSPECIALIZED)  # type: ignore[untyped-decorator, unused-ignore]
def masked_geglu_kernel(
    proj: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    batches: tl.tensor,
    tokens: tl.tensor,
    proj_batch: tl.tensor,
    proj_token: tl.tensor,
    mask_token: tl.tensor,
    value_token: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """`bakeout.kernels.reference.masked_geglu` of [batches, tokens, 2 WIDTH], into a contiguous `out`.

    The floats are read in groups of GROUP features, in which their strides count: proj_batch, proj_token, value_token.
    WIDTH is a multiple of GROUP. The mask is words of WORD features, from the lowest bit, one bit each; or one byte,
    where GATHER is not 0: multiplying by it makes them bits of the word's highest byte. mask_token is its stride, in
    words. Strides of 0 share the mask and the values among all tokens. A program has BLOCK features of ROWS tokens.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    batch = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    token = ((tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    feature = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (token < tokens) & (feature < WIDTH) & (batch < batches)

    at = proj + (batch * proj_batch + token * proj_token) * GROUP + feature
    a = tl.load(at, mask=inside)
    g = tl.load(at + WIDTH, mask=inside).to(tl.float32)
    word = tl.load(mask + token * mask_token + feature // WORD, mask=inside, other=0)
    if GATHER:
        word = (word * GATHER >> 8 * (WORD - 1)).to(tl.uint8)
    group = word >> feature // GROUP * GROUP % WORD & ((1 << GROUP) - 1)
    v = tl.load(value + token * value_token * GROUP + feature, mask=inside & (group != 0))
    result = (a.to(tl.float32) * gelu(g)).to(a.dtype)
    is_set = word >> feature % WORD & 1 != 0
    tl.store(out + (batch * tokens + token) * WIDTH + feature, tl.where(is_set, v, result), mask=inside)


class Grouped:
    """What is read and written at once.

    Attributes:
        dtype: of the floats.
        packed: whether the mask is packed, and not bool.
        aligned: whether rows start at multiples of a group.
    """

    dtype: torch.dtype
    packed: bool
    aligned: bool

    @property
    def group(self) -> int:
        """How many features a thread reads or writes at once."""
        return _BYTES // self.dtype.itemsize if self.aligned else 1

    @property
    def word(self) -> torch.dtype:
        """The integers as which the mask is read: of bool, as many bytes as a group has features."""
        return torch.uint8 if self.packed else {1: torch.uint8, 4: torch.int32, 8: torch.int64}[self.group]


@dataclass(frozen=True)
class Variant(Grouped):
    """What one compilation of the kernel is for.

    Attributes:
        width: how many features there are; h.
        dtype: one of `DTYPES`.
        packed: whether the mask is packed, and not bool.
        aligned: whether every row of the projection and of the values, both halves, and of a mask that is not packed
            starts at a multiple of a group: 16 bytes of floats, and as many features of the mask.
    """

    width: int
    dtype: torch.dtype
    packed: bool
    aligned: bool

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's constants, by name."""
        block = max(triton.next_power_of_2(min(self.width, _FEATURES)), self.group)
        rows = max(1, _THREADS * _BYTES // self.dtype.itemsize // block)
        word, gather = 8, 0
        if not self.packed:
            # Byte i of a word, at bit 8i, goes to bit i of the highest byte; no two of the products meet.
            word, gather = self.group, sum(1 << 8 * (self.group - 1) - 7 * i for i in range(self.group))
        return {"WIDTH": self.width, "BLOCK": block, "ROWS": rows, "GROUP": self.group, "WORD": word, "GATHER": gather}

    @property
    def signature(self) -> dict[str, str]:
        """The type of every argument of the kernel, by name, in their order."""
        types = dict.fromkeys(("proj", "value", "out"), POINTERS[self.dtype]) | {"mask": POINTERS[self.word]}
        types |= dict.fromkeys(self.constants, "constexpr")
        return {name: types.get(name, "i32") for name in masked_geglu_kernel.arg_names}

    @property
    def divisors(self) -> dict[str, int]:
        """By what the addresses of some arguments are divisible, in bytes."""
        return dict.fromkeys(("proj", "value", "out"), _BYTES) if self.aligned else {}

    def grid(self, batches: int, tokens: int) -> tuple[int, int, int]:
        """How many programs there are along each axis: blocks of rows and features; batches; more batches."""
        constants = self.constants
        blocks = _blocks(self.width, constants["BLOCK"]) * _blocks(tokens, constants["ROWS"])
        layers = _blocks(batches, _GRID_LIMIT)
        return blocks, _blocks(batches, layers), layers


@dataclass(frozen=True)
class Launch:
    """How the kernel is called for tensors of some shapes and strides.

    Attributes:
        variant: what is compiled.
        batches: how many there are; 1 where the rows of all have one stride and need no mask of their own.
        tokens: how many a batch has.
        proj_batch: stride of the projection in groups, as the next.
        proj_token: stride.
        mask_token: stride of the mask in words; 0 where it is the same for every token.
        value_token: stride of the values in groups; 0 as the mask's.
    """

    variant: Variant
    batches: int
    tokens: int
    proj_batch: int
    proj_token: int
    mask_token: int
    value_token: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """How many programs there are along each axis."""
        return self.variant.grid(self.batches, self.tokens)

    @property
    def integers(self) -> tuple[int, ...]:
        """The kernel's arguments between the value and the result."""
        return (self.batches, self.tokens, self.proj_batch, self.proj_token, self.mask_token, self.value_token)


def launch_of(proj: Tensor, mask: Tensor, value: Tensor) -> Launch:
    """How the kernel is called for these. Of their shapes, strides, dtypes and addresses.

    Args:
        proj: [batches, tokens, 2h], of a dtype of `DTYPES`. In it, and in the others, a row's elements are adjacent.
        mask: as the definition has it, for `tokens` tokens.
        value: as the definition has it.
    """
    width, packed = value.shape[-1], mask.dtype == torch.uint8
    (batches, proj_batch), (tokens, proj_token) = ((proj.shape[axis], stride_of(proj, axis)) for axis in (0, 1))
    mask_token, value_token = (stride_of(it, 0) if it.ndim == 2 else 0 for it in (mask, value))
    if mask_token == value_token == 0 and (tokens == 1 or proj_batch == tokens * proj_token):
        batches, tokens, proj_batch, proj_token = 1, batches * tokens, 0, proj_token if tokens > 1 else proj_batch

    group = _BYTES // proj.dtype.itemsize
    aligned = (
        not any(size % group for size in (width, proj_batch, proj_token, value_token))
        and not any(it.data_ptr() % _BYTES for it in (proj, value))
        and (packed or not any(size % group for size in (mask.data_ptr(), *mask.stride()[:-1])))
    )
    variant = Variant(width, proj.dtype, packed, aligned)
    group, word = variant.group, variant.word.itemsize
    return Launch(
        variant, batches, tokens, proj_batch // group, proj_token // group, mask_token // word, value_token // group
    )


def masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """`bakeout.kernels.reference.masked_geglu`, in fp16, bf16 or fp32, in one pass over memory; contiguous.

    Rows may have any strides. What is copied first: a tensor whose rows are not of adjacent elements, and a projection
    whose leading dimensions are not one with one stride.

    Raises:
        KernelUnavailable: as `check_runs` raises it.
        TypeError, ValueError: as the definition raises them.
    """
    check_masked_geglu(proj, mask, value)
    check_runs(masked_geglu_kernel, proj, mask, value)
    out = torch.empty((*proj.shape[:-1], value.shape[-1]), dtype=proj.dtype, device=proj.device)
    if out.numel():
        proj, mask, value = (it if it.stride(-1) == 1 else it.contiguous() for it in (proj, mask, value))
        *batches, tokens, _ = (1, *proj.shape)
        proj = proj.reshape(math.prod(batches), tokens, -1)
        launch = launch_of(proj, mask, value)
        arguments = (proj, mask.view(launch.variant.word), value, *launch.integers, out)
        run(masked_geglu_kernel, launch.grid, arguments, launch.variant.constants)
    return out


def check_runs(kernel: object, *tensors: Tensor) -> None:
    """Refuse tensors on which a Triton kernel does not run: on one NVIDIA GPU, or on a CPU while it is interpreted.

    Args:
        kernel: what triton.jit made of it.
        tensors: its arguments; of the first is the dtype.

    Raises:
        KernelUnavailable: a tensor is not where the kernel runs, the dtype is not of `DTYPES`, or the GPU is too old.
    """
    first = tensors[0]
    if first.dtype not in DTYPES:
        raise KernelUnavailable(f"the Triton kernels know fp16, bf16 and fp32, not {first.dtype}: cast it")
    if not isinstance(kernel, triton.runtime.JITFunction):
        return
    elsewhere = {str(it.device) for it in tensors if not it.is_cuda or it.device != first.device}
    if elsewhere:
        raise KernelUnavailable(
            f"Triton runs on one NVIDIA GPU, which is not where all tensors are ({', '.join(sorted(elsewhere))}): move "
            "them, or take the kernel 'reference'"
        )
    if _capability(first.device) < CAPABILITY:
        raise KernelUnavailable(
            f"the Triton kernels need a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or later: take the "
            "kernel 'reference'"
        )


def run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    options: Mapping[str, Any] = OPTIONS,
) -> None:
    """Launch a Triton kernel on the device of the first argument and its current stream.

    Raises:
        KernelUnavailable: Triton cannot build its launcher.
    """
    try:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            kernel[grid](*arguments, **constants, **options)
    except RuntimeError as error:
        if "C compiler" in str(error):
            raise KernelUnavailable("Triton needs a C compiler: install gcc or clang, or name one in CC") from error
        raise
    except subprocess.CalledProcessError as error:
        raise KernelUnavailable(
            f"the C compiler {error.cmd[0]} cannot build Triton's launcher: install Python's headers, or name another "
            "compiler in CC"
        ) from error


def _blocks(size: int, block: int) -> int:
    # triton.cdiv takes microseconds, of each call.
    return -(-size // block)


def stride_of(tensor: Tensor, axis: int) -> int:
    """The stride of an axis; 0 of one element, which has no next."""
    return tensor.stride(axis) if tensor.shape[axis] > 1 else 0


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
