"""What computes: ONNX Runtime's providers and kernels, and products in whole fp32 wherever hardware would take less."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bakeout.editor.errors import InputError
from bakeout.export.manifest import Manifest
from bakeout.export.targets import ONNX, TENSORRT
from bakeout.validate.parity import reason
from bakeout.validate.widened import onnx_type

if TYPE_CHECKING:
    from bakeout.export.onnx_pipeline import SessionSettings


def precision_of(manifest: Manifest, target: str) -> str:
    """In which precision, of `DTYPES`, a target is drawn with."""
    records = {ONNX: manifest.onnx, TENSORRT: manifest.tensorrt}
    record = records.get(target)
    return "fp32" if record is None else record.precision


def why_not_here(
    manifest: Manifest, target: str, folder: Path, sessions: SessionSettings | None, device: str
) -> Exception | None:
    """Why this machine cannot draw with a target, which is no fault of the artifact; None if it can.

    Args:
        manifest: of the artifact.
        target: of the artifact.
        folder: of the target.
        sessions: of ONNX Runtime; None are on the CPU.
        device: of PyTorch, on which engines run.
    """
    precision = precision_of(manifest, target)
    if target == TENSORRT and manifest.tensorrt is not None:
        from bakeout.export.tensorrt.pipeline import check_made_for

        try:
            check_made_for(folder, manifest.tensorrt, device)
        except InputError as unlike:
            return unlike
    if target == ONNX and (sessions is not None or precision != "fp32"):
        sessions = with_kernels_chosen(sessions)
        if error := why_not_started(sessions, precision):
            cure = "mend that, or choose another provider"
            if sessions.providers == ("CPUExecutionProvider",):
                cure = "validate it with --provider CUDAExecutionProvider on a machine with an NVIDIA GPU"
            providers = ", ".join(sessions.providers)
            return InputError(
                f"ONNX Runtime cannot compute in {precision} with {providers} on this machine ({reason(error)}): {cure}"
            )
    return None


def gpu_of(device: str) -> str:
    """The GPU that runs engines, where PyTorch runs on a device."""
    return device if device.startswith("cuda") else "cuda"


def check_providers(sessions: SessionSettings | None) -> None:
    """Raise InputError for a provider that is not here: that is no fault of the artifact."""
    if sessions is None or importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for name in sessions.providers:
        if name not in available:
            raise InputError(f"this ONNX Runtime has no {name!a:.100}; choose from {', '.join(available)}")


def why_not_started(sessions: SessionSettings, precision: str = "fp32") -> Exception | None:
    """What goes wrong where these sessions run a graph of one node in a precision, of `DTYPES`; None if nothing does.

    That is no fault of any artifact.
    """
    import onnx

    from bakeout.export.onnx_pipeline import OnnxGraph

    one, other = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab")
    nodes = [
        onnx.helper.make_node("Cast", ["a"], ["narrow"], to=onnx_type(precision)),
        onnx.helper.make_node("Neg", ["narrow"], ["negative"]),
        onnx.helper.make_node("Cast", ["negative"], ["b"], to=onnx.TensorProto.FLOAT),
    ]
    graph = onnx.helper.make_graph(nodes, "one", [one], [other])
    # Of a version that also older runtimes read.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        try:
            OnnxGraph(path, ["a"], ["b"], sessions).run({"a": torch.ones(1)})
        except InputError as error:
            # The sentence around ONNX Runtime's own is about the graph.
            return error.__cause__ if isinstance(error.__cause__, Exception) else error
    return None


def with_exact_products(sessions: SessionSettings | None) -> SessionSettings | None:
    """The sessions without TF32, in which the CUDA provider multiplies unless told otherwise."""
    cuda = "CUDAExecutionProvider"
    if sessions is None or cuda not in sessions.providers:
        return sessions
    own = {"use_tf32": "0", **sessions.provider_options.get(cuda, {})}
    return replace(sessions, provider_options={**sessions.provider_options, cuda: own})


def with_kernels_chosen(sessions: SessionSettings | None) -> SessionSettings:
    """The sessions with operators of ours as their function bodies unless the library is asked for by name.

    So files are judged as any runtime runs them, and on every machine alike.
    """
    from bakeout.export.onnx_pipeline import SessionSettings

    sessions = sessions or SessionSettings()
    return replace(sessions, kernels="function") if sessions.kernels == "auto" else sessions


def own_kernels(sessions: SessionSettings | None, folder: Path) -> str | None:
    """What computes operators of ours in the graphs in `folder`; None where there are none.

    Raises:
        InputError: it is the library, which is not here.
    """
    from bakeout.export.onnx_pipeline import GRAPH
    from bakeout.export.op_library import has_own_operators, op_library

    graphs = [path for path in folder.glob(f"*/{GRAPH}") if has_own_operators(path)]
    if not graphs:
        return None
    chosen = with_kernels_chosen(sessions)
    if importlib.util.find_spec("onnxruntime") is not None:
        op_library(graphs, chosen)
    return chosen.kernels


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products in whole fp32 inside: on a GPU cuDNN takes TF32 by itself, which is a thousand times coarser."""
    backends: Any = torch.backends
    convolutions, products = backends.cudnn.conv, backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before
