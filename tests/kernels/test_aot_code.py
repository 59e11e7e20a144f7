"""`masked_geglu` ahead of time: the PTX, read back and assembled."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from bakeout.kernels import aot, build
from bakeout.kernels.errors import KernelUnavailable

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("bakeout.kernels.masked_geglu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Aligned, and not.
WIDTHS = (1280, 37)
KERNELS = [kernel(dtype, width) for kernel in aot.KERNELS.values() for dtype in DTYPES for width in WIDTHS]
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
NAMES = ("proj", "mask", "value", "batches", "tokens", "proj_batch", "proj_token", "mask_token", "value_token", "out")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def nvcc_tool(name: str) -> Path:
    return Path(list(build._nvcc_places())[-1]).parent / name


def assembled(ptx: str, architecture: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the assembler says of the resources of some PTX, and the machine code in `folder`."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [nvcc_tool("ptxas"), f"-arch={architecture}", "-v", source, "-o", folder / f"{architecture}.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def instructions(cubin: Path) -> int:
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", listing, re.MULTILINE)
    return sum(opcode != "NOP" for opcode in opcodes)


def by_triton(width: int, dtype: torch.dtype, capability: int) -> str:
    """What Triton makes of the kernel for one architecture, as it is."""
    variant = kernels.Variant(width, dtype, packed=False, aligned=True)
    attributes = {
        (kernels.masked_geglu_kernel.arg_names.index(it),): [["tt.divisibility", 16]] for it in variant.divisors
    }
    source = triton.compiler.ASTSource(
        kernels.masked_geglu_kernel, variant.signature, constexprs=variant.constants, attrs=attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(kernels.OPTIONS)).asm["ptx"]


@pytest.mark.claim("the kernels' PTX takes the parameters that the launch description gives, in count, types and order")
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_ptx_takes_what_is_described(kernel):
    code = aot.compiled(kernel)
    name, parameters = aot.parameters(code.ptx)
    assert name == code.name
    assert tuple(parameters.values()) == aot.SIGNATURE
    assert len(aot.SIGNATURE) == len(NAMES) == 3 + len(kernel.launch(1, 1, True, max).integers) + 1
    assert code.shared == 0
    assert not re.search(r"\.extern\s+\.shared|\.shared\s", code.ptx)
    # A launch of other blocks would not start.
    threads = [int(it) for it in re.search(r"\.(?:req|max)ntid\s+([\d, ]+)", code.ptx)[1].split(",")]
    assert prod(threads) == prod(kernel.launch(1, 1, True, max).block)
    assert re.search(r"^\.target sm_80$", code.ptx, re.MULTILINE)


def test_triton_s_arguments_are_in_the_order_that_is_described():
    assert tuple(kernels.masked_geglu_kernel.arg_names[: len(NAMES)]) == NAMES
    source = (build.CSRC / "masked_geglu.cu").read_text(encoding="utf-8")
    given = re.search(r"masked_geglu_aot\((.*?)\)", source, re.DOTALL)[1]
    assert tuple(parameter.split()[-1] for parameter in given.split(",")) == NAMES


def conversions(ptx: str) -> set[str]:
    """The types of 16 bits to which the PTX rounds."""
    return set(re.findall(r"cvt\.rn\.(bf16|f16)(?:x2)?\.f32", ptx))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_ptx_is_of_its_dtype_and_reads_16_bytes_at_once(kernel):
    ptx = aot.compiled(kernel).ptx
    rounded = {torch.float16: {"f16"}, torch.bfloat16: {"bf16"}, torch.float32: set()}
    assert conversions(ptx) == rounded[kernel.dtype]
    others = [aot.compiled(replace(kernel, dtype=dtype)).ptx for dtype in DTYPES if dtype != kernel.dtype]
    assert all(conversions(other) != rounded[kernel.dtype] for other in others)
    assert bool(re.search(r"st\.global(?:\.cg)?\.v4\.", ptx)) == (kernel.group > 1)


@pytest.mark.claim("one PTX of each kernel is assembled for every GPU from compute capability 8.0 to 12.1")
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_one_ptx_is_assembled_for_every_gpu(kernel, tmp_path):
    listed = subprocess.run([nvcc_tool("nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [it for it in ARCHITECTURES if f"compute_{it}" in listed.split()]
    assert len(known) > 5
    for architecture in known if kernel.width == WIDTHS[0] else (80,):
        done = assembled(aot.compiled(kernel).ptx, f"sm_{architecture}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_later_gpu_it_is_what_triton_makes_for_it(dtype, tmp_path):
    ours = aot.compiled(aot.TritonKernel(dtype, 1280)).ptx
    own = by_triton(1280, dtype, 90)
    # Which runs on nothing else.
    assert re.search(r"^\.target sm_90a$", own, re.MULTILINE)
    assert assembled(own, "sm_100", tmp_path).returncode
    for ptx, architecture in ((ours, "sm_90"), (own, "sm_90a")):
        assert assembled(ptx, architecture, tmp_path).returncode == 0
    assert instructions(tmp_path / "sm_90.cubin") <= 1.02 * instructions(tmp_path / "sm_90a.cubin")


def test_it_says_nothing_of_the_machine_that_compiled_it():
    raw, ours = by_triton(1280, torch.float16, 80), aot.compiled(aot.TritonKernel(torch.float16, 1280)).ptx
    for word in ("masked_geglu.py", ".file", ".loc", ".debug_"):
        assert word in raw
        assert word not in ours
    assert re.search(r"^\.version 8\.0$", ours, re.MULTILINE)


BY_HAND = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry some_kernel(
{parameters}
)
{{
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [some_kernel_param_1];
{body}
	ret;
}}
"""


