"""What draws: a runtime with its settings, chosen from what was asked for and what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bakeout.editor.errors import InputError
from bakeout.export.artifact import RUNTIMES, Artifact
from bakeout.export.base import source_of
from bakeout.generate import device_from_text, dtype_from_text

if TYPE_CHECKING:
    import torch

    from bakeout.editor.model import Model
    from bakeout.export.manifest import Shapes
    from bakeout.export.onnx_pipeline import SessionSettings

# What draws on an NVIDIA GPU, and nowhere else.
GPU_RUNTIMES = ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt")
# In which torch draws what other runtimes do: their tensors are fp32, in whatever they compute.
_DTYPE = "fp32"


@dataclass(frozen=True)
class Runtime:
    """What draws, and how.

    Attributes:
        name: a key of `RUNTIMES`.
        device: of torch; for another runtime where torch would draw the same.
        dtype: of torch; for another runtime that in which torch would draw the same.
        sessions: of ONNX Runtime, None for another runtime.
        kernels: what computes operators of ours; None where there are none.
        base: of an artifact that torch draws with and that has no `diffusers/`: the model that was edited.
        compiled: whether torch compiles the UNet.
        shapes: of the only pictures that its engines draw; None is any.
    """

    name: str
    device: str
    dtype: torch.dtype
    sessions: SessionSettings | None
    kernels: str | None = None
    base: Model | None = None
    compiled: bool = False
    shapes: Shapes | None = None

    @property
    def facts(self) -> dict[str, str]:
        """For the record. Raises InputError if a runtime for GPUs has none here."""
        facts = {"runtime": self.name}
        if self.name != "onnxruntime":
            facts["device"] = self.device
        if self.name in GPU_RUNTIMES:
            from bakeout.export.tensorrt.library import gpu

            facts["gpu"] = gpu(self.device).name
        elif self.name == "torch":
            facts |= {"dtype": str(self.dtype), **_gpu_of_torch(self.device)}
        if self.sessions is not None:
            facts["providers"] = ", ".join(self.sessions.providers)
        if self.kernels is not None:
            facts["kernels"] = self.kernels
        if self.compiled:
            facts["compiled"] = "unet"
        return facts

    def __str__(self) -> str:
        where = ", ".join(self.sessions.providers) if self.sessions is not None else self.device
        kernels = "" if self.kernels is None else f"; kernels: {self.kernels}"
        compiled = "; compiled" if self.compiled else ""
        return f"{self.name} ({where}{kernels}{compiled})"

    def load(self, opened: Model | Artifact) -> Any:
        """The pipeline of a model or an artifact. Raises InputError."""
        if not isinstance(opened, Artifact):
            pipeline = opened.pipeline(self.device, self.dtype)
            if self.compiled:
                from bakeout.export.torch_pipeline import compile_unet

                compile_unet(pipeline)
            return pipeline
        if self.name == "torch":
            return opened.load(
                self.name, device=self.device, dtype=self.dtype, base=self.base, kernels=self.kernels,
                compile=self.compiled,
            )  # fmt: skip
        device = self.device if self.name in GPU_RUNTIMES else None
        return opened.load(self.name, device=device, sessions=self.sessions)


def runtime_for(
    opened: Model | Artifact,
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    providers: Sequence[str] = (),
    threads: int | None = None,
    arena: bool = True,
    kernels: str = "auto",
    base: str | None = None,
    compiled: bool = False,
) -> Runtime:
    """The runtime called `name`; None is ONNX Runtime for an artifact with ONNX graphs, else torch.

    Args:
        opened: what is to be drawn with.
        name: a key of `RUNTIMES`.
        device: of torch; of a runtime for GPUs `auto` is the first.
        dtype: of torch.
        providers: of the runtime `onnxruntime`; none is the CPU's.
        threads: of ONNX Runtime.
        arena: of ONNX Runtime.
        kernels: what computes operators of ours. Of ONNX Runtime, see `SessionSettings`; of torch, `Artifact.load`,
            and `auto` is its None.
        base: of torch, for an artifact without `diffusers/`: what to open as the model that was edited; None is what
            its manifest names.
        compiled: of torch: compile the UNet.

    Raises:
        InputError: a runtime, a device or kernels that are not there, or a setting of the runtime that is not used.
    """
    targets = opened.manifest.targets if isinstance(opened, Artifact) else ()
    name = name or ("onnxruntime" if RUNTIMES["onnxruntime"] in targets else "torch")
    if name == "torch":
        given = {
            "--provider": bool(providers),
            "--threads": threads is not None,
            "--no-arena": not arena,
            f"--kernels {kernels}": kernels in ("library", "function"),
        }
        _refuse(given, "ONNX Runtime", "torch", "use --runtime onnxruntime with an exported artifact")
        device = device_from_text(device)
        asked = None if kernels == "auto" else kernels
        model = own = None
        if isinstance(opened, Artifact) and RUNTIMES["torch"] not in targets:
            from bakeout.export.torch_pipeline import kernel_for

            model = source_of(opened, base)
            own = kernel_for(opened.edit, model, asked, device)
        elif asked is not None:
            raise _unneeded(kernels)
        return Runtime(name, device, dtype_from_text(dtype, device), None, own, model, compiled)
    if not isinstance(opened, Artifact):
        raise InputError(f"{opened.source} is no artifact, so only torch can draw with it: leave --runtime out")
    others = {"--dtype": dtype != "auto", "--compile": compiled}
    if name in GPU_RUNTIMES:
        others["--provider"] = bool(providers)
        device = "cuda:0" if device == "auto" else device
    else:
        others["--device"] = device != "auto"
        device = device_from_text("auto")
    if name == "tensorrt":
        others |= {"--threads": threads is not None, "--no-arena": not arena, f"--kernels {kernels}": kernels != "auto"}
    whose = ("another runtime", "choose that") if name in GPU_RUNTIMES else ("torch", "use --runtime torch")
    _refuse(others, whose[0], name, whose[1])
    if name == "tensorrt":
        made = opened.manifest.tensorrt
        return Runtime(
            name, device, dtype_from_text(_DTYPE, device), None, shapes=None if made is None else made.shapes
        )
    return _onnxruntime(opened, name, device, tuple(providers), threads, arena, kernels)


def _onnxruntime(
    opened: Artifact,
    name: str,
    device: str,
    providers: tuple[str, ...],
    threads: int | None,
    arena: bool,
    kernels: str,
) -> Runtime:
    from bakeout.export.onnx_pipeline import GRAPH, SessionSettings, check_providers
    from bakeout.export.op_library import KERNELS, has_own_operators, op_library

    _refuse({f"--kernels {kernels}": kernels not in KERNELS}, "torch", name, "use --runtime torch")
    settings: dict[str, Any] = {"providers": providers} if providers else {}
    sessions = SessionSettings(**settings, threads=threads, arena=arena, kernels=kernels)
    home, own, shapes = opened.folder / RUNTIMES[name], None, None
    if name in GPU_RUNTIMES:
        from bakeout.export.onnx_gpu import on_gpu, shapes_for
        from bakeout.export.targets import serving_of

        sessions = on_gpu(name, device, sessions)
        # Of graphs that are not there it is said, when they are loaded, how to have them.
        if RUNTIMES[name] in opened.manifest.targets:
            shapes = shapes_for(name, home, opened.size, serving_of(opened.manifest, None, None))
    graphs = [*home.glob(f"*/{GRAPH}")]
    if any(has_own_operators(path) for path in graphs):
        check_providers(sessions)
        own = "function" if op_library(graphs, sessions) is None else "library"
        sessions = replace(sessions, kernels=own)
    elif kernels != "auto":
        raise _unneeded(kernels)
    return Runtime(name, device, dtype_from_text(_DTYPE, device), sessions, own, shapes=shapes)


def _gpu_of_torch(device: str) -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}


def _unneeded(kernels: str) -> InputError:
    return InputError(f"--kernels {kernels}: this model has no operator that a kernel of ours computes; leave it out")


def _refuse(given: dict[str, bool], owner: str, runtime: str, cure: str) -> None:
    for option, is_given in given.items():
        if is_given:
            raise InputError(f"{option} belongs to {owner}, and {runtime} draws: leave it out, or {cure}")
