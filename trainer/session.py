"""What every loop of steps needs: a stopwatch, an ear for those who ask it to leave, and peace.

Garbage is collected rarely, and by all ranks after the same step.
"""

import contextlib
import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_COLLECT_EVERY = 1000  # steps


class Stopwatch:
    """Time of the run and of each interval, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        """Start."""
        self._started = self._lap_started = time.perf_counter()
        self._lap_waited_s = 0.0
        self.total_waited_s = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count one step, and the time of the block as waiting for its data."""
        began = time.perf_counter()
        yield
        waited_s = time.perf_counter() - began
        self._steps += 1
        self._lap_waited_s += waited_s
        self.total_waited_s += waited_s

    @property
    def total_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._started

    def lap(self) -> tuple[float, float, int]:
        """Return seconds, seconds waited and steps since the last lap."""
        now = time.perf_counter()
        lap = (now - self._lap_started, self._lap_waited_s, self._steps)
        self._lap_started, self._lap_waited_s, self._steps = now, 0.0, 0
        return lap


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set; the second signal acts as it did before."""
    stop = threading.Event()
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        previous.clear()

    def request(number: int, frame: FrameType | None) -> None:
        logger.info("%s: leaving after this step", signal.Signals(number).name)
        stop.set()
        restore()

    # Python allows handlers in the main thread only; elsewhere nobody can ask.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


@contextlib.contextmanager
def rare_collections() -> Iterator[Callable[[int], None]]:
    """Yield what is called after every step with the number of steps done.

    Its first call puts everything that is alive out of the collector's sight and stops it; then it
    collects every 1,000 steps, so that all ranks pause together. Otherwise each rank pauses at
    moments of its own, and the others wait for it.
    """
    was_enabled = gc.isenabled()
    is_frozen = False

    def step_done(step: int) -> None:
        nonlocal is_frozen
        if is_frozen and step % _COLLECT_EVERY:
            return
        gc.collect()
        if not is_frozen:
            gc.freeze()
            gc.disable()
            is_frozen = True

    try:
        yield step_done
    finally:
        if is_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
