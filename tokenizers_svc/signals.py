"""Signals as a queue: the main thread waits for them instead of being interrupted."""

import contextlib
import queue
import signal
from collections.abc import Iterator
from types import FrameType

Signals = queue.SimpleQueue[int]


@contextlib.contextmanager
def caught_signals(*numbers: signal.Signals) -> Iterator[Signals]:
    """Collect signals instead of dying of them. From the main thread only."""
    # Of the standard queues, only a SimpleQueue may be put to from a signal handler.
    signals: Signals = queue.SimpleQueue()

    def note(number: int, frame: FrameType | None) -> None:
        signals.put(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def next_signal(signals: Signals, timeout_s: float) -> int | None:
    """Return the next signal, or None when none has come in time."""
    try:
        return signals.get(timeout=timeout_s)
    except queue.Empty:
        return None
