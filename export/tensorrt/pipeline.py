"""Draw with TensorRT: the engines of a folder, `<component>/model.engine`, behind diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bakeout.editor.errors import InputError
from bakeout.export.graph_pipeline import EXPORT_AGAIN, check_names, load_graph_pipeline
from bakeout.export.one_size import check_static
from bakeout.export.tensorrt import device as devices
from bakeout.export.tensorrt import library
from bakeout.export.tensorrt.engine import ENGINE, Engine, Lane

if TYPE_CHECKING:
    from bakeout.export.manifest import Tensorrt


def load_tensorrt_pipeline(
    folder: Path,
    made: Tensorrt,
    device: str | torch.device = "cuda",
    first_states: Mapping[str, int] = {},
    latents: tuple[int, int] | None = None,
    *,
    cuda_graphs: bool = True,
) -> Any:
    """The text-to-image pipeline of diffusers for the folder's family, running in TensorRT.

    Its engines run one after the other on one stream, and in the same memory.

    Args:
        folder: in the directory contract, see `graph_pipeline.py`.
        made: with what, and for which GPU, the engines were made.
        device: of torch.
        first_states: as for `load_graph_pipeline`.
        latents: as for `load_graph_pipeline`.
        cuda_graphs: whether networks run as captured CUDA graphs.

    Raises:
        InputError: TensorRT or the GPU is not here, or the engines were not made for them, or not for the latents of
            the edit; or what `load_graph_pipeline` raises.
    """
    check_made_for(folder, made, device)
    lane = Lane(devices.torch_device(device))

    def load(component: str, inputs: Collection[str], outputs: Collection[str]) -> Engine:
        path = folder / component / ENGINE
        if not path.is_file():
            raise InputError(f"{path} is missing; {EXPORT_AGAIN}")
        engine = Engine(path, device, cuda_graphs=cuda_graphs, lane=lane)
        check_names(path, (engine.inputs, engine.outputs), inputs, outputs)
        # An edit for any size says nothing of the sizes that engines are for.
        if component == "unet" and latents is not None:
            check_static(path, engine.shape("sample"), latents)
        return engine

    return load_graph_pipeline(folder, load, first_states, latents)


def check_made_for(folder: Path, made: Tensorrt, device: str | torch.device) -> None:
    """Raise InputError unless TensorRT and the GPU are those that the engines in a folder were made with."""
    version = library.tensorrt().__version__
    gpu = library.gpu(device)
    here = (version, gpu.name, tuple(gpu.capability))
    if here != (made.version, made.gpu, tuple(made.capability)):
        raise InputError(
            f"{folder} was made with TensorRT {made.version} for {_described(made.gpu, made.capability)}, and here are "
            f"TensorRT {version} and {_described(gpu.name, gpu.capability)}: export the model again on this machine"
        )


def _described(name: str, capability: tuple[int, int]) -> str:
    return f"{name} (compute capability {capability[0]}.{capability[1]})"
