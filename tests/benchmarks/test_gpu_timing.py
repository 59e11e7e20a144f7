"""Times are medians of two captures, versions have their turns, and one that fails is a line."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import gpu_timing
import pytest
import torch


class FakeClock:
    """Takes what a call returns for its seconds. Second captures are 10 % slower; some measurements are disturbed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log: list[tuple[int, float]] = []
        self.captures = 0

    def prepare(self, calls, alive):
        seconds = [float(call()) for call in calls]
        capture, self.captures = self.captures, self.captures + 1

        def measure():
            mean = sum(seconds) / len(seconds)
            self.log.append((capture, mean))
            return mean * (1.1 if capture % 2 else 1.0) * (100 if len(self.log) % 7 == 3 else 1)

        return measure


def test_medians_of_two_captures_and_how_far_apart_they_are():
    clock = FakeClock()
    versions = {"slow": lambda scale: torch.tensor(4.0 * scale), "fast": lambda scale: torch.tensor(1.0 * scale)}
    found = gpu_timing.timings(versions, [1.0, 3.0], clock, calls=4, rounds=9)
    assert found["slow"].seconds == pytest.approx(2 * 4.0 * 1.05)
    assert found["fast"].seconds == pytest.approx(2 * 1.0 * 1.05)
    assert found["slow"].again == pytest.approx(0.1 / 1.05)
    assert [*found] == ["slow", "fast"]
    # Every version had its turn in every round, and the order rotates.
    order = [capture // 2 for capture, _ in clock.log]
    assert order[:4] == [0, 0, 1, 1]
    assert order[4:8] == [1, 1, 0, 0]
    assert order.count(0) == order.count(1) == 18


def test_calls_rotate_over_the_sets():
    seen = []
    gpu_timing.timings({"a": lambda it: seen.append(it) or torch.tensor(1.0)}, "xyz", FakeClock(), calls=6, rounds=1)
    assert "".join(seen) == "xyzxyz" * 2


def test_a_version_that_fails_is_told_in_one_line_and_the_others_are_timed():
    def broken(_):
        raise RuntimeError("\n  out of | memory\nand a long story")

    found = gpu_timing.timings({"broken": broken, "right": lambda _: torch.tensor(1.0)}, [0], FakeClock(), 1, 1)
    assert found["broken"] == "RuntimeError: out of / memory"
    assert isinstance(found["right"], gpu_timing.Timing)
    assert gpu_timing.timings({"broken": broken}, [0], FakeClock(), 1, 1) == {"broken": found["broken"]}


@pytest.mark.parametrize("size", [1.0, 3e5, 5e6, 5e7, 5e8, 1e10])
def test_sets_outgrow_the_cache_and_calls_are_whole_rotations(size):
    sets, calls = gpu_timing.sets_and_calls(size, 50 * 2**20, 2e9)
    assert sets >= 2
    assert sets * size >= 4 * 50 * 2**20
    assert calls % sets == 0
    assert calls >= 2 * sets
    assert calls * size >= 0.75 * 2e9


def test_the_hosts_clock_runs_every_call():
    runs = []
    measure = gpu_timing.HostClock().prepare([lambda: runs.append(0) or torch.zeros(1)] * 5, alive=2)
    assert measure() > 0
    assert len(runs) == 6


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for torch.cuda, on which a replay takes 6 ms; it tells what happened, in order."""
    told = SimpleNamespace(log=[], now=0.0)

    class Graph:
        def replay(self):
            told.log.append("replay")
            told.now += 6.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.log.append("record")
            self.at = told.now

        def synchronize(self):
            told.log.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    @contextmanager
    def capture(graph, stream):
        told.log.append("capture")
        yield
        told.log.append("captured")

    stream = SimpleNamespace(
        wait_stream=lambda other: told.log.append("ordered"), synchronize=lambda: told.log.append("wait")
    )
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda it: contextmanager(lambda: (yield))(),
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return told


@pytest.fixture
def call(gpu):
    """A call that tells of itself; `most` has how many of its outputs there were after each."""
    alive: list[weakref.ref] = []

    def one():
        gpu.log.append("call")
        out = torch.zeros(1)
        alive.append(weakref.ref(out))
        one.most.append(sum(it() is not None for it in alive))
        return out

    one.most = []
    return one


def test_a_graph_is_captured_warm_and_the_second_of_two_replays_is_timed(gpu, call):
    measure = gpu_timing.GraphClock().prepare([call] * 6, alive=3)
    assert gpu.log == ["ordered", "call", "call", "wait", "capture", *["call"] * 6, "captured"]
    # Outputs take turns as inputs do: one that is written has three others beside it that were written before.
    assert max(call.most[2:]) == 4
    gpu.log.clear()
    assert measure() == pytest.approx(6e-3 / 6)
    assert gpu.log == ["replay", "record", "replay", "record", "wait"]


def test_a_stream_runs_all_calls_twice_and_the_second_pass_is_timed(gpu, call):
    measure = gpu_timing.StreamClock().prepare([call] * 6, alive=3)
    assert gpu.log == ["ordered", *2 * [*["call"] * 6, "record"], "wait"]
    assert max(call.most) == 4
    gpu.log.clear()
    measure()
    assert gpu.log == [*2 * [*["call"] * 6, "record"], "wait"]
