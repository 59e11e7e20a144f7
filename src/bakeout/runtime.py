"""What draws: a runtime with its settings, chosen from what was asked for and what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bakeout.editor.errors import InputError
from bakeout.export.artifact import RUNTIMES, Artifact
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
    """

    name: str
    device: str
    dtype: torch.dtype
    sessions: SessionSettings | None

    @property
    def facts(self) -> dict[str, str]:
        """For the record."""
        if self.sessions is None:
            return {"runtime": self.name, "device": self.device, "dtype": str(self.dtype)}
        return {"runtime": self.name, "providers": ", ".join(self.sessions.providers)}

    def __str__(self) -> str:
        where = self.device if self.sessions is None else ", ".join(self.sessions.providers)
        return f"{self.name} ({where})"

    def load(self, opened: Model | Artifact) -> Any:
        """The pipeline of a model or an artifact. Raises InputError."""
        if not isinstance(opened, Artifact):
            return opened.pipeline(self.device, self.dtype)
        if self.sessions is None:
            return opened.load(self.name, device=self.device, dtype=self.dtype)
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

    Raises:
        InputError: a runtime or device that is not there, or a setting of the runtime that is not used.
    """
    targets = opened.manifest.targets if isinstance(opened, Artifact) else ()
    name = name or ("onnxruntime" if RUNTIMES["onnxruntime"] in targets else "torch")
    if name == "torch":
        if isinstance(opened, Artifact):
            _check_has_weights(opened)
        given = {"--provider": bool(providers), "--threads": threads is not None, "--no-arena": not arena}
        _refuse(given, "ONNX Runtime", "torch", "export the artifact and use --runtime onnxruntime")
        device = device_from_text(device)
        return Runtime(name, device, dtype_from_text(dtype, device), None)
    if not isinstance(opened, Artifact):
        raise InputError(f"{opened.source} is no artifact, so only torch can draw with it: leave --runtime out")
    cure = "use --runtime torch" if RUNTIMES["torch"] in targets else ""
    _refuse({"--device": device != "auto", "--dtype": dtype != "auto"}, "torch", name, cure)
    from bakeout.export.onnx_pipeline import SessionSettings

    settings: dict[str, Any] = {"providers": tuple(providers)} if providers else {}
    sessions = SessionSettings(**settings, threads=threads, arena=arena)
    device = device_from_text("auto")
    return Runtime(name, device, dtype_from_text("fp32", device), sessions)


def _check_has_weights(artifact: Artifact) -> None:
    if RUNTIMES["torch"] not in artifact.manifest.targets:
        in_graph = any(it.how == "graph" for it in artifact.manifest.lowering)
        why = "because its edit lies in the graphs and not in weights" if in_graph else "because nobody asked for it"
        raise InputError(f"{artifact.folder} has no diffusers/ for torch, {why}: leave --runtime out")


def _refuse(given: dict[str, bool], owner: str, runtime: str, cure: str) -> None:
    for option, is_given in given.items():
        if is_given:
            other = f", or {cure}" if cure else ""
            raise InputError(f"{option} belongs to {owner}, and {runtime} draws: leave it out{other}")
