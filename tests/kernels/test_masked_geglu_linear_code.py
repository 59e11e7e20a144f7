"""`masked_geglu_linear` in Triton, compiled ahead of time: what each architecture's code computes, reads and takes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bakeout.kernels.errors import KernelUnavailable

kernels = pytest.importorskip("bakeout.kernels.masked_geglu_linear", exc_type=KernelUnavailable)

# Multiprocessors (A100, A40, L40S, H100, B200), and the shared memory of one and of a block on it, in bytes.
GPUS = {
    (8, 0): (108, 164 << 10, 163 << 10), (8, 6): (84, 100 << 10, 99 << 10), (8, 9): (142, 100 << 10, 99 << 10),
    (9, 0): (132, 228 << 10, 227 << 10), (10, 0): (148, 228 << 10, 227 << 10),
}  # fmt: skip
# Tokens and inputs of a UNet's FFNs: Stable Diffusion 1.5 at 512 pixels, and SDXL at 1024.
FFNS = ((4096, 320), (1024, 640), (256, 1280), (64, 1280), (4096, 640), (1024, 1280))
# What the 16-bit products are made of. Triton's wgmma is a warpgroup's, its tcgen05 a thread's, mma a warp's.
PRODUCTS = {"mma": r"mma\.sync\.aligned\.m16n8k16", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma\."}


@dataclass(frozen=True)
class Code:
    """What the compiler made for one architecture.

    Attributes:
        ptx: the assembly.
        loads: the widths in bits of the loads from global memory, of the machine code, as the others.
        stores: the widths in bits of the stores to global memory.
        copies: the widths in bits of the asynchronous copies from global to shared memory.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        local: instructions and bytes that reach local memory: spills.
    """

    ptx: str
    loads: list[int]
    stores: list[int]
    copies: list[int]
    registers: int
    shared: int
    local: int

    def products(self) -> set[str]:
        """Which of `PRODUCTS` there are."""
        return {name for name, pattern in PRODUCTS.items() if re.search(pattern, self.ptx)}


def shown(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> Callable[..., Code]:
    """Compiles a variant as the launcher has it compiled, for an architecture, and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def compile_for(capability: tuple[int, int], variant: kernels.Variant) -> Code:
        kernel = kernels.masked_geglu_linear_kernel
        place = kernel.arg_names.index
        divisors = {(place(name),): [["tt.divisibility", by]] for name, by in variant.divisors.items()}
        constants = variant.constants | ({} if variant.biased else {"bias": None})
        source = ASTSource(kernel, variant.signature, constexprs=constants, attrs=divisors)
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        made = triton.compile(source, target=target, options=variant.config.options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        tools = triton.knobs.nvidia
        usage = shown(tools.cuobjdump.path, "-res-usage", cubin)
        listing = shown(tools.nvdisasm.path, "-c", cubin)
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", listing, re.MULTILINE)
        loads, stores, copies = (
            [next(int(bits) for bits in (*re.findall(r"\d+", it), "32")) for it in opcodes if it.split(".")[0] == name]
            for name in ("LDG", "STG", "LDGSTS")
        )
        return Code(
            ptx=made.asm["ptx"],
            loads=loads,
            stores=stores,
            copies=copies,
            registers=int(re.search(r"REG:(\d+)", usage)[1]),
            shared=made.metadata.shared,
            local=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
            + sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        )

    return compile_for


def variant_of(
    capability: tuple[int, int], tokens: int, inputs: int, dtype: torch.dtype = torch.float16, *, packed: bool = True,
    biased: bool = True, width: int | None = None, config: kernels.Config | None = None,
) -> kernels.Variant:  # fmt: skip
    """What the launcher has compiled for a batch of two, and a mask of its own for every token."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width = width or 4 * inputs
    mask = empty(tokens, -(-width // 8), dtype=torch.uint8) if packed else empty(tokens, width, dtype=torch.bool)
    given = empty(2, tokens, inputs), empty(2 * width, inputs), empty(2 * width) if biased else None, mask
    launch = kernels.launch_of(*given, empty(tokens, width), capability, GPUS[capability][0], config)
    return launch.variant


def check(capability: tuple[int, int], variant: kernels.Variant, code: Code) -> None:
    config, (_, _, block) = variant.config, GPUS[capability]
    threads = 32 * config.num_warps
    assert code.local == 0
    assert code.registers * threads <= 64 << 10
    assert code.shared <= block
    # A thread has its share of the tile in whole groups: it stores each, reads the values of each, and the words of the
    # mask once a group and not once a feature.
    groups = config.block_m * config.block_n // variant.group // threads
    assert code.stores == [128] * groups
    assert code.loads.count(128) >= groups
    assert sum(bits in (8, 64) for bits in code.loads) <= groups + 1
    assert set(code.copies) == {128}
    # More than one read is under way while products are computed.
    assert max(int(it, 16) for it in re.findall(r"cp\.async\.wait_group\s+(0x\w+|\d+)", code.ptx)) >= 2


@pytest.mark.parametrize("biased", [True, False])
def test_it_is_what_the_first_call_compiles(biased):
    """As Triton types the arguments of a call, and what it takes as known of their alignment."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = kernels.masked_geglu_linear_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    x, weight, value = (torch.empty(it, dtype=torch.float16) for it in ((2, 64, 320), (2560, 320), (64, 1280)))
    bias, mask = weight[:, 0].contiguous() if biased else None, torch.empty(64, 160, dtype=torch.uint8)
    launch = kernels.launch_of(x, weight, bias, mask, value, (9, 0), 132)
    variant = launch.variant
    arguments = (x, weight, bias, mask.view(variant.word), value, *launch.integers, x.new_empty(2, 64, 1280))
    _, found, _ = bind(*arguments, **variant.constants, **variant.config.options, debug=False)
    assert {name: type_ for name, (type_, _) in zip(kernel.arg_names, found, strict=True)} == variant.signature
    aligned = {name for name, (_, known) in zip(kernel.arg_names, found, strict=True) if known == "D"}
    assert aligned == variant.divisors.keys()


SELECTED = dict.fromkeys((capability, variant_of(capability, *ffn)) for capability in GPUS for ffn in FFNS)


@pytest.mark.parametrize(("capability", "variant"), SELECTED)
def test_what_is_chosen_for_stable_diffusion(capability, variant, compiled):
    code = compiled(capability, variant)
    check(capability, variant, code)
    assert code.products() == {{8: "mma", 9: "wgmma", 10: "tcgen05"}[capability[0]]}
    # The model counts on a second block where the accumulators take less than half of the registers.
    if 2 * variant.config.block_m * variant.config.block_n < 32 << 10:
        assert 2 * 32 * variant.config.num_warps * code.registers <= 64 << 10
        assert 2 * (code.shared + 1024) <= GPUS[capability][1]


@pytest.mark.parametrize("ffn", [(4096, 320), (4096, 640)])
@pytest.mark.parametrize(
    ("dtype", "name", "packed", "biased"), [(torch.bfloat16, "bf16", True, False), (torch.float16, "f16", False, True)]
)
def test_bf16_without_bias_and_masks_that_are_not_packed(ffn, dtype, name, packed, biased, compiled):
    variant = variant_of((9, 0), *ffn, dtype, packed=packed, biased=biased)
    code = compiled((9, 0), variant)
    check((9, 0), variant, code)
    assert set(re.findall(r"wgmma\.mma_async\S+\.f32\.(\w+)\.", code.ptx)) == {name}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_fp32_is_not_rounded_to_tf32(capability, compiled):
    variant = variant_of(capability, 4096, 320, torch.float32)
    code = compiled(capability, variant)
    check(capability, variant, code)
    assert not code.products()
    assert "tf32" not in code.ptx
    assert len(re.findall(r"fma\.rn\.f32", code.ptx)) >= variant.config.block_k


def test_edges_cost_no_16_byte_access(compiled):
    variant = variant_of((9, 0), 77, 40, width=168)
    assert variant.aligned
    assert not variant.even_n
    assert not variant.even_k
    check((9, 0), variant, compiled((9, 0), variant))


@pytest.mark.parametrize("capability", [(8, 6), (9, 0), (10, 0)])
def test_rows_that_are_not_aligned_are_not_read_so(capability, compiled):
    variant = variant_of(capability, 77, 45, width=163)
    assert variant.group == 1
    code = compiled(capability, variant)
    assert set(code.stores) == {16}
    assert max(code.loads) == 16
    assert not code.copies
    assert code.local == 0
    assert code.shared <= GPUS[capability][2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", GPUS)
def test_every_candidate(capability, dtype, compiled):
    for config in kernels.CONFIGS[kernels.unit_for(capability, dtype, aligned=True)]:
        variant = variant_of(capability, 4096, 320, dtype, config=config)
        check(capability, variant, compiled(capability, variant))
