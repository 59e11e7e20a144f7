"""How far TensorRT's builder is, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Lock
from typing import Any, Final, TypeVar

T = TypeVar("T")
# Seconds between two looks at how far the builder is.
_PERIOD: Final = 0.2


class Monitor:
    """The phases in which the builder is, one within another; each has steps. It tells of them from several threads.

    Attributes:
        stopped: whether the builder shall stop at its next step.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._most = 0.0
        self._lock = Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase starts, in a step of its parent."""
        with self._lock:
            self._phases[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> bool:
        """Step number `step`, from 0, is done; returns whether to go on."""
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, step + 1)
                self._most = max(self._most, self._fraction(None))
        return not self.stopped

    def finish(self, phase: str) -> None:
        """A phase is over, whether all its steps are done or not."""
        with self._lock:
            self._phases.pop(phase, None)

    @property
    def fraction(self) -> float:
        """The part of the phases without a parent that is done; never less than before."""
        return self._most

    def _fraction(self, parent: str | None) -> float:
        parts = (
            min((done + self._fraction(phase)) / steps, 1.0)
            for phase, (of, steps, done) in self._phases.items()
            if of == parent
        )
        return max(parts, default=0.0)


def listener(library: Any, monitor: Monitor) -> Any:
    """A `tensorrt.IProgressMonitor` that tells `monitor`."""

    class Listener(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            monitor.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return monitor.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            monitor.finish(phase_name)

    return Listener()


def watched(work: Callable[[], T], monitor: Monitor, progress: Callable[[float], object] | None) -> T:
    """What `work` returns, which runs in a thread of its own: Python looks for Ctrl-C only in the first.

    Args:
        work: calls the builder.
        monitor: of the builder. What interrupts this function stops it, and is raised when it has stopped.
        progress: called with the part, of one for the whole, that was just done.
    """
    told = 0.0
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as pool:
        future = pool.submit(work)
        try:
            while not wait([future], _PERIOD).done:
                told = _tell(progress, told, monitor.fraction)
        except BaseException:
            monitor.stopped = True
            raise
    result = future.result()
    _tell(progress, told, 1.0)
    return result


def _tell(progress: Callable[[float], object] | None, told: float, now: float) -> float:
    if progress is not None and now > told:
        progress(now - told)
    return now
