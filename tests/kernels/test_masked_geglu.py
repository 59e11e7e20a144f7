"""`masked_geglu` in Triton: the launcher that ships against the definition in fp64, interpreted and on a GPU."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bakeout.kernels import reference
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.ops import masked_geglu as operator
from bakeout.kernels.packing import pack_mask

pytest.importorskip("triton")
kernels = pytest.importorskip("bakeout.kernels.masked_geglu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Leading dimensions, tokens, width. The last is an FFN of Stable Diffusion 1.5.
SHAPES = (
    ((), 1, 1), ((2,), 3, 7), ((), 5, 8), ((2, 3), 4, 20), ((1, 2, 3), 2, 16), ((3,), 1, 24), ((), 77, 40),
    ((0,), 3, 16), ((2,), 2, 257), ((2,), 5, 1280),
)  # fmt: skip
FORMS = [(by_token, packed) for by_token in (True, False) for packed in (True, False)]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["interpreter", GPU])
def device(request, interpreted) -> str:
    if request.param == "cuda":
        return "cuda"
    interpreted(kernels)
    return "cpu"


def example(
    batch: tuple[int, ...], tokens: int, width: int, dtype: torch.dtype = torch.float16, *, by_token: bool = True,
    share: float = 0.3, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """proj, a mask that is not packed, and values that are NaN where it is not set, as proj is where it is."""
    generator = torch.Generator().manual_seed(tokens * width)
    places = (tokens, width) if by_token else (width,)
    mask = torch.rand(places, generator=generator) < share
    value = torch.where(mask, torch.randn(places, generator=generator), torch.nan)
    proj = torch.randn((*batch, tokens, 2 * width), generator=generator) * 2
    proj = proj.masked_fill(torch.cat([mask, mask], -1), torch.nan)
    return proj.to(dtype).to(device), mask.to(device), value.to(dtype).to(device)


def expected(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return reference.masked_geglu(proj.double(), mask, value.double())


@pytest.mark.parametrize(("by_token", "packed"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_it_is_the_definition(batch, tokens, width, dtype, by_token, packed, device, relative_error):
    proj, mask, value = example(batch, tokens, width, dtype, by_token=by_token, device=device)
    found = kernels.masked_geglu(proj, pack_mask(mask) if packed else mask, value)
    assert found.dtype == dtype
    assert found.is_contiguous()
    right = expected(proj, mask, value)
    assert found.shape == right.shape
    if found.numel():
        # The error of a GPU's power of two, up to 2⁻²², is seen whole in fp32 where one element is all there is.
        most = 4 if dtype == torch.float32 and device == "cuda" else 1
        assert relative_error(found, right) <= most * torch.finfo(dtype).eps
        whole = mask.expand(right.shape)
        assert torch.equal(found[whole], value.expand(right.shape)[whole])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "width"), [((2,), 3, 7), ((2,), 5, 1280)])
def test_another_mask_or_order_of_halves_is_told_apart(batch, tokens, width, packed, device, relative_error):
    proj, mask, value = (it.nan_to_num(5.0) for it in example(batch, tokens, width, device=device))
    found = kernels.masked_geglu(proj, pack_mask(mask) if packed else mask, value)
    assert relative_error(found, expected(proj, mask, value)) <= torch.finfo(torch.float16).eps
    for wrong in (
        (proj, mask.roll(1, -1), value),
        (proj, mask.roll(1, 0), value),
        (proj, torch.zeros_like(mask), value),
        (proj.roll(width, -1), mask, value),
        (proj, mask, value.roll(1, -1)),
    ):
        assert relative_error(found, expected(*wrong)) > 0.05


@pytest.mark.parametrize(("by_token", "packed"), FORMS)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("width", [7, 64])
@pytest.mark.usefixtures("poisoned")
def test_empty_and_full_masks(width, share, by_token, packed, device, relative_error):
    proj, mask, value = example((2,), 3, width, by_token=by_token, share=share, device=device)
    assert mask.all() if share else not mask.any()
    found = kernels.masked_geglu(proj, pack_mask(mask) if packed else mask, value)
    assert relative_error(found, expected(proj, mask, value)) <= torch.finfo(torch.float16).eps


def padded(tensor: Tensor, offset: int) -> Tensor:
    """The same in rows of 24 more elements, of which `offset` come first."""
    wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 24), dtype=tensor.dtype, device=tensor.device)
    return wide[..., offset : offset + tensor.shape[-1]].copy_(tensor)


def columns(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def turned(tensor: Tensor) -> Tensor:
    """With the first two dimensions of three in the other order in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.ndim == 3 else tensor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda it: padded(it, 8),
    "rows that are not aligned": lambda it: padded(it, 1),
    "every second row": lambda it: it.repeat_interleave(2, -2)[..., ::2, :],
    "tokens first": turned,
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_rows_of_any_strides_are_read_in_place(layout, dtype, packed, device, relative_error, monkeypatch):
    proj, mask, value = example((3,), 4, 48, dtype, device=device)
    right = expected(proj, mask, value)
    given = [LAYOUTS[layout](it) for it in (proj, pack_mask(mask) if packed else mask, value)]
    assert not given[0].is_contiguous()
    seen: list[Tensor] = []
    run = kernels.run
    monkeypatch.setattr(kernels, "run", lambda *call: (seen.extend(call[2]), run(*call)))
    assert relative_error(kernels.masked_geglu(*given), right) <= torch.finfo(dtype).eps
    assert [it.data_ptr() for it in seen[:3]] == [it.data_ptr() for it in given]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_what_has_no_rows_is_copied(packed, device, relative_error):
    proj, mask, value = example((3,), 4, 48, device=device)
    given = [columns(it) for it in (proj, pack_mask(mask) if packed else mask, value)]
    assert all(it.stride(-1) != 1 for it in given)
    right = expected(proj, mask, value)
    assert relative_error(kernels.masked_geglu(*given), right) <= torch.finfo(torch.float16).eps
    # Two leading dimensions that are not one with one stride.
    spread = proj[:, None].expand(-1, 5, -1, -1)
    found = kernels.masked_geglu(spread, mask, value)
    assert relative_error(found, right[:, None].expand_as(found)) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_more_batches_than_a_grid_has_rows(by_token, device, relative_error, monkeypatch):
    monkeypatch.setattr(kernels, "_GRID_LIMIT", 2)
    proj, mask, value = example((5,), 4, 16, by_token=by_token, device=device)
    given = (padded(proj, 8)[:, :3], mask[:3] if by_token else mask, value[:3] if by_token else value)
    assert kernels.launch_of(*given).grid == (1, 2, 3)
    assert relative_error(kernels.masked_geglu(*given), expected(*given)) <= torch.finfo(torch.float16).eps


