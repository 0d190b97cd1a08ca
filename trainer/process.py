"""What the loop asks of its process: to hear signals late, and to collect garbage rarely."""

import contextlib
import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_COLLECT_EVERY = 1000  # steps


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
