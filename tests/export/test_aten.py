"""Each ATen operator as ONNX Runtime computes it, against PyTorch, at sizes that it was not traced with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from bakeout.editor.errors import InputError
from bakeout.export import aten
from bakeout.export.aten import graph_from_program
from bakeout.export.custom_ops import functions_of
from bakeout.kernels.ops import masked_geglu

OPSET = 20


class Program(nn.Module):
    """A function with parameters `first` [6, 4], `second` [6] and `kernel` [6, 2, 3, 3], and a buffer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("first", (6, 4)), ("second", (6,)), ("kernel", (6, 2, 3, 3))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False))
        self.register_buffer("places", torch.arange(9), persistent=False)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        result = self.function(self, *inputs)
        return result if isinstance(result, tuple) else (result,)


def exported(function: Callable[..., Any], *inputs: Tensor) -> ExportedProgram:
    return export(
        Program(function).eval(),
        inputs,
        dynamic_shapes=(tuple(dict.fromkeys(range(it.ndim), Dim.AUTO) for it in inputs),),
    )


def translated(program: ExportedProgram) -> ir.Model:
    graph = graph_from_program(program, {name: f"stored.{name}" for name in program.state_dict}, OPSET)
    for name, parameter in program.state_dict.items():
        graph.initializers[f"stored.{name}"].const_value = ir.tensor(parameter.numpy())
    return ir.Model(graph, ir_version=10, functions=functions_of(graph))


def computed(model: ir.Model, *inputs: Tensor) -> list[Tensor]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {it.name: value.numpy() for it, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(it)) for it in session.run(None, given)]


def relative_rms(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected).square().mean().sqrt() / expected.double().square().mean().sqrt())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def attention(p: Program, x: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x * 2, x + 1, mask, **more)