def test_no_axis_of_a_grid_is_too_long():
    variant = kernels.Variant(1280, torch.float16, packed=True, aligned=True)
    for batches in (1, 65535, 65536, 200_000, 65535**2):
        blocks, rows, layers = variant.grid(batches, 4096)
        assert blocks == 5 * 4096 // variant.constants["ROWS"]
        assert max(rows, layers) <= 65535
        assert batches <= rows * layers < batches + layers


def test_a_mask_of_all_tokens_makes_one_batch_of_rows_with_one_stride():
    proj, mask, value = example((3,), 4, 48, by_token=False)
    assert (it := kernels.launch_of(proj, mask, value)).variant.aligned
    assert (it.batches, it.tokens, it.proj_token, it.mask_token, it.value_token) == (1, 12, 12, 0, 0)
    assert kernels.launch_of(proj[:, :3], mask, value).batches == 3
    proj, mask, value = example((3,), 4, 48)
    assert (it := kernels.launch_of(proj, mask, value)).integers == (3, 4, 48, 12, 6, 6)
    assert it.variant.word == torch.int64
    assert kernels.launch_of(proj, pack_mask(mask), value).mask_token == 6


def test_16_bytes_are_read_at_once_where_all_rows_start_at_multiples_of_them():
    def aligned(*given: Tensor) -> bool:
        return kernels.launch_of(*given).variant.aligned

    def spread(tensor: Tensor) -> Tensor:
        """Rows that begin at a multiple, but are an odd number of elements apart."""
        return torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 1), dtype=tensor.dtype)[..., :-1]

    proj, mask, value = example((3,), 4, 48)
    assert aligned(proj, mask, value)
    assert aligned(*(padded(it, 8) for it in (proj, mask, value)))
    for move in (lambda it: padded(it, 1), lambda it: padded(it, 4), spread):
        assert not aligned(move(proj), mask, value)
        assert not aligned(proj, move(mask), value)
        assert not aligned(proj, mask, move(value))
        assert aligned(proj, move(pack_mask(mask)), value)
    assert not aligned(*example((3,), 4, 44))
    # Of one batch or token there is no next, wherever it would be.
    assert aligned(spread(proj.reshape(3, 1, -1))[:1], mask[:1], spread(value)[:1])


