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
    from bakeout.export.onnx_pipeline import SessionSettings


@dataclass(frozen=True)
class Runtime:
    """What draws, and how.

    Attributes:
        name: a key of `RUNTIMES`.
        device: of torch; for another runtime where torch would draw the same.
        dtype: of torch; for another runtime that in which torch would draw the same.
        sessions: of ONNX Runtime, None for torch.
        kernels: what computes operators of ours; None where there are none.
        base: of an artifact that torch draws with and that has no `diffusers/`: the model that was edited.
        compiled: whether torch compiles the UNet.
    """

    name: str
    device: str
    dtype: torch.dtype
    sessions: SessionSettings | None
    kernels: str | None = None
    base: Model | None = None
    compiled: bool = False

    @property
    def facts(self) -> dict[str, str]:
        """For the record."""
        kernels = {} if self.kernels is None else {"kernels": self.kernels}
        if self.sessions is None:
            compiled = {"compiled": "unet"} if self.compiled else {}
            return {"runtime": self.name, "device": self.device, "dtype": str(self.dtype), **kernels, **compiled}
        return {"runtime": self.name, "providers": ", ".join(self.sessions.providers), **kernels}

    def __str__(self) -> str:
        where = self.device if self.sessions is None else ", ".join(self.sessions.providers)
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
        if self.sessions is None:
            return opened.load(
                self.name, device=self.device, dtype=self.dtype, base=self.base, kernels=self.kernels,
                compile=self.compiled,
            )  # fmt: skip
        return opened.load(self.name, sessions=self.sessions)


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
        device: of torch.
        dtype: of torch.
        providers: of ONNX Runtime; none is the CPU's.
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
    cure = "use --runtime torch"
    from bakeout.export.onnx_pipeline import GRAPH, SessionSettings, check_providers
    from bakeout.export.op_library import KERNELS, has_own_operators, op_library

    given = {
        "--device": device != "auto",
        "--dtype": dtype != "auto",
        f"--kernels {kernels}": kernels not in KERNELS,
        "--compile": compiled,
    }
    _refuse(given, "torch", name, cure)
    settings: dict[str, Any] = {"providers": tuple(providers)} if providers else {}
    sessions = SessionSettings(**settings, threads=threads, arena=arena, kernels=kernels)
    graphs = [*(opened.folder / RUNTIMES[name]).glob(f"*/{GRAPH}")]
    own = None
    if any(has_own_operators(path) for path in graphs):
        check_providers(sessions)
        own = "function" if op_library(graphs, sessions) is None else "library"
        sessions = replace(sessions, kernels=own)
    elif kernels != "auto":
        raise _unneeded(kernels)
    device = device_from_text("auto")
    return Runtime(name, device, dtype_from_text("fp32", device), sessions, own)


def _unneeded(kernels: str) -> InputError:
    return InputError(f"--kernels {kernels}: this model has no operator that a kernel of ours computes; leave it out")


def _refuse(given: dict[str, bool], owner: str, runtime: str, cure: str) -> None:
    for option, is_given in given.items():
        if is_given:
            raise InputError(f"{option} belongs to {owner}, and {runtime} draws: leave it out, or {cure}")
