"""What a batcher says about itself: to metrics, to admission, to a person who looks."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers_svc.pace import Pace

_SMOOTHING = 0.1


class BatchReport(NamedTuple):
    """A batch has run."""

    num_pictures: int
    infer_s: float
    queue_s: Sequence[float]  # of every picture


class BatcherStats(NamedTuple):
    """What a batcher is doing."""

    num_undecoded: int  # files that no thread has taken
    num_views: int  # pictures that no batch has taken
    num_running: int  # pictures in batches
    num_batches: int  # since the start, as all below
    num_late: int  # pictures dropped because their deadline had passed or their client had gone
    busy_s: tuple[float, ...]  # of every lane, in batches and jobs
    num_lanes_alive: int
    max_batch: int  # less than was asked for where memory was short


class Books:
    """Counts that several lanes write."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.num_batches = 0
        self.num_late = 0
        self.decode_s = 0.0  # of one file, smoothed
        self.pace = Pace()
        self._lock = threading.Lock()

    def note_batch(self, num_pictures: int, infer_s: float) -> None:
        """Count a batch that has just ended."""
        with self._lock:
            self.num_batches += 1
            self.pace.learn(num_pictures, infer_s)

    def note_decode(self, seconds: float) -> None:
        """Remember how long a file took."""
        with self._lock:
            self.decode_s += _SMOOTHING * (seconds - self.decode_s)

    def note_late(self, num_pictures: int) -> None:
        """Count pictures that were dropped."""
        with self._lock:
            self.num_late += num_pictures
