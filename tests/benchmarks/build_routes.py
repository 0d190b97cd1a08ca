"""The commands that are compared, what each costs, and that their token ids are equal."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_builder.formats import manifest
from cache_builder.formats.cache import TokenCache
from tests import factories
from tests.benchmarks import build_peers, process_tree
from tests.benchmarks.build_inputs import NUM_VIEWS, Settings
from tests.benchmarks.process_tree import Cost
from tests.places import ROOT

ENV = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # else Ray's workers alone give way to other processes
}


Command = Callable[[Path, Path], list[str]]
"""Return the command that tokenises the images of the first folder into the second."""


class Measured(NamedTuple):
    """One route over the same images."""

    cost: Cost
    finished: list[float]  # when every image was done, in order, as time.time()

    @property
    def num_images(self) -> int:
        """Of the source."""
        return len(self.finished)

    @property
    def rate(self) -> float:
        """Images per second, once it runs."""
        start, stop, number = self._steady()
        return number / (stop - start) if number else float("nan")  # all was written at once

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per image, once it runs."""
        start, stop, number = self._steady()
        return self.cost.cpu_between(start, stop) / number * 1e3 if number else float("nan")

    @property
    def half_way_s(self) -> float:
        """Seconds until half of the images were done."""
        return self.finished[self.num_images // 2] - self.cost.started

    def _steady(self) -> tuple[float, float, int]:
        """Return the time from the first sixth of the images to the last, and how many that are."""
        start, stop = self.finished[self.num_images // 6], self.finished[-1]
        return start, stop, sum(moment > start for moment in self.finished)


def measure(command: Command, images: Path, out: Path) -> Measured:
    """Run a command to its end."""
    cost = process_tree.run(command(images, out), env=ENV)
    return Measured(cost, finished_at(out))


def finished_at(out: Path) -> list[float]:
    """Return when every image of an output was done: the times of the files that say so."""
    if (out / "units").is_dir():
        records = [*(out / "units").iterdir()]
        counts = [
            factories.read(manifest.UnitRecord, out, f"units/{path.name}").num_samples
            for path in records
        ]
    elif (out / "tokens").is_dir():
        records = [*(out / "tokens").iterdir()]
        counts = [1] * len(records)
    else:
        records = [*out.glob("*.parquet")]
        counts = [build_peers.num_rows(path) for path in records]
    moments = [path.stat().st_mtime for path in records]
    return sorted(m for m, count in zip(moments, counts, strict=True) for _ in range(count))


def build_command(settings: Settings, layout: str, kept: str, *more: str) -> Command:
    """Return `patchcache build` as anyone would call it."""

    def command(images: Path, out: Path) -> list[str]:
        return [
            sys.executable, "-m", "cache_builder.cli", "build", "--images", str(images),
            "--codebook", str(settings.codebook), "--out", str(out), "--views", str(NUM_VIEWS),
            "--layout", layout, "--images-in-cache", kept, "--device", settings.device,
            "--workers", str(settings.num_processes), *gpu_share(settings), *more,
        ]  # fmt: skip

    return command


def peer_command(settings: Settings, peer: str) -> Command:
    """Return one of the peers."""

    def command(images: Path, out: Path) -> list[str]:
        return [
            sys.executable, "-m", "tests.benchmarks.build_peers", peer, "--images", str(images),
            "--codebook", str(settings.codebook), "--out", str(out), "--views", str(NUM_VIEWS),
            "--processes", str(settings.num_processes), "--device", settings.device,
        ]  # fmt: skip

    return command


def gpu_share(settings: Settings) -> list[str]:
    """Return how the actors of a build share one GPU."""
    if settings.device == "cpu":
        return []
    return ["--gpus-per-worker", str(1 / settings.num_processes)]


def check_same_ids(out: Path, cache_dir: Path) -> None:
    """Compare every token id of a route with those of a build.

    Raises:
        RuntimeError: An image is missing or has other ids.
    """
    with TokenCache.open(cache_dir) as cache:
        expected = {cache[i].key: cache[i].token_ids for i in range(len(cache))}
    found = token_ids_of(out)
    wrong = [k for k in expected if k not in found or not np.array_equal(found[k], expected[k])]
    if wrong or len(found) != len(expected):
        raise RuntimeError(f"{out}: {len(found)} images, {len(wrong)} missing or different")


def token_ids_of(out: Path) -> dict[str, Any]:
    """Return the token ids in the output of any route, by name."""
    if (out / "manifest.json").is_file():
        with TokenCache.open(out) as cache:
            return {cache[i].key: cache[i].token_ids for i in range(len(cache))}
    if (out / "tokens").is_dir():
        return {path.stem: np.load(path) for path in (out / "tokens").iterdir()}
    return build_peers.read_parquet(out)
