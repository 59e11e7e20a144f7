"""What the compilers make of the fused kernels for each GPU, read off the machine code; no GPU is needed.

    python benchmarks/machine_code.py

All in fp16, with a packed mask, aligned; `masked_geglu_linear` with the tiles that it takes at the shapes of the other
benchmarks. Registers are a thread's, and local memory is what spills go to. Loads and stores are those of global
memory, by their widths, 128 bits being 16 bytes; those that go to shared memory without a register are the loads of
the products. The instructions are the whole program's, whether a thread gets to all of them or not. What matters of it
is asserted in tests/kernels/.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from budget import SHAPES
from kernel_versions import in_words
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bakeout.kernels import build, masked_geglu, masked_geglu_linear

# Compute capability → the multiprocessors of its largest GPU that is sold for servers, which decide on the tiles.
GPUS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148}
HEAD = """\
| kernel | GPU | registers | shared, bytes | local memory | loads | loads to shared | stores | products | instructions |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: of a thread.
        local: bytes of a thread's stack and local memory, and instructions that reach it.
        accesses: (kind, bits) → how many there are, of LDG, LDGSTS and STG.
        products: the instructions of the tensor cores.
        instructions: how many there are.
    """

    registers: int
    local: int
    accesses: Counter[tuple[str, int]]
    products: set[str]
    instructions: int

    def of(self, kind: str) -> str:
        """The accesses of a kind, in words."""
        return ", ".join(f"{count} of {bits}" for (name, bits), count in sorted(self.accesses.items()) if name == kind)


def code_of(listing: str) -> Code:
    """One function of what `cuobjdump -sass -res-usage` lists."""
    resources = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", listing)}
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing, re.MULTILINE)
    kinds = [it.split(".") for it in names]
    return Code(
        registers=resources["REG"],
        local=resources["STACK"] + resources["LOCAL"] + sum(kind in ("LDL", "STL") for kind, *_ in kinds),
        accesses=Counter((kind, _bits(rest)) for kind, *rest in kinds if kind in ("LDG", "LDGSTS", "STG")),
        products={kind for kind, *_ in kinds if kind.endswith("MMA")},
        instructions=sum(kind != "NOP" for kind, *_ in kinds),
    )


def by_triton(kernel: Any, variant: Any, options: Mapping[str, Any], capability: int) -> tuple[Code, int]:
    """What Triton makes of a kernel as its launcher has it compiled, and the bytes of shared memory that it takes."""
    divisors = {(kernel.arg_names.index(name),): [["tt.divisibility", by]] for name, by in variant.divisors.items()}
    source = ASTSource(kernel, variant.signature, constexprs=variant.constants, attrs=divisors)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return code_of(cuobjdump("-sass", "-res-usage", file.name)), made.metadata.shared


def by_nvcc(capability: int) -> Code:
    """What nvcc makes of `masked_geglu` in fp16, for aligned rows and a packed mask."""
    listing = cuobjdump("-sass", "-res-usage", "-arch", f"sm_{capability}", str(build.library("cuda")))
    parts = re.split(r"^(?=\s*Function )", listing, flags=re.MULTILINE)
    (usage,), (instructions,) = (
        [it for it in parts if re.match(rf"\s*Function {mark}\S*masked_geglu\S*4HalfLi8ELb1E", it)]
        for mark in ("(?!:)", ": ")
    )
    return code_of(usage + instructions)


def cuobjdump(*arguments: str) -> str:
    """What the program of Triton's package prints."""
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - Triton's own


def rows() -> Iterator[str]:
    """The lines of the table."""
    triton_s = masked_geglu.Variant(1280, torch.float16, packed=True, aligned=True)
    for capability in GPUS:
        yield _line("masked_geglu, Triton", capability, *by_triton(
            masked_geglu.masked_geglu_kernel, triton_s, masked_geglu.OPTIONS, capability
        ))  # fmt: skip
    for capability in GPUS:
        yield _line("masked_geglu, CUDA C++", capability, by_nvcc(capability), 0)
    for capability, multiprocessors in GPUS.items():
        for config in tiles(capability, multiprocessors):
            variant = masked_geglu_linear.Variant(config, torch.float16, True, True, True, True, True)
            name = f"masked_geglu_linear, {in_words(config)}"
            kernel = masked_geglu_linear.masked_geglu_linear_kernel
            yield _line(name, capability, *by_triton(kernel, variant, config.options, capability))


def tiles(capability: int, multiprocessors: int) -> list[masked_geglu_linear.Config]:
    """The configurations that are taken at the shapes of SD 1.5 and SDXL, in fp16."""
    unit = masked_geglu_linear.unit_for(divmod(capability, 10), torch.float16, aligned=True)
    chosen = (
        masked_geglu_linear.config_for(unit, multiprocessors, it.batch, it.tokens, it.h, 2 * it.d) for it in SHAPES
    )
    return list(dict.fromkeys(chosen))


def _line(name: str, capability: int, code: Code, shared: int) -> str:
    cells = (
        name,
        f"sm_{capability}",
        code.registers,
        shared,
        code.local,
        *map(code.of, ("LDG", "LDGSTS", "STG")),
        ", ".join(sorted(code.products)),
        code.instructions,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _bits(suffixes: list[str]) -> int:
    """The width that an opcode's suffixes say: a number, or U8 and the like; 32 where they say none."""
    return next((int(it.lstrip("US")) for it in suffixes if it.lstrip("US") in ("8", "16", "64", "128")), 32)


if __name__ == "__main__":
    print(HEAD)
    for line in rows():
        print(line, flush=True)
