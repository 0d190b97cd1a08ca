"""Codebook fitting: k-means, exact, from a sample of any size.

Lloyd's algorithm assigns every point in every iteration; the mini-batch form (Sculley 2010) assigns
a random batch and is for samples that can hardly be read often. Seeds are distinct random points:
k-means++ lowers the fitted error slightly and perplexity by a third, measured on ImageNet patches.
Codes that hardly any point uses are revived early in the fit, which lowers held-out error and
raises perplexity at once.

The objective and the sums are float64, in which integers add up exactly, so a pixel codebook does
not depend on the order of its points, on threads or on workers. faiss sums its objective in
float32, which at ten million points errs by more than the last ten iterations gain.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import MAX_VOCAB_SIZE
from cache_builder.formats.codebook_header import Metric
from cache_builder.point_shards import Assignment, ShardedPoints
from cache_builder.points import PointSet

logger = logging.getLogger(__name__)

MIN_POINTS_PER_CENTROID = 39  # faiss warns below; an ImageNet codebook gains 1 % per doubling

_REVIVAL_ITERATIONS = (2, 4, 6)
_RARE_SHARE = 0.1  # of the mean count; below it a code is revived
_CONVERGED = 1e-4  # relative gain of the objective that ends the fit
_BATCHES_WITHOUT_GAIN = 10  # that end a mini-batch fit
_SMOOTHING = 0.1  # weight of a batch in the running objective
_ROWS_PER_DRAW = 1 << 14


class Fit(NamedTuple):
    """Centroids and how they came to be."""

    centroids: Tensor  # (K, D) uint8, int16 or float32
    counts: Tensor  # (K,) int64, points of each centroid
    objective: list[float]  # mean squared distance before each update, then the final one


Progress = Callable[[int, float], None]
"""Called after every iteration with its number and the objective."""


def fit_centroids(
    points: Tensor | PointSet | ShardedPoints,
    k: int,
    *,
    metric: Metric = "l2",
    iterations: int = 20,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    warm_start: Tensor | None = None,
    spherical: bool | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fit K centroids to points.

    Args:
        points: (n, D), integer or floating. uint8 points give uint8 centroids and int16 points
            int16 ones, and every iteration assigns to rounded ones, so that all distances are
            exact integers.
        k: K, number of centroids.
        metric: `cosine` normalises points and centroids (spherical k-means).
        iterations: Most iterations; the fit ends earlier when it has converged. Of a mini-batch
            fit, the number of batches.
        restarts: Fits from different seeds, of which the best is kept.
        seed: Of the random choices.
        batch_size: Points per mini-batch; None assigns all points in every iteration.
        warm_start: (K, D) centroids to begin with in place of random points.
        spherical: Whether centroids are normalised; by default if the metric is `cosine`.
            Residuals of unit vectors are not.
        progress: Told of every iteration.

    Raises:
        ConfigError: Too few distinct points for K centroids, values that are not finite, or a
            warm start of another shape.
    """
    if not 0 < k <= MAX_VOCAB_SIZE:
        raise ConfigError(f"K must be 1 to {MAX_VOCAB_SIZE:,}, not {k:,}.")
    if batch_size is not None and batch_size < k:
        raise ConfigError(
            f"A mini-batch of {batch_size:,} patches is too small for K={k:,}. "
            "Use a --batch-size of K or more, better ten times K."
        )
    if not isinstance(points, ShardedPoints):
        device = points.device if isinstance(points, Tensor) else torch.device("cpu")
        point_set = points if isinstance(points, PointSet) else PointSet.of(_storable(points))
        points = ShardedPoints.local(point_set, metric, device)
    if len(points) < MIN_POINTS_PER_CENTROID * k:
        logger.warning(
            "only %.1f patches per centroid (%s for K=%s); %d or more make a better codebook",
            len(points) / k, f"{len(points):,}", f"{k:,}", MIN_POINTS_PER_CENTROID,
        )  # fmt: skip
    is_spherical = metric == "cosine" if spherical is None else spherical
    best: Fit | None = None
    for restart in range(restarts):
        run = _Run(points, k, is_spherical, seed + restart)
        run.begin(warm_start if restart == 0 else None)
        run.iterate(iterations, batch_size, progress)
        fit = run.finish()
        if best is None or fit.objective[-1] < best.objective[-1]:
            best = fit
    assert best is not None
    return best


