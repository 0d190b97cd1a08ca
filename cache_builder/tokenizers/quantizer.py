"""Vector quantisation: the exact nearest centroid of every patch.

Two cases, one answer each:

* uint8 patches and uint8 centroids: every distance is an exact integer, so an id depends on
  nothing but the two: not on the device, the batch or the number of threads.
* anything else: float32 scores find the candidates, and every row with more than one candidate
  within a certified rounding margin is decided in float64. What is left to chance is a tie closer
  than float64 rounding.

Ties go to the lowest index. No (n, K) matrix is ever held for all n.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cache_builder.errors import ConfigError

_SCORES_PER_BLOCK = 1 << 18  # 1 MiB of float32: a block stays in the cache of a core
_CENTRE = 128  # uint8 minus this is exact in every floating type down to bf16
# Products of two such values summed D times stay below 2**24, exact in float32, up to this D.
_MAX_EXACT_DIM = (1 << 24) // _CENTRE**2 - 1
_UNDERFLOW = torch.finfo(torch.float32).tiny  # what products of tiny values lose


def nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of every row of `x`.

    Distances are squared Euclidean. For a cosine codebook pass unit vectors; the two orderings
    then agree.

    Args:
        x: (n, D) uint8 or floating.
        centroids: (K, D) uint8 or floating, on the same device.

    Returns:
        (n,) int64, each in [0, K); an exact tie goes to the lowest index.

    Raises:
        ValueError: The dimensions differ, there is no centroid, or a value is not finite.
    """
    return CentroidIndex(centroids).assign(x)[0]


