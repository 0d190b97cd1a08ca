"""Nearest centroids on a CPU without measuring most of them.

For an orthonormal basis U (D, p) and a mean m, Pythagoras and the reverse triangle inequality give

    |x - c|^2 >= |px - pc|^2 + (rx - rc)^2        px = U^T (x - m), rx = |(x - m) - U px|

and likewise for c. The right side is one product of p + 2 terms per centroid. Centroids whose bound
exceeds the distance of a good first guess cannot be nearest; the few others are measured exactly,
in integers or in float64. With U the principal components of the centroids 32 terms leave about
ten of 8,192 centroids of image patches. U decides the speed, never the answer: a margin covers
the rounding of every step (`kernels/nearest.cpp` derives it).

The length of the prefix is chosen on the first rows that come, and where none pays (features
whose variance is spread evenly) the plan says so and the caller computes the whole matrix.
The compiled kernel does all of it in one pass; without it the same is done in torch.
"""

import ctypes
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import torch
from torch import Tensor

from cache_builder.tokenizers.kernels.library import GROUP, Index, kernels

PREFIXES = (24, 32, 48, 64, 96, 128, 192, 256)

_TYPES = {torch.uint8: 0, torch.int16: 1, torch.float32: 2}
_NO_CENTROID = 3e38  # bound of a column that pads the last group
_ROWS_TO_CHOOSE = 192
_DIMS_TO_GROUP_BY = 16
_ROWS_PER_TASK = 768  # of the compiled kernel; enough to keep a thread busy for milliseconds
_ROWS_PER_BLOCK = 512  # of the torch form
_ULP = 2.0**-24
_LONGEST = 1e37  # |x - m|^2, so that no product of two such vectors overflows
_CANCELLATION = 1e-10  # of the expanded square in float64, generously
_MAX_EXACT_DIM = 1 << 10  # 2**24 / 128**2
_TINY = torch.finfo(torch.float32).tiny

# Costs in units of one multiply-add of the compiled product, measured with AVX-512.
_COST_OF_MEASURING = {torch.uint8: (2000.0, 4.0), torch.int16: (2000.0, 8.0),
                      torch.float32: (2000.0, 12.0)}  # fmt: skip
_COST_OF_DENSE = 1.2  # per multiply-add: the product and the search for the minimum
_COST_IN_TORCH = 2.5  # of measuring, beside the compiled one


class Basis(NamedTuple):
    """An orthonormal basis of the directions in which centroids differ most."""

    mean: Tensor  # (D,) float32
    vectors: Tensor  # (D, P) float32, by falling variance
    skew: float  # |U^T U - 1|, what float32 leaves of orthonormality

    @classmethod
    def of(cls, centroids: Tensor) -> Self:
        """Find the principal components of centroids (K, D) by subspace iteration."""
        exact = centroids.double()
        mean = exact.mean(0).float()
        centred = exact - mean
        # Of a scale at which no sum overflows; the directions do not depend on it.
        centred = (centred / centred.abs().max().clamp(min=_TINY)).float()
        dim = centred.shape[1]
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(dim, min(dim, PREFIXES[-1]), generator=generator)
        for _ in range(3):
            vectors = torch.linalg.qr(centred.T @ (centred @ vectors)).Q
        projected = (centred @ vectors).double()
        _, rotation = torch.linalg.eigh(projected.T @ projected)
        vectors = torch.linalg.qr(vectors.double() @ rotation.flip(1)).Q.float()
        gram = vectors.double().T @ vectors.double()
        skew = float(torch.linalg.matrix_norm(gram - torch.eye(len(gram)), 2))
        return cls(mean, vectors, skew)


class Plan(NamedTuple):
    """How to search; it fits every set of K centroids, and similar ones well."""

    basis: Basis
    prefix: int | None  # p; None: no prefix pays, compute the whole matrix
    order: Tensor  # (K,) int64, the centroids in the order of the columns


