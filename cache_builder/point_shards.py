"""The points of a k-means fit, in one piece or spread over Ray actors.

A `PointShard` holds a range of the points and does what needs all of them: it assigns them to
centroids, adds them up, and names the members of a cluster. What comes back is small (K x D), so
shards may lie on other machines. Sums of integers are exact and sums of features are float64: a
fit does not depend on the number of shards, features up to that rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cache_builder.errors import ConfigError
from cache_builder.formats.codebook_header import Metric
from cache_builder.points import PointSet
from cache_builder.tokenizers.quantizer import CentroidIndex, residual
from cache_builder.tokenizers.tokenizer import choose_device

_VALUES_PER_BLOCK = 1 << 24
_MAX_ROWS_PER_BLOCK = 1 << 15
_MAX_EXACT_ROWS = (1 << 24) // 255
_SHARE_OF_GPU_MEMORY = 0.6  # of what is free, for points that stay there
_BYTES_PER_MESSAGE = 1 << 26

# SplitMix64 (Steele, Lea, Flood 2014), as signed numbers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


class Assignment(NamedTuple):
    """What points amount to at given centroids."""

    sums: Tensor  # (K, D) float64, of the points of each centroid
    counts: Tensor  # (K,) int64
    distortion: Tensor  # (K,) float64, summed squared distances of the points of each centroid

    def __add__(self, other: Self) -> Self:  # type: ignore[override]
        """Return what both amount to together."""
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))


class Members(NamedTuple):
    """One point of each cluster, drawn by lot."""

    lots: Tensor  # (K,) int64, the highest of the cluster; negative for no member
    points: Tensor  # (K,) int64, whose it is


class PointShard:
    """The points from `offset` on; after `assign` it knows the centroid of each."""

    def __init__(
        self,
        points: PointSet,
        *,
        offset: int = 0,
        metric: Metric = "l2",
        device: str | torch.device = "cpu",
    ) -> None:
        """Take points; `offset` is the number of the first one among those of all shards."""
        self._points = points
        self._offset = offset
        self._metric = metric
        self._device = choose_device(device)
        self._stages: list[tuple[Tensor, Tensor]] = []  # centroids, ids of every point
        self._index: CentroidIndex | None = None
        self._ids = torch.full((len(points),), -1, dtype=torch.int32)
        self._apart = torch.zeros(len(points), dtype=torch.bool)  # not equal to their centroid
        rows = max(256, _VALUES_PER_BLOCK // max(points.dim, 1))
        self._block_rows = min(_MAX_ROWS_PER_BLOCK, rows)
        self._resident: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self._points)

    def assign(self, centroids: Tensor, rows: Tensor | None = None) -> Assignment:
        """Assign all points, or those of `rows` (m,) int64, to centroids (K, D).

        Raises:
            ConfigError: A feature is NaN or infinite.
        """
        k, dim = centroids.shape
        index = CentroidIndex(centroids.to(self._device), like=self._index)
        sums = torch.zeros(k, dim, dtype=torch.float64, device=self._device)
        counts = torch.zeros(k, dtype=torch.int64)
        distortion = torch.zeros(k, dtype=torch.float64)
        for block, points in self._blocks(rows):
            hints = self._ids[block].to(torch.int64)
            known = self._index is not None and bool((hints >= 0).all())
            try:
                ids, distances = index.assign(points, hints if known else None)
            except ValueError as exc:
                raise ConfigError(
                    "The features hold NaN or infinity. Check the model and its weights."
                ) from exc
            _add_up(sums, ids, points)
            ids, distances = ids.cpu(), distances.double().cpu()
            counts += ids.bincount(minlength=k)
            distortion.index_add_(0, ids, distances)
            self._ids[block] = ids.to(torch.int32)
            self._apart[block] = distances > 0
        self._index = index
        return Assignment(sums.cpu(), counts, distortion)

    def draw_members(self, salt: int, rows: Tensor | None = None) -> Members:
        """Draw a point of every cluster of the last assignment, not one that equals its centroid.

        The lot of a point depends on its number and on `salt` alone.
        """
        assert self._index is not None
        chosen = torch.arange(len(self._ids)) if rows is None else rows
        chosen = chosen[self._apart[chosen]]
        ids = self._ids[chosen].to(torch.int64)
        lots = _lots(chosen + self._offset, salt)
        k = len(self._index.centroids)
        best = torch.full((k,), -1, dtype=torch.int64).scatter_reduce_(0, ids, lots, "amax")
        winners = (lots == best[ids]).nonzero().squeeze(1)
        points = torch.full((k,), -1, dtype=torch.int64)
        points[ids[winners]] = chosen[winners] + self._offset
        return Members(best, points)

    def rows(self, numbers: Tensor) -> Tensor:
        """Return points by their numbers among those of all shards, as they are assigned."""
        local = numbers - self._offset
        return self._prepared(self._points.gather(local), local)

    def forget(self) -> None:
        """Forget the last assignment, which else is where the next one looks first."""
        self._ids.fill_(-1)

    def quantise(self, centroids: Tensor) -> None:
        """End a stage: from here on the points are what its centroids leave over.

        The last assignment must have been to `centroids`.
        """
        self._stages.append((centroids, self._ids.clone()))
        self._index = None
        self._ids.fill_(-1)
        self._resident = None

    def _blocks(self, rows: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
        """Yield which points, as an index of rows, and the points on the device."""
        if rows is not None:
            for part in rows.split(self._block_rows):
                yield part, self._prepared(self._points.gather(part), part).to(self._device)
            return
        if self._resident is None and self._fits_on_gpu():
            self._resident = [points for _, points in self._read_blocks()]
        if self._resident is None:
            yield from self._read_blocks()
            return
        start = 0
        for points in self._resident:
            yield slice(start, start + len(points)), points
            start += len(points)

    def _read_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start, points in self._points.blocks(self._block_rows):
            block = slice(start, start + len(points))
            yield block, self._prepared(points, block).to(self._device)

    def _prepared(self, points: Tensor, block: Any) -> Tensor:
        if self._metric == "cosine":
            points = torch.nn.functional.normalize(points.float(), dim=1)
        for centroids, ids in self._stages:
            points = residual(points, centroids, ids[block].to(torch.int64))
        return points

    def _fits_on_gpu(self) -> bool:
        if self._device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self._device)
        dtype = torch.float32 if self._metric == "cosine" else self._points.dtype
        num_bytes = len(self) * self._points.dim * dtype.itemsize * (2 if self._stages else 1)
        return bool(num_bytes < _SHARE_OF_GPU_MEMORY * free)


class ShardedPoints:
    """All shards of a fit together; `call` asks every one of them at once."""

    def __init__(
        self, sizes: Sequence[int], call: Callable[[str, list[tuple[Any, ...]]], list[Any]]
    ) -> None:
        """Take the number of points of each shard.

        Args:
            sizes: In the order of the shards.
            call: Given a method of `PointShard` and each shard's arguments, returns each one's
                answer.
        """
        self._call = call
        self._starts = torch.tensor([0, *sizes]).cumsum(0)

    @classmethod
    def local(cls, points: PointSet, metric: Metric, device: str | torch.device) -> Self:
        """Keep the points in this process, in one shard."""
        shard = PointShard(points, metric=metric, device=device)

        def call(method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
            return [getattr(shard, method)(*arguments[0])]

        return cls([len(points)], call)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def assign(self, centroids: Tensor, rows: Tensor | None = None) -> Assignment:
        """Assign all points, or those with the given numbers, to centroids (K, D)."""
        parts = self._call("assign", [(centroids, part) for part in self._parts(rows)])
        total: Assignment = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def draw_members(self, salt: int, rows: Tensor | None = None) -> Tensor:
        """Return the number of a point of every cluster (K,) int64, -1 where there is none."""
        drawn = self._call("draw_members", [(salt, part) for part in self._parts(rows)])
        lots, points = drawn[0]
        for other in drawn[1:]:
            higher = other.lots > lots
            lots = torch.where(higher, other.lots, lots)
            points = torch.where(higher, other.points, points)
        return points

    def rows(self, numbers: Tensor) -> Tensor:
        """Return points (m, D) by their numbers (m,)."""
        owners = torch.searchsorted(self._starts, numbers, right=True) - 1
        wanted = [(numbers[owners == shard],) for shard in range(len(self._starts) - 1)]
        answers = self._call("rows", wanted)
        result = torch.empty(len(numbers), answers[0].shape[1], dtype=answers[0].dtype)
        for shard, answer in enumerate(answers):
            result[owners == shard] = answer
        return result

    def forget(self) -> None:
        """Begin anew, see `PointShard.forget`."""
        self._call("forget", [()] * (len(self._starts) - 1))

    def quantise(self, centroids: Tensor) -> None:
        """End a stage, see `PointShard.quantise`."""
        self._call("quantise", [(centroids,)] * (len(self._starts) - 1))

    def _parts(self, rows: Tensor | None) -> list[Tensor | None]:
        starts = self._starts.tolist()
        if rows is None:
            return [None] * (len(starts) - 1)
        return [rows[(rows >= start) & (rows < stop)] - start for start, stop in pairwise(starts)]


class RemoteShard:
    """A `PointShard` in an actor: it is given its points in pieces before it is asked."""

    def __init__(self, offset: int, metric: Metric, device: str) -> None:
        """Wait for points."""
        self._make = partial(PointShard, offset=offset, metric=metric, device=device)
        self._arrays: list[Any] = []
        self._shard: PointShard | None = None

    def load(self, array: Any) -> None:
        """Take some more points (n, D), numpy, in order."""
        self._arrays.append(array)

    def call(self, method: str, *args: Any) -> Any:
        """Ask the shard."""
        if self._shard is None:
            self._shard = self._make(PointSet(self._arrays))
        return getattr(self._shard, method)(*args)


def pieces(points: PointSet, num_shards: int) -> list[tuple[int, list[Any]]]:
    """Return for every shard its number of points and its arrays, in pieces fit to be sent.

    No shard is empty: of fewer points than shards, each has a shard of its own.
    """
    num_shards = max(1, min(num_shards, len(points)))
    bounds = [len(points) * shard // num_shards for shard in range(num_shards + 1)]
    step = max(1, _BYTES_PER_MESSAGE // (points.dim * 4))
    return [
        (stop - start, [
            part
            for first in range(start, stop, step)
            for part in points.stored(first, min(first + step, stop))
        ])
        for start, stop in pairwise(bounds)
    ]  # fmt: skip


def _add_up(sums: Tensor, ids: Tensor, points: Tensor) -> None:
    """Add points to the sums (K, D) float64 of their centroids."""
    if points.dtype != torch.uint8 or len(points) > _MAX_EXACT_ROWS:
        sums.index_add_(0, ids, points.double())
        return
    # So few bytes add up exactly in float32, which moves half the memory.
    exact = torch.zeros(sums.shape, device=sums.device)
    sums += exact.index_add_(0, ids, points.float())


def _lots(numbers: Tensor, salt: int) -> Tensor:
    """Return a pseudo-random number of 62 bits for every point; of a salt 24 bits count."""
    start = (salt << 40) % (1 << 64)
    start -= (start >> 63) << 64  # signed, as the numbers are
    value = (numbers + 1 + start) * _GAMMA
    for shift, factor in _MIX:
        value = (value ^ _shifted(value, shift)) * factor
    value ^= _shifted(value, 31)
    return _shifted(value, 2)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right without dragging the sign along."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
