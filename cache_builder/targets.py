"""What `build` stores of resized views: token ids and, on request, soft targets and features.

Whatever else is asked for, the token ids are those of `PatchTokenizer.encode`. The features of a
view are computed once, and all its targets are made from them.

Beside the targets stands what they are worth: the perplexity of the soft targets, the share of the
softmax over all K that the stored k hold, and how near the stored features are to the float32 ones.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import CacheSpec
from cache_builder.formats.payloads import (
    FeatureSpec,
    FeatureTotals,
    FeatureType,
    SoftSpec,
    SoftTotals,
    pack_features,
    restore_features,
)
from cache_builder.soft_targets import soften
from cache_builder.tokenizers import PatchTokenizer

_VIEWS_PER_BATCH = 64
# The softmax over all K is measured of one patch in this many: a prime, so that no grid falls into
# step with it.
_MASS_STEP = 61
_MASS_ROWS = 512  # patches of which all K distances are held at once


class Targets(NamedTuple):
    """Targets of B views; the optional ones as in `CachedSample`, with B in the place of V."""

    token_ids: NDArray[np.uint16]  # (B, rows, cols), or (B, rows, cols, M) with M > 1 stages
    soft_ids: NDArray[np.uint16] | None = None
    soft_probs: NDArray[np.float16] | None = None
    features: NDArray[Any] | None = None
    feature_scales: NDArray[np.float32] | None = None

    def split(self, num_images: int) -> "list[Targets]":
        """Return the targets of every image, of each of which B / num_images views follow."""
        columns = [
            [None] * num_images if array is None else np.split(array, num_images) for array in self
        ]
        return [Targets(*parts) for parts in zip(*columns, strict=True)]


class TargetMaker:
    """Makes the targets that a cache's settings ask for, and measures them."""

    def __init__(
        self,
        tokenizer: PatchTokenizer,
        spec: CacheSpec,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        """Take the tokenizer that the cache was planned for, and what is held while it works."""
        self._tokenizer = tokenizer
        self._turn = turn or contextlib.nullcontext()
        self._soft = spec.soft
        self._dtype = spec.features.dtype if spec.features else None
        # Sums over patches: perplexity, mass, patches with a mass; cosine, relative error.
        self._num_patches = self._num_masses = 0
        self._perplexity = self._mass = self._cosine = self._error = 0.0

    def make(self, pixels: Tensor) -> Targets:
        """Return the targets of resized views, (B, 3, S, S) uint8.

        Raises:
            ConfigError: The features are not finite, or too large for float16.
        """
        parts = [self._make(batch) for batch in pixels.split(_VIEWS_PER_BATCH)]
        return Targets._make(
            None if column[0] is None else np.concatenate(column)
            for column in zip(*parts, strict=True)
        )

    def soft_totals(self, num_bytes: int) -> SoftTotals | None:
        """Say what the soft targets made so far came to; None if there are none."""
        if not self._soft or not self._num_patches:
            return None
        return SoftTotals(
            bytes=num_bytes,
            num_patches=self._num_patches,
            perplexity=round(self._perplexity / self._num_patches, 6),
            mass=round(self._mass / self._num_masses, 6),
        )

    def feature_totals(self, num_bytes: int) -> FeatureTotals | None:
        """Say what the features made so far came to; None if there are none."""
        if not self._dtype or not self._num_patches:
            return None
        return FeatureTotals(
            bytes=num_bytes,
            num_patches=self._num_patches,
            cosine=round(self._cosine / self._num_patches, 9),
            relative_error=round(self._error / self._num_patches, 9),
        )

    def _make(self, pixels: Tensor) -> Targets:
        if self._soft is None and self._dtype is None:
            with self._turn:
                return Targets(self._tokenizer.encode(pixels).numpy().astype(np.uint16))
        shape = (len(pixels), *self._tokenizer.grid)
        with self._turn:
            features = self._tokenizer.features(pixels)
            flat = features.reshape(-1, features.shape[-1])
            self._num_patches += len(flat)
            if self._soft:
                targets = Targets(*self._soften(flat, self._soft, shape))
            else:
                targets = Targets(self._tokenizer.quantize(features).numpy().astype(np.uint16))
            stored = features.cpu().numpy() if self._dtype else None
        if self._dtype is None or stored is None:
            return targets
        values, scales = self._store(stored, self._dtype, shape)
        return targets._replace(features=values, feature_scales=scales)

    def _soften(
        self, flat: Tensor, soft: SoftSpec, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float16]]:
        index = self._tokenizer.quantizer.stages[0]
        found = soften(index, flat, soft)
        probabilities = found.probabilities
        entropy = -torch.xlogy(probabilities, probabilities).sum(1)
        self._perplexity += float(entropy.exp().sum())
        chosen = slice(None, None, _MASS_STEP)
        masses = _masses(flat[chosen], index.centroids, found.distances[chosen], soft.bandwidth)
        self._mass += float(masses.sum())
        self._num_masses += len(masses)
        soft_ids = found.ids.reshape(*shape, soft.top_k)
        soft_probs = found.stored.reshape(*shape, soft.top_k)
        return np.ascontiguousarray(soft_ids[..., 0]), soft_ids, soft_probs

    def _store(
        self, features: NDArray[np.float32], dtype: FeatureType, shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        values, scales = pack_features(features, dtype)
        for view, stored in zip(features, restore_features(values, scales), strict=True):
            cosines, errors = fidelity(view, stored)
            self._cosine += float(cosines.sum())
            self._error += float(errors.sum())
        values = values.reshape(*shape, values.shape[-1])
        return values, None if scales is None else scales.reshape(shape)


def fidelity(
    features: NDArray[np.float32],  # (n, D)
    stored: NDArray[np.float32],  # (n, D)
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return cosine and |f - stored| / |f| of every patch, (n,) each; a zero kept is 1 and 0."""
    # Squared lengths, added up in float64; the dot product follows from the three.
    exact, kept, error = (
        np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (features, stored, features - stored)
    )
    lost = (exact == 0) | (kept == 0)
    cosines = (exact + kept - error) / 2 / np.sqrt(np.where(lost, 1, exact * kept))
    errors = np.sqrt(error / np.where(exact == 0, 1, exact))
    return np.where(lost, exact == kept, cosines), errors


def feature_spec(codebook: Codebook, dtype: FeatureType | None) -> FeatureSpec | None:
    """Return how features are stored, None if they are not asked for.

    Raises:
        ConfigError: The features are pixels, or quantised by another rule than ours.
    """
    if dtype is None:
        return None
    if not codebook.is_fitted:
        raise ConfigError(
            f"--store-features stores what our quantiser sees, and {codebook.extractor.id} "
            "quantises by itself. Leave it out."
        )
    if codebook.extractor.id == "pixel":
        raise ConfigError(
            "--store-features has no meaning for a pixel tokenizer: its features are the pixels, "
            "which every view of the image holds. Leave it out."
        )
    return FeatureSpec(dtype=dtype, dim=codebook.dim)


def _masses(x: Tensor, centroids: Tensor, nearest: Tensor, bandwidth: float) -> Tensor:
    """Return the share of the softmax over all K that the nearest k hold, (n,) float64."""
    centres = centroids.double()
    norms = centres.square().sum(1)
    parts = []
    for rows, kept in zip(x.split(_MASS_ROWS), nearest.split(_MASS_ROWS), strict=True):
        exact = rows.double()
        distances = exact.square().sum(1, keepdim=True) + norms - 2 * exact @ centres.T
        of_all = torch.logsumexp(distances / -bandwidth, 1)
        parts.append((torch.logsumexp(kept.double() / -bandwidth, 1) - of_all).exp().clamp(max=1))
    return torch.cat(parts)
