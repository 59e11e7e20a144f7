"""Records with tensors, as JSON and tensors that a safetensors file holds: for `bakeout.editor.edit`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of a mask, which takes 40 times its bytes in the file when its values come to it. That of SD 1.5's hidden units at
# 2048 px has 2^26.
_MAX_ELEMENTS = 1 << 28


def encode(record: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record as JSON and tensors.

    A mask becomes uint8, its bits packed from the least significant one on; of a field whose metadata say `where`, only
    the values under the mask of that name are kept.
    """
    said: dict[str, Any] = {"operation": type(record).__name__}
    tensors: dict[str, Tensor] = {}
    for it in fields(record):
        value = getattr(record, it.name)
        if not isinstance(value, Tensor):
            said[it.name] = value
        elif "where" in it.metadata:
            said[it.name] = {"masked": list(value.shape)}
            tensors[it.name] = value.detach().cpu()[getattr(record, it.metadata["where"]).cpu()]
        elif value.dtype == torch.bool:
            said[it.name] = {"bits": list(value.shape)}
            tensors[it.name] = torch.from_numpy(np.packbits(value.cpu().numpy(), bitorder="little"))
        else:
            said[it.name] = {"tensor": list(value.shape)}
            tensors[it.name] = value.detach().cpu()
    return said, tensors


def decode(said: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, Any]) -> Any:
    """The record, of one of the classes in `kinds`, that `encode` made these of.

    Raises:
        ValueError: they are of none, or sizes do not go together; TypeError, KeyError and others for other nonsense.
    """
    said = dict(said)
    name = said.pop("operation")
    if name not in kinds:
        raise ValueError(f"there is no operation {name!a:.50}")
    record = kinds[name]
    if {it.name for it in fields(record)} != said.keys():
        raise ValueError(f"the fields of {name} are others")
    if {key for key, value in said.items() if isinstance(value, dict)} != tensors.keys():
        raise ValueError(f"the tensors of {name} are others")
    placed = {it.name: it.metadata["where"] for it in fields(record) if "where" in it.metadata}
    whole = {
        key: _tensor(key, value, tensors[key]) if key in tensors else value
        for key, value in said.items()
        if key not in placed
    }
    for name, mask in placed.items():
        whole[name] = _scattered(name, said[name], tensors.get(name), whole[mask])
    return record(**whole)


def _scattered(name: str, said: Any, stored: Tensor | None, mask: Any) -> Tensor:
    """A tensor of which only the values under `mask` were stored."""
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and said == {"masked": list(mask.shape)}
    if not fits or stored is None or stored.shape != (int(mask.sum()),):
        raise ValueError(f"{name} has not the values of its mask")
    return torch.zeros(mask.shape, dtype=stored.dtype).masked_scatter(mask, stored)


def _tensor(name: str, said: Mapping[str, Any], stored: Tensor) -> Tensor:
    [(how, shape)] = said.items()
    if not (isinstance(shape, list) and len(shape) in (1, 2) and all(type(size) is int and size > 0 for size in shape)):
        raise ValueError(f"{name} has no shape")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise ValueError(f"{name} is larger than any layer")
    if how == "tensor":
        if list(stored.shape) != shape:
            raise ValueError(f"{name} is not of shape {shape!a:.50}")
        return stored
    count = math.prod(shape)
    if how != "bits" or stored.dtype != torch.uint8 or stored.shape != ((count + 7) // 8,):
        raise ValueError(f"{name} has not the bits of a mask of shape {shape!a:.50}")
    bits = np.unpackbits(stored.numpy(), bitorder="little", count=count)
    return torch.from_numpy(bits.view(np.bool_).reshape(shape))


def digest(record: Any) -> str:
    """SHA-256 of a record's class, fields, and its tensors' dtypes, shapes and bytes."""
    said, tensors = encode(record)
    total = hashlib.sha256(canonical(said).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor_digest(tensor)}".encode())
    return total.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + _bytes(tensor)).hexdigest()


def canonical(said: Any) -> str:
    """JSON, the same for the same content."""
    return json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _bytes(tensor: Tensor) -> bytes:
    # Not of the tensor itself: numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
