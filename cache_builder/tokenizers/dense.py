"""Nearest centroids by the whole matrix of scores, one block of rows at a time.

`IntegerForm` decides in integers and `FloatForm` in float64; both let a fast product find the
candidates and measure those that its rounding leaves open. On a GPU the product runs on tensor
cores with float16 inputs: uint8 values minus 128 are exact in float16 and their products add up
exactly in float32, and for features the rounding of the inputs is part of the margin.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

INTEGER_TYPES = (torch.uint8, torch.int16)

_SCORES_PER_BLOCK = 1 << 18  # 1 MiB of float32: a block stays in the cache of a core
_SCORES_PER_BLOCK_ON_GPU = 1 << 26
_VALUES_PER_BLOCK = 1 << 20  # of the float64 copies of candidates
_CENTRE = 128  # uint8 minus this is exact in every floating type down to bf16
_MAX_EXACT = 1 << 24  # integers up to this are exact in float32
_MAX_EXACT_HALF = 1 << 23  # and halves up to this
_UNDERFLOW = torch.finfo(torch.float32).tiny  # what products of tiny values lose
_SPARE_CANDIDATES = 8  # beyond k, so that hardly any row has more


class IntegerForm:
    """Exact distances of uint8 or int16 rows to uint8 or int16 centroids.

    The score of a centroid is |c|^2 / 2 - x.c, around the centre: half the squared distance less
    |x|^2. Its terms are exact. In float32 the difference is exact as well as long as it is below
    2**23, and larger ones are rounded in their order, so that a smallest score below 2**23 is
    right; the rare rows without one are decided in float64.
    """

    distance_dtype = torch.int64

    def __init__(self, centroids: Tensor, *, wide: bool = False) -> None:
        """Prepare (K, D) uint8 or int16 centroids; `wide` computes in float64."""
        self._centroids = centroids
        # Products of two centred uint8 values summed D times stay exact in float32 up to this D.
        short = centroids.dtype == torch.uint8 and centroids.shape[1] < _MAX_EXACT // _CENTRE**2
        self._wide = wide or not short
        self._dtype = torch.float64 if self._wide else torch.float32
        half = not self._wide and centroids.is_cuda and _half_sums_are_exact(centroids.device)
        self._input_dtype = torch.float16 if half else self._dtype
        centred = centroids.to(torch.int32) - _CENTRE
        self._centred = centred.T.contiguous().to(self._input_dtype)
        norms = centred.to(torch.int64).square().sum(1)
        self._half_norms = (norms.double() / 2).to(self._dtype)

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and squared distances, int64, of one block of rows."""
        scores, norms = self._scores(x)
        best, ids = scores.min(1)
        # torch.min promises no order among equals; the first one is found in the rows that tie.
        tied = (scores == best[:, None]).sum(1) > 1
        if tied.any():
            ids[tied] = (scores[tied] == best[tied, None]).to(torch.uint8).argmax(1)
        distances = (2 * best.double()).to(torch.int64) + norms
        far = self._beyond_exact(best)
        if far is not None:
            ids[far], distances[far] = IntegerForm(self._centroids, wide=True).assign(x[far])
        return ids, distances

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest of one block of rows, nearest first."""
        scores, norms = self._scores(x)
        num_centroids = scores.shape[1]
        columns = torch.arange(num_centroids, device=x.device)
        # One integer orders by distance and then by index.
        twice = (2 * scores.double()).to(torch.int64)
        ranked = (twice * num_centroids + columns).topk(k, largest=False).values
        ids = ranked.remainder(num_centroids)
        distances = ranked.div(num_centroids, rounding_mode="floor") + norms[:, None]
        far = self._beyond_exact(scores.gather(1, ids[:, -1:]).squeeze(1))
        if far is not None:
            ids[far], distances[far] = IntegerForm(self._centroids, wide=True).top_k(x[far], k)
        return ids, distances

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return |c|^2 / 2 - x.c (n, K) and |x|^2 (n,), both around the centre."""
        centred = x.to(torch.int32) - _CENTRE
        scores = _product(centred.to(self._input_dtype), self._centred)
        torch.sub(self._half_norms, scores, out=scores)
        return scores, centred.to(torch.int64).square().sum(1)

    def _beyond_exact(self, best: Tensor) -> Tensor | None:
        """Return the rows whose best score float32 may have rounded, None if there are none."""
        if self._wide:
            return None
        far = best >= _MAX_EXACT_HALF
        return far if far.any() else None


