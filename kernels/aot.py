"""`masked_geglu` compiled ahead of time: PTX, and how a host that launches kernels itself, such as TensorRT, does so.

All tensors are contiguous, and each starts at a multiple of 16 bytes: proj [batches, tokens, 2h], mask bool and value
both [tokens, h] or both [h], out [batches, tokens, h]. The kernel's arguments are, in this order,

    proj, mask, value                                   addresses
    batches, tokens, proj_batch, proj_token,
    mask_token, value_token                             32-bit integers; the last four are strides, in groups
    out                                                 an address

A group is 16 bytes of features where h is a multiple of that, else one feature. Counts are integers, or expressions of
a host's own that become integers when it knows the shapes.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

from bakeout.kernels import build
from bakeout.kernels.errors import KernelUnavailable


class Count(Protocol):
    """An integer, or an expression of one that its host knows how to multiply."""

    def __mul__(self, other: int, /) -> Any: ...


Size = TypeVar("Size", bound=Count)
# Of every parameter the PTX type, by which a launch places it: its size.
SIGNATURE: Final = ("b64",) * 3 + ("b32",) * 6 + ("b64",)
# PTX for an architecture runs on every later one, and this kernel's is as good there as their own. What Triton compiles
# for 9.0 and later is for one architecture alone (sm_90a), in a version of PTX that only the newest drivers know.
_TARGET: Final = build.ARCHITECTURES[0]
# The first that it runs on.
CAPABILITY: Final = divmod(_TARGET, 10)
_PTX_VERSION: Final = 80
_BYTES: Final = 16
_INTEGER: Final = 2**31 - 1
_GRID: Final = (_INTEGER, 65535, 65535)
# As csrc/masked_geglu.cu has them.
_TYPES: Final = {torch.float16: "Half", torch.bfloat16: "Bfloat16", torch.float32: "float"}
_LANES: Final = 32
_WARPS: Final = 4
_ROWS: Final = 2
_ENTRY: Final = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")
_PARAMETER: Final = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(?P<type>[a-z]+\d+)(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?"
    r"\s+(?P<name>[\w$]+)(?P<length>\[\d+\])?"
)
_DEBUG: Final = re.compile(r"^[ \t]*\.(?:(?:loc|file)[ \t][^\n]*|section\s+\.debug_\w+\s*\{[^}]*\})\n?", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """What is compiled.

    Attributes:
        name: of the entry point.
        ptx: whose only entry point takes the parameters of `SIGNATURE`.
        shared: bytes of shared memory that a launch gives.
    """

    name: str
    ptx: str
    shared: int


@dataclass(frozen=True)
class Launch(Generic[Size]):
    """How the kernel is launched for tensors of some shapes.

    Attributes:
        grid: blocks along x, y and z.
        block: threads along x, y and z.
        integers: the arguments between the addresses of the value and the result.
    """

    grid: tuple[Size | int, Size | int, Size | int]
    block: tuple[int, int, int]
    integers: tuple[Size | int, ...]

    def check(self: Launch[int]) -> None:
        """Raise ValueError if a grid or an integer is too large for what it is given as."""
        if any(size > limit for size, limit in zip(self.grid, _GRID, strict=True)) or max(self.integers) > _INTEGER:
            raise ValueError(
                f"a grid of {self.grid} with the integers {self.integers} is beyond what a GPU launches: make the "
                "batch or the pictures smaller"
            )


@dataclass(frozen=True)
class Kernel(ABC):
    """One kernel for tensors of one dtype and width.

    Attributes:
        dtype: of the floats: fp16, bf16 or fp32.
        width: how many features there are; h.
    """

    dtype: torch.dtype
    width: int

    @property
    def group(self) -> int:
        """How many features a thread reads or writes at once."""
        most = _BYTES // self.dtype.itemsize
        return 1 if self.width % most else most

    def launch(
        self, batches: Size, tokens: Size, each_token: bool, ceil_div: Callable[[Size, int], Size]
    ) -> Launch[Size]:
        """How it is launched.

        Args:
            batches: how many there are.
            tokens: how many a batch has.
            each_token: whether mask and value are [tokens, h], and not [h].
            ceil_div: the quotient of a count and an integer, rounded up.
        """
        groups = self.width // self.group
        stride = groups if each_token else 0
        integers = (batches, tokens, tokens * (2 * groups), 2 * groups, stride, stride)
        return Launch(self._grid(batches, tokens, ceil_div), self._block, integers)

    @abstractmethod
    def compile(self) -> Code:
        """The PTX. Raises KernelUnavailable if what compiles it is missing or fails."""

    @property
    @abstractmethod
    def _block(self) -> tuple[int, int, int]: ...

    @abstractmethod
    def _grid(self, batches: Any, tokens: Any, ceil_div: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]: ...


class TritonKernel(Kernel):
    """That of `bakeout.kernels.masked_geglu`."""

    def compile(self) -> Code:
        """As the kernel's launcher has it compiled, but for the architecture."""
        # First, since it says what to do where there is no Triton.
        variant = self._variant
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from bakeout.kernels.masked_geglu import OPTIONS, masked_geglu_kernel

        place = masked_geglu_kernel.arg_names.index
        divisors = {(place(name),): [["tt.divisibility", by]] for name, by in variant.divisors.items()}
        source = ASTSource(masked_geglu_kernel, variant.signature, constexprs=variant.constants, attrs=divisors)
        options = {**OPTIONS, "ptx_version": _PTX_VERSION}
        try:
            made = triton.compile(source, target=GPUTarget("cuda", _TARGET, 32), options=options)
            ptx = without_hidden(without_debug(made.asm["ptx"]))
        except (triton.TritonError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise KernelUnavailable(
                f"Triton {triton.__version__} cannot compile the kernel ({said}); install a version that bakeout names "
                "in its dependencies"
            ) from error
        return _code(ptx, made.metadata.shared)

    @property
    def _variant(self) -> Any:
        from bakeout.kernels.masked_geglu import Variant

        return Variant(self.width, self.dtype, packed=False, aligned=self.group > 1)

    @property
    def _block(self) -> tuple[int, int, int]:
        from bakeout.kernels.masked_geglu import OPTIONS

        return 32 * OPTIONS["num_warps"], 1, 1

    def _grid(self, batches: Any, tokens: Any, ceil_div: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]:
        constants = self._variant.constants
        return ceil_div(tokens, constants["ROWS"]) * _blocks(self.width, constants["BLOCK"]), batches, 1


class CudaKernel(Kernel):
    """That of `csrc/masked_geglu.cu`."""

    def compile(self) -> Code:
        """By nvcc, with the group as a constant; the width is an argument, half the stride of the projection."""
        macros: dict[str, str | int] = {"BAKEOUT_AOT_TYPE": _TYPES[self.dtype], "BAKEOUT_AOT_GROUP": self.group}
        return _code(build.ptx("masked_geglu.cu", macros), 0)

    @property
    def _block(self) -> tuple[int, int, int]:
        return _LANES, _WARPS, 1

    def _grid(self, batches: Any, tokens: Any, ceil_div: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]:
        return _blocks(self.width, _LANES * self.group), ceil_div(tokens, _WARPS * _ROWS), batches


KERNELS: Final[Mapping[str, type[Kernel]]] = {"triton": TritonKernel, "cuda": CudaKernel}


@functools.cache
def compiled(kernel: Kernel) -> Code:
    """`Kernel.compile`, once in a process for each dtype and width."""
    return kernel.compile()


def parameters(ptx: str) -> tuple[str, dict[str, str]]:
    """The name of the only entry point of some PTX, and the type of each of its parameters, by name, in their order.

    A launch places parameters by their sizes, so that u32 and s32 are b32. An array has its length: b8[72].

    Raises:
        ValueError: there is no entry point, there are several, or a parameter cannot be read.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise ValueError(f"the PTX has {len(entries)} entry points, not one")
    found = {}
    for text in filter(str.strip, entries[0]["parameters"].split(",")):
        match = _PARAMETER.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"the parameter {text.strip()!r} of the PTX is not understood")
        found[match["name"]] = re.sub("^[us]", "b", match["type"]) + (match["length"] or "")
    return entries[0]["name"], found


def without_hidden(ptx: str) -> str:
    """The same PTX with only the first parameters, as many as `SIGNATURE` has.

    Triton appends addresses of scratch memory, which its own launcher gives; a host that does not would have them read
    from beyond its arguments. A parameter is read by its name alone (PTX ISA, "Kernel function parameters"): one whose
    name is nowhere else is not read, and the code is the same without it.

    Raises:
        ValueError: as `parameters`; or a parameter that would go is no address, or is read.
    """
    _, found = parameters(ptx)
    names = list(found)
    for name in names[len(SIGNATURE) :]:
        if found[name] != "b64" or len(re.findall(rf"(?<![\w$]){re.escape(name)}(?![\w$])", ptx)) > 1:
            raise ValueError(f"the kernel needs the parameter {name}, which nobody gives it")
    entry = _ENTRY.search(ptx)
    assert entry is not None  # noqa: S101 - `parameters` has found it
    begin, end = entry.span("parameters")
    kept = entry["parameters"].split(",")[: len(SIGNATURE)]
    return f"{ptx[:begin]}{','.join(kept).rstrip()}\n{ptx[end:]}"


def without_debug(ptx: str) -> str:
    """The same PTX without what it says of source files, which are of the machine that compiled it."""
    return _DEBUG.sub("", ptx)


def _code(ptx: str, shared: int) -> Code:
    name, found = parameters(ptx)
    if tuple(found.values()) != SIGNATURE:
        raise KernelUnavailable(
            f"this compiler made a kernel of other parameters ({', '.join(found.values())}): install a version that "
            "bakeout names in its dependencies"
        )
    return Code(name, ptx, shared)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
