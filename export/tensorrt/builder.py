"""Have TensorRT build an engine.

The network is strongly typed, as all of TensorRT 11 are: each layer computes in the type that the graph says. What is
left off, and why:

- Engines for other GPUs or versions (`hardware_compatibility_level`, `VERSION_COMPATIBLE`): kernels that all of them
  have are slower, and the artifact has what to build from.
- Refitting: an engine whose weights can be exchanged can be made one that is half edited.

Profiling verbosity is detailed, for the inspector: it is of what is written down, not of what is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bakeout.editor.errors import InputError
from bakeout.export.checkpoint import write_synced
from bakeout.export.tensorrt import device as devices
from bakeout.export.tensorrt import plugin
from bakeout.export.tensorrt.library import logger, tensorrt
from bakeout.export.tensorrt.monitor import Monitor, listener
from bakeout.export.tensorrt.shapes import Profile

# 3 is TensorRT's own choice; higher ones compile kernels also for layers that have some.
LEVEL: Final = 3
_NO_MEMORY: Final = ("out of memory", "outofmemory", "insufficient memory", "memory allocation", "failed_allocation")


@dataclass(frozen=True)
class Order:
    """What to build.

    Attributes:
        graph: the name of the graph, for errors.
        onnx: the graph.
        profile: the shapes that its inputs may have.
        plugins: how many operators of ours it has.
        tf32: whether products in fp32 may be of numbers rounded to 10 bits.
        workspace: bytes of the GPU's memory that a layer may compute in.
    """

    graph: str
    onnx: Path
    profile: Profile
    plugins: int
    tf32: bool
    workspace: int

    def flags(self) -> Mapping[str, object]:
        """What changes the engine, other than the graph and the profile."""
        return {"level": LEVEL, "tf32": self.tf32, "verbosity": "detailed"}


def write_plan(order: Order, plan: Path, timings: bytes, device: str, monitor: Monitor) -> bytes:
    """Write an engine to a new file.

    Args:
        order: what to build.
        plan: the file.
        timings: what earlier calls gave back; what is damaged or of another machine is not used.
        device: of torch.
        monitor: learns how far the builder is, and may stop it.

    Returns:
        How long which kernels took, as TensorRT writes it down.

    Raises:
        InputError: TensorRT does not take the graph, cannot build it, or was stopped.
        OSError: the plan cannot be written.
    """
    if order.plugins:
        plugin.register()
    library, log, stream = tensorrt(), logger(), devices.Stream(devices.torch_device(device))
    with stream.ordered():
        try:
            builder = library.Builder(log)
        except TypeError as error:  # how the bindings tell that the library made none
            raise _failed(order, log.said) from error
        network = _parsed(library, builder, order, log)
        config = builder.create_builder_config()
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = LEVEL
        (config.set_flag if order.tf32 else config.clear_flag)(library.BuilderFlag.TF32)
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, order.workspace)
        # The config keeps no hold of its own on these two.
        timed = _timing_cache(config, timings)
        told = config.progress_monitor = listener(library, monitor)
        _add_profile(builder, network, config, order, log)
        memory = builder.build_serialized_network(network, config)
        if memory is None:
            raise _failed(order, log.said)
        write_synced(plan, [memory])
        kept = bytes(timed.serialize())
        del told
    return kept


def _parsed(library: Any, builder: Any, order: Order, log: Any) -> Any:
    network = builder.create_network(0)
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(order.onnx)):
        raise InputError(
            f"TensorRT does not take {order.graph}: {_parser_error(parser, log)}; use TensorRT 11.4 or newer"
        )
    layers = map(network.get_layer, range(network.num_layers))
    taken = sum(layer.type == library.LayerType.PLUGIN_V3 for layer in layers)
    if taken != order.plugins:
        raise InputError(
            f"TensorRT read {taken} of the {order.plugins} operators of ours in {order.graph} as plugins, and of the "
            "others the bodies; use TensorRT 11.4"
        )
    return network


def _parser_error(parser: Any, log: Any) -> str:
    if not parser.num_errors:
        return log.said or "it does not say why"
    error = parser.get_error(0)
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    said = " ".join(error.desc().split())[:300]
    return f"node {error.node_name()!a:.200}, a {error.node_operator()!a:.50}: {said}{more}"


def _timing_cache(config: Any, timings: bytes) -> Any:
    for given in (timings, b""):
        cache = config.create_timing_cache(given)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    raise InputError("TensorRT makes no timing cache; use TensorRT 11.4")


def _add_profile(builder: Any, network: Any, config: Any, order: Order, log: Any) -> None:
    inputs = {it.name: tuple(it.shape) for it in map(network.get_input, range(network.num_inputs))}
    if inputs.keys() != order.profile.keys():
        names = ", ".join(sorted(inputs.keys() ^ order.profile.keys()))
        raise InputError(f"{order.graph} has other inputs than was expected ({names!a:.200}); export the model again")
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        if -1 in shape:
            profile.set_shape(name, *order.profile[name])
    if config.add_optimization_profile(profile) < 0:
        raise _failed(order, log.said)


def _failed(order: Order, said: str) -> InputError:
    if any(words in said.lower() for words in _NO_MEMORY):
        return InputError(
            f"the GPU's memory is too small to build {order.graph} ({said}); end other programs on it, choose smaller "
            "or fewer pictures with --size and --batch, or take a GPU with more"
        )
    return InputError(
        f"TensorRT cannot build the engine of {order.graph} ({said or 'it does not say why'}); choose another "
        "--precision or --size, or another version of TensorRT"
    )
