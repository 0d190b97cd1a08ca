"""Vector quantisation: the exact nearest centroid of every patch.

Two cases, one answer each:

* integers (uint8 or int16 patches and centroids): every distance is an exact integer, so an id
  depends on nothing but the two: not on the device, the batch or the number of threads.
* anything else: a bound or a fast product finds the candidates, and they are decided in float64.
  What is left to chance is a tie closer than float64 rounding.

Ties go to the lowest index. No (n, K) matrix is ever held for all n. On a CPU most centroids are
not measured at all (`prefix.py`); on a GPU, and where that does not pay, the whole matrix of scores
is computed block by block (`dense.py`).
"""

from typing import Self

import torch
from torch import Tensor

from cache_builder.errors import ConfigError
from cache_builder.tokenizers.dense import INTEGER_TYPES, FloatForm, IntegerForm, in_blocks
from cache_builder.tokenizers.prefix import Plan, PrefixSearch, make_plan

# Below these, preparing a bound costs more than it saves.
_MIN_CENTROIDS = 256
_MIN_DIM = 32
_MIN_ROWS = 64
_MAX_SEARCHED = 64  # neighbours; a limit that lets more pass excludes too little


def nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of every row of `x`.

    Distances are squared Euclidean. For a cosine codebook pass unit vectors; the two orderings
    then agree.

    Args:
        x: (n, D) uint8, int16 or floating.
        centroids: (K, D) uint8, int16 or floating, on the same device.

    Returns:
        (n,) int64, each in [0, K); an exact tie goes to the lowest index.

    Raises:
        ValueError: The dimensions differ, there is no centroid, or a value is not finite.
    """
    return CentroidIndex(centroids).assign(x)[0]


class CentroidIndex:
    """Centroids prepared for many calls of `assign`."""

    def __init__(self, centroids: Tensor, *, like: Self | None = None) -> None:
        """Prepare (K, D) centroids, uint8, int16 or floating.

        Args:
            centroids: Any device; rows must come on the same one.
            like: An index of similar centroids, whose preparation is used again; it changes the
                speed alone.

        Raises:
            ValueError: Not a matrix, empty, or not finite.
        """
        if centroids.ndim != 2 or not len(centroids):
            raise ValueError(f"centroids must be (K, D) with K > 0, not {tuple(centroids.shape)}")
        if centroids.is_floating_point() and not centroids.isfinite().all():
            raise ValueError("centroids hold NaN or infinity")
        self.centroids = centroids
        self._plan: Plan | None = like._plan if like else None
        self._dense: dict[bool, IntegerForm | FloatForm] = {}
        self._searches: dict[torch.dtype, PrefixSearch | None] = {}

    def assign(self, x: Tensor, hints: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the nearest centroid of every row, and how far it is.

        Args:
            x: (n, D) uint8, int16 or floating.
            hints: (n,) int64, ids that are likely right. They change the speed alone.

        Returns:
            Ids (n,) int64 and squared distances (n,): int64 when both sides are integers, else
            float64.

        Raises:
            ValueError: The dimensions differ, or a value is not finite.
        """
        self._check(x)
        kind = self._kind(x)
        search = self._search(x, kind)
        if search is None:
            return self._assign_dense(x)
        ids, distances, _ = search.assign(x.to(kind).contiguous(), hints)
        odd = ids < 0
        if odd.any():
            ids[odd], distances[odd] = self._assign_dense(x[odd])
        return ids, distances

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest centroids of every row, nearest first.

        Args:
            x: (n, D) uint8, int16 or floating.
            k: 1 to K.

        Returns:
            Ids (n, k) int64 and squared distances (n, k) as `assign` gives them; ties go to the
            lowest index.

        Raises:
            ValueError: The dimensions differ, k is out of range, or a value is not finite.
        """
        self._check(x)
        num_centroids = len(self.centroids)
        if not 0 < k <= num_centroids:
            raise ValueError(f"k must be 1 to {num_centroids:,}, not {k:,}")
        kind = self._kind(x)
        search = self._search(x, kind) if k <= _MAX_SEARCHED else None
        found = search.top_k(x.to(kind).contiguous(), k) if search else None
        if found is None:
            return self._top_k_dense(x, k)
        ids, distances = found
        odd = ids[:, 0] < 0
        if odd.any():
            ids[odd], distances[odd] = self._top_k_dense(x[odd], k)
        return ids, distances

    def _check(self, x: Tensor) -> None:
        dim = self.centroids.shape[1]
        if x.ndim != 2 or x.shape[1] != dim:
            raise ValueError(f"x must be (n, {dim}) to match the centroids, not {tuple(x.shape)}")

    def _kind(self, x: Tensor) -> torch.dtype:
        """Return the type in which a bound is sought: exact for both sides, or none."""
        types = {x.dtype, self.centroids.dtype}
        if types <= {torch.uint8}:
            return torch.uint8
        if types <= set(INTEGER_TYPES):
            return torch.int16
        return torch.float64 if torch.float64 in types else torch.float32

    def _search(self, x: Tensor, kind: torch.dtype) -> PrefixSearch | None:
        """Return the search that pays for rows like x, None where the whole matrix does."""
        if kind in self._searches:
            return self._searches[kind]
        num_centroids, dim = self.centroids.shape
        small = num_centroids < _MIN_CENTROIDS or dim < _MIN_DIM or len(x) < _MIN_ROWS
        if small or x.is_cuda or kind == torch.float64:
            return None
        centroids = self.centroids.to(kind).contiguous()
        if self._plan is None:
            self._plan = make_plan(centroids, x.to(kind))
        pays = self._plan.prefix is not None
        self._searches[kind] = PrefixSearch(centroids, self._plan) if pays else None
        return self._searches[kind]

    def _assign_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        form = self._dense_form(x)
        ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
        distances = torch.empty(len(x), dtype=form.distance_dtype, device=x.device)
        for rows, *found in in_blocks(form.assign, x, len(self.centroids)):
            ids[rows], distances[rows] = found
        return ids, distances

    def _top_k_dense(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        form = self._dense_form(x)
        ids = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
        distances = torch.empty(len(x), k, dtype=form.distance_dtype, device=x.device)
        for rows, *found in in_blocks(lambda block: form.top_k(block, k), x, len(self.centroids)):
            ids[rows], distances[rows] = found
        return ids, distances

    def _dense_form(self, x: Tensor) -> IntegerForm | FloatForm:
        exact = {x.dtype, self.centroids.dtype} <= set(INTEGER_TYPES)
        if exact not in self._dense:
            self._dense[exact] = (IntegerForm if exact else FloatForm)(self.centroids)
        return self._dense[exact]


def residual(x: Tensor, centroids: Tensor, ids: Tensor) -> Tensor:
    """Return what centroids (K, D) leave over of x (n, D): int16 of integers, else float32."""
    exact = x.dtype in INTEGER_TYPES and centroids.dtype in INTEGER_TYPES
    dtype = torch.int16 if exact else torch.float32
    return x.to(dtype) - centroids.to(x.device)[ids].to(dtype)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids of any shape that no codebook of this size has.

    Raises:
        ConfigError: An id is out of range.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ConfigError(
            f"Token ids {int(ids.min())}..{int(ids.max())} do not lie in "
            f"[0, {vocab_size}). Pass ids of this codebook."
        )


class ResidualQuantizer:
    """M codebooks in a row: each quantises what the ones before it left over.

    With M = 1 this is `CentroidIndex`. The search is greedy.
    """

    def __init__(self, centroids: Tensor) -> None:
        """Prepare (M, K, D) centroids."""
        self.stages = [CentroidIndex(stage) for stage in centroids]

    def encode(self, x: Tensor) -> Tensor:
        """Return ids (n, M) int64 of (n, D) features."""
        columns: list[Tensor] = []
        left = x
        for stage in self.stages:
            ids, _ = stage.assign(left)
            columns.append(ids)
            if len(columns) < len(self.stages):
                left = residual(left, stage.centroids, ids)
        return torch.stack(columns, 1)

    def decode(self, ids: Tensor) -> Tensor:
        """Return the features (..., D) that ids (..., M) stand for, float32.

        Raises:
            ConfigError: An id is out of range.
        """
        check_ids(ids, len(self.stages[0].centroids))
        parts = [
            stage.centroids[column].float()
            for stage, column in zip(self.stages, ids.unbind(-1), strict=True)
        ]
        return torch.stack(parts).sum(0)