class FloatForm:
    """Distances of floating rows, decided in float64 wherever the product cannot."""

    distance_dtype = torch.float64

    def __init__(self, centroids: Tensor, *, half: bool | None = None) -> None:
        """Prepare (K, D) centroids.

        Args:
            centroids: Floating or integer.
            half: Round the inputs of the product to float16; by default on a GPU.

        Raises:
            ValueError: A value is not finite.
        """
        self._exact = centroids.to(torch.float64)
        if not self._exact.isfinite().all():
            raise ValueError("centroids hold NaN or infinity")
        self._half = centroids.is_cuda if half is None else half
        # Around their mean the vectors are shorter, so the expanded square cancels less.
        self._mean = self._exact.mean(0)
        centred = self._exact - self._mean
        self._scale = _power_of_two_below(centred) if self._half else 1.0
        rounded, lost = self._round(centred)
        self._product_side = rounded.T.contiguous()
        self._norms = rounded.double().square().sum(1).float()
        self._longest = float(self._norms.max().sqrt()) + float(lost.max())
        self._lost = float(lost.max())
        # Rounding of a dot product of D terms, with room for that of the centring and the norm.
        self._epsilon = (centroids.shape[1] + 16) * 2.0**-23

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids, int64, and squared distances, float64, of one block of rows."""
        exact, scores, norms, lost = self._scores(x)
        best, ids = scores.min(1)
        limit = self._limit(best, norms, lost)
        # "Not greater", because a score that has overflowed to NaN excludes no candidate.
        rows, candidates = (~(scores > limit[:, None])).nonzero(as_tuple=True)
        exact_of_pair = self._pair_distances(exact, rows, candidates)
        distances = torch.full_like(best, torch.inf, dtype=torch.float64)
        distances.scatter_reduce_(0, rows, exact_of_pair, "amin")
        winners = exact_of_pair == distances[rows]
        ids = torch.full_like(ids, len(self._exact))
        ids.scatter_reduce_(0, rows[winners], candidates[winners], "amin")
        return ids, distances

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest of one block of rows, nearest first."""
        exact, scores, norms, lost = self._scores(x)
        num_candidates = min(k + _SPARE_CANDIDATES, scores.shape[1])
        nearest = scores.topk(num_candidates, largest=False, sorted=True)
        limit = self._limit(nearest.values[:, k - 1], norms, lost)
        candidates = nearest.indices.sort(1).values
        ids, distances = self._ranked(exact, candidates, k)
        if num_candidates < scores.shape[1]:
            crowded = ~(nearest.values[:, -1] > limit)
            every = torch.arange(scores.shape[1], device=x.device)
            for row in crowded.nonzero().flatten().tolist():
                ids[row], distances[row] = self._ranked(exact[row, None], every[None], k)
        return ids, distances

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows in float64, scores, norms of the rows and what rounding took from them."""
        exact = x.to(torch.float64)
        if not exact.isfinite().all():
            raise ValueError("x holds NaN or infinity")
        rounded, lost = self._round(exact - self._mean)
        products = _product(rounded, self._product_side)
        scores = torch.add(self._norms, products, alpha=-2)
        return exact, scores, rounded.float().norm(dim=1), lost

    def _limit(self, best: Tensor, norms: Tensor, lost: Tensor) -> Tensor:
        """Return the largest score that a row's nearest centroid can have.

        By the triangle inequality rounding moves a distance by no more than what it took from
        the two vectors, and the product errs by its own rounding.
        """
        margin = self._epsilon * (norms + self._longest).square() + _UNDERFLOW
        if not self._half:
            return best + 2 * margin
        square = norms.square()
        distance = (best + square + margin).clamp(min=0).sqrt() + 2 * (lost + self._lost)
        return distance.square() - square + 2 * margin

    def _round(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        if not self._half:
            return centred.float(), centred.new_zeros(len(centred)).float()
        scaled = centred * self._scale
        rounded = scaled.half()
        return rounded, (scaled - rounded.double()).norm(dim=1).float()

    def _pair_distances(self, exact: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
        step = max(1, _VALUES_PER_BLOCK // exact.shape[1])
        parts = [
            (exact[r] - self._exact[c]).square().sum(1)
            for r, c in zip(rows.split(step), candidates.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else exact.new_empty(0)

    def _ranked(self, exact: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest of candidates (n, m) given in ascending order."""
        rows = torch.arange(len(exact), device=exact.device).repeat_interleave(candidates.shape[1])
        measured = self._pair_distances(exact, rows, candidates.flatten()).view_as(candidates)
        distances, order = measured.sort(dim=1, stable=True)
        return candidates.gather(1, order[:, :k]), distances[:, :k]


def in_blocks(
    compute: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, num_centroids: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield `compute` of one block of rows after another, with the rows that it covers.

    Where a GPU has not the memory for a block, blocks of half the size are used from there on.

    Raises:
        torch.OutOfMemoryError: Not even a few rows fit.
    """
    scores = _SCORES_PER_BLOCK_ON_GPU if x.is_cuda else _SCORES_PER_BLOCK
    step = max(64, scores // num_centroids)
    start = 0
    with _full_precision():
        while start < len(x):
            rows = slice(start, start + step)
            try:
                ids, distances = compute(x[rows])
            except torch.OutOfMemoryError:
                if step <= 64:
                    raise
                step //= 2
                logger.warning("out of GPU memory: going on with %d patches at a time", step)
                continue
            yield rows, ids, distances
            start += step


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, float32 or better; float16 inputs are summed in float32."""
    if a.dtype != torch.float16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@cache
def _half_sums_are_exact(device: torch.device) -> bool:
    """Say whether this GPU adds up products of centred uint8 values without rounding."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (128, 1008), generator=generator) for _ in range(2))
    a[:64] = b[:64] = -128  # the largest sums of all
    with _full_precision():
        found = _product(a.to(device, torch.float16), b.to(device, torch.float16).T.contiguous())
    return bool(torch.equal(found.cpu().to(torch.int64), a @ b.T))


def _power_of_two_below(values: Tensor) -> float:
    """Return the power of two that brings values to float16's most precise range, exactly."""
    largest = float(values.abs().max())
    if largest == 0:
        return 1.0
    return float(2.0 ** -torch.tensor(largest).log2().ceil())


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Forbid TF32 and bf16 products, which the margin does not cover."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
