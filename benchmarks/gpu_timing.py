"""Times of versions of one computation, side by side, on a GPU.

Calls are captured into a CUDA graph, so that what is timed is the GPU's work and not the host's. They rotate over sets
of inputs, and outputs, that together are larger than the L2 cache, as those of a network's layers are. Versions are
replayed in turn, and each is captured twice: what differs between the two captures is noise.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Runs what was prepared, and gives the seconds of one call.
Measure = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """A version's time.

    Attributes:
        seconds: of one call: the mean of two captures' medians.
        again: how far apart these two are, as a share of `seconds`.
    """

    seconds: float
    again: float


class Clock(Protocol):
    """What measures calls on one kind of device."""

    device: torch.device

    def prepare(self, calls: Sequence[Callable[[], Tensor]], alive: int) -> Measure:
        """Warm up and make ready `calls`, in turn; the last `alive` outputs exist at a time."""


class GraphClock:
    """CUDA events around the replay of a CUDA graph."""

    device = torch.device("cuda")

    def prepare(self, calls: Sequence[Callable[[], Tensor]], alive: int) -> Measure:
        """Warm up, capture, and give what replays: once to be under way when the clock starts, and once timed."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        outputs: deque[Tensor] = deque(maxlen=alive)
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                outputs.append(call())
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def measure() -> float:
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / len(calls)

        return measure


class StreamClock:
    """CUDA events around calls on one stream, for what cannot be captured: how fast the host is bounds short ones."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def prepare(self, calls: Sequence[Callable[[], Tensor]], alive: int) -> Measure:
        """Warm up, and give what queues the calls twice and times the second pass."""
        self.stream.wait_stream(torch.cuda.current_stream())
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def measure() -> float:
            outputs: deque[Tensor] = deque(maxlen=alive)
            with torch.cuda.stream(self.stream):
                for event in (begin, end):
                    outputs.extend(call() for call in calls)
                    event.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / len(calls)

        measure()
        return measure


class HostClock:
    """The host's clock, for a rehearsal without a GPU: nothing that it says is a measurement."""

    device = torch.device("cpu")

    def prepare(self, calls: Sequence[Callable[[], Tensor]], alive: int) -> Measure:
        """Warm up, and give what runs the calls."""
        calls[0]()

        def measure() -> float:
            outputs: deque[Tensor] = deque(maxlen=alive)
            begin = time.perf_counter()
            for call in calls:
                outputs.append(call())
            return (time.perf_counter() - begin) / len(calls)

        return measure


def timings(
    versions: Mapping[str, Callable[[T], Tensor]], sets: Sequence[T], clock: Clock, calls: int, rounds: int
) -> dict[str, Timing | str]:
    """The time of each version, or in one line why it has none.

    Args:
        versions: name → what computes it, from one set of inputs.
        sets: the sets, over which `calls` calls rotate.
        clock: what measures.
        calls: how many calls are timed together.
        rounds: how often each capture has its turn.
    """
    measures: dict[str, list[Measure]] = {}
    times: dict[str, Timing | str] = {}
    for name, run in versions.items():
        turn = [_bound(run, sets[place % len(sets)]) for place in range(calls)]
        try:
            measures[name] = [clock.prepare(turn, len(sets)) for _ in range(2)]
        except Exception as error:  # noqa: BLE001 - a version that cannot run is a line of the table, not its end
            times[name] = one_line(error)
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in measures}
    names = list(measures)
    for turn_of in range(rounds):
        first = turn_of % max(1, len(names))
        for name in names[first:] + names[:first]:
            for capture, measure in zip(seconds[name], measures[name], strict=True):
                capture.append(measure())
    for name, captures in seconds.items():
        one, other = map(statistics.median, captures)
        mean = (one + other) / 2
        times[name] = Timing(mean, abs(one - other) / mean)
    return {name: times[name] for name in versions}


def one_line(error: BaseException) -> str:
    """What went wrong, in one line that a table holds."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}".removeprefix("KernelUnavailable: ")[:300].replace("|", "/")


def sets_and_calls(bytes_of_one: float, cache: int, volume: float) -> tuple[int, int]:
    """How many sets are four times as large as the cache, and how many calls of whole rotations move `volume` bytes."""
    sets = max(2, math.ceil(4 * cache / bytes_of_one))
    return sets, sets * max(2, round(volume / bytes_of_one / sets))


def _bound(run: Callable[[T], Tensor], inputs: T) -> Callable[[], Tensor]:
    return lambda: run(inputs)
