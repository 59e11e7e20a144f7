"""The operators: what PyTorch's own checks say of them, and that torch.export and torch.compile keep them whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from bakeout.kernels import reference
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.ops import KERNELS, masked_geglu, masked_geglu_linear
from bakeout.kernels.packing import pack_mask

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OPERATORS = {"masked_geglu": masked_geglu, "masked_geglu_linear": masked_geglu_linear}


def example(operation: str, *places: int, dtype: torch.dtype = torch.float32, packed: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = [(2, 3, 4), (10, 4), (10,)] if operation == "masked_geglu_linear" else [(2, 3, 10)]
    *given, value = (torch.randn(shape, generator=generator).to(dtype) for shape in (*linear, places))
    mask = torch.rand(places, generator=generator) < 0.4
    return [*given, pack_mask(mask) if packed else mask, value]


@pytest.fixture(params=OPERATORS)
def operation(request) -> str:
    return request.param


@pytest.fixture
def definition(operation) -> Callable[..., Tensor]:
    return getattr(reference, operation)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(3, 5), (5,)])
def test_it_is_the_definition_and_a_proper_operator(operation, definition, places, dtype, packed):
    given = example(operation, *places, dtype=dtype, packed=packed)
    assert torch.equal(getattr(torch.ops.bakeout, operation)(*given), definition(*given))
    *before, mask, value = given
    assert not torch.equal(OPERATORS[operation](*given), definition(*before, ~mask, value))
    torch.library.opcheck(OPERATORS[operation], given)


def test_what_it_gives_is_contiguous_as_it_says_before_there_are_values():
    proj, mask, value = example("masked_geglu", 3, 5)
    turned = proj.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    torch.library.opcheck(masked_geglu, (turned, mask, value))
    assert masked_geglu(turned, mask, value).is_contiguous()


class Program(nn.Module):
    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = OPERATORS[operation]

    def forward(self, *given: Tensor) -> Tensor:
        return self.operation(*given) * 2


def test_an_export_keeps_it_whole_with_any_batch(operation, definition):
    given = example(operation, 3, 5)
    shapes = ({0: Dim.DYNAMIC}, *({} for _ in given[1:]))
    program = export(Program(operation), tuple(given), dynamic_shapes=(shapes,))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [getattr(torch.ops.bakeout, operation).default, torch.ops.aten.mul.Tensor]
    more = (given[0].repeat(3, 1, 1), *given[1:])
    assert torch.equal(program.module()(*more), definition(*more) * 2)


def test_a_compilation_keeps_it_in_one_graph(operation, definition):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(Program(operation), backend="aot_eager", fullgraph=True)
    for batch in (2, 4, 6):
        given = example(operation, 3, 5)
        given[0] = given[0][:1].expand(batch, -1, -1).contiguous()
        assert torch.equal(compiled(*given), definition(*given) * 2)
    assert not counters["graph_break"]
    # The first batch, and then any.
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compilation_to_machine_code_calls_it(operation, definition):
    # The code generator calls operators by a function with parameters of its own, whose names ours must not be.
    torch._dynamo.reset()
    given = example(operation, 3, 5)
    compiled = torch.compile(lambda *it: OPERATORS[operation](*it, by="reference") * 2, fullgraph=True)
    assert torch.equal(compiled(*given), definition(*given) * 2)


def test_wrong_shapes_are_refused_before_there_are_values(operation):
    mode = FakeTensorMode()
    first, *others = (mode.from_tensor(it) for it in example(operation, 3, 5))
    with pytest.raises(ValueError, match="does not end in"):
        OPERATORS[operation](first[:, :2], *others)


def test_another_kernel_is_never_taken_in_silence(operation):
    given = example(operation, 3, 5)
    assert torch.equal(OPERATORS[operation](*given, by="reference"), OPERATORS[operation](*given))
    with pytest.raises(KernelUnavailable, match=r"no kernel 'cudnn'.*choose from reference, triton"):
        OPERATORS[operation](*given, by="cudnn")
    for kernel in KERNELS[operation].keys() - {"reference"}:
        with pytest.raises(KernelUnavailable):
            OPERATORS[operation](*given, by=kernel)


def test_importing_them_loads_no_compiler():
    code = "import sys, bakeout.kernels.ops; print({'triton', 'bakeout.kernels.build'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stdout
