"""The fused operations as PyTorch operators `bakeout::<name>`, which torch.export and torch.compile keep whole.

Importing this registers them. Each is the definition in `bakeout.kernels.reference` with one more argument, `by`, the
kernel that computes it, which is never another than the one that was asked for:

    reference   plain PyTorch, on any device
    triton      Triton, on an NVIDIA GPU
    cuda        CUDA C++, on an NVIDIA GPU; `masked_geglu` only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from bakeout.kernels import reference
from bakeout.kernels.errors import KernelUnavailable

# Operation → kernel → the module that has it, under the operation's name. Imported when it is asked for: not every
# machine has Triton, or a compiler.
KERNELS: Final[Mapping[str, Mapping[str, str]]] = {
    "masked_geglu": {
        "reference": "bakeout.kernels.reference",
        "triton": "bakeout.kernels.masked_geglu",
        "cuda": "bakeout.kernels.cuda",
    },
    "masked_geglu_linear": {
        "reference": "bakeout.kernels.reference",
        "triton": "bakeout.kernels.masked_geglu_linear",
    },
}


@torch.library.custom_op("bakeout::masked_geglu", mutates_args=())
def masked_geglu(proj: Tensor, mask: Tensor, value: Tensor, by: str = "reference") -> Tensor:
    """`bakeout.kernels.reference.masked_geglu`, by a kernel of `KERNELS`; contiguous.

    Raises:
        KernelUnavailable: there is no such kernel, or it cannot run here or on these tensors.
        TypeError, ValueError: as the definition raises them.
    """
    return _kernel("masked_geglu", by)(proj, mask, value).contiguous()


@torch.library.custom_op("bakeout::masked_geglu_linear", mutates_args=())
def masked_geglu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, value: Tensor, by: str = "reference"
) -> Tensor:
    """`bakeout.kernels.reference.masked_geglu_linear`, by a kernel of `KERNELS`; contiguous.

    Raises:
        KernelUnavailable: there is no such kernel, or it cannot run here or on these tensors.
        TypeError, ValueError: as the definition raises them.
    """
    return _kernel("masked_geglu_linear", by)(x, weight, bias, mask, value).contiguous()


@masked_geglu.register_fake
def _(proj: Tensor, mask: Tensor, value: Tensor, by: str = "reference") -> Tensor:  # noqa: ARG001 - shapes are the same
    reference.check_masked_geglu(proj, mask, value)
    return proj.new_empty((*proj.shape[:-1], value.shape[-1]))


@masked_geglu_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    value: Tensor,
    by: str = "reference",  # noqa: ARG001
) -> Tensor:
    reference.check_masked_geglu_linear(x, weight, bias, mask, value)
    return x.new_empty((*x.shape[:-1], value.shape[-1]))


def _kernel(operation: str, kernel: str) -> Callable[..., Tensor]:
    kernels = KERNELS[operation]
    if kernel not in kernels:
        raise KernelUnavailable(f"there is no kernel {kernel!a:.50} for {operation}; choose from {', '.join(kernels)}")
    module: Any = import_module(kernels[kernel])
    return module.__dict__[operation]  # type: ignore[no-any-return]
