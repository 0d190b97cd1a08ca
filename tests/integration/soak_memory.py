"""The memory of every process of a soak, and whether it is flat.

Processes have the name that they were given, or what their command says of them, or that of the
process that started them.

A process that lives for at least `LONG_S` is judged by itself: a line through its samples after the
first third of its life may rise by at most `GROWTH` of its mean, and `GROWTH_BYTES`, until the end.
Of those that come and go under one name, the upper quartile of the largest memory of the later half
of them is held against that of the earlier half in the same way: a driver of a build takes 0.2 GB
more in the last tenth of a second of its life, which is seen of one in ten or so.
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.clusters import children

LONG_S = 300.0
GROWTH = 0.10
GROWTH_BYTES = 48_000_000
_PAUSE_S = 2.0
_COMMANDS = {
    "/gcs_server": "Ray: gcs_server",
    "/raylet ": "Ray: raylets",
    "ray::UnitActor": "Ray: build workers",
    "ray::": "Ray: idle workers",
    "default_worker.py": "Ray: idle workers",
    "/ray/": "Ray: others",
    "object_store._BEAT_S": "build drivers",
}
_PAGE_BYTES = 4096
_MIN_LIVES = 12  # of short ones, to tell earlier from later


class Row(NamedTuple):
    """What the memory of the processes of one name came to."""

    name: str
    num_processes: int
    first_bytes: float  # after warm-up, or of the earlier half
    last_bytes: float
    peak_bytes: int
    problem: str

    def text(self) -> str:
        """Return a line of the table."""
        return (
            f"{self.name:<18}{self.num_processes:>5} processes {self.first_bytes / 1e6:>7.0f} MB "
            f"-> {self.last_bytes / 1e6:>5.0f} MB, peak {self.peak_bytes / 1e6:>5.0f} MB"
        )


class Memory:
    """Samples this process, and all that it has started."""

    def __init__(self) -> None:
        self._names = {os.getpid(): "the soak itself"}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
        self.done: list[tuple[float, dict[str, int]]] = []
        self._num_done: Callable[[], dict[str, int]] = dict
        self.begun_s = 0.0

    def name(self, pid: int, name: str) -> None:
        """Count a process, and those that it will start, under a name."""
        self._names[pid] = name

    def begin(self, num_done: Callable[[], dict[str, int]]) -> None:
        """Begin to sample memory and how much is done."""
        self._num_done = num_done
        self.begun_s = time.monotonic()
        self._thread.start()

    def end(self) -> None:
        """Sample no more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def rows(self) -> list[Row]:
        """Return what came of every name."""
        names = sorted({name for name, _ in self.samples})
        return [_row(name, self._lives(name)) for name in names]

    def totals(self) -> dict[str, list[tuple[float, int]]]:
        """Return the memory of all processes of every name together, over time."""
        totals: dict[str, dict[float, int]] = defaultdict(lambda: defaultdict(int))
        for (name, _), samples in self.samples.items():
            for when, size in samples:
                totals[name][when] += size
        return {name: sorted(sizes.items()) for name, sizes in sorted(totals.items())}

    def _lives(self, name: str) -> list[list[tuple[float, int]]]:
        return [samples for (other, _), samples in self.samples.items() if other == name]

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE_S):
            now = time.monotonic() - self.begun_s
            self.done.append((now, self._num_done()))
            for pid, name in self._tree(os.getpid(), ""):
                if size := _resident_bytes(pid):
                    self.samples[name, pid].append((now, size))

    def _tree(self, pid: int, above: str) -> Iterator[tuple[int, str]]:
        name = self._names.get(pid) or _own_name(pid) or above
        yield pid, name
        for child in children(pid):
            yield from self._tree(child, name)


def _own_name(pid: int) -> str | None:
    """Return what a process is by its command; None where that does not tell."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    return next((name for part, name in _COMMANDS.items() if part in command), None)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):  # it has just ended
        return 0


def _row(name: str, lives: list[list[tuple[float, int]]]) -> Row:
    peak = max(size for life in lives for _, size in life)
    long = [life for life in lives if life[-1][0] - life[0][0] >= LONG_S]
    if long:
        ends = [_ends_of_line(life) for life in long]
        first, last = max(ends, key=lambda pair: pair[1] - pair[0])
    else:
        peaks = [max(size for _, size in life) for life in lives]
        half = len(peaks) // 2
        parts = (peaks[:half] or peaks, peaks[half:])
        first, last = (float(np.percentile(part, 75)) for part in parts)
    grown = last - first
    may_grow = GROWTH * first + GROWTH_BYTES
    is_judged = bool(long) or len(lives) >= _MIN_LIVES
    problem = f"it grew by {grown / 1e6:.0f} MB" if is_judged and grown > may_grow else ""
    return Row(name, len(lives), first, last, peak, problem)


def _ends_of_line(life: list[tuple[float, int]]) -> tuple[float, float]:
    """Return where a line through the samples after warm-up begins and ends."""
    times, sizes = np.array(life, float)[len(life) // 3 :].T
    slope, start = np.polyfit(times - times[0], sizes, 1)
    return float(start), float(start + slope * (times[-1] - times[0]))
