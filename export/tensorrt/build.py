"""The engine of a graph: built, or taken from the cache, and judged in either case."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from bakeout.editor.errors import InputError
from bakeout.export.custom_ops import DOMAIN
from bakeout.export.tensorrt.builder import Order, write_plan
from bakeout.export.tensorrt.cache import Cache, graph_digests, key_of
from bakeout.export.tensorrt.inspection import inspect
from bakeout.export.tensorrt.library import Gpu, gpu, tensorrt
from bakeout.export.tensorrt.monitor import Monitor, watched
from bakeout.export.tensorrt.shapes import Profile
from bakeout.export.tensorrt.skeleton import skeleton
from bakeout.kernels import aot
from bakeout.kernels.errors import KernelUnavailable

_KERNEL: Final = "triton"
_VAE: Final = ("vae_encoder", "vae_decoder")
# bf16 came with Ampere.
_BF16_CAPABILITY: Final = (8, 0)
_LEAST_WORKSPACE: Final = 1 << 28


@dataclass(frozen=True)
class Built:
    """An engine.

    Attributes:
        key: SHA-256 of all that it was built from and for.
        layers: how many it has.
        plugins: how many of them are kernels of ours.
        from_cache: whether it was built before.
        doubt: why its layers could not be judged, or not all of them; empty if they were.
    """

    key: str
    layers: int
    plugins: int
    from_cache: bool
    doubt: str


def build(
    onnx: Path,
    plan: Path,
    *,
    graph: str,
    precision: str,
    profile: Profile,
    device: str,
    progress: Callable[[float], object] | None = None,
) -> Built:
    """Write the engine of a graph, which computes as the graph says and has our kernels for operators of ours.

    Products in fp32 are not made in TF32, which rounds to 10 bits: what a graph has in fp32 is there for its digits.
    Only the VAE beside networks in fp16 or bf16 is in fp32 for its range, and computes in TF32.

    Args:
        onnx: the graph, cast to `precision`.
        plan: the file to write; must not exist.
        graph: its name, of `bakeout.export.tensorrt.target.GRAPHS`.
        precision: `fp32`, `fp16` or `bf16`.
        profile: the shapes that its inputs may have.
        device: of torch: the GPU that builds it and for whose kind it is.
        progress: called with the part, of one for the whole, that was just done.

    Raises:
        InputError: TensorRT or the GPU is missing, too old or too small; TensorRT does not take the graph, cannot build
            it, or built another engine than was asked for (see `inspection.judge`).
        KeyboardInterrupt: the user stopped it; the builder has stopped too.
        OSError: the plan cannot be written.
    """
    library, found, cache = tensorrt(), gpu(device), Cache()
    digests = graph_digests(onnx)
    plugins = sum(node.domain == DOMAIN for node in skeleton(onnx).graph.node)
    _check_capability(found, precision, plugins > 0)
    weights = sum((onnx.parent / name).stat().st_size for name in digests)
    tf32 = precision != "fp32" and graph in _VAE
    order = Order(graph, onnx, profile, plugins, tf32, max(found.free - weights, _LEAST_WORKSPACE))
    machine = {
        "tensorrt": library.__version__, "gpu": found.name, "capability": found.capability, "driver": found.driver,
        "system": [platform.system(), platform.machine()],
    }  # fmt: skip
    key = key_of({
        "machine": machine, "graph": digests, "precision": precision, "profile": dict(profile), "flags": order.flags(),
        "kernels": _kernels() if plugins else None, "bakeout": version("bakeout"),
    })  # fmt: skip
    from_cache = cache.fetch(key, plan)
    if from_cache:
        if progress is not None:
            progress(1.0)
    else:
        _check_memory(found, weights, graph)
        _compile(order, plan, cache, f"timing-{key_of(machine)}", device, progress)
    inspected = inspect(plan, onnx, profile, device)
    if not from_cache:
        cache.keep(key, plan)
    return Built(key, inspected.layers, inspected.plugins, from_cache, inspected.doubt)


def _compile(
    order: Order, plan: Path, cache: Cache, name: str, device: str, progress: Callable[[float], object] | None
) -> None:
    """Build with what was timed before under `name`, and keep what is known then."""
    monitor = Monitor()
    with TemporaryDirectory(dir=cache.folder, prefix="timing-") as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        timings = before.read_bytes() if cache.fetch(name, before) else b""
        after.write_bytes(watched(lambda: write_plan(order, plan, timings, device, monitor), monitor, progress))
        cache.keep(name, after)


def _kernels() -> str:
    """SHA-256 of what compiles our kernels and how they are launched; which of them a graph has is in its digest."""
    try:
        code = aot.compiled(aot.KERNELS[_KERNEL](torch.float16, 8))
    except KernelUnavailable as error:
        raise InputError(str(error)) from error
    return hashlib.sha256(code.ptx.encode() + Path(aot.__file__).read_bytes()).hexdigest()


def _check_capability(found: Gpu, precision: str, with_kernels: bool) -> None:
    what, least = ("bf16", _BF16_CAPABILITY) if precision == "bf16" else ("our kernel", aot.CAPABILITY)
    if (precision == "bf16" or with_kernels) and found.capability < least:
        raise InputError(
            f"{found.name} has compute capability {found.capability[0]}.{found.capability[1]}, and {what} needs "
            f"{least[0]}.{least[1]} or more; take a newer GPU" + (" or --precision fp16" if what == "bf16" else "")
        )


def _check_memory(found: Gpu, weights: int, graph: str) -> None:
    least = weights + _LEAST_WORKSPACE
    if found.free < least:
        raise InputError(
            f"{found.name} has {_gb(found.free)} of its {_gb(found.total)} free, and to build {graph} takes at least "
            f"{_gb(least)}; end other programs on it, or take a GPU with more memory"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
