"""The kernels of CUDA C++, for NVIDIA GPUs of compute capability 8.0 and later; nvcc builds them at their first use."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final

import torch
from torch import Tensor

from bakeout.kernels import build
from bakeout.kernels.errors import KernelUnavailable
from bakeout.kernels.reference import check_masked_geglu

ENTRY_POINTS: Final = {
    torch.float32: "bakeout_masked_geglu_f32",
    torch.float16: "bakeout_masked_geglu_f16",
    torch.bfloat16: "bakeout_masked_geglu_bf16",
}
# As csrc/bakeout_kernels.h declares them.
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: Final = (
    _POINTER, _SIZE, _SIZE, _POINTER, ctypes.c_int, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER,
)  # fmt: skip
# cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion
_CANNOT_RUN: Final = (35, 100, 209, 222)


def masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """`bakeout.kernels.reference.masked_geglu` on the current stream of the tensors' GPU; contiguous.

    Args:
        proj: as the definition says, of float32, float16 or bfloat16. Rows are read where they are; it is copied first
            where its last stride is not 1, or what comes before the tokens cannot be one dimension.
        mask: as the definition says; copied first where its last stride is not 1.
        value: as the definition says; copied as mask is.

    Raises:
        KernelUnavailable: the tensors are not on one NVIDIA GPU, their dtype is another, or the library cannot be had.
        RuntimeError: an earlier kernel of the process failed, or this one does not start.
        TypeError, ValueError: as the definition raises them.
    """
    check_masked_geglu(proj, mask, value)
    for name, tensor in {"proj": proj, "mask": mask, "value": value}.items():
        if not tensor.is_cuda or tensor.device != proj.device:
            raise KernelUnavailable(
                f"{name} is on {tensor.device}, but the CUDA kernel takes tensors of one NVIDIA GPU; move them there, "
                "or take the kernel 'reference'"
            )
    if proj.dtype not in ENTRY_POINTS:
        raise KernelUnavailable(
            f"the CUDA kernel has no {proj.dtype}; convert to float32, float16 or bfloat16, or take the kernel "
            "'reference'"
        )
    library = load()
    with torch.cuda.device(proj.device):
        return launch(library, proj, mask, value, torch.cuda.current_stream().cuda_stream)


@cache
def load() -> ctypes.CDLL:
    """The library `cuda` of `bakeout.kernels.build`, with its signatures.

    Raises:
        KernelUnavailable: it cannot be built or loaded.
    """
    path = build.library("cuda")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(
            f"the built CUDA kernel does not load ({error}); remove {path} and try again"
        ) from error
    return with_signatures(library)


def with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, after its entry points were told what they take and give."""
    for name in ENTRY_POINTS.values():
        getattr(library, name).argtypes = _ARGUMENTS
        getattr(library, name).restype = ctypes.c_int
    library.bakeout_cuda_error.argtypes = (ctypes.c_int,)
    library.bakeout_cuda_error.restype = ctypes.c_char_p
    return library


def launch(library: ctypes.CDLL, proj: Tensor, mask: Tensor, value: Tensor, stream: int) -> Tensor:
    """`masked_geglu` of tensors that were checked, by that library, on that stream of the current device.

    Raises:
        KernelUnavailable, RuntimeError: as `masked_geglu` raises them.
    """
    out = torch.empty((*proj.shape[:-1], value.shape[-1]), dtype=proj.dtype, device=proj.device)
    rows = _unit_stride(proj[(None,) * (3 - proj.ndim)].flatten(0, -3))
    batch, tokens, _ = rows.shape
    mask, value = _unit_stride(mask), _unit_stride(value)
    error = getattr(library, ENTRY_POINTS[proj.dtype])(
        rows.data_ptr(), rows.stride(0), rows.stride(1),
        mask.data_ptr(), mask.dtype == torch.uint8, _token_stride(mask),
        value.data_ptr(), _token_stride(value),
        out.data_ptr(), batch, tokens, value.shape[-1], stream,
    )  # fmt: skip
    if error:
        said = library.bakeout_cuda_error(error).decode()
        if error in _CANNOT_RUN:
            raise KernelUnavailable(
                f"the CUDA kernel cannot run here ({said}); update the driver, or choose another kernel on this GPU"
            )
        raise RuntimeError(f"the CUDA kernel did not start: {said}")
    return out


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _token_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.ndim == 2 else 0
