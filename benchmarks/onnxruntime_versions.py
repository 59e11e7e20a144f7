"""`MaskedGeglu` in ONNX Runtime on a GPU: our library's kernel, and the function body that runtimes without it run.

PyTorch's tensors are bound as they are, so that it reads and writes them in place. Runs are queued on one stream,
without waiting; the host prepares each, which bounds small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from budget import Shape, masked_geglu_bytes
from gpu_timing import Measure
from kernel_versions import DENSITY, Inputs, Version, Versions, draw
from torch import Tensor

from bakeout.kernels.build import library
from bakeout.kernels.errors import KernelUnavailable

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class StreamClock:
    """CUDA events around calls on one stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def prepare(self, calls: Sequence[Callable[[], Tensor]], alive: int) -> Measure:  # noqa: ARG002 - outputs are bound
        """Warm up, and give what queues the calls twice and times the second pass."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def measure() -> float:
            with torch.cuda.stream(self.stream):
                for event in (begin, end):
                    for call in calls:
                        call()
                    event.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / len(calls)

        measure()
        return measure


def masked_geglu_in_onnxruntime(shape: Shape, stream: int | None) -> Versions:
    """GEGLU, patched, as one node with a constant mask and values.

    Args:
        shape: of what sizes.
        stream: the CUDA stream that runs it; None runs it on the CPU.

    Raises:
        KernelUnavailable: this ONNX Runtime has no CUDA provider.
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
