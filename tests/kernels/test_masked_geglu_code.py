"""`masked_geglu` in Triton, compiled ahead of time: what each architecture's machine code reads, writes and takes."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bakeout.kernels.packing import pack_mask

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("bakeout.kernels.masked_geglu")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource


@dataclass(frozen=True)
class Code:
    """What the compiler made for one architecture.

    Attributes:
        parameters: the types of the entry's parameters, of the PTX.
        loads: the widths in bits of the loads from global memory, in their order, of the machine code, as the others.
        stores: the widths in bits of the stores to global memory.
        loads_first: how many of the loads come before the first power of two, which is in the GELU.
        registers: of a thread.
        shared: bytes of shared memory.
        local: instructions and bytes that reach local memory: spills.
        instructions: how many there are.
        cubin: all of it.
    """

    parameters: list[str]
    loads: list[int]
    stores: list[int]
    loads_first: int
    registers: int
    shared: int
    local: int
    instructions: int
    cubin: bytes


def shown(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def width(opcode: str) -> int:
    """In bits, of an access to memory: LDG.E.128, LDG.E.U8, LDG.E."""
    return next(int(bits) for bits in (*re.findall(r"\d+", opcode), "32"))


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> Callable[..., Code]:
    """Compiles a variant as the launcher has it compiled, for an architecture, and reads the machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def compile_for(capability: int, variant: kernels.Variant) -> Code:
        kernel = kernels.masked_geglu_kernel
        place = kernel.arg_names.index
        divisors = {(place(name),): [["tt.divisibility", by]] for name, by in variant.divisors.items()}
        source = ASTSource(kernel, variant.signature, constexprs=variant.constants, attrs=divisors)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(kernels.OPTIONS))
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        tools = triton.knobs.nvidia
        usage = shown(tools.cuobjdump.path, "-res-usage", cubin)
        listing = shown(tools.nvdisasm.path, "-c", cubin)
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", listing, re.MULTILINE)
        powers = [number for number, opcode in enumerate(opcodes) if opcode == "MUFU.EX2"]
        assert len(powers) == 16 // variant.dtype.itemsize
        # A NaN stays one: the interpreter's maximum keeps it in any case.
        assert opcodes.count("FMNMX.NAN") == len(powers)
        loads = [(number, width(opcode)) for number, opcode in enumerate(opcodes) if opcode.startswith("LDG")]
        return Code(
            parameters=re.findall(r"\.param \.(\w+)", made.asm["ptx"].split(".entry")[1].split(")")[0]),
            loads=[bits for _, bits in loads],
            stores=[width(opcode) for opcode in opcodes if opcode.startswith("STG")],
            loads_first=sum(number < powers[0] for number, _ in loads),
            registers=int(re.search(r"REG:(\d+)", usage)[1]),
            shared=made.metadata.shared,
            local=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
            + sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
            instructions=sum(opcode != "NOP" for opcode in opcodes),
            cubin=made.asm["cubin"],
        )

    return compile_for


ARCHITECTURES = (80, 86, 89, 90, 100)
COMPILED = [
    *((it, dtype, True) for it in ARCHITECTURES for dtype in (torch.float16, torch.float32)),
    (90, torch.bfloat16, True), (90, torch.float16, False), (90, torch.float32, False),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "dtype", "packed"), COMPILED)
def test_a_thread_reads_and_writes_16_bytes_at_once(capability, dtype, packed, compiled):
    code = compiled(capability, kernels.Variant(1280, dtype, packed, aligned=True))
    group = 16 // dtype.itemsize
    # Both halves and the values; the mask once a group, not once a feature.
    assert sorted(code.loads) == [8 if packed else 8 * group, 128, 128, 128]
    assert code.stores == [128]
    # No load waits for the arithmetic of another.
    assert code.loads_first == 4
    assert code.local == code.shared == 0
    # 65536 registers, for 2048 threads; 86 and 89 have 1536.
    assert code.registers <= (40 if capability in (86, 89) else 32)
    # What docs/kernels.md counts with.
    assert code.instructions <= (33 if group == 8 else 38) * group
    pointer, integer = "u64", "u32"
    # The last two are Triton's own: scratch memory for the launch, and for a profiler.
    assert code.parameters == [*[pointer] * 3, *[integer] * 6, pointer, pointer, pointer]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_that_are_not_aligned_are_not_read_so(packed, compiled):
    variant = kernels.Variant(1280, torch.float16, packed, aligned=False)
    code = compiled(90, variant)
    assert set(code.loads) == {8, 16}
    assert set(code.stores) == {16}
    assert code.local == code.shared == 0


class Driver:
    """Of a GPU of which only the architecture is known: as much as compiling for it takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[bytes]]:
    """The machine code of what `masked_geglu` launches, on CPU tensors: compiled as for a launch, and not run."""
    made: list[bytes] = []

    def run(kernel, grid, arguments, constants):
        compiled = kernel.warmup(*arguments, **constants, **kernels.OPTIONS, grid=grid)
        made.append(compiled.asm["cubin"])

    kernel = kernels.masked_geglu_kernel
    monkeypatch.setattr(kernels, "run", run)
    monkeypatch.setattr(kernels, "check_runs", lambda *tensors: None)
    # What was compiled for a real device stays out, and what is compiled here does not stay.
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Driver())
    yield made
    driver.set_active(before)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 1280), (torch.float32, 20)])
def test_what_is_launched_is_this_code(dtype, width, packed, compiled, launched):
    # Counts and strides of 1 are what Triton would make constants.
    for batch, tokens, places in ((2, 3, (3, width)), (2, 3, (width,)), (1, 1, (width,)), (32, 1, (1, width))):
        proj, mask = torch.zeros(batch, tokens, 2 * width, dtype=dtype), torch.ones(places, dtype=torch.bool)
        kernels.masked_geglu(proj, pack_mask(mask) if packed else mask, torch.zeros(places, dtype=dtype))
    assert len(launched) == 4
    assert set(launched) == {compiled(90, kernels.Variant(width, dtype, packed, aligned=True)).cubin}
    assert compiled(90, kernels.Variant(width, dtype, not packed, aligned=True)).cubin not in launched