class CentroidIndex:
    """Centroids prepared for many calls of `assign`."""

    def __init__(self, centroids: Tensor) -> None:
        """Prepare (K, D) centroids, uint8 or floating.

        Raises:
            ValueError: Not a matrix, empty, or not finite.
        """
        if centroids.ndim != 2 or not len(centroids):
            raise ValueError(f"centroids must be (K, D) with K > 0, not {tuple(centroids.shape)}")
        self.centroids = centroids
        self._integer = centroids.dtype == torch.uint8
        self._integer_form = _IntegerForm(centroids) if self._integer else None
        self._float_form: _FloatForm | None = None
        if not self._integer:
            self._float_form = _FloatForm(centroids)

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest centroid of every row, and how far it is.

        Args:
            x: (n, D) uint8 or floating.

        Returns:
            Ids (n,) int64 and squared distances (n,): int64 when both sides are uint8, else
            float64.

        Raises:
            ValueError: The dimensions differ, or a value is not finite.
        """
        num_centroids, dim = self.centroids.shape
        if x.ndim != 2 or x.shape[1] != dim:
            raise ValueError(f"x must be (n, {dim}) to match the centroids, not {tuple(x.shape)}")
        form: _IntegerForm | _FloatForm
        if x.dtype == torch.uint8 and self._integer_form is not None:
            form = self._integer_form
        else:
            if self._float_form is None:
                self._float_form = _FloatForm(self.centroids)
            form = self._float_form
        ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
        distances = torch.empty(len(x), dtype=form.distance_dtype, device=x.device)
        step = max(64, _SCORES_PER_BLOCK // num_centroids)
        with _full_precision():
            for start in range(0, len(x), step):
                block = slice(start, start + step)
                ids[block], distances[block] = form.assign(x[block])
        return ids, distances


class ResidualQuantizer:
    """M codebooks in a row: each quantises what the ones before it left over.

    With M = 1 this is `CentroidIndex`. The search is greedy.
    """

    def __init__(self, centroids: Tensor) -> None:
        """Prepare (M, K, D) centroids."""
        self._stages = [CentroidIndex(stage) for stage in centroids]

    def encode(self, x: Tensor) -> Tensor:
        """Return ids (n, M) int64 of (n, D) features."""
        ids, _ = self._stages[0].assign(x)
        columns = [ids]
        residual = x
        for previous, stage in zip(self._stages, self._stages[1:], strict=False):
            residual = residual.float() - previous.centroids[columns[-1]].float()
            columns.append(stage.assign(residual)[0])
        return torch.stack(columns, 1)

    def decode(self, ids: Tensor) -> Tensor:
        """Return the features (..., D) that ids (..., M) stand for, float32.

        Raises:
            ConfigError: An id is out of range.
        """
        num_centroids = len(self._stages[0].centroids)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_centroids:
            raise ConfigError(
                f"Token ids {int(ids.min())}..{int(ids.max())} do not lie in "
                f"[0, {num_centroids}). Pass ids of this codebook."
            )
        parts = [
            stage.centroids[column].float()
            for stage, column in zip(self._stages, ids.unbind(-1), strict=True)
        ]
        return torch.stack(parts).sum(0)


class _IntegerForm:
    """Exact distances of uint8 rows to uint8 centroids."""

    distance_dtype = torch.int64

    def __init__(self, centroids: Tensor) -> None:
        small = centroids.shape[1] <= _MAX_EXACT_DIM
        exact = torch.float32 if small else torch.float64
        self._centred = (centroids.to(exact) - _CENTRE).T.contiguous()
        # |c|^2 - 2 x.c passes 2**24, so the last step is done in integers.
        self._integer = torch.int32 if small else torch.int64
        self._norms = self._centred.to(torch.int64).square().sum(0).to(self._integer)

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.to(self._centred.dtype) - _CENTRE
        scores = self._norms - 2 * (centred @ self._centred).to(self._integer)
        best, ids = scores.min(1)
        # torch.min promises no order among equals; the first one is found in the rows that tie.
        tied = (scores == best[:, None]).sum(1) > 1
        if tied.any():
            ids[tied] = (scores[tied] == best[tied, None]).to(torch.uint8).argmax(1)
        norms = centred.to(torch.int64).square().sum(1)
        return ids, best + norms


class _FloatForm:
    """Distances of floating rows, decided in float64 wherever float32 cannot."""

    distance_dtype = torch.float64

    def __init__(self, centroids: Tensor) -> None:
        self._exact = centroids.to(torch.float64)
        if not self._exact.isfinite().all():
            raise ValueError("centroids hold NaN or infinity")
        # Around their mean the vectors are shorter, so the expanded square cancels less.
        self._mean = self._exact.mean(0)
        centred = self._exact - self._mean
        self._centred = centred.float().T.contiguous()
        self._norms = centred.square().sum(1).float()
        self._longest = float(centred.square().sum(1).max().sqrt())
        # Rounding of a dot product of D terms, with room for that of the centring and the norm.
        self._epsilon = (centroids.shape[1] + 16) * 2.0**-23

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exact = x.to(torch.float64)
        if not exact.isfinite().all():
            raise ValueError("x holds NaN or infinity")
        centred = (exact - self._mean).float()
        scores = torch.addmm(self._norms, centred, self._centred, alpha=-2)
        best, ids = scores.min(1)
        margin = self._epsilon * (centred.norm(dim=1) + self._longest).square() + _UNDERFLOW
        # "Not greater", because a score that has overflowed to NaN excludes no candidate.
        rows, candidates = (~(scores > (best + 2 * margin)[:, None])).nonzero(as_tuple=True)
        exact_of_pair = self._pair_distances(exact, rows, candidates)
        distances = torch.full_like(best, torch.inf, dtype=torch.float64)
        distances.scatter_reduce_(0, rows, exact_of_pair, "amin")
        winners = exact_of_pair == distances[rows]
        ids = torch.full_like(ids, len(self._exact))
        ids.scatter_reduce_(0, rows[winners], candidates[winners], "amin")
        return ids, distances

    def _pair_distances(self, exact: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
        step = max(1, _SCORES_PER_BLOCK // exact.shape[1])
        parts = [
            (exact[r] - self._exact[c]).square().sum(1)
            for r, c in zip(rows.split(step), candidates.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else exact.new_empty(0)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Forbid TF32 and bf16 products, which the margin does not cover."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