def gelu(g: Tensor) -> Tensor:
    """In fp64, from the C library's erfc, which keeps its digits where it is small."""
    return torch.tensor([it * math.erfc(-it / math.sqrt(2)) / 2 for it in g.double().flatten().tolist()])


def test_gelu_keeps_its_digits(device):
    g = torch.cat([torch.linspace(-14, 14, 40_000), torch.logspace(-30, 0, 200), -torch.logspace(-30, 0, 200)])
    proj = torch.cat([torch.ones_like(g), g]).to(device)
    none = torch.zeros(g.numel(), dtype=torch.bool, device=device)
    found = kernels.masked_geglu(proj, none, proj[: g.numel()]).cpu().double()
    right = gelu(g)
    # 1.6 is the polynomial with rounded products and sums; a GPU's power of two has errors of up to 2^-22.
    bound = (2 if device == "cpu" else 4) * 2**-24
    assert float(((found - right) / g.double()).abs().max()) <= bound
    tanh = torch.nn.functional.gelu(g.double(), approximate="tanh")
    assert float(((tanh - right) / g.double()).abs().max()) > 100 * bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype, device):
    g = torch.tensor([torch.inf, -torch.inf, torch.nan, 60000.0, -60000.0, 0.0, -0.0, 1.0], dtype=dtype, device=device)
    a = torch.tensor([1.0] * 7 + [torch.nan], dtype=dtype, device=device)
    none = torch.zeros(8, dtype=torch.bool, device=device)
    found = kernels.masked_geglu(torch.cat([a, g]), none, g).float().cpu()
    large = float(g[3])
    right = torch.tensor([torch.inf, 0.0, torch.nan, large, 0.0, 0.0, 0.0, torch.nan])
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 64), (torch.float32, 64), (torch.float16, 63)])
def test_values_are_read_where_a_group_has_a_set_bit_and_nowhere_else(dtype, width, packed, interpreted, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    interpreted(kernels)
    proj, mask, value = example((1,), 3, width, dtype, share=0.05)
    group = 16 // dtype.itemsize if width % 8 == 0 else 1
    read: set[int] = set()
    load = interpreter_builder.create_masked_load

    def record(pointers, mask, *others):
        read.update(pointers.data[mask.data.astype(bool)].tolist())
        return load(pointers, mask, *others)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", record)
    kernels.masked_geglu(proj, pack_mask(mask) if packed else mask, value)
    begin = value.data_ptr()
    places = {(at - begin) // dtype.itemsize for at in read if begin <= at < begin + value.nbytes}
    set_places = mask.flatten().nonzero().flatten().tolist()
    assert places == {place // group * group + lane for place in set_places for lane in range(group)}
    assert len(places) < value.numel() / 2


def test_where_it_cannot_run_it_says_so(monkeypatch):
    given = example((2,), 3, 8)
    with pytest.raises(KernelUnavailable, match=r"runs on one NVIDIA GPU.*\(cpu\): move them"):
        kernels.masked_geglu(*given)
    with pytest.raises(KernelUnavailable, match=r"not torch\.float64: cast it"):
        kernels.masked_geglu(*(it.double() if it.is_floating_point() else it for it in given))
    with pytest.raises(ValueError, match="does not end in"):
        kernels.masked_geglu(given[0][:, :2], *given[1:])
    with FakeTensorMode():
        on_gpu = [torch.empty(1, dtype=torch.float16, device=f"cuda:{index}") for index in (0, 1)]
    with pytest.raises(KernelUnavailable, match=r"\(cuda:1\)"):
        kernels.check_runs(kernels.masked_geglu_kernel, *on_gpu)
    for capability in ((8, 0), (12, 0)):
        monkeypatch.setattr(kernels, "_capability", lambda device, it=capability: it)
        kernels.check_runs(kernels.masked_geglu_kernel, on_gpu[0])
    monkeypatch.setattr(kernels, "_capability", lambda device: (7, 5))
    with pytest.raises(KernelUnavailable, match=r"compute capability 8\.0 or later"):
        kernels.check_runs(kernels.masked_geglu_kernel, on_gpu[0])


def test_without_a_c_compiler_or_triton_it_says_so():
    class Kernel:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __getitem__(self, grid):
            raise self.error

    with pytest.raises(KernelUnavailable, match="install gcc or clang"):
        kernels.run(Kernel(RuntimeError("Failed to find C compiler. Please specify")), (1,), (torch.zeros(1),), {})
    # What gcc does where there is no Python.h.
    with pytest.raises(KernelUnavailable, match=r"the C compiler /usr/bin/gcc cannot .*: install Python's headers"):
        kernels.run(Kernel(subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"])), (1,), (torch.zeros(1),), {})
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.run(Kernel(RuntimeError("out of memory")), (1,), (torch.zeros(1),), {})
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from bakeout.kernels.errors import KernelUnavailable\n"
        "try: import bakeout.kernels.masked_geglu\n"
        "except KernelUnavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Triton is not installed: run `pip install triton`, on Linux"


class Program(torch.nn.Module):
    def forward(self, proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
        return operator(proj, mask, value, by="triton") + 1


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_it_compiles_into_one_graph(packed, relative_error):
    proj, mask, value = example((2,), 64, 1280, device="cuda")
    found = torch.compile(Program(), fullgraph=True)(proj, pack_mask(mask) if packed else mask, value)
    assert relative_error(found, expected(proj, mask, value) + 1) <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.gpu
def test_a_cuda_graph_captures_it(relative_error):
    proj, mask, value = example((2,), 64, 1280, device="cuda")
    bits = pack_mask(mask)
    kernels.masked_geglu(proj, bits, value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.masked_geglu(proj, bits, value)
    proj.neg_()
    graph.replay()
    assert relative_error(found, expected(proj, mask, value)) <= torch.finfo(torch.float16).eps
    assert relative_error(found, expected(-proj, mask, value)) > 0.1


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(relative_error):
    tokens, width = 4096, 5120
    _, mask, value = example((1,), tokens, width, device="cuda")
    proj = torch.empty(2**31 // (2 * width * tokens) + 2, tokens, 2 * width, dtype=torch.float16, device="cuda")
    assert proj[-1].storage_offset() > 2**31
    found = kernels.masked_geglu(proj.normal_(), pack_mask(mask), value)
    for batch in (0, -1):
        assert relative_error(found[batch], expected(proj[batch], mask, value)) <= torch.finfo(torch.float16).eps
