"""Run a TensorRT engine on tensors of torch."""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.export.graph_pipeline import check_given
from bakeout.export.tensorrt import device as devices
from bakeout.export.tensorrt.library import logger, tensorrt

ENGINE: Final = "model.engine"
# Sets of shapes for which an engine keeps buffers: with and without guidance, of two batches.
_MAX_CALLS: Final = 4
_DTYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
Shape = tuple[int, ...]


class CaptureWarning(UserWarning):
    """An engine runs without a CUDA graph, because it could not be captured."""


@dataclass(frozen=True)
class Port:
    """An input or an output of an engine.

    Attributes:
        dtype: of torch.
        least: the smallest shape that it takes; of an output empty, as is `most`.
        most: the largest.
    """

    dtype: torch.dtype
    least: Shape = ()
    most: Shape = ()


class Lane:
    """A stream on which engines run one after the other, and the memory in which each of them computes meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.stream = devices.Stream(device)
        self._device = device
        self._size = 1
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> None:
        """Have `memory` give at least so many bytes from now on."""
        self._size = max(self._size, size)

    def memory(self) -> Tensor:
        """Bytes [n] on the device. What was given before stays as it is for as long as somebody holds it."""
        if len(self._memory) < self._size:
            self._memory = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        return self._memory


class Engine:
    """An engine, called with tensors by name. Not for several threads at a time.

    It computes in buffers of its own, of which there are as many as sets of shapes lately given, and from the second
    call with the same shapes as a captured CUDA graph. The order of work on torch's current stream is kept.

    Args:
        path: of the engine. It is a program that the GPU runs: load only one of a source that you trust.
        device: of torch.
        cuda_graphs: whether calls are captured.
        lane: shared with engines that run before and after this one; None is one of its own.

    Attributes:
        path: of its file.
        device: where its outputs are.
        inputs: by name.
        outputs: by name.

    Raises:
        InputError: TensorRT or the GPU is not here, or the file is no engine for them.
    """

    def __init__(
        self, path: Path, device: str | torch.device, *, cuda_graphs: bool = True, lane: Lane | None = None
    ) -> None:
        self.path = path
        self.device = devices.torch_device(device)
        self._library = tensorrt()
        self._logger = logger()
        self._lane = lane or Lane(self.device)
        self._captured = cuda_graphs
        with self._lane.stream.ordered():
            # The engine needs its runtime for as long as it lives.
            self._runtime, self._engine = deserialize(self._library, path, self._logger)
        self.inputs, self.outputs = _ports(self._library, self._engine, path)
        self._lane.reserve(self._engine.device_memory_size_v2)
        self._calls: OrderedDict[tuple[Shape, ...], _Call] = OrderedDict()
        # A context must not go while the GPU still works in it.
        weakref.finalize(self, self._lane.stream.wait)

    def shape(self, name: str) -> tuple[int | None, ...]:
        """Of an input; None is a dimension that need not always be the same."""
        port = self.inputs[name]
        return tuple(low if low == high else None for low, high in zip(port.least, port.most, strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name.

        Args:
            inputs: by name, on any device and in any dtype.

        Returns:
            Tensors on the engine's device and in its dtypes, in memory that no later call writes to.

        Raises:
            InputError: an input is missing, unknown, or of a shape that the engine was not made for, or it fails.
        """
        check_given(self.path, inputs, self.inputs)
        for name, port in self.inputs.items():
            _check_shape(self.path, name, tuple(inputs[name].shape), port)
        call = self._call(tuple(tuple(inputs[name].shape) for name in self.inputs))
        # Made before anything is queued, of the memory of the stream that will read them.
        outputs = {name: torch.empty_like(buffer) for name, buffer in call.outputs.items()}
        with self._lane.stream.ordered():
            for name, buffer in call.inputs.items():
                buffer.copy_(inputs[name].detach())
            call.compute()
            for name, tensor in outputs.items():
                tensor.copy_(call.outputs[name])
        return outputs

    def _call(self, shapes: tuple[Shape, ...]) -> _Call:
        if shapes in self._calls:
            self._calls.move_to_end(shapes)
            return self._calls[shapes]
        if len(self._calls) == _MAX_CALLS:
            self._lane.stream.wait()
            self._calls.popitem(last=False)
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), self._lane.stream.ordered():
            call = _Call(self, dict(zip(self.inputs, shapes, strict=True)))
        self._calls[shapes] = call
        return call


