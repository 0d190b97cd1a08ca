"""Which samples make up which batch, and how they are read.

The order is a pure function. An epoch permutes the shards, takes windows of 64 of them and permutes
the samples inside each window, so that a shuffle over the whole cache reads few shards at a time.
Batch k of a run is B consecutive samples of its epoch; what is left at the end of an epoch is not
used. Which view of a sample is seen follows from the epoch and the sample's key. So the number of
a step says everything about its data, whatever the number of workers, and a run resumes from it.
"""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder import imaging
from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    ImageError,
    SourceError,
)
from cache_builder.formats import CachedSample, PayloadName, TokenCache, View
from cache_builder.sources import ImageJoin
from trainer.objectives.interface import Targets
from trainer.pixels import to_unit_range

_WINDOW_SHARDS = 64  # as many as TokenCache keeps open


# Arrays of a sample that belong to a view, under the same names in `Batch`.
_TARGETS = ("token_ids", "soft_ids", "soft_probs", "features", "feature_scales")


class Pick(NamedTuple):
    """One sample, in one epoch."""

    epoch: int
    shard: int
    row: int


class Batch(NamedTuple):
    """What a step reads; B samples, one view of each."""

    pixels: Tensor  # (B, 3, S, S) uint8
    token_ids: Tensor  # (B, N) int64, or (B, N, M) with M > 1 stages
    labels: Tensor  # (B,) int64, -1 where there is none
    keys: list[str]
    # Of payloads that were asked for, as they are stored.
    soft_ids: Tensor | None = None  # (B, N, k) int64
    soft_probs: Tensor | None = None  # (B, N, k) float16
    features: Tensor | None = None  # (B, N, D) float16 or int8
    feature_scales: Tensor | None = None  # (B, N) float32, of int8

    def part(self, start: int, stop: int) -> "Batch":
        """Return the samples `start .. stop - 1`."""
        parts: Any = (None if field is None else field[start:stop] for field in self)
        return Batch(*parts)

    def targets(self, device: torch.device) -> Targets:
        """Return what a method is called with, on a device."""

        def move(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        probs, features, scales = map(move, (self.soft_probs, self.features, self.feature_scales))
        if features is not None:
            features = features.float()
            if scales is not None:
                features = features * scales[..., None]
        return Targets(
            token_ids=self.token_ids.to(device, non_blocking=True),
            clean=to_unit_range(self.pixels, device),
            soft_ids=move(self.soft_ids),
            soft_probs=None if probs is None else probs.float(),
            features=features,
        )


class BatchOrder:
    """The samples of every batch of a run, or of the part of each that one process reads."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        """Take the number of samples of every shard.

        Args:
            shard_sizes: Of the cache.
            batch_size: Samples of a whole batch.
            seed: Of the shuffling.
            first: Where this process's part of a batch begins.
            count: How many samples that part has; None: all.

        Raises:
            ConfigError: All shards together do not fill one batch.
        """
        num_samples = sum(shard_sizes)
        if num_samples < batch_size:
            raise ConfigError(
                f"The cache has {num_samples} samples, fewer than one batch of {batch_size}. "
                f"Pass `--set data.batch_size={max(1, num_samples)}` or less, or a larger cache."
            )
        self.steps_per_epoch = num_samples // batch_size
        self._shard_sizes = tuple(shard_sizes)
        self._batch_size = batch_size
        self._seed = seed
        self._first = first
        self._count = batch_size if count is None else count
        self._epoch = -1
        self._order = np.empty((0, 2), np.int64)

    def picks(self, step: int) -> list[Pick]:
        """Return this process's samples of batch `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self._shard_sizes, seed=self._seed, epoch=epoch)
            self._epoch = epoch
        start = index * self._batch_size + self._first
        rows = self._order[start : start + self._count]
        return [Pick(epoch, shard, row) for shard, row in rows.tolist()]


def epoch_order(shard_sizes: Sequence[int], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return every sample of a cache once, shuffled: (n, 2), columns shard and row."""
    rng = np.random.default_rng([seed, epoch])
    sizes = np.asarray(shard_sizes, np.int64)
    shards = rng.permutation(len(sizes))
    order = np.empty((sizes.sum(), 2), np.int64)
    start = 0
    for first in range(0, len(shards), _WINDOW_SHARDS):
        window = shards[first : first + _WINDOW_SHARDS]
        counts = sizes[window]
        stop = start + counts.sum()
        shuffled = rng.permutation(stop - start)
        order[start:stop, 0] = np.repeat(window, counts)[shuffled]
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        order[start:stop, 1] = (np.arange(stop - start) - begins)[shuffled]
        start = stop
    return order


def view_index(key: str, epoch: int, num_views: int) -> int:
    """Return which view of a sample an epoch sees: V epochs see each of its V views once."""
    return (epoch + stable_hash(key)) % num_views


def stable_hash(text: str) -> int:
    """Return 64 bits that depend on `text` alone, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


class CachedViews:
    """Reads picks of a cache as batches; a copy in another process opens the cache for itself."""

    def __init__(
        self,
        cache_path: str | Path,
        *,
        image_size: int,
        images: str | None = None,
        tokenizer: str | None = None,
        payloads: Collection[PayloadName] = (),
    ) -> None:
        """Say what to read; nothing is opened yet.

        Args:
            cache_path: A finished cache.
            image_size: Side of the pictures in a batch, pixels.
            images: Where the images lie, for a cache that holds none and whose images have moved.
            tokenizer: Fingerprint of one of several tokenizers of the cache; None is the first.
            payloads: Which of `soft` and `features`, which can be a hundred times as large as the
                token ids, to read beside the images.
        """
        self._cache_path = cache_path
        self._image_size = image_size
        self._images = images
        self._tokenizer = tokenizer
        self._payloads = frozenset({"image", *payloads})
        self._opened: TokenCache | None = None
        self._join: ImageJoin | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: open files belong to this one."""
        return {**self.__dict__, "_opened": None, "_join": None}

    def read(self, picks: Sequence[Pick]) -> Batch:
        """Return the batch of these picks.

        Raises:
            ArtifactError: A shard, or an image in it, is damaged.
            ConfigError: The cache holds no images and they are not where it says.
        """
        pixels, labels, keys = [], [], []
        targets: dict[str, list[NDArray[Any]]] = {}
        for pick in picks:
            sample = self._cache.read(pick.shard, pick.row, payloads=self._payloads)
            index = view_index(sample.key, pick.epoch, len(sample.views))
            pixels.append(self._pixels(sample, pick.shard, index))
            for name in _TARGETS:
                if (values := getattr(sample, name)) is not None:
                    targets.setdefault(name, []).append(values[index])
            labels.append(-1 if sample.label is None else sample.label)
            keys.append(sample.key)
        # (B, rows, cols, ...) to (B, N, ...)
        found = {name: _to_tensor(arrays).flatten(1, 2) for name, arrays in targets.items()}
        return Batch(torch.stack(pixels), labels=torch.tensor(labels), keys=keys, **found)

    def close(self) -> None:
        """Close what this process has opened."""
        if self._opened is not None:
            self._opened.close()
        self._opened = self._join = None

    @property
    def _cache(self) -> TokenCache:
        if self._opened is None:
            self._opened = TokenCache.open(self._cache_path, self._tokenizer)
        return self._opened

    def _pixels(self, sample: CachedSample, shard: int, index: int) -> Tensor:
        top, left, height, width, hflip = sample.views[index].tolist()
        interpolation = self._cache.manifest.view_spec.interpolation
        try:
            picture = imaging.decode(self._image_of(sample, shard))
            view = View(top, left, height, width, bool(hflip))
            return imaging.apply_view(picture, view, self._image_size, interpolation)
        except ImageError as exc:
            raise ArtifactError(
                f"{self._cache_path}: the image of {sample.key} is not the one that was tokenised: "
                f"{str(exc).rstrip('.')}. Run `patchcache verify {self._cache_path}`."
            ) from exc

    def _image_of(self, sample: CachedSample, shard: int) -> bytes:
        if sample.image is not None:
            return sample.image
        source = self._cache.manifest.spec.source
        try:
            if self._join is None:
                self._join = ImageJoin(self._cache.store, source, self._images)
            return self._join.read(shard, sample.key)
        except SourceError as exc:
            raise ConfigError(
                f"{self._cache_path} holds no images, and the image of {sample.key} is not found "
                f"in {self._images or source.location}: {exc} "
                "Say where the images lie with `--set data.images=PLACE`."
            ) from exc


def _to_tensor(arrays: list[NDArray[Any]]) -> Tensor:
    stacked = np.stack(arrays)
    # torch indexes with int64 alone.
    return torch.from_numpy(stacked.astype(np.int64) if stacked.dtype == np.uint16 else stacked)
