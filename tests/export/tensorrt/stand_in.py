"""What stands for TensorRT where there is none: its names and arguments as of 11.4, and ONNX Runtime behind them.

A plan is the ONNX graph, the profile, and for which GPU and version it was built. Its context reads and writes the
addresses that it is given, which are of the host here. `world.faults` has what goes wrong with engines built from then
on:

    fp32-layer       the inspector shows a product in fp32 that the graph has in less
    no-plugin        the parser reads MaskedGeglu as its body
    body             the inspector shows the bodies of MaskedGeglu
    unnamed          the inspector's layers do not say of which nodes they are
    nan, constant    what all outputs are
    wrong            outputs are a tenth too large
    untouched        outputs are not written
    out-of-memory    the build fails
    parser           the parser refuses the first node
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import TYPES, layers_of, widened
from onnx import TensorProto
from stand_in_types import (
    BuilderFlag,
    DataType,
    ExecutionContextAllocationStrategy,
    IHostMemory,
    ILayer,
    ILogger,
    IOptimizationProfile,
    IProgressMonitor,
    ITensor,
    ITimingCache,
    LayerInformationFormat,
    LayerType,
    Logger,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
    TensorIOMode,
)

# Of the module, as whoever imports it finds it.
__all__ = ["Logger", "NetworkDefinitionCreationFlag"]
__version__ = "11.4.0.106"

_MAGIC = b"stand-in\n"


@dataclass
class World:
    """What an engine meets, and what was done."""

    gpu: str = "NVIDIA Stand-in"
    version: str = __version__
    faults: set[str] = field(default_factory=set)
    plugins: set[str] = field(default_factory=set)
    builds: int = 0
    timings: list[int] = field(default_factory=list)
    config: Any = None
    before_step: Callable[[], None] | None = None


world = World()


_TYPES = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.BFLOAT16: DataType.BF16,
    TensorProto.INT32: DataType.INT32,
    TensorProto.INT64: DataType.INT64,
    TensorProto.BOOL: DataType.BOOL,
}
_NUMPY: dict[DataType, Any] = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.BOOL: np.bool_,
}


class INetworkDefinition:
    def __init__(self) -> None:
        self.model: onnx.ModelProto | None = None
        self.name = ""

    @property
    def num_inputs(self) -> int:
        return len(_inputs(self.model))

    def get_input(self, index: int) -> ITensor:
        return _tensor(_inputs(self.model)[index])

    @property
    def num_layers(self) -> int:
        assert self.model is not None
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> ILayer:
        assert self.model is not None
        node = self.model.graph.node[index]
        taken = f"{node.domain}::{node.op_type}" in world.plugins and "no-plugin" not in world.faults
        return ILayer(node.name, LayerType.PLUGIN_V3 if taken else LayerType.MATRIX_MULTIPLY)

    @property
    def num_outputs(self) -> int:
        assert self.model is not None
        return len(self.model.graph.output)

    def get_output(self, index: int) -> ITensor:
        assert self.model is not None
        return _tensor(self.model.graph.output[index])


class ParserError:
    def __init__(self, node: onnx.NodeProto, desc: str) -> None:
        self._node, self._desc = node, desc

    def desc(self) -> str:
        return self._desc

    def node_name(self) -> str:
        return str(self._node.name)

    def node_operator(self) -> str:
        return str(self._node.op_type)


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        loaded = onnx.load(model)
        if "parser" in world.faults:
            self._errors.append(ParserError(loaded.graph.node[0], "Assertion failed: (false) && 'not supported'"))
            return False
        self._network.model = onnx.shape_inference.infer_shapes(loaded)
        return True


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags = 1 << BuilderFlag.TF32
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: IProgressMonitor | None = None
        self.num_optimization_profiles = 0
        self._profiles: list[IOptimizationProfile] = []
        self._timing: ITimingCache | None = None
        self._pools: dict[MemoryPoolType, int] = {}

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags |= 1 << flag

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags &= ~(1 << flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return bool(self.flags & 1 << flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._pools.get(pool, 0)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if any(
            not low <= usual <= high
            for shapes in profile.shapes.values()
            for low, usual, high in zip(*shapes, strict=True)
        ):
            return -1
        self._profiles.append(profile)
        self.num_optimization_profiles = len(self._profiles)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        read = bytes(serialized_timing_cache)
        return None if read.strip(b"t") else ITimingCache(read)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._timing = cache
        world.timings.append(len(cache.entries))
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timing


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        world.config = config
        assert network.model is not None
        if not _stepped(config.progress_monitor):
            return None
        if "out-of-memory" in world.faults:
            self._logger.log(
                ILogger.Severity.ERROR,
                "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (out of memory)",
            )
            return None
        dynamic = [it.name for it in map(_tensor, _inputs(network.model)) if -1 in it.shape]
        shapes = config._profiles[0].shapes if config._profiles else {}
        if missing := set(dynamic) - shapes.keys():
            why = f"Error Code 4: API Usage Error (no profile for {min(missing)})"
            self._logger.log(ILogger.Severity.ERROR, why)
            return None
        world.builds += 1
        if config._timing is not None:
            config._timing.entries += b"t"
        head = {
            "gpu": world.gpu,
            "version": world.version,
            "shapes": shapes,
            "faults": sorted(world.faults),
            "plugins": sorted(world.plugins),
            "verbosity": config.profiling_verbosity,
        }
        return IHostMemory(_MAGIC + json.dumps(head).encode() + b"\n" + network.model.SerializeToString())


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        given = bytes(serialized_engine)
        if not given.startswith(_MAGIC):
            return self._refuse(
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag does not match)"
            )
        head, _, graph = given.removeprefix(_MAGIC).partition(b"\n")
        facts = json.loads(head)
        if facts["version"] != world.version:
            return self._refuse(
                "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not "
                "compatible with this version of TensorRT, "
                f"expecting library version {facts['version']} got {world.version}, please rebuild.)"
            )
        if facts["gpu"] != world.gpu:
            return self._refuse(
                "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on "
                "an incompatible device, expecting "
                f"{facts['gpu']} got {world.gpu}, please rebuild.)"
            )
        return ICudaEngine(facts, onnx.load_from_string(graph))

    def _refuse(self, why: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, why)


class ICudaEngine:
    def __init__(self, facts: dict[str, Any], model: onnx.ModelProto) -> None:
        self._facts, self._model = facts, model
        self._session: onnxruntime.InferenceSession | None = None
        self._output_shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        inputs, outputs = (list(map(_tensor, its)) for its in (_inputs(model), model.graph.output))
        self._inputs = {it.name: it for it in inputs}
        self._outputs = {it.name: it for it in outputs}
        self._tensors = self._inputs | self._outputs
        self.num_io_tensors = len(self._tensors)
        self.num_layers = len(layers_of(facts, model))
        self.num_optimization_profiles = 1
        self.device_memory_size_v2 = 4096

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(it) for it in self._facts["shapes"].get(name, [self._tensors[name].shape] * 3)]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext:
        return IExecutionContext(self, strategy)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def _compute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            self._session = onnxruntime.InferenceSession(
                widened(self._model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return dict(zip(self._outputs, self._session.run(list(self._outputs), inputs), strict=True))

    def _shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(sorted(shapes.items()))
        if key not in self._output_shapes:
            zeros = {name: np.zeros(shapes[name], _NUMPY[it.dtype]) for name, it in self._inputs.items()}
            self._output_shapes[key] = {name: found.shape for name, found in self._compute(zeros).items()}
        return self._output_shapes[key]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self.engine = engine
        self._has_memory = strategy != ExecutionContextAllocationStrategy.USER_MANAGED
        self._shapes = {name: it.shape for name, it in engine._inputs.items()}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return profile_index == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._has_memory = size >= self.engine.device_memory_size_v2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        given = tuple(shape)
        if len(given) != len(least) or not all(
            low <= it <= high for low, it, high in zip(least, given, most, strict=True)
        ):
            return False
        self._shapes[name] = given
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name, shape in self._shapes.items() if -1 in shape]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return self.engine._tensors[name].shape if self.infer_shapes() else self.engine._shapes(self._shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self.engine._tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, faults = self.engine, self.engine._facts["faults"]
        if not self._has_memory or self.infer_shapes() or self._addresses.keys() != engine._tensors.keys():
            return False
        shapes = self._shapes | engine._shapes(self._shapes)
        memory = {name: _array(self._addresses[name], shapes[name], it.dtype) for name, it in engine._tensors.items()}
        found = engine._compute({name: memory[name].copy() for name in engine._inputs})
        for name, values in found.items():
            if "untouched" in faults:
                continue
            memory[name][...] = values * 1.1 if "wrong" in faults else values
            if "nan" in faults:
                memory[name][...] = np.nan
            if "constant" in faults:
                memory[name][...] = 0.5
        return True


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self.execution_context: IExecutionContext | None = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002
        layers: list[Any] = layers_of(self._engine._facts, self._engine._model)
        if self._engine._facts["verbosity"] != ProfilingVerbosity.DETAILED:
            layers = [layer["Name"] for layer in layers]
        elif self.execution_context is None and self._engine._facts["shapes"]:
            for layer in layers:
                for tensor in layer["Inputs"] + layer["Outputs"]:
                    tensor["Format"] = tensor["DataType"] = "N/A due to dynamic shapes"
        tensors = [
            {
                "Name": it.name,
                "IOMode": "Input" if it.name in self._engine._inputs else "Output",
                "DataType": next(TYPES[kind] for kind, dtype in _TYPES.items() if dtype == it.dtype),
                "Dimensions": list(it.shape),
                "Location": "Device",
                "IsShapeInferenceIO": False,
                "ProfileInfo": [],
            }
            for it in self._engine._tensors.values()
        ]
        return json.dumps({"Layers": layers, "I/O Tensors": tensors})


def _inputs(model: onnx.ModelProto | None) -> list[onnx.ValueInfoProto]:
    assert model is not None
    stored = {it.name for it in model.graph.initializer}
    return [it for it in model.graph.input if it.name not in stored]


def _tensor(value: onnx.ValueInfoProto) -> ITensor:
    kind = value.type.tensor_type
    shape = tuple(-1 if dim.dim_param or not dim.HasField("dim_value") else dim.dim_value for dim in kind.shape.dim)
    return ITensor(value.name, _TYPES[kind.elem_type], shape)


def _array(address: int, shape: tuple[int, ...], dtype: DataType) -> Any:
    kind = np.dtype(_NUMPY[dtype])
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)


def _stepped(monitor: IProgressMonitor | None) -> bool:
    """Go through phases as the builder does, one within the other. False if the monitor wants it to stop."""
    if monitor is None:
        return True
    monitor.phase_start("Building engine", None, 4)
    for step in range(4):
        monitor.phase_start("Timing kernels", "Building engine", 2)
        for inner in range(2):
            if world.before_step is not None:
                world.before_step()
            if not monitor.step_complete("Timing kernels", inner):
                return False
        monitor.phase_finish("Timing kernels")
        if not monitor.step_complete("Building engine", step):
            return False
    monitor.phase_finish("Building engine")
    return True


class CpuStream:
    """`bakeout.export.tensorrt.device.Stream` where everything is done when it is queued."""

    def __init__(self, device: torch.device) -> None:
        self.handle = 0

    @contextmanager
    def ordered(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """This module as `tensorrt`, on a GPU that is the CPU, with an empty cache of engines."""
    from bakeout.export.tensorrt import device, library, plugin

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "world", World())
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "torch_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(device, "Stream", CpuStream)
    monkeypatch.setattr(
        library, "_read", lambda _: library.Gpu(world.gpu, (8, 9), "580.65.06", 24_000_000_000, 23_000_000_000)
    )
    monkeypatch.setattr(plugin, "register", lambda kernel="triton": world.plugins.add("bakeout::MaskedGeglu"))
    return module
