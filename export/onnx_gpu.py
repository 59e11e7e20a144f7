"""ONNX Runtime's providers for NVIDIA GPUs: what they are given, whether they start, and what they leave to the CPU.

With TensorRT as provider, what it does not take runs in the CUDA provider. Operators of ours are then the bodies in the
file: TensorRT sees into these, and a kernel of ours would cut the graph into a piece for every FFN. The networks are
strongly typed, because none of the provider's flags for a precision is set. It keeps timings for the next load but no
engines: it would find these by the names in a graph alone, so that of two models that differ in their weights the
second would draw with the engine of the first, unerased.
"""

from __future__ import annotations

import ctypes
import io
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from bakeout.editor.errors import InputError
from bakeout.kernels.cache import cache_folder
from bakeout.kernels.errors import KernelUnavailable

if TYPE_CHECKING:
    from bakeout.editor.recipe import Tensorrt as Serving
    from bakeout.export.manifest import Shapes
    from bakeout.export.onnx_pipeline import SessionSettings
    from bakeout.export.tensorrt.shapes import Profile

CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
# Of a runtime, in order of preference.
GPU_PROVIDERS: Final = {"onnxruntime-cuda": (CUDA,), "onnxruntime-tensorrt": (TENSORRT, CUDA)}
_CPU: Final = "CPUExecutionProvider"
_LIBRARIES: Final = {CUDA: "cuda", TENSORRT: "tensorrt"}
_NEEDS: Final = {
    CUDA: "it needs an NVIDIA GPU and driver, and the CUDA and cuDNN libraries that it was built for "
    "(pip install 'onnxruntime-gpu[cuda,cudnn]')",
    TENSORRT: "it needs the very TensorRT that it was built for, which may be older than that of runtime tensorrt; "
    "else use runtime onnxruntime-cuda",
}
# "Fatal". It is for the whole process, and the only way to silence remarks at the start of a provider that starts.
_QUIET: Final = 4
# What is done with shapes and places of tokens, which ONNX Runtime itself puts on the CPU, or has no kernel of CUDA for
# (ArgMax of integers, which finds where a text ends). Whatever else lies there was meant for the GPU.
_INDEX_ARITHMETIC: Final = frozenset({
    "Add", "And", "ArgMax", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor",
    "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not",
    "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip


def on_gpu(runtime: str, device: str | torch.device, settings: SessionSettings) -> SessionSettings:
    """The settings with which a runtime of `GPU_PROVIDERS` computes on a GPU, and tensors lie there.

    Args:
        runtime: its name.
        device: of torch.
        settings: the rest; providers among them are those of the runtime, or the default.

    Raises:
        InputError: settings of another provider, or kernels that the runtime does not have; or there is no such GPU.
    """
    from bakeout.export.tensorrt.device import torch_device

    providers = GPU_PROVIDERS[runtime]
    if settings.providers not in ((_CPU,), providers):
        raise InputError(
            f"{runtime} has the providers {', '.join(providers)}, not {', '.join(settings.providers)}: leave them out, "
            "or draw with onnxruntime"
        )
    if unused := sorted(settings.provider_options.keys() - set(providers)):
        raise InputError(f"there are options for {unused[0]!a:.100}, which {runtime} does not use; leave them out")
    kernels = settings.kernels
    if runtime == "onnxruntime-tensorrt":
        if kernels == "library":
            raise InputError("in TensorRT's provider there are no kernels of ours; choose the kernels 'function'")
        kernels = "function"
    gpu = torch_device(device)
    options = {
        name: {"device_id": str(gpu.index or 0), **_usual(name), **settings.provider_options.get(name, {})}
        for name in providers
    }
    return replace(settings, providers=providers, provider_options=options, kernels=kernels, device=str(gpu))


def with_profile(settings: SessionSettings, profile: Profile) -> SessionSettings:
    """The settings with the shapes of a graph's inputs for which the TensorRT provider makes its engine."""
    shapes = {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, of[index]))}" for name, of in profile.items() if of[index]
        )
        for index, which in enumerate(("min", "opt", "max"))
    }
    own = {**shapes, **settings.provider_options.get(TENSORRT, {})}
    return replace(settings, provider_options={**settings.provider_options, TENSORRT: own})


