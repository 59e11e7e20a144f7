"""Load a model's components bit for bit as stored, into the modules of diffusers and transformers.

One loader serves folders and single files. The libraries' own match names loosely and report what did not match as a
log line at most (transformers 4 and 5 name a text encoder's parameters differently), and cast every component to one
dtype; this one assigns exactly the parameters that opening the model found, or fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bakeout.editor.architecture import build
from bakeout.editor.checkpoint_header import StoredTensor
from bakeout.editor.ldm_names import Location

if TYPE_CHECKING:
    import torch


def load_module(
    class_name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    locations: Mapping[str, Location],
    device: str | torch.device,
    dtype: torch.dtype | None,
    changed: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> torch.nn.Module:
    """The module with its weights on `device`, in the dtypes in which they are stored unless `dtype` is given.

    `locations` says of each parameter, by its name in memory, where among `tensors` it lies. `changed` are tensors that
    take the place of stored ones, by their names and in their shapes.
    """
    from safetensors import safe_open

    module = build(class_name, config)
    with ExitStack() as stack:
        files: dict[Path, Any] = {
            file: stack.enter_context(safe_open(file, framework="pt")) for file in {t.file for t in tensors.values()}
        }
        state = {
            name: _read(
                files[tensors[location.tensor].file],
                changed.get(location.tensor),
                location,
                module.get_parameter(name).shape,
            ).to(device=device, dtype=dtype)
            for name, location in locations.items()
        }
        module.load_state_dict(state, strict=True, assign=True)
    make_position_ids(module, device)
    return module.eval()


def _read(file: Any, changed: torch.Tensor | None, location: Location, shape: torch.Size) -> torch.Tensor:
    tensor: torch.Tensor
    if location.change == "third":
        rows = shape[0]
        whole = file.get_slice(location.tensor) if changed is None else changed
        tensor = whole[location.part * rows : (location.part + 1) * rows]
    else:
        tensor = file.get_tensor(location.tensor) if changed is None else changed
    if location.change == "transposed":
        return tensor.T.contiguous()
    return tensor.reshape(shape) if location.change == "pointwise" else tensor


def make_position_ids(module: torch.nn.Module, device: str | torch.device) -> None:
    """Give CLIP's position ids their values: no parameter and not stored, they have none on the meta device."""
    import torch

    for name, buffer in list(module.named_buffers()):
        owner = module.get_submodule(name.rpartition(".")[0])
        if not name.endswith("position_ids"):
            raise NotImplementedError(f"how to fill the buffer {name}, new in this version, is not known")
        owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