def hidden(*extra: str, body: str = "") -> str:
    """A kernel with parameters beyond those that are described."""
    kinds = [f".u{kind[1:]}" + (" .ptr .global .align 1" if kind == "b64" else "") for kind in aot.SIGNATURE]
    declared = [f"\t.param {kind} some_kernel_param_{place}" for place, kind in enumerate([*kinds, *extra])]
    return BY_HAND.format(parameters=",\n".join(declared), body=body)


def test_hidden_parameters_go_where_nothing_reads_them(tmp_path):
    raw = by_triton(1280, torch.float16, 80)
    count = len(aot.parameters(raw)[1])
    assert count > len(aot.SIGNATURE), "Triton appends no parameters any more"
    ours = aot.without_hidden(raw)
    assert tuple(aot.parameters(ours)[1].values()) == aot.SIGNATURE
    # What is left is what was there.
    assert [line for line in raw.splitlines() if line not in ours.splitlines()] == [
        line for line in raw.splitlines() if re.search(rf"\.param .*_param_(9,|{count - 2},|{count - 1})$", line)
    ]
    pointer = ".u64 .ptr .global .align 1"
    assert aot.without_hidden(hidden(pointer, pointer)) == aot.without_hidden(hidden())
    # The name of the second parameter is the beginning of that of the eleventh.
    assert aot.parameters(aot.without_hidden(hidden(pointer)))[1]["some_kernel_param_1"] == "b64"
    assert assembled(aot.without_hidden(hidden(pointer, pointer)), "sm_80", tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("extra", "body"),
    [
        ((".u32",), ""),
        ((".align 8 .b8",), ""),
        ((".u64", ".u64"), "\tld.param.u64 %rd2, [some_kernel_param_11];"),
        ((".u64",), "\tld.param.u64 %rd2, [some_kernel_param_10+0];"),
    ],
)
def test_a_parameter_too_many_is_found(extra, body):
    with pytest.raises(ValueError, match=r"the kernel needs the parameter some_kernel_param_1[01]"):
        aot.without_hidden(hidden(*extra, body=body))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((".u32 some_kernel_param_3", ".u64 some_kernel_param_3"), "b64, b64, b64, b64, b32"),
        (("\t.param .u32 some_kernel_param_8,\n", ""), "b32, b32, b32, b32, b32, b64"),
        ((".u32 some_kernel_param_4", ".align 8 .b8 some_kernel_param_4[72]"), r"b8\[72\]"),
        ((".u32 some_kernel_param_4", ".f32 some_kernel_param_4"), "f32"),
    ],
)
def test_a_kernel_of_other_parameters_is_refused(change, says, monkeypatch):
    monkeypatch.setattr(build, "ptx", lambda *_: hidden())
    assert aot.CudaKernel(torch.float16, 8).compile().name == "some_kernel"
    monkeypatch.setattr(build, "ptx", lambda *_: hidden().replace(*change))
    with pytest.raises(KernelUnavailable, match=f"other parameters .*{says}"):
        aot.CudaKernel(torch.float16, 8).compile()


def test_ptx_that_is_not_one_kernel_is_refused():
    for ptx, says in (("", "0 entry"), (hidden() * 2, "2 entry"), (hidden(".u64 x;"), "is not understood")):
        with pytest.raises(ValueError, match=says):
            aot.parameters(ptx)
    # An exact kernel has nothing to lose.
    code = aot.compiled(aot.CudaKernel(torch.float16, 1280))
    assert aot.parameters(aot.without_hidden(code.ptx)) == aot.parameters(code.ptx)


@pytest.mark.parametrize(
    ("name", "failing", "says"),
    [
        ("without_hidden", ValueError("the kernel needs the parameter x"), r"needs the parameter x\); install"),
        ("without_debug", triton.TritonError("`ptxas` failed\nwith code 255"), r"`ptxas` failed with code 255\)"),
    ],
)
def test_a_triton_that_compiles_no_such_kernel_is_one_sentence(name, failing, says, monkeypatch):
    def fails(_: str) -> str:
        raise failing

    monkeypatch.setattr(aot, name, fails)
    with pytest.raises(KernelUnavailable, match=rf"^Triton [\d.]+\S* cannot compile the kernel \(.*{says}"):
        aot.TritonKernel(torch.float16, 8).compile()


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(build, "_nvcc_places", lambda: iter(()))
    with pytest.raises(KernelUnavailable, match="there is no nvcc"):
        aot.CudaKernel(torch.float16, 8).compile()
    monkeypatch.undo()
    with pytest.raises(KernelUnavailable, match=r"nvcc cannot compile the kernel \(.*error.*\); mend or change"):
        build.ptx("masked_geglu.cu", {"BAKEOUT_AOT_TYPE": "nothing", "BAKEOUT_AOT_GROUP": 8})
