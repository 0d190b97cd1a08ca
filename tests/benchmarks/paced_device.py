"""A build whose tokenizer is a device of a known rate: it waits and computes nothing.

Where the tokenizer and the decoder share the cores, no build can show whether its engine keeps both
busy. This device takes no CPU, works on one batch at a time, whoever brings it, and gives token ids
of zero. All else of the build is what `patchcache build` runs.
"""

import fcntl
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_builder.build import _UNITS_AT_A_GPU
from cache_builder.build_worker import BuildTask, BuildWorker
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.units import Target


class PacedDevice:
    """Stands in the place of a tokenizer and of its quantizer."""

    device = torch.device("cuda")  # by name: nothing is moved there

    def __init__(self, tokenizer: PatchTokenizer, lock: str, views_per_s: float) -> None:
        """Take the identity of a tokenizer, and a file whose lock is the device.

        The file gets a line for every batch: `time.time()` when it was done, and its views.
        """
        self.codebook = tokenizer.codebook
        self.fingerprint = tokenizer.fingerprint
        self.grid = tokenizer.grid
        self.quantizer = self
        self._lock = lock
        self._views_per_s = views_per_s

    def features(self, pixels: Tensor) -> Tensor:
        """Keep the device busy as long as B views take; return (B, N, 1) zeros."""
        with Path(self._lock).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(len(pixels) / self._views_per_s)
            file.write(f"{time.time()} {len(pixels)}\n")
        return torch.zeros(len(pixels), self.grid[0] * self.grid[1], 1, dtype=torch.uint8)

    def encode(self, features: Tensor) -> Tensor:
        """Return (n, 1) zeros."""
        return torch.zeros(len(features), 1, dtype=torch.int64)


class PacedWorker(BuildWorker):
    """Builds units with such a device."""

    def __init__(self, task: BuildTask, lock: str, views_per_s: float) -> None:
        """Take what the device is."""
        super().__init__(task)
        self._device = (lock, views_per_s)

    def _target(self, name: str) -> Target:
        target = super()._target(name)
        return target._replace(tokenizer=PacedDevice(target.tokenizer, *self._device))


def build_units(
    task: BuildTask, num_units: int, lock: Path, views_per_s: float, cluster: ClusterOptions
) -> Iterator[Any]:
    """Build the units of a plan as `patchcache build` does, on such a device."""
    lock.write_text("")
    make = partial(PacedWorker, task, str(lock), views_per_s)
    return map_units(make, range(num_units), cluster, at_once=_UNITS_AT_A_GPU)
