"""Draw with ONNX Runtime: the graphs of a folder, `<component>/model.onnx[_data]`, behind diffusers' pipelines.

Inputs and outputs are bound where they lie, on a CPU or a GPU, and not copied. On a GPU ONNX Runtime computes on a
stream of its own, of which PyTorch knows nothing: before a call PyTorch's current stream is waited for, and a call
returns when its own is done. That makes a call safe whatever lies before and after it, also memory that ONNX Runtime
takes back when a tensor is gone; on PyTorch's stream (`user_compute_stream`) it would be the stream of one moment.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bakeout.editor.errors import InputError, not_installed
from bakeout.export.graph_pipeline import EXPORT_AGAIN, check_given, check_names, load_graph_pipeline
from bakeout.export.one_size import check_static
from bakeout.export.onnx_gpu import check_placement, check_started, other_package, with_profile
from bakeout.export.op_library import KERNELS, op_library

if TYPE_CHECKING:
    from bakeout.export.tensorrt.shapes import Profile

GRAPH = "model.onnx"
# What ONNX Runtime calls a type: what torch calls it, and its number in `onnx.TensorProto`.
_DTYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(int64)": (torch.int64, 7),
    "tensor(int32)": (torch.int32, 6),
}
# ONNX Runtime's "fatal": what goes wrong comes as an exception, and need not stand on the terminal too.
_QUIET = 4
# "CUDA failure 35: …", also of its libraries, after long names of C++ functions and before those of machine and file.
_CUDA_SAID = re.compile(r"\bCU\w+ failure \d+: [^;]*")


@dataclass(frozen=True)
class SessionSettings:
    """How ONNX Runtime runs.

    Attributes:
        providers: execution providers in order of preference. What the first cannot run, the next does, and the CPU's
            at last; but on a GPU as `device` the CPU does arithmetic with shapes and places and nothing else.
        provider_options: of a provider, by its name: what ONNX Runtime documents for it.
        threads: that work on one operation; None leaves it to ONNX Runtime, which takes one a core.
        arena: keep freed memory for the next call. Without, little stays in use between calls, which take longer: on a
            CPU the UNet of `shapes` an eighth, its VAE decoder a third.
        memory_pattern: plan a call's memory as a whole when its shapes have been seen before. ONNX Runtime does so by
            default; that UNet is 3 % faster with it, and the arena of that VAE at 512 px 1.8 times as large.
        kernels: what computes operators of ours (`bakeout.export.custom_ops`): `library`, our library of kernels;
            `function`, their bodies in the file, as in any other runtime; or `auto`, the library if it can be had.
        device: of torch, where tensors go in and out: `cpu`, or a GPU of the first provider as `cuda:0`. See
            `bakeout.export.onnx_gpu.on_gpu`, which makes such settings.

    Raises:
        InputError: no provider, options for another one, less than one thread, or no such kernels.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    threads: int | None = None
    arena: bool = True
    memory_pattern: bool = False
    kernels: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.providers:
            raise InputError("no execution provider is given; give one, as CPUExecutionProvider")
        if unused := sorted(self.provider_options.keys() - set(self.providers)):
            raise InputError(f"there are options for {unused[0]!a:.100}, which is not among the providers; add it")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}: it must be 1 or more")
        if self.kernels not in KERNELS:
            raise InputError(f"ONNX Runtime has no kernels {self.kernels!a:.50}; choose from {', '.join(KERNELS)}")


