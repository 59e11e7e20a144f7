"""The operators: what PyTorch's own checks say of them, and that torch.export keeps them whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from bakeout.kernels import reference
from bakeout.kernels.ops import masked_geglu

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def example(*places: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    proj, value = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 10), places))
    return proj, torch.rand(places, generator=generator) < 0.4, value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(3, 5), (5,)])
def test_it_is_the_definition_and_a_proper_operator(places, dtype):
    given = example(*places, dtype=dtype)
    assert torch.equal(torch.ops.bakeout.masked_geglu(*given), reference.masked_geglu(*given))
    assert not torch.equal(masked_geglu(*given), reference.masked_geglu(given[0], ~given[1], given[2]))
    torch.library.opcheck(masked_geglu, given)


def test_an_export_keeps_it_whole_with_any_batch():
    class Program(nn.Module):
        def forward(self, proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
            return masked_geglu(proj, mask, value)

    given = example(3, 5)
    program = export(Program(), given, dynamic_shapes=({0: Dim.DYNAMIC}, {}, {}))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.bakeout.masked_geglu.default]
    more = (given[0].repeat(3, 1, 1), *given[1:])
    assert torch.equal(program.module()(*more), reference.masked_geglu(*more))


def test_wrong_shapes_are_refused_before_there_are_values():
    with FakeTensorMode(), pytest.raises(ValueError, match="does not end in"):
        masked_geglu(torch.empty(2, 4, 10), torch.empty(3, 5, dtype=torch.bool), torch.empty(3, 5))
