"""The fused operations in every version that benchmarks/gpu_kernels.py times, and random inputs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from budget import Shape, linear_flops, masked_geglu_bytes, masked_geglu_linear_bytes
from torch import Tensor
from torch.nn import functional as F

from bakeout.kernels import ops, reference
from bakeout.kernels.build import library
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.packing import pack_mask

DENSITY = 0.01
COPY = "copy of as many bytes"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Inputs(NamedTuple):
    """One set of inputs of an FFN, and of GEGLU alone."""

    proj: Tensor  # [batch, N, 2h]
    x: Tensor  # [batch, N, d]
    weight: Tensor  # [2h, d]
    bias: Tensor  # [2h]
    weight_2: Tensor  # [d, h]
    bias_2: Tensor  # [d]
    mask: Tensor  # bool [N, h]
    bits: Tensor  # the mask, packed
    value: Tensor  # [N, h]


Version = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Versions:
    """All ways to compute one thing.

    Attributes:
        baselines: name → without a kernel of ours. What the first gives, every fused one has to give.
        fused: name → with one.
        needs: name of a fused one → (operation, kernel).
        bytes: that a fused one must move.
        flops: of its products.
    """

    baselines: Mapping[str, Version]
    fused: Mapping[str, Version]
    needs: Mapping[str, tuple[str, str]]
    bytes: float
    flops: int


def masked_geglu(shape: Shape, backend: str) -> Versions:
    """GEGLU, patched."""
    patched, stock = compiled(reference.masked_geglu, backend), compiled(geglu, backend)
    return Versions(
        baselines={
            "patched, eager": lambda it: reference.masked_geglu(it.proj, it.mask, it.value),
            "patched, compiled": lambda it: patched(it.proj, it.mask, it.value),
            "stock, eager": lambda it: geglu(it.proj),
            "stock, compiled": lambda it: stock(it.proj),
            # Three quarters of proj, read and written, are as many bytes as both halves in and one out.
            COPY: lambda it: it.proj.flatten()[: 3 * it.proj.numel() // 4].clone(),
        },
        fused={
            "triton": lambda it: ops.masked_geglu(it.proj, it.bits, it.value, "triton"),
            "cuda": lambda it: ops.masked_geglu(it.proj, it.bits, it.value, "cuda"),
        },
        needs={kernel: ("masked_geglu", kernel) for kernel in ("triton", "cuda")},
        bytes=masked_geglu_bytes(shape, DENSITY),
        flops=0,
    )


def masked_geglu_linear(shape: Shape, backend: str) -> Versions:
    """FFN-1, patched."""
    patched = compiled(reference.masked_geglu_linear, backend)
    stock = compiled(lambda x, weight, bias: geglu(F.linear(x, weight, bias)), backend)
    return Versions(
        baselines={
            "patched, eager": lambda it: reference.masked_geglu_linear(it.x, it.weight, it.bias, it.mask, it.value),
            "patched, compiled": lambda it: patched(it.x, it.weight, it.bias, it.mask, it.value),
            "stock, eager": lambda it: geglu(F.linear(it.x, it.weight, it.bias)),
            "stock, compiled": lambda it: stock(it.x, it.weight, it.bias),
            "Linear alone": lambda it: F.linear(it.x, it.weight, it.bias),
        },
        fused={
            "triton": lambda it: ops.masked_geglu_linear(it.x, it.weight, it.bias, it.bits, it.value, "triton"),
            "Linear, triton": lambda it: after_linear(it, "triton"),
            "Linear, cuda": lambda it: after_linear(it, "cuda"),
        },
        needs={
            "triton": ("masked_geglu_linear", "triton"),
            "Linear, triton": ("masked_geglu", "triton"),
            "Linear, cuda": ("masked_geglu", "cuda"),
        },
        bytes=masked_geglu_linear_bytes(shape, DENSITY),
        flops=linear_flops(shape),
    )


def whole_ffn(shape: Shape, backend: str) -> Versions:
    """FFN-1, patched, and FFN-2."""
    first = masked_geglu_linear(shape, backend)
    patched = compiled(
        lambda x, w, b, mask, value, w2, b2: F.linear(reference.masked_geglu_linear(x, w, b, mask, value), w2, b2),
        backend,
    )
    stock = compiled(lambda x, w, b, w2, b2: F.linear(geglu(F.linear(x, w, b)), w2, b2), backend)
    return Versions(
        baselines={
            "patched, eager": then_second(first.baselines["patched, eager"]),
            "patched, compiled": lambda it: patched(
                it.x, it.weight, it.bias, it.mask, it.value, it.weight_2, it.bias_2
            ),
            "stock, eager": then_second(first.baselines["stock, eager"]),
            "stock, compiled": lambda it: stock(it.x, it.weight, it.bias, it.weight_2, it.bias_2),
        },
        fused={name: then_second(run) for name, run in first.fused.items()},
        needs=first.needs,
        bytes=first.bytes + 2 * (shape.rows * (shape.h + shape.d) + shape.d * (shape.h + 1)),
        flops=first.flops + first.flops // 2,
    )


def tiles(shape: Shape, backend: str, capability: tuple[int, int]) -> Versions:
    """FFN-1, patched, by every tile that the Triton kernel has for a GPU, and by the one that it takes, `triton`.

    Raises:
        KernelUnavailable: Triton is not there.
    """
    triton = import_module(ops.KERNELS["masked_geglu_linear"]["triton"])

    def by(config: Any) -> Version:
        return lambda it: triton.masked_geglu_linear(it.x, it.weight, it.bias, it.bits, it.value, config=config)

    own = masked_geglu_linear(shape, backend)
    configs = triton.CONFIGS[triton.unit_for(capability, torch.float16, aligned=True)]
    fused = {in_words(config): by(config) for config in configs} | {"triton": own.fused["triton"]}
    return replace(own, fused=fused, needs=dict.fromkeys(fused, own.needs["triton"]))


def in_words(tile: Any) -> str:
    """A configuration of `bakeout.kernels.masked_geglu_linear`."""
    sizes = f"{tile.block_m} x {tile.block_n} x {tile.block_k}"
    return f"{sizes}, {tile.num_warps} warps, {tile.num_stages} stages"


def masked_geglu_in_onnxruntime(shape: Shape, stream: int | None) -> Versions:
    """GEGLU, patched, as one node with a constant mask and values: by our library, and by its function body.

    PyTorch's tensors are bound as they are, so that it reads and writes them in place. Runs are queued on one stream,
    without waiting.

    Args:
        shape: of what sizes.
        stream: the CUDA stream that runs it; None runs it on the CPU.

    Raises:
        KernelUnavailable: this ONNX Runtime has no CUDA provider.
        ImportError: there is no ONNX Runtime, or no onnx-ir.
    """
    import onnxruntime

    device = "cpu" if stream is None else "cuda"
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise KernelUnavailable(
            "this ONNX Runtime has no CUDA provider: install onnxruntime-gpu in place of onnxruntime"
        )
    model = model_of(shape)
    return Versions(
        baselines={"function body": _session(model, device, stream, with_library=False)},
        fused={"library": _session(model, device, stream, with_library=True)},
        needs={"library": ("masked_geglu", "cuda")},
        bytes=masked_geglu_bytes(shape, DENSITY),
        flops=0,
    )


def model_of(shape: Shape) -> bytes:
    """An ONNX model of fp16 with one node of ours and its function body."""
    import onnx_ir as ir

    from bakeout.export.custom_ops import DOMAIN, MASKED_GEGLU, PLUGIN, VERSION, functions_of

    given = draw(shape, torch.device("cpu"))
    opsets = {"": 20, DOMAIN: VERSION}
    half = ir.TensorType(ir.DataType.FLOAT16)
    proj = ir.Value(name="proj", shape=ir.Shape(given.proj.shape), type=half)
    constants = [
        ir.Value(name=name, const_value=ir.tensor(tensor.numpy(), name=name))
        for name, tensor in {"mask": given.mask, "value": given.value}.items()
    ]
    out = ir.Value(name="out", shape=ir.Shape((shape.batch, shape.tokens, shape.h)), type=half)
    node = ir.node(MASKED_GEGLU, [proj, *constants], PLUGIN, domain=DOMAIN, outputs=[out])
    graph = ir.Graph([proj], [out], nodes=[node], initializers=constants, opset_imports=opsets, name="masked_geglu")
    made: bytes = ir.to_proto(ir.Model(graph, ir_version=10, functions=functions_of(graph))).SerializeToString()
    return made


OPERATIONS: Mapping[str, Callable[..., Versions]] = {
    "masked_geglu": masked_geglu,
    "masked_geglu_linear": masked_geglu_linear,
    "whole FFN": whole_ffn,
}


def draw(shape: Shape, device: torch.device) -> Inputs:
    """Random inputs in fp16."""

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, dtype=torch.float16, device=device).mul_(scale)

    mask = torch.rand(shape.tokens, shape.h, device=device) < DENSITY
    return Inputs(
        proj=normal(shape.batch, shape.tokens, 2 * shape.h),
        x=normal(shape.batch, shape.tokens, shape.d),
        weight=normal(2 * shape.h, shape.d, scale=1 / math.sqrt(shape.d)),
        bias=normal(2 * shape.h, scale=0.25),
        weight_2=normal(shape.d, shape.h, scale=1 / math.sqrt(shape.h)),
        bias_2=normal(shape.d, scale=0.25),
        mask=mask,
        bits=pack_mask(mask),
        value=normal(shape.tokens, shape.h),
    )


def geglu(proj: Tensor) -> Tensor:
    """The stock GEGLU, as diffusers computes it."""
    a, g = proj.chunk(2, dim=-1)
    return a * F.gelu(g)


def after_linear(inputs: Inputs, kernel: str) -> Tensor:
    """FFN-1 by the library's Linear and a kernel of `masked_geglu`."""
    proj = F.linear(inputs.x, inputs.weight, inputs.bias)
    patched: Tensor = ops.masked_geglu(proj, inputs.bits, inputs.value, kernel)
    return patched


def then_second(first: Version) -> Version:
    """What `first` computes, through FFN-2."""
    return lambda it: F.linear(first(it), it.weight_2, it.bias_2)


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Any]:
    """The function through torch.compile, as one graph, for one shape."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def _session(model: bytes, device: str, stream: int | None, with_library: bool) -> Version:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if with_library:
        options.register_custom_ops_library(str(library("cpu" if stream is None else "cuda")))
    settings = {} if stream is None else {"user_compute_stream": str(stream)}
    session = onnxruntime.InferenceSession(model, options, providers=[(PROVIDERS[device], settings)])
    queued = onnxruntime.RunOptions()
    queued.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(inputs: Inputs) -> Tensor:
        proj = inputs.proj
        out = torch.empty((*proj.shape[:-1], proj.shape[-1] // 2), dtype=proj.dtype, device=proj.device)
        binding = session.io_binding()
        binding.bind_input("proj", device, 0, np.float16, proj.shape, proj.data_ptr())
        binding.bind_output("out", device, 0, np.float16, out.shape, out.data_ptr())
        session.run_with_iobinding(binding, queued)
        return out

    return run
