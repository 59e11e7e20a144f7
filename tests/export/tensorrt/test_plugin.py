"""The plugin, by TensorRT's own decorators and classes: what it says of types, shapes and launches; and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from bakeout.editor.errors import InputError
from bakeout.export.custom_ops import DOMAIN, MASKED_GEGLU, PLUGIN
from bakeout.kernels import aot, reference

pytest.importorskip("triton")
DTYPES = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32}
# Batches, tokens, width: FFNs of Stable Diffusion, small ones, and one whose rows are not aligned.
SHAPES = ((2, 4096, 1280), (16, 64, 5120), (1, 1, 8), (3, 77, 37))


class Registry:
    """TensorRT's, as far as a creator is registered and asked for."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, *key: str) -> Any:
        return self.creators.get(key)


@pytest.fixture
def trt(bindings, monkeypatch) -> ModuleType:
    """The real bindings, with a registry of plugins."""
    registry = Registry()
    monkeypatch.setattr(bindings, "get_plugin_registry", lambda: registry)
    return bindings


@pytest.fixture
def plugin(trt) -> ModuleType:
    from bakeout.export.tensorrt import plugin

    return plugin


@pytest.fixture
def expressions(trt) -> type:
    """A builder of expressions of shapes that computes integers, in place of TensorRT's."""

    class Number(trt.IDimensionExpr):
        pass

    def number(value: int) -> Any:
        # They have no constructor, and only TensorRT makes them.
        made = Number.__new__(Number)
        made.value = value
        return made

    operations = trt.DimensionOperation
    compute = {
        operations.SUM: lambda a, b: a + b,
        operations.PROD: lambda a, b: a * b,
        operations.CEIL_DIV: lambda a, b: -(-a // b),
    }

    class Builder(trt.IExprBuilder):
        def constant(self, value: int) -> Any:
            return number(value)

        def operation(self, operation: Any, first: Any, second: Any) -> Any:
            return number(compute[operation](first.value, second.value))

    return Builder


def created(trt: ModuleType, request: str) -> Any:
    """The plugin that the ONNX parser makes of a node, of which the creator has no fields."""
    creator = trt.get_plugin_registry().get_creator("MaskedGeglu", PLUGIN["plugin_version"], PLUGIN["plugin_namespace"])
    kind = getattr(trt.QuickPluginCreationRequest, request)
    fields = trt.PluginFieldCollection([])
    return creator.create_plugin("MaskedGeglu", "bakeout", fields, trt.TensorRTPhase.BUILD, kind)


def described(trt: ModuleType, dtype: str, *shape: int, batches_from: int = 0) -> Any:
    """What TensorRT says of a tensor; the first dimension is dynamic where it is from some number."""
    tensor = trt.DynamicPluginTensorDesc()
    tensor.desc.dims = trt.Dims((-1, *shape[1:]) if batches_from else shape)
    tensor.min = trt.Dims((batches_from, *shape[1:]) if batches_from else shape)
    tensor.opt = tensor.max = trt.Dims(shape)
    tensor.desc.type, tensor.desc.format = getattr(trt.DataType, dtype), trt.TensorFormat.LINEAR
    return tensor


class Integers:
    """TensorRT's list of a kernel's arguments beside the tensors."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.nbSymExprs = 0

    def __setitem__(self, place: int, value: int) -> None:
        assert place == len(self.given) < self.nbSymExprs
        self.given.append(value)


@pytest.fixture
def built(trt, plugin, expressions, monkeypatch) -> Callable[..., SimpleNamespace]:
    """What TensorRT is given while it builds an engine with the plugin, by the template of an AOT plugin."""

    def build(dtype: str, batches: int, tokens: int, width: int, each: bool, kernel: str = "triton") -> SimpleNamespace:
        plugin.register(kernel)
        from tensorrt.plugin import _tensor as tensors

        # TensorRT's own objects cannot be read.
        monkeypatch.setattr(tensors, "SymExprImpl", lambda expression: expression._expr.value)
        builder = tensors.SymIntExpr._exprBuilder = expressions()
        places = (tokens, width) if each else (width,)
        shapes = ((batches, tokens, 2 * width), places, places)
        types = [getattr(trt.DataType, it) for it in (dtype, "BOOL", dtype)]
        made = created(trt, "STRICT_AOT")
        out_types = made.get_output_data_types(types, [len(shape) for shape in shapes])
        made.input_descs = [
            tensors.TensorDesc(
                tensors.ShapeExprs.from_tuple(tuple(tensors.ShapeExpr(builder.constant(it)) for it in shape)), kind
            )
            for shape, kind in zip(shapes, types, strict=True)
        ]
        made.output_descs = (made.register_function(*made.input_descs),)
        given = [
            described(trt, dtype, *shapes[0], batches_from=1), described(trt, "BOOL", *places),
            described(trt, dtype, *places), described(trt, dtype, batches, tokens, width, batches_from=1),
        ]  # fmt: skip
        combinations = made.get_supported_format_combinations(given, 3)
        made.set_tactic(0)
        launch, integers = SimpleNamespace(), Integers()
        made.get_launch_params([], given, 3, launch, integers, builder)
        name, ptx = made.get_kernel([it.desc for it in given[:3]], [it.desc for it in given[3:]])
        return SimpleNamespace(
            out_types=out_types, out_shape=tuple(it._expr.value for it in made.output_descs[0].shape_expr),
            combinations=[combinations[place : place + 4] for place in range(0, len(combinations), 4)],
            grid=(launch.grid_x, launch.grid_y, launch.grid_z), block=(launch.block_x, launch.block_y, launch.block_z),
            shared=launch.shared_mem, integers=tuple(integers.given), name=name, ptx=ptx.decode(),
        )  # fmt: skip

    return build


def ceil_div(size: int, by: int) -> int:
    return (size + by - 1) // by


@pytest.mark.claim("TensorRT's plugin decorators give it the launch that is described (bindings alone)")
@pytest.mark.parametrize("kernel", aot.KERNELS)
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_tensorrt_is_given_is_the_description(dtype, each, kernel, built, trt):
    for batches, tokens, width in SHAPES:
        found = built(dtype, batches, tokens, width, each, kernel)
        assert found.out_types == [getattr(trt.DataType, dtype)]
        assert found.out_shape == (batches, tokens, width)
        of_width = aot.KERNELS[kernel](DTYPES[dtype], width)
        assert aot.Launch(found.grid, found.block, found.integers) == of_width.launch(batches, tokens, each, ceil_div)
        code = aot.compiled(of_width)
        assert (found.name, found.ptx, found.shared) == (code.name, code.ptx, code.shared)
        # Three tensors, as many integers as TensorRT was given, and the result.
        name, parameters = aot.parameters(found.ptx)
        assert name == found.name
        assert [*parameters.values()] == ["b64"] * 3 + ["b32"] * len(found.integers) + ["b64"]


def test_types_are_tied_and_formats_linear(built, trt):
    found = built("HALF", 2, 64, 1280, True).combinations
    assert [[it.type for it in combination] for combination in found] == [
        [getattr(trt.DataType, it) for it in (dtype, "BOOL", dtype, dtype)] for dtype in ("HALF", "BF16", "FLOAT")
    ]
    assert {it.format for combination in found for it in combination} == {trt.TensorFormat.LINEAR}


def test_a_launch_that_is_too_large_and_shapes_that_are_others_are_refused(built, plugin, trt):
    built("HALF", 65_535, 1, 8, True)
    with pytest.raises(ValueError, match="make the batch or the pictures smaller"):
        built("HALF", 65_536, 1, 8, True)
    import tensorrt.plugin as trtp

    def tensor(ndim: int, *shape: int) -> Any:
        return SimpleNamespace(
            ndim=ndim, shape=trtp.Shape(described(trt, "HALF", *shape)), dtype=trt.DataType.HALF, shape_expr=shape
        )

    good = (tensor(3, 2, 4, 16), tensor(1, 8), tensor(1, 8))
    assert plugin.launch_of(aot.TritonKernel, *good, ceil_div)[1].integers == (2, 4, 8, 2, 0, 0)
    for place, wrong in ((0, tensor(2, 4, 16)), (1, tensor(2, 4, 8)), (2, tensor(1, -1)), (2, tensor(3, 1, 4, 8))):
        given = list(good)
        given[place] = wrong
        with pytest.raises(ValueError, match="MaskedGeglu is for a projection"):
            plugin.launch_of(aot.TritonKernel, *given, ceil_div)


def test_the_plugin_is_registered_once_and_a_later_kernel_takes_its_place(built, trt):
    assert built("HALF", 2, 64, 1280, True, "triton").name == "masked_geglu_kernel"
    assert built("HALF", 2, 64, 1280, True, "cuda").name == "masked_geglu_aot"
    assert built("HALF", 2, 64, 1280, True, "triton").name == "masked_geglu_kernel"
    creators = trt.get_plugin_registry().creators
    assert [*creators] == [("MaskedGeglu", "1", "bakeout")]
    assert len(next(iter(creators.values())).field_names) == 0


def test_a_node_says_which_implementation(plugin, trt):
    plugin.register()
    import tensorrt.plugin as trtp

    # What the parser reads by these types: an integer, and strings.
    kinds = {name: ir.convenience.convert_attribute(name, value).type for name, value in PLUGIN.items()}
    text = ir.AttributeType.STRING
    assert kinds == {"aot": ir.AttributeType.INT, "plugin_namespace": text, "plugin_version": text}
    classes = trtp._plugin_class
    for request, template in (("STRICT_AOT", classes._TemplateAOTPlugin), ("STRICT_JIT", classes._TemplateJITPlugin)):
        assert type(created(trt, request)) is template


def test_the_decorators_find_a_function_of_another_form(plugin, trt):
    plugin.register()
    import tensorrt.plugin as trtp

    desc = trtp.TensorDesc
    returned = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def other_order(mask, proj, value, outputs, tactic):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def nothing_said(proj, mask, value, outputs, tactic):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    other_order.__annotations__ = {"return": returned}
    for wrong in (other_order, nothing_said):
        with pytest.raises(ValueError, match=r"does not match|No return annotation"):
            trtp.aot_impl(plugin.PLUGIN_ID)(wrong)
    with pytest.raises(ValueError, match="already has"):
        trtp.register(plugin.PLUGIN_ID)(lambda: desc)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition_is_called_back_on_tensorrt_s_memory_and_stream(dtype, each, plugin, trt, monkeypatch):
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(plugin, "_on", lambda stream, device: seen.append((stream, device.type)) or nullcontext())
    # The same description of memory, for memory of the CPU.
    gpu = plugin._Memory

    def memory(*given: Any) -> np.ndarray:
        return np.asarray(SimpleNamespace(__array_interface__=gpu(*given).__cuda_array_interface__))

    monkeypatch.setattr(plugin, "_Memory", memory)
    plugin.register()

    proj, mask, value = example(DTYPES[dtype], 2, 5, 24, each)
    out = torch.full((2, 5, 24), torch.nan, dtype=DTYPES[dtype])
    inputs, kinds = (proj, mask, value), (dtype, "BOOL", dtype)
    descriptions = [described(trt, kind, *it.shape).desc for kind, it in zip(kinds, inputs, strict=True)]
    made = created(trt, "STRICT_JIT")
    made.get_output_data_types([it.type for it in descriptions], [it.ndim for it in inputs])
    made.enqueue(
        descriptions, [described(trt, dtype, *out.shape).desc], [it.data_ptr() for it in inputs], [out.data_ptr()],
        [it.stride() for it in inputs], [out.stride()], 7,
    )  # fmt: skip
    assert torch.equal(out, reference.masked_geglu(proj, mask, value))
    assert not torch.equal(out, reference.masked_geglu(proj, ~mask, value.nan_to_num(3)))
    assert seen == [(7, "cpu")]


def test_no_kernel_and_no_compiler_are_one_sentence(plugin, trt, monkeypatch):
    with pytest.raises(InputError, match="there is no kernel 'vulkan' for TensorRT: choose one of triton, cuda"):
        plugin.register("vulkan")
    monkeypatch.setattr(aot.build, "_nvcc_places", lambda: iter(()))
    aot.compiled.cache_clear()
    with pytest.raises(InputError, match="there is no nvcc to build the CUDA kernel; install"):
        plugin.register("cuda")


def example(
    dtype: torch.dtype, batches: int, tokens: int, width: int, each: bool, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values outside the mask are NaN, which nobody may see."""
    generator = torch.Generator().manual_seed(width)
    places = (tokens, width) if each else (width,)
    mask = torch.rand(places, generator=generator) < 0.3
    value = torch.randn(places, generator=generator).where(mask, torch.nan)
    proj = torch.randn((batches, tokens, 2 * width), generator=generator) * 2
    return proj.to(device, dtype), mask.to(device), value.to(device, dtype)


# On a GPU, with TensorRT


def node(dtype: torch.dtype, tokens: int, width: int, each: bool, ahead: bool) -> bytes:
    """An ONNX model of one node, for any batch."""
    kinds = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16, torch.float32: ir.DataType.FLOAT}
    places = [tokens, width] if each else [width]

    def value(name: str, kind: ir.DataType, *shape: Any) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    kind = kinds[dtype]
    inputs = [
        value("proj", kind, "batch", tokens, 2 * width), value("mask", ir.DataType.BOOL, *places),
        value("value", kind, *places),
    ]  # fmt: skip
    tape = ir.tape.Tape()
    attributes = PLUGIN | {"aot": int(ahead)}
    out = tape.op(MASKED_GEGLU, inputs, attributes, domain=DOMAIN, version=1)
    out.name, out.type, out.shape = "out", ir.TensorType(kind), ir.Shape(["batch", tokens, width])
    graph = ir.Graph(inputs, [out], nodes=tape.nodes, opset_imports={"": 20, DOMAIN: 1}, name="node")
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def run_on_gpu(model: bytes, tensors: dict[str, torch.Tensor], batches: tuple[int, ...]) -> list[torch.Tensor]:
    """What TensorRT's engine of a model gives for the first so many batches of a projection, in one context."""
    trt = pytest.importorskip("tensorrt")
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), [parser.get_error(it).desc() for it in range(parser.num_errors)]
    assert trt.LayerType.PLUGIN_V3 in [network.get_layer(it).type for it in range(network.num_layers)]
    profile = builder.create_optimization_profile()
    most = tuple(tensors["proj"].shape)
    profile.set_shape("proj", (1, *most[1:]), most, most)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(builder.build_serialized_network(network, config))
    context = engine.create_execution_context()
    results = []
    for count in batches:
        given = tensors | {"proj": tensors["proj"][:count].contiguous()}
        out = torch.full((count, *given["proj"].shape[1:2], given["value"].shape[-1]), torch.nan)
        out = out.to(given["proj"])
        for name, tensor in given.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_tensor_address("out", out.data_ptr())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        results.append(out)
    return results


