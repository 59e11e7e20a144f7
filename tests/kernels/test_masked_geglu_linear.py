"""`masked_geglu_linear` in Triton: the launcher that ships, interpreted or on a GPU, against the definition in fp64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bakeout.kernels import reference
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.ops import masked_geglu_linear as operator
from bakeout.kernels.packing import pack_mask

kernels = pytest.importorskip("bakeout.kernels.masked_geglu_linear", exc_type=KernelUnavailable)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Leading dimensions, tokens, inputs, width. Of the last two, in tiles of 64 x 64, one has edges on all sides, one none.
SHAPES = (
    ((), 1, 1, 1), ((2,), 3, 5, 7), ((2, 3), 4, 16, 24), ((), 77, 40, 8), ((0,), 3, 8, 16), ((3,), 2, 0, 8),
    ((2,), 65, 33, 67), ((2,), 66, 40, 72), ((2,), 64, 64, 64),
)  # fmt: skip
FORMS = [(by_token, packed) for by_token in (True, False) for packed in (True, False)]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def in_interpreter(interpreted, monkeypatch) -> None:
    """The interpreter keeps bf16 as integers, and multiplies these (triton-lang/triton#11584)."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    def widened(it: TensorHandle) -> TensorHandle:
        if it.data.dtype != np.uint16:
            return it
        return TensorHandle((it.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = interpreter_builder.create_dot
    monkeypatch.setattr(interpreter_builder, "create_dot", lambda a, b, *more: dot(widened(a), widened(b), *more))
    interpreted(kernels)


@pytest.fixture(params=["interpreter", GPU])
def device(request) -> str:
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("in_interpreter")
    return "cpu"


def example(
    batch: tuple[int, ...], tokens: int, inputs: int, width: int, dtype: torch.dtype = torch.float16, *,
    by_token: bool = True, biased: bool = True, share: float = 0.3, device: str = "cpu",
) -> list[Tensor | None]:  # fmt: skip
    """x, a weight, a bias, a mask that is not packed, and values that are NaN where it is not set."""
    generator = torch.Generator().manual_seed(tokens * width + inputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    places = (tokens, width) if by_token else (width,)
    mask = torch.rand(places, generator=generator) < share
    value = torch.where(mask, normal(*places), torch.nan)
    x, weight = normal(*batch, tokens, inputs), normal(2 * width, inputs) * 2 / math.sqrt(max(inputs, 1))
    bias = normal(2 * width) if biased else None
    return [
        None if it is None else it.to(device=device, dtype=torch.bool if it is mask else dtype)
        for it in (x, weight, bias, mask, value)
    ]


def packed_of(given: list[Tensor | None], packed: bool) -> list[Tensor | None]:
    return [*given[:3], pack_mask(given[3]) if packed else given[3], given[4]]


def expected(*given: Tensor | None) -> Tensor:
    wide = (it if it is None or it.dtype == torch.bool else it.double() for it in given)
    return reference.masked_geglu_linear(*wide)


def bound(dtype: torch.dtype, inputs: int) -> float:
    """Of the relative error. fp16 and bf16: one rounding, of at most eps / 2, and sums in fp32 that add less than that.

    fp32: a sum of K products is rounded K times, by eps / 2 of what it is then, which is as large as the whole sum;
    that adds up to √K at random. There are two sums, and the GELU and the product round some more; on a GPU the GELU's
    power of two has an error of up to 2 eps.
    """
    eps = torch.finfo(dtype).eps
    return eps * (4 + math.sqrt(inputs)) if dtype == torch.float32 else eps


@pytest.mark.parametrize(
    ("by_token", "packed", "biased"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "inputs", "width"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_it_is_the_definition(batch, tokens, inputs, width, dtype, by_token, packed, biased, device, relative_error):
    given = example(batch, tokens, inputs, width, dtype, by_token=by_token, biased=biased, device=device)
    found, right = kernels.masked_geglu_linear(*packed_of(given, packed)), expected(*given)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert found.shape == right.shape
    if right.count_nonzero():
        assert relative_error(found, right) <= bound(dtype, inputs)
    mask, value = (it.expand(right.shape) for it in given[3:])
    assert torch.equal(found[mask], value[mask])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "width"), [(3, 5, 7), (66, 40, 72)])
def test_another_operand_or_order_is_told_apart(tokens, inputs, width, packed, device, relative_error):
    x, weight, bias, mask, value = given = example((2,), tokens, inputs, width, device=device)
    value.nan_to_num_(5.0)
    found = kernels.masked_geglu_linear(*packed_of(given, packed))
    assert relative_error(found, expected(*given)) <= bound(torch.float16, inputs)
    for wrong in (
        (x, weight, None, mask, value),
        (x, weight, bias.roll(width), mask, value),
        (x, weight.roll(width, 0), bias, mask, value),
        (x, weight.roll(1, 0), bias, mask, value),
        (x.roll(1, -1), weight, bias, mask, value),
        (x.roll(1, 1), weight, bias, mask, value),
        (x.roll(1, 0), weight, bias, mask, value),
        (x, weight, bias, mask.roll(1, -1), value),
        (x, weight, bias, mask.roll(1, 0), value),
        (x, weight, bias, torch.zeros_like(mask), value),
        (x, weight, bias, mask, value.roll(1, -1)),
    ):
        assert relative_error(found, expected(*wrong)) > 0.05


def tf32(tensor: Tensor) -> Tensor:
    """The 10 bits that tf32 keeps of 23."""
    return (tensor.view(torch.int32) + (1 << 12) & -(1 << 13)).view(torch.float32)


def test_tf32_would_be_seen(device, relative_error):
    x, weight, *others = example((2,), 66, 64, 72, torch.float32, device=device)
    right = expected(x, weight, *others)
    assert relative_error(kernels.masked_geglu_linear(x, weight, *others), right) <= bound(torch.float32, 64)
    rounded = kernels.masked_geglu_linear(tf32(x), tf32(weight), *others)
    assert relative_error(rounded, right) > 20 * bound(torch.float32, 64)


@pytest.mark.parametrize(("by_token", "packed"), FORMS)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("width", [7, 72])
@pytest.mark.usefixtures("poisoned")
def test_empty_and_full_masks(width, share, by_token, packed, device, relative_error):
    given = example((2,), 3, 16, width, by_token=by_token, share=share, device=device)
    assert given[3].all() if share else not given[3].any()
    found = kernels.masked_geglu_linear(*packed_of(given, packed))
    assert relative_error(found, expected(*given)) <= bound(torch.float16, 16)


# NumPy, which multiplies for the interpreter, warns of them.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("poisoned")
def test_what_is_not_finite_under_the_mask_is_not_seen(dtype, packed, device, relative_error):
    x, weight, bias, mask, value = given = example((2,), 5, 16, 24, dtype, device=device)
    mask[2], mask[:, 3] = True, True
    value[2], value[:, 3] = 1.0, 2.0
    right = expected(*given)
    x[:, 2] = torch.nan
    weight[3], weight[24 + 3], bias[3], bias[24 + 3] = torch.inf, torch.nan, torch.nan, -torch.inf
    found = kernels.masked_geglu_linear(*packed_of(given, packed))
    assert relative_error(found, right) <= bound(dtype, 16)
    mask[2, 5] = False
    assert kernels.masked_geglu_linear(*packed_of(given, packed)).isnan().sum() == 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("unit", "number"), [(unit, at) for unit, them in kernels.CONFIGS.items() for at in range(len(them))]
)
@pytest.mark.usefixtures("poisoned")
def test_every_candidate_computes_the_same(unit, number, packed, device, relative_error):
    if device == "cuda" and unit == "wgmma":
        here = kernels.unit_for(torch.cuda.get_device_capability(), torch.float16, aligned=True)
        if here != unit:
            pytest.skip("its tiles do not fit into the shared memory of this GPU")
    # Tiles at the edges, and with 128 of them nothing but an edge.
    given = example((2,), 70, 72, 136, device=device)
    found = kernels.masked_geglu_linear(*packed_of(given, packed), config=kernels.CONFIGS[unit][number])
    assert relative_error(found, expected(*given)) <= bound(torch.float16, 72)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_every_tile_of_several_bands_is_computed(by_token, device, relative_error):
    """Three batches of seven rows of tiles are two bands of eight rows, and one of five."""
    config = kernels.Config(16, 16, 16, 4, 2)
    given = example((3,), 100, 16, 40, by_token=by_token, device=device)
    launch = kernels.launch_of(*given, (8, 0), 1, config)
    assert launch.grid == ((21 if by_token else 19) * 3,)
    found = kernels.masked_geglu_linear(*given, config=config)
    assert relative_error(found, expected(*given)) <= bound(torch.float16, 16)


def padded(tensor: Tensor, offset: int) -> Tensor:
    """The same in rows of 24 more elements, of which `offset` come first."""
    wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 24), dtype=tensor.dtype, device=tensor.device)
    return wide[..., offset : offset + tensor.shape[-1]].copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda it: padded(it, 8),
    "rows that are not aligned": lambda it: padded(it, 1),
    "every second row": lambda it: it.repeat_interleave(2, -2)[..., ::2, :],
    "tokens first": lambda it: it.transpose(0, 1).contiguous().transpose(0, 1) if it.ndim == 3 else it,
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_rows_of_any_strides_are_read_in_place(layout, by_token, packed, device, relative_error, monkeypatch):
    given = example((3,), 4, 40, 48, by_token=by_token, device=device)
    laid = [LAYOUTS[layout](it) if it.ndim > 1 else it for it in packed_of(given, packed)]
    assert not laid[0].is_contiguous()
    seen: list[Tensor] = []
    run = kernels.run
    monkeypatch.setattr(kernels, "run", lambda *call: (seen.extend(call[2]), run(*call)))
    assert relative_error(kernels.masked_geglu_linear(*laid), expected(*given)) <= bound(torch.float16, 40)
    assert [it.data_ptr() for it in seen[:5]] == [it.data_ptr() for it in laid]


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_one_token_a_batch_has_the_stride_of_batches(by_token, device, relative_error):
    x, *others = given = example((3,), 1, 40, 48, by_token=by_token, device=device)
    found = kernels.masked_geglu_linear(padded(x, 8), *others)
    assert relative_error(found, expected(*given)) <= bound(torch.float16, 40)


@pytest.mark.usefixtures("poisoned")
def test_a_mask_of_one_token_is_a_row_of_any_other(device, relative_error):
    *others, mask, value = given = example((2,), 1, 40, 48, device=device)
    row = torch.cat([mask, mask[:, :1]], -1).expand(3, -1).contiguous()[:1, :48]
    assert row.stride() == (49, 1)
    found = kernels.masked_geglu_linear(*others, row, value)
    assert relative_error(found, expected(*given)) <= bound(torch.float16, 40)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_what_has_no_rows_is_copied(packed, device, relative_error):
    given = example((3,), 4, 40, 48, device=device)
    right = expected(*given)
    turned = [it.mT.contiguous().mT if it.ndim > 1 else it.repeat_interleave(2)[::2] for it in packed_of(given, packed)]
    assert all(it.stride(-1) != 1 for it in turned)
    assert relative_error(kernels.masked_geglu_linear(*turned), right) <= bound(torch.float16, 40)
    # Two leading dimensions that are not one with one stride.
    spread = given[0][:, None].expand(-1, 5, -1, -1)
    found = kernels.masked_geglu_linear(spread, *given[1:])
    assert relative_error(found, right[:, None].expand_as(found)) <= bound(torch.float16, 40)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, 72), (torch.bfloat16, 72), (torch.float32, 72), (torch.float16, 71)]
)
def test_values_are_read_where_a_group_has_a_set_bit_and_nothing_outside(
    dtype, width, packed, in_interpreter, monkeypatch
):
    from triton.runtime.interpreter import interpreter_builder

    given = packed_of(example((2,), 3, 16, width, dtype, share=0.05), packed)
    read: set[int] = set()
    load, masked_load = interpreter_builder.create_load, interpreter_builder.create_masked_load

    def record(pointers, *others):
        read.update(pointers.data.flatten().tolist())
        return load(pointers, *others)

    def record_masked(pointers, mask, *others):
        read.update(pointers.data[mask.data].tolist())
        return masked_load(pointers, mask, *others)

    monkeypatch.setattr(interpreter_builder, "create_load", record)
    monkeypatch.setattr(interpreter_builder, "create_masked_load", record_masked)
    kernels.masked_geglu_linear(*given)
    inside = [range(it.data_ptr(), it.data_ptr() + it.nbytes) for it in given]
    assert all(any(at in it for it in inside) for at in read)

    *_, value = given
    places = {(at - value.data_ptr()) // dtype.itemsize for at in read if at in inside[-1]}
    group = 16 // dtype.itemsize if width % 8 == 0 else 1
    set_places = value.isnan().logical_not().flatten().nonzero().flatten().tolist()
    assert places == {place // group * group + lane for place in set_places for lane in range(group)}
    assert len(places) < value.numel() / 2


H100, A100, L40S = ((9, 0), 132), ((8, 0), 108), ((8, 9), 142)


@pytest.mark.parametrize(
    ("gpu", "tokens", "inputs", "tile"),
    [
        # Stable Diffusion 1.5 at 512 pixels. 128 x 128 would leave the last of its 5, 3 and 2 rounds of tiles emptier,
        # or its epilogue uncovered after a short sum.
        (H100, 4096, 320, (128, 64)), (H100, 1024, 640, (128, 64)), (H100, 256, 1280, (128, 64)),
        (A100, 4096, 320, (128, 64)), (A100, 256, 1280, (128, 64)), (L40S, 4096, 320, (128, 64)),
        # Half of a tile of 128 would be tokens that are not there.
        (H100, 64, 1280, (64, 128)), (A100, 64, 1280, (64, 64)),
        # SDXL at 1024: a long sum, and 9.7 of 10 or 4.85 of 5 rounds.
        (H100, 4096, 640, (128, 128)), (H100, 1024, 1280, (128, 128)), (A100, 4096, 640, (128, 64)),
    ],
)  # fmt: skip
def test_the_tile_fits_the_shape_and_the_gpu(gpu, tokens, inputs, tile):
    capability, multiprocessors = gpu
    unit = kernels.unit_for(capability, torch.float16, aligned=True)
    config = kernels.config_for(unit, multiprocessors, 2, tokens, 4 * inputs, 2 * inputs)
    assert (config.block_m, config.block_n) == tile


def test_what_multiplies():
    units = {
        capability: kernels.unit_for(capability, torch.bfloat16, aligned=True)
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    }
    assert [*units.values()] == ["mma", "mma", "mma", "wgmma", "wgmma", "wgmma", "mma"]
    assert kernels.unit_for((9, 0), torch.float32, aligned=True) == "fma"
    assert {kernels.unit_for((9, 0), dtype, aligned=False) for dtype in DTYPES} == {"unaligned"}


def test_a_mask_of_all_tokens_makes_one_batch_of_rows_with_one_stride():
    given = example((3,), 4, 40, 48, by_token=False)
    launch = kernels.launch_of(*given, *H100)
    assert launch.variant.aligned
    assert launch.integers == (1, 12, 6, 5, 0, 5, 5, 0, 0)
    assert kernels.launch_of(given[0][:, :3], *given[1:], *H100).integers == (3, 3, 6, 5, 20, 5, 5, 0, 0)
    given = example((3,), 4, 40, 48)
    launch = kernels.launch_of(*given, *H100)
    assert launch.integers == (3, 4, 6, 5, 20, 5, 5, 6, 6)
    assert launch.variant.word == torch.int64
    assert kernels.launch_of(*packed_of(given, True), *H100).mask_token == 6
    for place, offset in ((0, 1), (1, 4), (3, 1), (4, 2)):
        unaligned = padded(given[place], offset)
        assert not kernels.launch_of(*given[:place], unaligned, *given[place + 1 :], *H100).variant.aligned


def test_where_it_cannot_run_it_says_so():
    given = example((2,), 3, 8, 16)
    with pytest.raises(KernelUnavailable, match=r"runs on one NVIDIA GPU.*\(cpu\): move them"):
        kernels.masked_geglu_linear(*given)
    with pytest.raises(KernelUnavailable, match=r"not torch\.float64: cast it"):
        kernels.masked_geglu_linear(*(it if it.dtype == torch.bool else it.double() for it in given))
    with pytest.raises(ValueError, match="does not end in"):
        kernels.masked_geglu_linear(given[0][:, :2], *given[1:])
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from bakeout.kernels.errors import KernelUnavailable\n"
        "try: import bakeout.kernels.masked_geglu_linear\n"
        "except KernelUnavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Triton is not installed: run `pip install triton`, on Linux"


# Tokens and inputs of the FFNs of Stable Diffusion 1.5 at 512 pixels, and of SDXL at 1024.
FFNS = ((4096, 320), (1024, 640), (256, 1280), (64, 1280), (4096, 640), (1024, 1280))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs"), FFNS)
@pytest.mark.usefixtures("poisoned")
def test_it_is_the_definition_at_the_sizes_of_stable_diffusion(tokens, inputs, dtype, packed, relative_error):
    given = example((2,), tokens, inputs, 4 * inputs, dtype, device="cuda")
    found, right = kernels.masked_geglu_linear(*packed_of(given, packed)), expected(*given)
    assert relative_error(found, right) <= bound(dtype, inputs)
    mask, value = (it.expand(right.shape) for it in given[3:])
    assert torch.equal(found[mask], value[mask])


class Program(torch.nn.Module):
    def forward(self, *given: Tensor) -> Tensor:
        return operator(*given, by="triton") + 1


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_it_compiles_into_one_graph(packed, relative_error):
    given = example((2,), 64, 320, 1280, device="cuda")
    found = torch.compile(Program(), fullgraph=True)(*packed_of(given, packed))
    # The sum is rounded once more.
    assert relative_error(found, expected(*given) + 1) <= 2 * bound(torch.float16, 320)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it(relative_error):
    given = example((2,), 64, 320, 1280, device="cuda")
    packed = packed_of(given, True)
    kernels.masked_geglu_linear(*packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.masked_geglu_linear(*packed)
    given[0].neg_()
    graph.replay()
    assert relative_error(found, expected(*given)) <= bound(torch.float16, 320)
    assert relative_error(found, expected(-given[0], *given[1:])) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "width"), [(1280, 64), (64, 1280)])
def test_more_elements_than_an_int32_counts(inputs, width, relative_error):
    tokens = 4096
    x, *others = example((1,), tokens, inputs, width, device="cuda")
    batches = 2**31 // (1280 * tokens) + 2
    x = torch.empty(batches, tokens, inputs, dtype=torch.float16, device="cuda").normal_()
    found = kernels.masked_geglu_linear(x, *others)
    assert max(x[-1].storage_offset(), found[-1].storage_offset()) > 2**31
    for batch in (0, -1):
        assert relative_error(found[batch], expected(x[batch], *others)) <= bound(torch.float16, inputs)