class PrefixSearch:
    """Centroids prepared with one length of prefix."""

    def __init__(self, centroids: Tensor, plan: Plan) -> None:
        """Project (K, D) uint8, int16 or float32 centroids, contiguous, on the CPU."""
        assert plan.prefix is not None
        self.prefix = plan.prefix
        self._centroids = centroids
        self._basis, order = plan.basis, plan.order
        self._vectors = self._basis.vectors[:, : self.prefix].contiguous()
        num_groups = -(-len(centroids) // GROUP)
        self._order = torch.full((num_groups * GROUP,), -1, dtype=torch.int64)
        self._order[: len(order)] = order
        self._terms = self._bound_terms(order, num_groups * GROUP)
        self._compiled = kernels()
        if self._compiled:
            self._index, self._held = self._compiled_index(num_groups)
        else:
            # Centred uint8 values add up exactly in float32 as long as the vectors are short.
            short = centroids.dtype == torch.uint8 and centroids.shape[1] < _MAX_EXACT_DIM
            self._centre = 0 if centroids.dtype == torch.float32 else 128
            self._wide = centroids.to(torch.float32 if short else torch.float64) - self._centre
            self._wide_norms = self._wide.double().square().sum(1)

    def assign(self, x: Tensor, hints: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Find the nearest centroid of rows of the centroids' type.

        Args:
            x: (n, D), contiguous.
            hints: (n,) int64, ids that are likely right; they save time.

        Returns:
            Ids (n,) int64, -1 for a row that is not finite or too long for float32; squared
            distances (n,), int64 or float64; and how many centroids were measured per row.
        """
        if self._compiled:
            ids, distances, measured = self._run_kernel(x, 1, hints)
            return ids.squeeze(1), distances.squeeze(1), measured
        return self._assign_in_torch(x, hints)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Find the k nearest centroids of rows, nearest first, as (n, k) each.

        Returns:
            What `assign` returns without the count, or None without the compiled kernels.
        """
        return self._run_kernel(x, k, None)[:2] if self._compiled else None

    def cost(self, num_measured: float) -> float:
        """Return the cost of a row, in multiply-adds, when so many centroids are measured."""
        num_centroids, dim = self._centroids.shape
        each, per_value = _COST_OF_MEASURING[self._centroids.dtype]
        measuring: float = num_measured * (each + per_value * dim)
        if not self._compiled:
            measuring *= _COST_IN_TORCH
        bounding: int = num_centroids * (self.prefix + 2) + dim * self.prefix
        return bounding + measuring

    def _bound_terms(self, order: Tensor, width: int) -> Tensor:
        """Return (p + 2, width) float32: -2 pc, -2 rc, |c - m|^2 in each column."""
        centred = self._centroids[order].double() - self._basis.mean.double()
        projected = centred @ self._vectors.double()
        norms = centred.square().sum(1)
        residuals = (norms - projected.square().sum(1)).clamp(min=0).sqrt()
        terms = torch.zeros(self.prefix + 2, width)
        terms[-1] = _NO_CENTROID
        columns = torch.cat([-2 * projected, -2 * residuals[:, None], norms[:, None]], 1)
        terms[:, : len(order)] = columns.T.float()
        return terms

    def _compiled_index(self, num_groups: int) -> tuple[Index, list[Tensor]]:
        """Return what the kernel takes, and the tensors that must outlive it."""
        dim = len(self._vectors)
        num_panels = -(-self.prefix // GROUP)
        basis = torch.zeros(dim, num_panels * GROUP)
        basis[:, : self.prefix] = self._vectors
        held = [
            self._basis.mean,
            basis.view(dim, num_panels, GROUP).transpose(0, 1).contiguous(),
            self._terms.view(self.prefix + 2, num_groups, GROUP).transpose(0, 1).contiguous(),
            self._order,
            self._centroids,
        ]
        index = Index(
            _TYPES[self._centroids.dtype], dim, self.prefix, num_groups, self._basis.skew,
            *(tensor.data_ptr() for tensor in held),
        )  # fmt: skip
        return index, held

    def _run_kernel(self, x: Tensor, k: int, hints: Tensor | None) -> tuple[Tensor, Tensor, float]:
        compiled = self._compiled
        assert compiled is not None
        index = ctypes.byref(self._index)
        ids = torch.empty(len(x), k, dtype=torch.int64)
        distances = torch.empty(len(x), k, dtype=_distance_type(x))

        def task(rows: slice) -> int:
            parts = [x[rows], ids[rows], distances[rows]]
            hint = None if hints is None else hints[rows].data_ptr()
            measured: int = compiled.assign(
                index, parts[0].data_ptr(), len(parts[0]), k, hint,
                parts[1].data_ptr(), parts[2].data_ptr(),
            )  # fmt: skip
            return measured

        slices = [slice(i, i + _ROWS_PER_TASK) for i in range(0, len(x), _ROWS_PER_TASK)]
        num_threads = min(torch.get_num_threads(), len(slices))
        if num_threads < 2:
            measured = sum(map(task, slices))
        else:
            with ThreadPoolExecutor(num_threads) as threads:
                measured = sum(threads.map(task, slices))
        return ids, distances, measured / max(len(x), 1)

    def _assign_in_torch(self, x: Tensor, hints: Tensor | None) -> tuple[Tensor, Tensor, float]:
        ids = torch.empty(len(x), dtype=torch.int64)
        distances = torch.empty(len(x), dtype=_distance_type(x))
        measured = 0
        for start in range(0, len(x), _ROWS_PER_BLOCK):
            rows = slice(start, start + _ROWS_PER_BLOCK)
            hint = None if hints is None else hints[rows]
            ids[rows], distances[rows], num = self._assign_block(x[rows], hint)
            measured += num
        return ids, distances, measured / max(len(x), 1)

    def _assign_block(self, x: Tensor, hints: Tensor | None) -> tuple[Tensor, Tensor, int]:
        centred = x.float() - self._basis.mean
        norms = centred.square().sum(1)
        projected = centred @ self._vectors
        residuals = (norms - projected.square().sum(1)).clamp(min=0).sqrt()
        ones = torch.ones(len(x), 1)
        bounds = torch.cat([projected, residuals[:, None], ones], 1) @ self._terms
        grouped = bounds.view(len(x), -1, GROUP)
        least = grouped.amin(2)  # twenty times as fast as a search through `bounds`
        if hints is None:
            group = least.argmin(1)
            member = grouped[torch.arange(len(x)), group].argmin(1)
            hints = self._order[group * GROUP + member].clamp(min=0)
        rows = torch.arange(len(x))
        first = self._measure(x, rows, hints)
        limit = self._limit(first.double(), norms.double(), residuals.double())
        # "Not greater": a bound that is not a number excludes nothing.
        row, group = (~(least > limit[:, None])).nonzero(as_tuple=True)
        pair, member = (~(grouped[row, group] > limit[row, None])).nonzero(as_tuple=True)
        row, column = row[pair], group[pair] * GROUP + member
        candidate = self._order[column]
        row, candidate = row[candidate >= 0], candidate[candidate >= 0]
        found = self._measure(x, row, candidate)
        best = first.scatter_reduce(0, row, found, "amin")
        winners = found == best[row]
        ids = torch.where(first == best, hints, len(self._centroids))
        ids = ids.scatter_reduce(0, row[winners], candidate[winners], "amin")
        ids[~(norms < _LONGEST)] = -1
        return ids, best, len(x) + len(row)

    def _measure(self, x: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
        """Return the exact squared distance of every pair; rows must ascend."""
        wide = x.to(self._wide.dtype) - self._centre
        products = _products_of_pairs(wide, self._wide, rows, candidates)
        norms = wide.double().square().sum(1)
        measured = norms[rows] + self._wide_norms[candidates] - 2 * products.double()
        if x.dtype != torch.float32:
            return measured.to(torch.int64)
        # What the expanded square leaves open is measured once more without it.
        best = torch.full_like(norms, torch.inf).scatter_reduce(0, rows, measured, "amin")
        close = measured <= best[rows] + _CANCELLATION * (norms[rows] + measured.abs())
        again = x[rows[close]].double() - self._centroids[candidates[close]].double()
        measured[close] = again.square().sum(1)
        return measured

    def _limit(self, best: Tensor, norms2: Tensor, residuals: Tensor) -> Tensor:
        """Return the largest computed bound, less |x - m|^2, of the nearest centroid.

        The margin of `kernels/nearest.cpp`, with the longer sums of torch's products.
        """
        dim = len(self._vectors)
        norm, distance = norms2.sqrt(), best.sqrt()
        reach = 2 * norm + distance
        e = dim * _ULP * math.sqrt(self.prefix) * norm + (self._basis.skew + 4 * _ULP) * reach
        of_norm = (dim / 8 + 8) * _ULP
        error2 = 2 * e * norm + e.square() + (of_norm + self.prefix * _ULP) * norms2
        s = torch.minimum(error2.sqrt(), error2 / residuals.clamp(min=_TINY))
        bound = best - norms2 + 2 * distance * (e + s) + (e + s).square()
        bound += (self.prefix + 6) * 2 * _ULP * reach.square() + 2 * of_norm * norms2 + _TINY
        return (bound + 2 * _ULP * bound.abs()).float()


def _distance_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float32 else torch.int64


def _products_of_pairs(x: Tensor, centroids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return x[rows] . centroids[columns], without a copy of either; rows must ascend."""
    starts = torch.zeros(len(x) + 1, dtype=torch.int64)
    starts[1:] = rows.bincount(minlength=len(x)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        pairs = torch.sparse_csr_tensor(
            starts, columns, torch.zeros(len(rows), dtype=x.dtype), (len(x), len(centroids)),
            check_invariants=False,
        )  # fmt: skip
        return torch.sparse.sampled_addmm(pairs, x, centroids.T, beta=0).values()


def make_plan(centroids: Tensor, sample: Tensor) -> Plan:
    """Choose the cheapest prefix for rows like `sample`.

    The choice rests on counts, not on times: the same rows always give the same one.

    Args:
        centroids: (K, D) uint8, int16 or float32, on the CPU.
        sample: (n, D) of the same type; a few hundred rows of it are looked at.
    """
    basis = Basis.of(centroids)
    projected = (centroids.float() - basis.mean) @ basis.vectors[:, :_DIMS_TO_GROUP_BY]
    plan = Plan(basis, None, _neighbours_together(projected))
    if float((centroids.double() - basis.mean.double()).square().sum(1).max()) > _LONGEST:
        return plan
    rows = sample[:: max(1, len(sample) // _ROWS_TO_CHOOSE)][:_ROWS_TO_CHOOSE].contiguous()
    num_centroids, dim = centroids.shape
    least = _COST_OF_DENSE * num_centroids * dim
    for prefix in PREFIXES:
        if prefix > basis.vectors.shape[1] or num_centroids * (prefix + 2) > least:
            break
        candidate = plan._replace(prefix=prefix)
        search = PrefixSearch(centroids, candidate)
        cost = search.cost(search.assign(rows)[2])
        if cost < least:
            plan, least = candidate, cost
    return plan


def _neighbours_together(projected: Tensor) -> Tensor:
    """Return centroids in an order in which near ones share a group.

    Parts are halved at the median of the coordinate in which they differ most.
    """
    parts = [torch.arange(len(projected))]
    while len(parts[0]) > GROUP:
        halves = []
        for part in parts:
            values = projected[part]
            ranked = part[values[:, values.var(0).argmax()].argsort(stable=True)]
            halves += [ranked[: len(part) // 2], ranked[len(part) // 2 :]]
        parts = halves
    return torch.cat(parts)