class OnnxGraph:
    """A graph in ONNX Runtime, called with tensors by name.

    Args:
        path: of the graph.
        inputs: the names of all its inputs.
        outputs: names that must be among its outputs.
        settings: of the session.

    Raises:
        InputError: it does not load, or has other inputs and outputs, or the kernels asked for are not there; or a
            provider does not start, or on a GPU leaves work to the CPU.
    """

    def __init__(
        self, path: Path, inputs: Collection[str], outputs: Collection[str], settings: SessionSettings
    ) -> None:
        self.path = path
        self.device = torch.device(settings.device)
        with _restored(self.device):
            self.session = _session(path, settings)
        self.inputs = {it.name: it for it in self.session.get_inputs()}
        self.outputs = tuple(it.name for it in self.session.get_outputs())
        check_names(path, (self.inputs, self.outputs), inputs, outputs)
        for name, it in self.inputs.items():
            if it.type not in _DTYPES:
                raise InputError(f"{path} wants {name} as {it.type:.50}, which no pipeline gives it; {EXPORT_AGAIN}")

    def shape(self, name: str) -> tuple[int | str | None, ...]:
        """Of an input; a dimension that is no whole number is dynamic."""
        return tuple(self.inputs[name].shape)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name.

        Args:
            inputs: by name, on any device and in any dtype; those on the graph's device and in its dtype are not
                copied.

        Returns:
            Tensors on the graph's device and in its dtypes, in memory that no later call writes to.

        Raises:
            InputError: an input is missing, unknown, or of a shape that the graph does not take, or memory is short.
        """
        check_given(self.path, inputs, self.inputs)
        feeds = {
            name: inputs[name].detach().to(self.device, _DTYPES[it.type][0]).contiguous()
            for name, it in self.inputs.items()
        }
        for name, tensor in feeds.items():
            _check_shape(self.path, name, tensor.shape, self.shape(name))
        place = self.device.type, self.device.index or 0
        binding = self.session.io_binding()
        try:
            for name, tensor in feeds.items():
                element = _DTYPES[self.inputs[name].type][1]
                binding.bind_input(name, *place, element, list(tensor.shape), tensor.data_ptr())
            for name in self.outputs:
                binding.bind_output(name, *place)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            with _restored(self.device):
                self.session.run_with_iobinding(binding)
                binding.synchronize_outputs()
        except Exception as error:  # ONNX Runtime has a class for each of its codes, and documents none
            raise InputError(
                f"ONNX Runtime failed in {self.path} ({_reason(error)}); if memory is short, draw fewer or smaller "
                f"pictures at a time, else {EXPORT_AGAIN}"
            ) from error
        values = binding.get_outputs()
        return {name: from_dlpack(value) for name, value in zip(self.outputs, values, strict=True)}


def load_onnx_pipeline(
    folder: Path,
    settings: SessionSettings | None = None,
    first_states: Mapping[str, int] = {},
    latents: tuple[int, int] | None = None,
    profiles: Mapping[str, Profile] = MappingProxyType({}),
) -> Any:
    """The text-to-image pipeline of diffusers for the folder's family, running in ONNX Runtime.

    Args:
        folder: in the directory contract, see `graph_pipeline.py`.
        settings: of every session; by default one on the CPU.
        first_states: as for `load_graph_pipeline`.
        latents: as for `load_graph_pipeline`.
        profiles: of components, the shapes of inputs for which the TensorRT provider makes an engine.

    Raises:
        InputError: ONNX Runtime or a provider is not installed, or what `load_graph_pipeline` or `OnnxGraph` raises.
    """
    settings = settings or SessionSettings()
    check_providers(settings)

    def load(component: str, inputs: Collection[str], outputs: Collection[str]) -> OnnxGraph:
        own = with_profile(settings, profiles[component]) if component in profiles else settings
        graph = OnnxGraph(folder / component / GRAPH, inputs, outputs, own)
        if component == "unet":
            check_static(graph.path, graph.shape("sample"), latents)
        return graph

    return load_graph_pipeline(folder, load, first_states, latents)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(not_installed("onnxruntime")) from None
    return onnxruntime


def check_providers(settings: SessionSettings) -> None:
    """Raise InputError if ONNX Runtime, or a provider, is not installed or cannot start."""
    onnxruntime = _onnxruntime()
    available = onnxruntime.get_available_providers()
    for name in settings.providers:
        if name not in available:
            raise InputError(
                f"this ONNX Runtime has no {name!a:.100}; choose from {', '.join(available)}{other_package(name)}"
            )
        check_started(onnxruntime, name)


def _session(path: Path, settings: SessionSettings) -> Any:
    onnxruntime = _onnxruntime()
    if not path.is_file():
        raise InputError(f"{path} is missing; {EXPORT_AGAIN}")
    check_providers(settings)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.enable_cpu_mem_arena = settings.arena
    options.enable_mem_pattern = settings.memory_pattern
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if library := op_library([path], settings):
        options.register_custom_ops_library(str(library))
    providers = [(name, dict(settings.provider_options.get(name, {}))) for name in settings.providers]
    try:
        # Else a provider that fails is replaced by the CPU's, with a remark on the terminal.
        session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has a class for each of its codes, and documents none
        cure = EXPORT_AGAIN
        if " : NOT_IMPLEMENTED : " in str(error):
            cure += " in another --precision, or draw with another provider: the CPU's has nothing for bf16, CUDA's has"
        elif settings.device != "cpu":
            cure = f"see that the GPU has memory left and a driver for this CUDA, else {cure}"
        raise InputError(f"{path} does not load in ONNX Runtime ({_reason(error)}); {cure}") from error
    for name in settings.providers:
        if name not in session.get_providers():
            raise InputError(
                f"ONNX Runtime has {name} but could not start it; install what it needs, or choose another provider"
            )
    if settings.device != "cpu":
        check_placement(path, session, settings.providers[0])
    return session


def _restored(device: torch.device) -> AbstractContextManager[object]:
    """After what ONNX Runtime does on a GPU, the current one of CUDA is again the one before: it leaves its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_shape(path: Path, name: str, given: tuple[int, ...], wanted: tuple[int | str | None, ...]) -> None:
    fixed = [size if isinstance(size, int) else None for size in wanted]
    if len(given) != len(fixed) or any(size not in (None, own) for size, own in zip(fixed, given, strict=True)):
        shape = ", ".join("any" if size is None else str(size) for size in fixed)
        raise InputError(f"{path} takes {name} of shape [{shape}] only, not {list(given)}; draw what it was made for")


def _reason(error: Exception) -> str:
    """The first line of a message of ONNX Runtime, without `[ONNXRuntimeError] : code : NAME : `; CUDA's alone."""
    first = str(error).strip().partition("\n")[0].split(" : ", 3)[-1]
    said = _CUDA_SAID.search(first)
    return (said[0].strip() if said else first)[:300]