def shapes_for(runtime: str, folder: Path, size: tuple[int, int] | None, wanted: Serving) -> Shapes | None:
    """Of which pictures a runtime of `GPU_PROVIDERS` makes engines, and then draws no others; None if it makes none.

    Args:
        runtime: its name.
        folder: of ONNX graphs.
        size: width and height, in pixels, of the only pictures that the model draws; None is any that it can.
        wanted: of which pictures the engines are to be.

    Raises:
        InputError: the model does not draw such pictures, or the folder is not whole.
    """
    if TENSORRT not in GPU_PROVIDERS[runtime]:
        return None
    from bakeout.export.tensorrt.shapes import shapes_of

    return shapes_of(folder, size, wanted.width, wanted.height, wanted.batch)


def profiles_for(folder: Path, shapes: Shapes) -> dict[str, Profile]:
    """The shapes of the inputs of each graph in a folder that engines of such pictures take."""
    from bakeout.export.tensorrt.shapes import profile_of

    return {path.parent.name: profile_of(folder, path.parent.name, shapes) for path in folder.glob("*/model.onnx")}


def other_package(provider: str) -> str:
    """What to say of a provider that the installed ONNX Runtime lacks: empty, or where it is to be had."""
    if provider not in _LIBRARIES:
        return ""
    return (
        ", or install the package that has it (pip uninstall onnxruntime, then pip install 'bakeout[gpu]': "
        "onnxruntime and onnxruntime-gpu exclude each other)"
    )


def check_started(onnxruntime: Any, provider: str) -> None:
    """Raise InputError if the library of a provider for GPUs does not load; of other providers nothing is asked."""
    if provider not in _LIBRARIES:
        return
    _preload(onnxruntime)
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{_LIBRARIES[provider]}.so"
    # Elsewhere it has another name, and whether it starts is seen later.
    if library.is_file() and (reason := _not_loading(library)):
        raise InputError(f"ONNX Runtime has {provider} but cannot start it ({reason}): {_NEEDS[provider]}")


def check_placement(path: Path, session: Any, provider: str) -> None:
    """Raise InputError unless all of a graph is computed on the GPU, and some of it by `provider`.

    Args:
        path: of the graph.
        session: of ONNX Runtime, which recorded what computes what.
        provider: the first of the session's.
    """
    placed: dict[str, list[Any]] = {}
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(part.get_nodes())
    for node in placed.get(_CPU, []):
        if node.domain or node.op_type not in _INDEX_ARITHMETIC:
            raise InputError(
                f"{path} would compute {node.op_type!a:.100} ({node.name!a:.100}) on the CPU, because "
                f"{' and '.join(name for name in session.get_providers() if name != _CPU) or provider} cannot; export "
                "the model in another precision, or draw with another runtime"
            )
    if provider not in placed:
        raise InputError(f"{provider} computes nothing of {path}; draw with another runtime")


def _usual(provider: str) -> dict[str, str]:
    if provider != TENSORRT:
        return {}
    try:
        folder = cache_folder("onnxruntime", "timings of kernels")
    except KernelUnavailable as error:
        raise InputError(str(error)) from error
    return {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder)}


@cache
def _preload(onnxruntime: Any) -> None:
    """Load the CUDA libraries that pip installed beside ONNX Runtime, which the linker does not find by itself."""
    onnxruntime.set_default_logger_severity(_QUIET)
    # What it cannot load it prints, and the linker says it again.
    with redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def _not_loading(library: Path) -> str | None:
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        return str(error)[:300]
    return None