class _Run:
    """One fit from one seed."""

    def __init__(self, points: ShardedPoints, k: int, spherical: bool, seed: int) -> None:
        self._points = points
        self._k = k
        self._spherical = spherical
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._centroids = torch.empty(0)  # (K, D) float64
        self._dtype = torch.float32  # of the centroids that are assigned to
        self._objective: list[float] = []

    def begin(self, warm_start: Tensor | None) -> None:
        """Choose the first centroids."""
        self._points.forget()
        order = torch.randperm(len(self._points), generator=self._generator)
        first = self._points.rows(order[:1])
        self._dtype = first.dtype
        if warm_start is None:
            self._centroids = self._distinct_points(order).double()
            return
        expected = (self._k, first.shape[1])
        if tuple(warm_start.shape) != expected:
            raise ConfigError(
                f"The codebook to start from has centroids {tuple(warm_start.shape)}, but this fit "
                f"needs {expected}. Pass one of the same -k and the same features."
            )
        self._centroids = warm_start.cpu().double()

    def iterate(self, iterations: int, batch_size: int | None, progress: Progress | None) -> None:
        """Run Lloyd's iterations, or as many mini-batches."""
        batches = _Batches(len(self._points), batch_size, self._generator)
        weights = torch.zeros(self._k, dtype=torch.int64)
        running: list[float] = []
        for iteration in range(1, iterations + 1):
            rows = batches.draw()
            found = self._points.assign(self._stored(), rows)
            num_points = int(found.counts.sum())
            self._objective.append(float(found.distortion.sum()) / num_points)
            running.append(_smoothed(running, self._objective[-1]) if batch_size else 0)
            if progress:
                progress(iteration, self._objective[-1])
            # A mini-batch moves a centroid by its share of all points that it has ever had.
            weights = weights + found.counts if batch_size else found.counts
            self._update(found, weights)
            rare = _rare_codes(weights, iteration)
            if len(rare):
                weights[self._revive(rare, found, iteration, rows)] = 0
            elif _is_stuck(running) if batch_size else _has_converged(self._objective):
                break

    def finish(self) -> Fit:
        """Assign all points to the centroids as they are stored."""
        stored = self._stored()
        found = self._points.assign(stored)
        objective = float(found.distortion.sum()) / len(self._points)
        return Fit(stored, found.counts, [*self._objective, objective])

    def _distinct_points(self, order: Tensor) -> Tensor:
        """Return K distinct points, in random order."""
        seen: dict[bytes, Tensor] = {}
        for numbers in order.split(_ROWS_PER_DRAW):
            rows = self._points.rows(numbers)
            if rows.is_floating_point() and not rows.isfinite().all():
                raise ConfigError(
                    "The features hold NaN or infinity. Check the model and its weights."
                )
            for row in rows:
                seen.setdefault(row.numpy().tobytes(), row)
                if len(seen) == self._k:
                    return torch.stack(list(seen.values()))
        raise ConfigError(
            f"There are only {len(seen):,} distinct patches among {len(self._points):,}, too few "
            f"for K={self._k:,}. Use a smaller -k, more images, or a larger --sample."
        )

    def _update(self, found: Assignment, weights: Tensor) -> None:
        """Move every centroid towards its points; one without points stays where it is."""
        if torch.equal(found.counts, weights):
            # The mean itself, without the rounding of a move: integers stay exact.
            centroids = found.sums / found.counts.clamp(min=1)[:, None]
        else:
            moves = found.sums - found.counts[:, None] * self._centroids
            centroids = self._centroids + moves / weights.clamp(min=1)[:, None]
        if self._spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
        self._centroids = torch.where(found.counts[:, None] > 0, centroids, self._centroids)

    def _revive(
        self, rare: Tensor, found: Assignment, iteration: int, rows: Tensor | None
    ) -> Tensor:
        """Move rare codes to random members of the clusters with the largest distortion.

        A member at distance zero is no use: it would only duplicate its own centroid.

        Returns:
            The codes that were moved.
        """
        distortion = found.distortion.clone()
        distortion[rare] = 0
        donors = distortion.argsort(descending=True, stable=True)[: len(rare)]
        donors = donors[distortion[donors] > 0]
        members = self._points.draw_members(self._seed * 1009 + iteration, rows)[donors]
        moved, members = rare[: len(donors)][members >= 0], members[members >= 0]
        if len(moved):
            self._centroids[moved] = self._points.rows(members).double()
        return moved

    def _stored(self) -> Tensor:
        """Round to the type that the codebook keeps."""
        if self._dtype.is_floating_point:
            return self._centroids.float()
        limits = torch.iinfo(self._dtype)
        return self._centroids.round().clamp(limits.min, limits.max).to(self._dtype)


class _Batches:
    """Random batches without replacement: every point once before any comes again."""

    def __init__(self, num_points: int, size: int | None, generator: torch.Generator) -> None:
        self._num_points = num_points
        self._size = size
        self._generator = generator
        self._waiting = torch.empty(0, dtype=torch.int64)

    def draw(self) -> Tensor | None:
        """Return the numbers of the points of the next batch, ascending; None for all."""
        if self._size is None or self._size >= self._num_points:
            return None
        while len(self._waiting) < self._size:
            again = torch.randperm(self._num_points, generator=self._generator)
            self._waiting = torch.cat([self._waiting, again])
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return batch.unique()


def _storable(points: Tensor) -> Tensor:
    exact = points.dtype in (torch.uint8, torch.int16)
    return points if exact else points.float()


def _rare_codes(counts: Tensor, iteration: int) -> Tensor:
    """Return the codes to move: the empty ones always, the rare ones early in the fit."""
    threshold = _RARE_SHARE * float(counts.double().mean())
    rare = counts < threshold if iteration in _REVIVAL_ITERATIONS else counts == 0
    return rare.nonzero().squeeze(1)


def _has_converged(objective: list[float]) -> bool:
    if objective[-1] == 0:
        return True
    if len(objective) < 2:
        return False
    return objective[-2] - objective[-1] < _CONVERGED * objective[-2]


def _smoothed(running: list[float], value: float) -> float:
    return running[-1] + _SMOOTHING * (value - running[-1]) if running else value


def _is_stuck(running: list[float]) -> bool:
    """Say whether the running objective of mini-batches has had no new minimum for long."""
    recent, before = running[-_BATCHES_WITHOUT_GAIN:], running[:-_BATCHES_WITHOUT_GAIN]
    return bool(before) and min(recent) >= min(before) * (1 - _CONVERGED)