def causal(_: Program, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[2])
    mask = (places[None, :] <= places[:, None])[None, None].expand(x.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(x, x, x, mask)


# A name → a function, its inputs as traced, and as computed.
CASES: dict[str, tuple[Callable[..., Any], list[Tensor], list[Tensor]]] = {
    "linear of a matrix": (lambda p, x: F.linear(x, p.first, p.second), [random(2, 4)], [random(1, 4)]),
    "linear of a batch": (lambda p, x: F.linear(x, p.first, p.second), [random(2, 3, 4)], [random(5, 1, 4)]),
    "linear without bias": (lambda p, x: F.linear(x, p.first), [random(2, 3, 4)], [random(1, 2, 4)]),
    "conv": (
        lambda p, x: F.conv2d(x, p.kernel, p.second, stride=(2, 1), padding=(1, 0), groups=2),
        [random(2, 4, 8, 6)], [random(1, 4, 5, 9)],
    ),
    "conv without bias": (
        lambda p, x: F.conv2d(x, p.kernel, None, dilation=(1, 2)), [random(2, 2, 8, 6)], [random(3, 2, 5, 9)],
    ),
    "group_norm of pictures": (
        lambda p, x: F.group_norm(x, 3, p.second, p.second + 1, 1e-3), [random(2, 6, 4, 3)], [random(1, 6, 2, 5)],
    ),
    "group_norm of rows": (
        lambda p, x: F.group_norm(x, 2, p.second, p.second + 1), [random(2, 6, 4)], [random(3, 6, 7)],
    ),
    "layer_norm": (
        lambda p, x: F.layer_norm(x, (6,), p.second, p.second + 1, 1e-2), [random(2, 3, 6)], [random(1, 5, 6)],
    ),
    "attention": (attention, [random(2, 3, 5, 4)], [random(1, 3, 2, 4)]),
    "attention with a scale": (
        lambda p, x: attention(p, x, scale=0.3), [random(2, 3, 5, 4)], [random(3, 1, 7, 4)],
    ),
    "attention with a mask of numbers": (
        attention, [random(2, 3, 5, 4), random(5, 5)], [random(1, 3, 2, 4), random(2, 2)],
    ),
    "attention with a causal mask": (causal, [random(2, 3, 5, 4)], [random(1, 3, 8, 4)]),
    "silu, sigmoid, exp, sin, cos": (
        lambda p, x: (F.silu(x), torch.sigmoid(x), torch.exp(x), torch.sin(x), torch.cos(x)), [random(4)], [random(9)],
    ),
    "gelu": (lambda p, x: (F.gelu(x), F.gelu(x, approximate="tanh")), [random(4)], [random(9)]),
    "clamp": (lambda p, x: (x.clamp(-0.5, 0.5), x.clamp(min=0.1)), [random(4)], [random(9)]),
    "arithmetic": (lambda p, x: ((x + 2 - p.second) * x / 3, x * 1.0, x + 0, x / 1), [random(2, 6)], [random(1, 6)]),
    "arithmetic of integers and floats": (
        lambda p, x, n: (x * n, n / 2, n * 1.5, n * 1.0, n + 1, n == 2), [random(4), torch.arange(4)],
        [random(7), torch.arange(7)],
    ),
    "merging and splitting axes": (
        lambda p, x: (x.flatten(1), x.reshape(x.shape[0], -1, 2, 2), x.view(-1, x.shape[2])),
        [random(2, 3, 4)], [random(5, 2, 4)],
    ),
    "splitting one axis into two": (
        lambda p, x, y: (
            y.reshape(x.shape[0], x.shape[2], x.shape[3], 6).permute(0, -1, 1, 2),
            y.transpose(0, 1).contiguous().reshape(x.shape[2] * x.shape[3], 3, x.shape[0] * 2),
        ),
        [random(2, 6, 4, 3), random(2, 12, 6)], [random(1, 6, 2, 5), random(1, 10, 6)],
    ),
    "axes that are of one size in the example": (
        lambda p, x: x.reshape(x.shape[3], x.shape[2], x.shape[1], x.shape[0]),
        [random(2, 3, 3, 4)], [random(2, 5, 3, 7)],
    ),
    "numbers up to a size": (
        lambda p, x: (torch.arange(x.shape[0], dtype=torch.float32) * x, torch.arange(x.shape[0])),
        [random(4)], [random(9)],
    ),
    "moving axes": (
        lambda p, x: (x.transpose(-1, -2), x.permute(2, -3, 1), x.unsqueeze(-1), x.unsqueeze(1)), [random(2, 3, 4)],
        [random(5, 1, 2)],
    ),
    "slices": (
        lambda p, x: (x[:, 1:], x[:, ::2], x[:, -2:], p.places[: x.shape[1]]), [random(2, 5)], [random(1, 7)],
    ),
    "chunk and cat": (
        lambda p, x: (
            torch.cat([x.chunk(2, dim=-1)[1], x, p.second[None].expand(x.shape[0], -1)], dim=-1), torch.concat([x, x]),
        ),
        [random(2, 4)], [random(3, 4)],
    ),
    "chunks that are not equal": (lambda p, x: x.chunk(3, dim=1), [random(2, 5)], [random(3, 5)]),
    "pad": (
        lambda p, x: (F.pad(x, (0, 1, 2, 3)), F.pad(x, (1, 1), value=2.0)), [random(2, 3, 4)], [random(1, 2, 5)],
    ),
    "upsample": (
        lambda p, x: F.interpolate(x, scale_factor=2.0, mode="nearest"), [random(2, 3, 4, 5)], [random(1, 3, 2, 7)],
    ),
    "embedding": (
        lambda p, ids: F.embedding(ids, p.first), [torch.tensor([[0, 5], [3, 1]])], [torch.tensor([[2, 2, 4]])],
    ),
    "the row of the first end mark": (
        lambda p, x, ids: x[torch.arange(x.shape[0]), (ids.to(torch.int) == 7).int().argmax(dim=-1)],
        [random(2, 4, 3), torch.tensor([[1, 7, 7, 0], [7, 1, 1, 7]])], [random(1, 3, 3), torch.tensor([[1, 7, 7]])],
    ),
    "embedding of what is known": (
        lambda p, x: x + F.embedding(p.places[2:4], p.first)[None], [random(2, 2, 4)], [random(1, 2, 4)],
    ),
    "comparisons": (
        lambda p, x, y: (x > y, x == y, x < y, (x < y).logical_not(), x < 0.3, (x > y) & (x < 2), (x < y) | (y == 2)),
        [torch.tensor([1.0, 2, 2]), torch.tensor([2.0, 2, 1])], [torch.tensor([0.0, 2, 2, 3]), torch.tensor([2.0])],
    ),
    "any": (
        lambda p, x: ((x < 0).any(-1), (x < -1).any(0, keepdim=True)), [random(4, 3)], [random(1, 2)],
    ),
    "sums and means": (
        lambda p, x: (x.sum(-1), x.mean((0, 2), keepdim=True), x.to(torch.int32).sum(1, dtype=torch.int32)),
        [random(2, 3, 4) * 9], [random(5, 1, 3) * 9],
    ),
    "relu, square, sqrt": (lambda p, x: (F.relu(x), x.square(), x.square().sqrt()), [random(4)], [random(9)]),
    "where": (lambda p, x: torch.where(x < 0, x, p.second), [random(2, 6)], [random(5, 6)]),
    "index_select": (
        lambda p, x: (x.index_select(-1, p.places[1:3]), x.index_select(0, x.argmax(1))),
        [random(4, 4)], [random(5, 5)],
    ),
    "scatter": (
        lambda p, x: (
            x + torch.zeros(9).scatter(0, p.first.argmax(0), 1.0),
            x + torch.full((9,), 0.5).scatter(0, p.places[2:8], p.second),
        ),
        [random(2, 9)], [random(5, 9)],
    ),
    "masked_geglu": (
        lambda p, x: masked_geglu(F.linear(x, p.first), p.second[:3] < 0, p.second[3:]),
        [random(2, 3, 4)], [random(1, 5, 4)],
    ),
    "topk": (lambda p, x: tuple(x.topk(2, dim=-1)), [random(4, 5)], [random(2, 3, 9)[0]]),
    "other dtypes": (
        lambda p, x: (x.to(torch.float16), (x * 4).to("cpu", torch.int32), x.to(p.first.device)),
        [random(2, 3)], [random(1, 5)],
    ),
    "nothing to do": (lambda p, x: F.dropout(x, 0.5, False).contiguous().float()[:], [random(2, 3)], [random(1, 5)]),
}  # fmt: skip


@cache
def program_of(case: str) -> ExportedProgram:
    function, example, _ = CASES[case]
    return exported(function, *example)


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_computes_what_pytorch_computes(case: str) -> None:
    function, example, other = CASES[case]
    model = translated(program_of(case))
    for inputs in (example, other):
        expected = Program(function)(*inputs)
        for found, right in zip(computed(model, *inputs), expected, strict=True):
            if right.is_floating_point():
                assert relative_rms(found, right) <= 1e-6
            else:
                assert torch.equal(found, right)


def test_another_weight_is_seen() -> None:
    case = "linear of a matrix"
    model = translated(program_of(case))
    weight = model.graph.initializers["stored.first"]
    changed = weight.const_value.numpy().copy()
    changed[0, 0] += 0.1
    weight.const_value = ir.tensor(changed)
    (found,) = computed(model, random(2, 4))
    assert relative_rms(found, Program(CASES[case][0])(random(2, 4))[0]) > 1e-3


def test_a_row_that_is_masked_all_over_is_no_nan() -> None:
    def masked(_: Program, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, mask)

    model = translated(exported(masked, random(2, 3, 5, 4), torch.ones(5, 5, dtype=torch.bool)))
    (found,) = computed(model, random(1, 1, 2, 4), torch.tensor([[True, False], [False, False]]))
    assert found.isfinite().all()


def test_parameters_are_initializers_of_the_names_given_as_they_are() -> None:
    program = exported(lambda p, x: F.conv2d(F.linear(x, p.first), p.kernel, p.second), random(2, 2, 3, 4))
    model = translated(program)
    named = {name: it for name, it in model.graph.initializers.items() if name.startswith("stored.")}
    assert {name.removeprefix("stored.") for name in named} == program.state_dict.keys()
    for name, parameter in program.state_dict.items():
        assert tuple(named[f"stored.{name}"].shape or ()) == parameter.shape
    assert all(it.const_value.size < 10 for name, it in model.graph.initializers.items() if name not in named)


@pytest.mark.parametrize("k", [1, 2, 32, 100, 1000, 3071, 3072])
def test_of_equal_values_topk_takes_those_of_the_lower_index(k: int) -> None:
    """ONNX says so and PyTorch does not, so the expected indices are those of a stable sort."""
    model = translated(exported(lambda p, x: x.topk(k, dim=-1).indices, random(2, 3, 3072)))
    ties = torch.randint(0, 40, (2, 3, 3072), generator=torch.Generator().manual_seed(k)).float()
    (found,) = computed(model, ties)
    expected = ties.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(found, expected)
    # With values that are all apart there is nothing to tell.
    assert not torch.equal(found, (ties + random(2, 3, 3072) * 1e-3).sort(dim=-1, descending=True).indices[..., :k])


def test_what_is_constant_is_pytorchs_own_value() -> None:
    def frequencies(_: Program, x: Tensor) -> Tensor:
        return x[:, None] * torch.exp(torch.arange(0, 3, dtype=torch.float32) * -1.7 / 3)[None]

    model = translated(exported(frequencies, random(4)))
    values = [it.const_value.numpy() for it in model.graph.initializers.values() if "." not in str(it.name)]
    expected = torch.exp(torch.arange(0, 3, dtype=torch.float32) * -1.7 / 3)[None].numpy()
    assert any(it.shape == expected.shape and (it == expected).all() for it in values)
    assert {node.op_type for node in model.graph} == {"Unsqueeze", "Mul"}


def test_nothing_of_the_source_is_in_the_graph() -> None:
    model = translated(exported(lambda p, x: F.linear(x, p.first), random(2, 4)))
    assert not any(node.doc_string or node.metadata_props for node in model.graph)
    assert __file__.encode() not in ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda p, x: torch.erfinv(x), "aten.erfinv.default"),
        (lambda p, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "aten.upsample_bilinear2d.vec"),
        (lambda p, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "aten.scaled_dot_product_attention"),
        (lambda p, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "aten.scaled_dot_product_attention"),
        (lambda p, x: F.dropout(x, 0.5, True), "aten.dropout.default"),
        (lambda p, x: F.pad(x, (1, 1, 1, 1), mode="replicate"), "aten.pad.default"),
        (lambda p, x: x.chunk(4, dim=-1), "aten.chunk.default"),
        (lambda p, x: F.conv2d(x, p.kernel[:, :1].expand(-1, 3, -1, -1), padding="same"), "aten.conv2d.padding"),
        (lambda p, x: F.group_norm(x, 3), "aten.group_norm.default"),
        (lambda p, x: F.layer_norm(x, (5,)), "aten.layer_norm.default"),
        (lambda p, x: torch.add(x, x, alpha=2), "aten.add.Tensor"),
        (lambda p, x: x * x.shape[0], "aten.mul.Tensor"),
        (lambda p, x: x[:, torch.tensor([0, 1])], "aten.index.Tensor"),
        (lambda p, x: x.int() & x.int(), "aten.__and__.Tensor"),
        (lambda p, x: x.flatten().scatter(0, p.places[:6], p.second), "aten.scatter.src"),
        (lambda p, x: torch.arange(6.0).scatter(0, p.places[:6], p.second), "aten.scatter.src"),
        (lambda p, x: torch.zeros(6, 4).scatter(1, p.first.int().long().clamp(0, 3), 1.0), "aten.scatter.value"),
        (
            lambda p, x: torch.zeros(9).scatter(0, x.flatten().argmax(0, keepdim=True).expand(x.shape[0]), 1.0),
            "aten.scatter.value",
        ),
        (lambda p, x: (x < 0).sum(-1), "aten.sum.dim_IntList"),
        (lambda p, x: torch.where(x < 0, x, x.int()), "aten.where.self"),
        (lambda p, x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2)), "aten.upsample_nearest2d.vec"),
    ],
)
def test_what_has_no_translation_is_refused_in_a_sentence(function: Callable[..., Any], operator: str) -> None:
    with pytest.raises(InputError, match=rf"uses {operator}.* in a way that bakeout cannot export") as caught:
        translated(exported(function, random(2, 3, 4, 5)))
    assert "\n" not in str(caught.value)


def test_every_translation_is_tried() -> None:
    tried = {node.target for case in CASES for node in program_of(case).graph.nodes}
    assert not {str(it) for it in aten._OPERATORS.keys() - tried}