class _Call:
    """An engine at work on one set of shapes: its context, the tensors it reads and writes, and the captured graph.

    Each has a context of its own. A captured graph needs that (TensorRT's developer guide, CUDA graphs): it is of one
    state of its context, and of one place of all memory. And a context in which an ahead-of-time plugin runs leaks
    memory whenever the shapes of its inputs change (TensorRT's issue 4849).
    """

    def __init__(self, engine: Engine, shapes: Mapping[str, Shape]) -> None:
        self._path, self._stream, self._logger = engine.path, engine._lane.stream, engine._logger
        self._captured = engine._captured
        self._ran = False
        self._replay: Callable[[], object] | None = None
        strategy = engine._library.ExecutionContextAllocationStrategy.USER_MANAGED
        try:
            self._memory = engine._lane.memory()
            self.inputs = {
                name: torch.empty(shape, dtype=engine.inputs[name].dtype, device=engine.device)
                for name, shape in shapes.items()
            }
            self._context = engine._engine.create_execution_context(strategy)
            if self._context is None:
                raise self._failure()
            self._context.set_device_memory(self._memory.data_ptr(), len(self._memory))
            self._check(self._context.set_optimization_profile_async(0, self._stream.handle))
            for name, shape in shapes.items():
                self._check(self._context.set_input_shape(name, shape))
            self.outputs = {
                name: torch.empty(self._output_shape(name), dtype=port.dtype, device=engine.device)
                for name, port in engine.outputs.items()
            }
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU's memory is full with what {engine.path} computes in; draw fewer or smaller pictures at a "
                "time"
            ) from error
        for name, buffer in {**self.inputs, **self.outputs}.items():
            self._check(self._context.set_tensor_address(name, buffer.data_ptr()))

    def compute(self) -> None:
        """Queue the outputs of what the inputs hold, on the current stream."""
        # The first call does what TensorRT puts off to it, which must not be part of a graph.
        if self._ran and self._captured and self._replay is None:
            self._capture()
        if self._replay is not None:
            self._replay()
            return
        self._check(self._context.execute_async_v3(self._stream.handle))
        self._ran = True

    def _output_shape(self, name: str) -> Shape:
        shape = tuple(self._context.get_tensor_shape(name))
        self._check(min(shape, default=0) >= 0)
        return shape

    def _capture(self) -> None:
        try:
            self._replay = self._stream.capture(self._execute)
        except RuntimeError as error:
            self._captured = False
            reason = str(error).strip().partition("\n")[0][:300]
            warnings.warn(
                f"{self._path} runs without a CUDA graph, which takes longer ({reason})", CaptureWarning, stacklevel=2
            )

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError(self._logger.said or "TensorRT does not say why")

    def _check(self, done: bool) -> None:
        if not done:
            raise self._failure()

    def _failure(self) -> InputError:
        reason = self._logger.said or "it does not say why"
        return InputError(
            f"TensorRT failed in {self._path} ({reason}); if memory is short, draw fewer or smaller pictures at a "
            "time, else export the model again"
        )


def deserialize(library: Any, path: Path, log: Any) -> tuple[Any, Any]:
    """The runtime and the engine of a file, on the current device.

    Args:
        library: the module `tensorrt`.
        path: of the engine.
        log: its logger, of `bakeout.export.tensorrt.library`.

    Raises:
        InputError: the file cannot be read, or is no engine for this version of TensorRT and this GPU.
    """
    runtime = library.Runtime(log)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); export the model again") from error
    if engine is None:
        reason = log.said or "it does not say why"
        raise InputError(
            f"TensorRT {library.__version__} does not load {path} ({reason}): it takes the version of TensorRT and the "
            "kind of GPU that it was made with, and memory for its weights; export the model again on this machine"
        )
    return runtime, engine


def _ports(library: Any, engine: Any, path: Path) -> tuple[dict[str, Port], dict[str, Port]]:
    inputs, outputs = {}, {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise InputError(f"{path} has {name!a:.100} as {kind}, which torch does not know; export the model again")
        if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT:
            shape = engine.get_tensor_shape(name)
            # Of an input without a dynamic dimension the profile need not say anything.
            ends = engine.get_tensor_profile_shape(name, 0)[::2] if -1 in tuple(shape) else (shape, shape)
            inputs[name] = Port(_DTYPES[kind], *map(tuple, ends))
        else:
            outputs[name] = Port(_DTYPES[kind])
    return inputs, outputs


def _check_shape(path: Path, name: str, given: Shape, port: Port) -> None:
    fits = len(given) == len(port.least) and all(
        low <= size <= high for low, size, high in zip(port.least, given, port.most, strict=True)
    )
    if not fits:
        takes = str(list(port.least)) + ("" if port.least == port.most else f" to {list(port.most)}")
        raise InputError(
            f"{path} was made for {name} of shape {takes}, not {list(given)}; draw that many pictures of that size, or "
            "export again with another --size or --batch"
        )
