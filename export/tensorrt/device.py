"""The GPU as a runner sees it: its name in torch, and a stream on which work is queued or captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bakeout.editor.errors import InputError


def torch_device(device: str | torch.device) -> torch.device:
    """The GPU that torch calls so, with its number. Raises InputError if it is none, or not here."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(f"{str(device)!a:.50} is no device; give an NVIDIA GPU, as cuda or cuda:1") from None
    if wanted.type != "cuda":
        raise InputError(f"{str(device)!a:.50} is no NVIDIA GPU; give one, as cuda or cuda:1")
    count = torch.cuda.device_count()
    index = wanted.index if wanted.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        built = "" if torch.version.cuda else ", and this torch is built without CUDA"
        raise InputError(
            f"there is no NVIDIA GPU cuda:{index} here (torch sees {count}{built}); draw on a machine that has it, or "
            "with another runtime"
        )
    return torch.device("cuda", index)


class Stream:
    """A stream of a GPU beside those on which torch works by itself.

    A CUDA graph cannot be captured on a device's default stream, and TensorRT waits for the whole device where it is
    given that one.

    Attributes:
        handle: its `cudaStream_t`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle: int = self._stream.cuda_stream

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Queue what torch is given inside after the work of the current stream, which then waits for it.

        The stream's device is the current one inside, for torch and for CUDA.
        """
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def wait(self) -> None:
        """Return when all that was queued is done."""
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], object]:
        """A CUDA graph of what `work` queues, which is not done now; what is returned queues it on the current stream.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate memory meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
