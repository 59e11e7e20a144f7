"""`MaskedGeglu` for TensorRT: a plugin of its Python interface, with which its ONNX parser reads our nodes.

The parser asks the registry for a plugin of a node's op type, `plugin_version` and `plugin_namespace`, and takes the
function body only where there is none. The node's attribute `aot` says which implementation. 1 is the kernel: its PTX
becomes a part of the engine, which then runs without Python. 0 is the definition in PyTorch, called back while the
engine runs, without CUDA graphs, in a process that has called `register`: with it a fault is found in the kernel, or
not there.

The plugin has no fields. Types are tied: projection, values and result are all fp16, all bf16 or all fp32, and the mask
is bool, bytes of 0 and 1. All are linear, which is contiguous. TensorRT's API asks for 256 bytes of alignment of what
is given to an engine (`IExecutionContext::setTensorAddress`), and says of no tensor inside one that it has less; 16 are
enough here. Rows of a width that is not a multiple of 16 bytes are read one element at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.export.custom_ops import DOMAIN, MASKED_GEGLU
from bakeout.export.tensorrt import library
from bakeout.kernels import reference
from bakeout.kernels.aot import KERNELS, Code, Kernel, Launch, compiled
from bakeout.kernels.errors import KernelUnavailable

PLUGIN_ID: Final = f"{DOMAIN}::{MASKED_GEGLU}"
_FLOATS: Final = "FP16|BF16|FP32"
_TYPES: Final = f"{_FLOATS}, BOOL, {_FLOATS}, {_FLOATS}"
# By the names of TensorRT's.
_DTYPES: Final = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32, "BOOL": torch.bool}
# The integers as which memory is taken: the interface between libraries has no bf16.
_INTEGERS: Final = {1: "|u1", 2: "<i2", 4: "<i4"}


def register(kernel: str = "triton") -> None:
    """Make the plugin known to TensorRT, before a graph with our nodes is parsed. To call it again changes the kernel.

    Args:
        kernel: of `bakeout.kernels.aot.KERNELS`, with which engines compute that are built from here on.

    Raises:
        InputError: there is no such kernel, what compiles it is missing or fails, or TensorRT cannot be used.
    """
    if kernel not in KERNELS:
        raise InputError(f"there is no kernel {kernel!a:.100} for TensorRT: choose one of {', '.join(KERNELS)}")
    library.tensorrt()
    plugin: Any = import_module("tensorrt.plugin")
    try:
        # TensorRT only prints what is raised while it calls back.
        compiled(KERNELS[kernel](torch.float16, 8))
    except KernelUnavailable as error:
        raise InputError(str(error)) from error

    def described(proj: Any, mask: Any, value: Any) -> Any:  # noqa: ARG001 - TensorRT calls it so, as the others
        out = proj.like()
        out.shape_expr[proj.ndim - 1] = value.shape_expr[value.ndim - 1]
        return out

    def combinations(proj: Any, mask: Any, value: Any, outputs: Any) -> Any:  # noqa: ARG001
        return [plugin.AutoTuneCombination(_TYPES, "LINEAR")]

    def computed(proj: Any, mask: Any, value: Any, outputs: Any, stream: int) -> None:
        given = [tensor_of(it) for it in (proj, mask, value)]
        out = tensor_of(outputs[0])
        with _on(stream, out.device):
            out.copy_(reference.masked_geglu(*given))

    def launched(proj: Any, mask: Any, value: Any, outputs: Any, tactic: int) -> Any:  # noqa: ARG001
        code, launch = launch_of(KERNELS[kernel], proj, mask, value, plugin.cdiv)
        parameters = plugin.KernelLaunchParams(*launch.grid, *launch.block, code.shared)
        integers = plugin.SymIntExprs.from_tuple(tuple(plugin.SymInt32(it) for it in launch.integers))
        return code.name, code.ptx, parameters, integers

    # TensorRT reads annotations, and takes none but its own.
    described.__annotations__ = dict.fromkeys(("proj", "mask", "value", "return"), plugin.TensorDesc)
    launched.__annotations__ = {"return": tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]}
    combinations.__annotations__ = computed.__annotations__ = {}

    if not hasattr(getattr(plugin.op, DOMAIN, None), MASKED_GEGLU):
        plugin.register(PLUGIN_ID)(described)
        plugin.autotune(PLUGIN_ID)(combinations)
        plugin.impl(PLUGIN_ID)(computed)
    plugin.aot_impl(PLUGIN_ID)(launched)


def launch_of(
    kernel: type[Kernel], proj: Any, mask: Any, value: Any, ceil_div: Callable[[Any, int], Any]
) -> tuple[Code, Launch[Any]]:
    """The kernel for some tensors, and its launch in expressions of their shapes.

    Args:
        kernel: of `bakeout.kernels.aot.KERNELS`.
        proj: TensorRT's description of [batches, tokens, 2h], with the largest shape.
        mask: that of [tokens, h] or [h].
        value: as the mask.
        ceil_div: the quotient of an expression and an integer, rounded up.

    Raises:
        ValueError: the shapes are others, or too large.
    """
    *_, width = tuple(value.shape)
    if proj.ndim != 3 or mask.ndim not in (1, 2) or value.ndim != mask.ndim or width < 1:
        raise ValueError(
            f"{MASKED_GEGLU} is for a projection [batches, tokens, 2h] with a mask and values [tokens, h] or [h], of a "
            f"known h: the projection has {proj.ndim} dimensions, the mask {mask.ndim} and the values {value.ndim}"
        )
    of_width, each_token = kernel(_DTYPES[proj.dtype.name], width), mask.ndim == 2
    most_batches, most_tokens, _ = proj.shape.max if proj.shape.is_dynamic else tuple(proj.shape)
    of_width.launch(most_batches, most_tokens, each_token, lambda size, by: -(-size // by)).check()
    batches, tokens = proj.shape_expr[0], proj.shape_expr[1]
    return compiled(of_width), of_width.launch(batches, tokens, each_token, ceil_div)


def tensor_of(tensor: Any) -> Tensor:
    """The memory of a contiguous tensor that TensorRT gives, as PyTorch's, without a copy."""
    dtype = _DTYPES[tensor.dtype.name]
    memory = _Memory(tensor.data_ptr, tuple(tensor.shape), _INTEGERS[dtype.itemsize])
    return torch.as_tensor(memory).view(dtype)


class _Memory:
    """Memory of a GPU by the CUDA array interface, version 3."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": kind, "data": (address, False), "version": 3}


def _on(stream: int, device: torch.device) -> AbstractContextManager[object]:
    """PyTorch's operations on a CUDA stream that is not its own."""
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))  # type: ignore[no-untyped-call]
