"""The log of a cache's builds: when each run was, where, how fast, and how it ended.

A cache's own bytes may not depend on when or how fast it was built, so the log lies beside it:
`runs/cache` has `runs/cache.log.jsonl`, one line of JSON per run of `patchcache build` that got as
far as its units. Nothing reads it but `patchcache inspect`: a cache without one is whole, a log
that cannot be written is a warning, and a line that cannot be read is left out.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, Field, ValidationError

from cache_builder import __version__, files
from cache_builder.errors import ConfigError, PatchCacheError
from cache_builder.stores import absolute_location, open_store, read_location

logger = logging.getLogger(__name__)

SUFFIX = ".log.jsonl"

_LIBRARIES = ("torch", "ray")
_MAX_ERROR_LENGTH = 500

_Image = TypeVar("_Image", bound=tuple[Any, object])

Outcome = Literal["finished", "stopped", "failed"]


class BuildRun(BaseModel, frozen=True):
    """One line of the log. Fields that a later version adds are passed over."""

    started: datetime = Field(description="UTC")
    outcome: Outcome
    error: str = Field("", description="of a run that failed, its first line")
    seconds: float = Field(ge=0, description="of the whole run, starting of workers included")
    working_seconds: float = Field(
        ge=0, description="from the first unit's start to the last one's end; rates are over it"
    )
    hosts: tuple[str, ...] = Field(description="names of the machines that built units")
    num_workers: int = Field(ge=0, description="processes that built units")
    devices: tuple[str, ...] = Field(description="on which they tokenised")
    num_images: int = Field(ge=0, description="tokenised by this run")
    num_views: int = Field(ge=0)
    num_skipped: int = Field(ge=0)
    bytes_read: int = Field(ge=0, description="of encoded images")
    bytes_written: int = Field(ge=0, description="of shards")
    num_units: int = Field(ge=0, description="built by this run")
    num_units_kept: int = Field(ge=0, description="found finished")
    images_per_s: float = Field(ge=0)
    versions: dict[str, str] = Field(description="patchcache and what it ran on")

    @property
    def views_per_s(self) -> float:
        """Rate of views, over the same time as that of images."""
        return self.num_views / self.working_seconds if self.working_seconds else 0.0


class UnitWork(NamedTuple):
    """How one unit was built."""

    host: str
    process: int
    device: str
    seconds: float
    bytes_read: int


class UnitDone(Protocol):
    """What is logged of a unit; `work` is None if an earlier run built it."""

    @property
    def num_samples(self) -> int:
        """Images that were tokenised."""

    @property
    def num_views(self) -> int:
        """Views of them that were."""

    @property
    def num_skipped(self) -> int:
        """Images that were not."""

    @property
    def bytes(self) -> int:
        """Of the shards that were written."""

    @property
    def work(self) -> UnitWork | None:
        """How it was built."""


class UnitMeter:
    """Measures, in a worker, how a unit is built."""

    def __init__(self, device: str) -> None:
        """Start the clock."""
        self._device = device
        self._started_s = time.monotonic()
        self._bytes_read = 0

    def count(self, images: Iterable[_Image]) -> Iterator[_Image]:
        """Pass images on, each a row and what was read of it, and add up their sizes."""
        for image in images:
            data = image[1]
            self._bytes_read += len(data) if isinstance(data, bytes) else 0
            yield image

    def work(self) -> UnitWork:
        """Return what was measured until now."""
        return UnitWork(
            host=socket.gethostname(),
            process=os.getpid(),
            device=self._device,
            seconds=time.monotonic() - self._started_s,
            bytes_read=self._bytes_read,
        )


class Recorder:
    """Adds up, in the driver, what a run does."""

    def __init__(self) -> None:
        """Start the clock."""
        self._started = datetime.now(UTC)
        self._started_s = time.monotonic()
        self._first_s = self._last_s = self._started_s  # of units that this run built
        self._built: list[UnitDone] = []
        self._work: list[UnitWork] = []
        self._num_kept = 0

    def unit_done(self, unit: UnitDone) -> None:
        """Take note of a unit as its report arrives."""
        if unit.work is None:
            self._num_kept += 1
            return
        now_s = time.monotonic()
        # Clocks of two machines differ, durations do not.
        unit_started_s = max(now_s - unit.work.seconds, self._started_s)
        self._first_s = min(self._first_s, unit_started_s) if self._built else unit_started_s
        self._last_s = now_s
        self._built.append(unit)
        self._work.append(unit.work)

    def run(self, outcome: Outcome, error: str = "") -> BuildRun:
        """Return the run as it stands."""
        num_images = sum(unit.num_samples for unit in self._built)
        working_s = self._last_s - self._first_s
        return BuildRun(
            started=self._started.replace(microsecond=0),
            outcome=outcome,
            error=error,
            seconds=round(time.monotonic() - self._started_s, 3),
            working_seconds=round(working_s, 3),
            hosts=tuple(sorted({work.host for work in self._work})),
            num_workers=len({(work.host, work.process) for work in self._work}),
            devices=tuple(sorted({work.device for work in self._work})),
            num_images=num_images,
            num_views=sum(unit.num_views for unit in self._built),
            num_skipped=sum(unit.num_skipped for unit in self._built),
            bytes_read=sum(work.bytes_read for work in self._work),
            bytes_written=sum(unit.bytes for unit in self._built),
            num_units=len(self._built),
            num_units_kept=self._num_kept,
            images_per_s=round(num_images / working_s, 3) if working_s else 0.0,
            versions=_versions(),
        )


@contextlib.contextmanager
def recording(cache: str) -> Iterator[Recorder]:
    """Log the block as one run of the build of `cache`, however it ends."""
    recorder = Recorder()
    try:
        yield recorder
    except Exception as exc:
        append(cache, recorder.run("failed", _first_line(exc)))
        raise
    except BaseException:  # Ctrl-C, or the process is told to leave
        append(cache, recorder.run("stopped"))
        raise
    append(cache, recorder.run("finished"))


def log_location(cache: str) -> str:
    """Return where the log of the cache at `cache` lies."""
    return absolute_location(cache).rstrip("/") + SUFFIX


def append(cache: str, run: BuildRun) -> None:
    """Add a line to the log; a place where that is not possible is a warning."""
    line = files.canonical_json(run.model_dump(mode="json")) + b"\n"
    try:
        _append(log_location(cache), line)
    except (PatchCacheError, OSError) as exc:
        logger.warning("The log of this build is not kept: %s", exc)


def read(cache: str) -> list[BuildRun]:
    """Return the runs that are logged, oldest first; none where there is no log."""
    try:
        text = read_location(log_location(cache))
    except (PatchCacheError, OSError) as exc:
        logger.debug("%s has no log of its builds: %s", cache, exc)
        return []
    runs = []
    for line in filter(None, text.split(b"\n")):
        try:
            runs.append(BuildRun.model_validate_json(line))
        except ValidationError:
            logger.debug("%s has a damaged line", log_location(cache))
    return runs


def _append(location: str, line: bytes) -> None:
    if "://" in location:
        # Nothing can be appended there; the lock of the cache keeps other drivers out.
        root, _, name = location.rpartition("/")
        if "://" not in root:
            raise ConfigError(f"{location} is no object: the cache is the whole of its bucket")
        store = open_store(root)
        before = store.read(name) if store.exists(name) else b""
        store.publish(name, before + _break_after(before[-1:]) + line)
        return
    with Path(location).open("a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        file.write(_break_after(file.read(1)) + line)


def _break_after(last: bytes) -> bytes:
    """Return what must follow the last byte of a log; a line that was torn swallows no other."""
    return b"" if last in (b"", b"\n") else b"\n"


@cache
def _versions() -> dict[str, str]:
    versions = {"patchcache": __version__}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines() or [""]
    return f"{type(exc).__name__}: {lines[0]}"[:_MAX_ERROR_LENGTH]
