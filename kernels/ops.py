"""The fused operations as PyTorch operators `bakeout::<name>`, which torch.export and torch.compile keep whole.

Importing this registers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bakeout.kernels import reference


@torch.library.custom_op("bakeout::masked_geglu", mutates_args=(), device_types="cpu")
def masked_geglu(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """`bakeout.kernels.reference.masked_geglu`, on the CPU."""
    return reference.masked_geglu(proj, mask, value)


@masked_geglu.register_fake
def _(proj: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    reference.check_masked_geglu(proj, mask, value)
    return proj.new_empty((*proj.shape[:-1], mask.shape[-1]))