@pytest.mark.claim("an engine of one MaskedGeglu is the definition: Triton's and CUDA C++'s PTX, and the JIT form")
@pytest.mark.tensorrt
@pytest.mark.parametrize("implementation", ["triton", "cuda", "called back"])
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(64, 5120), (77, 1280), (5, 37)])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_an_engine_of_one_node_is_the_definition(dtype, tokens, width, each, implementation):
    from bakeout.export.tensorrt import plugin

    ahead = implementation in aot.KERNELS
    plugin.register(implementation if ahead else "triton")
    proj, mask, value = example(dtype, 4, tokens, width, each, "cuda")
    tensors = {"proj": proj, "mask": mask, "value": value}
    batches = (4, 1, 3, 4)
    found = run_on_gpu(node(dtype, tokens, width, each, ahead), tensors, batches)
    for count, out in zip(batches, found, strict=True):
        expected = reference.masked_geglu(proj[:count].double(), mask, value.double())
        limit = 4 * torch.finfo(dtype).eps
        assert float((out.double() - expected).norm() / expected.norm()) <= limit
        whole = mask.expand(expected.shape)
        assert torch.equal(out[whole], value.expand(expected.shape)[whole])
        other = reference.masked_geglu(proj[:count].double(), mask.roll(1, -1), value.double().nan_to_num(3))
        assert float((out.double() - other).norm() / other.norm()) > 0.05
