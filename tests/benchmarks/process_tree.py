"""Running a command and counting what it and every process below it cost.

Ray's daemons ignore the end of their children, so the kernel's own sum over a process tree misses
most of the work. The processes are sampled instead, each by its own clock, and this process adopts
what is orphaned. A process that lives for less than a sample is missed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SET_CHILD_SUBREAPER = 36
_SAMPLE_S = 0.1
_GRACE_S = 15.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """What a command took, or took until it was killed."""

    seconds: float  # until the command itself ended
    cpu_s: float  # user and system time of all of its processes
    started: float  # time.time()
    samples: list[tuple[float, float]]  # time.time(), and the CPU seconds up to then

    def cpu_between(self, start: float, stop: float) -> float:
        """Return the CPU seconds between two moments of `time.time()`."""
        times, used = zip(*self.samples, strict=True)
        before, after = np.interp([start, stop], times, used)
        return float(after - before)


def run(
    command: Sequence[str | Path],
    *,
    kill_after_s: float | None = None,
    env: dict[str, str] | None = None,
) -> Cost:
    """Run a command to its end, or kill all of its processes after a time.

    Raises:
        RuntimeError: It failed; the message ends with what it printed.
    """
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    others = frozenset(_children().get(os.getpid(), ()))
    used: dict[tuple[int, int], float] = {}
    start, started = time.perf_counter(), time.time()
    samples = [(started, 0.0)]
    # A file, not a pipe: daemons may hold the other end for longer than the command lives.
    with tempfile.TemporaryFile() as log:
        main = subprocess.Popen(
            [str(word) for word in command], stdout=log, stderr=log, env=os.environ | (env or {})
        )
        killed = False
        while main.poll() is None:
            _sample(used, others)
            samples.append((time.time(), sum(used.values())))
            if kill_after_s is not None and time.perf_counter() - start > kill_after_s:
                _kill_all(others)
                killed = True
            time.sleep(_SAMPLE_S)
        seconds = time.perf_counter() - start
        _wait_for_the_rest(used, others)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if main.returncode and not killed:
        raise RuntimeError(f"{command} ended with {main.returncode}:\n{output[-3000:]}")
    return Cost(seconds, sum(used.values()), started, samples)


def disk_use(folder: Path) -> tuple[int, int, int]:
    """Return bytes of content, bytes that the file system gives them, and the number of files."""
    states = [path.stat() for path in folder.rglob("*") if path.is_file()]
    allocated = sum(state.st_blocks * 512 for state in states)
    return sum(state.st_size for state in states), allocated, len(states)


class _Process(NamedTuple):
    pid: int
    start_ticks: int
    cpu_s: float


def _children() -> dict[int, dict[int, _Process]]:
    """Return the children of every process, those that have ended unnoticed too."""
    children: dict[int, dict[int, _Process]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:  # it has ended meanwhile
            continue
        # The name, in brackets, may hold anything; the fields after it are numbers.
        fields = text.rpartition(")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        process = _Process(int(folder.name), int(fields[19]), cpu_s)
        children.setdefault(int(fields[1]), {})[process.pid] = process
    return children


def _descendants(others: frozenset[int]) -> list[_Process]:
    """Return every process below this one, but for children of it that are no concern of ours."""
    children = _children()
    found = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), {})
        ours = [process for pid, process in below.items() if pid not in others]
        found += ours
        waiting += [process.pid for process in ours]
    return found


def _sample(used: dict[tuple[int, int], float], others: frozenset[int]) -> None:
    for process in _descendants(others):
        used[process.pid, process.start_ticks] = process.cpu_s


def _kill_all(others: frozenset[int]) -> None:
    for process in _descendants(others):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _wait_for_the_rest(used: dict[tuple[int, int], float], others: frozenset[int]) -> None:
    """Wait until what the command left running has ended, and end it if it does not."""
    deadline = time.perf_counter() + _GRACE_S
    while processes := _descendants(others):
        _sample(used, others)
        if time.perf_counter() > deadline:
            _kill_all(others)
        for process in processes:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        time.sleep(_SAMPLE_S)
