"""Features as targets: what vectors stand behind the ids of a cache, and on which scale.

Scale: features of an `l2` codebook are left as they are. Those of a `cosine` codebook have unit
length and are multiplied by sqrt(D), so that a value is of order one. Pixels are brought to [0, 1],
less the mean and over the standard deviation of the codebook's pixels, one of each for the whole
codebook.

Projection: on the principal directions of the centroids, each weighted by its count. The mean is
not taken away first: what is compared are directions from zero, and those are kept as well as so
few values can. It is computed once, in float64, and is part of a checkpoint, because another
machine's may differ in the last digits.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cache_builder.errors import ConfigError
from cache_builder.formats import Codebook
from trainer.objectives.interface import Parts, Targets, require_payload

TargetSource = Literal["centroids", "residual", "features"]

_VARIANCE_EPS = 1e-6
_PIXEL_MAX = 255


class FeatureTargets(nn.Module):
    """Turns what a cache says of patches into features.

    Attributes:
        dim: d, values of a feature.
        table: (M, K, d), the centroids on the scale of the targets.
        projection: (D, d), or None.
    """

    def __init__(self, parts: Parts, source: TargetSource, target_dim: int | None) -> None:
        """Prepare the centroids of a codebook.

        Raises:
            ConfigError: The cache lacks the source, or the features are no longer than
                `target_dim`.
        """
        super().__init__()
        manifest, codebook = parts.manifest, parts.codebook
        if source == "features":
            require_payload(manifest, "features", "dtm", "--store-features float16")
        elif source == "centroids" and manifest.spec.num_stages > 1:
            raise ConfigError(
                f"The cache holds {manifest.spec.num_stages} token ids per patch, whose centroids "
                "add up. Set objective.source=residual."
            )
        elif source == "residual" and manifest.spec.num_stages == 1:
            raise ConfigError(
                "objective.source = 'residual' adds up the centroids of several token ids per "
                "patch; the cache holds one. Set objective.source=centroids."
            )
        if not codebook.has_centroids:
            why = "they were imported" if codebook.is_foreign else "its plugin names no centroids"
            raise ConfigError(
                f"The token ids of {codebook.extractor.id} stand for no vectors: {why}. "
                "Train with a method that predicts ids, such as beit or mapet."
            )
        if target_dim is not None and target_dim >= codebook.dim:
            raise ConfigError(
                f"objective.target_dim {target_dim} is no projection: targets have {codebook.dim} "
                "values. Lower it, or leave it out."
            )
        self._source = source
        self._is_cosine = codebook.metric == "cosine"
        weights = _weights(codebook)
        table, self._scale = _scaled(codebook, weights)
        projection = None
        if target_dim is not None:
            projection = principal_directions(table, weights, target_dim)
            table = table @ projection
        self.dim = int(table.shape[-1])
        is_projected = projection is not None
        self.register_buffer("projection", projection, persistent=is_projected)
        self.register_buffer("table", table, persistent=is_projected)

    def forward(self, targets: Targets) -> Tensor:
        """Return the features of a batch, (B, N, d) float32."""
        if self._source == "features":
            assert targets.features is not None
            features = targets.features * self._scale
            if self.projection is None:
                return features
            with torch.autocast(features.device.type, enabled=False):
                return features @ self.projection
        ids = targets.token_ids
        if ids.ndim == 2:
            ids = ids[..., None]
        features = self.table[0][ids[..., 0]]
        for stage in range(1, len(self.table)):
            features = features + self.table[stage][ids[..., stage]]
        return features

    def nearest(self, features: Tensor, is_standardised: bool) -> Tensor:
        """Return the id of the nearest centroid of the first stage, (B, N) of (B, N, d)."""
        centroids = self.table[0]
        if is_standardised:
            centroids = standardise(centroids)
        if self._is_cosine:
            features, centroids = normalize(features, dim=-1), normalize(centroids, dim=-1)
        return torch.cdist(features, centroids.expand(len(features), -1, -1)).argmin(-1)


def standardise(features: Tensor) -> Tensor:
    """Give every feature mean 0 and variance 1 over its values."""
    centred = features - features.mean(-1, keepdim=True)
    return centred / (features.var(-1, keepdim=True) + _VARIANCE_EPS).sqrt()


def principal_directions(table: Tensor, weights: Tensor, num_directions: int) -> Tensor:
    """Return the directions along which weighted vectors have most of their square length.

    Args:
        table: (M, K, D); the sums of one vector per stage are meant.
        weights: (M, K), of every stage adding up to 1.
        num_directions: d, at most D.

    Returns:
        (D, d) float32 with orthogonal columns of length 1, the first direction first. The largest
        value of each is positive, because a direction has two signs.
    """
    flat = table.flatten(0, 1).double()
    moment = (flat * weights.flatten()[:, None]).T @ flat
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :num_directions]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (directions * largest.sign()).float()


def _weights(codebook: Codebook) -> Tensor:
    """Return each centroid's share of the patches of the fit, (M, K) float64; even without one."""
    counts = torch.from_numpy(codebook.counts).double()
    if not codebook.is_fitted:
        counts = torch.ones_like(counts)
    return counts / counts.sum(1, keepdim=True)


def _scaled(codebook: Codebook, weights: Tensor) -> tuple[Tensor, float]:
    """Return centroids (M, K, D) float32 on the targets' scale, and what features are scaled by."""
    centroids = torch.from_numpy(codebook.centroids)
    if codebook.extractor.id != "pixel":
        scale = codebook.dim**0.5 if codebook.metric == "cosine" else 1.0
        return centroids * scale, scale
    centroids = centroids.double() / _PIXEL_MAX
    share = weights[..., None] / codebook.dim
    means = (centroids * share).sum((1, 2))
    variance = ((centroids - means[:, None, None]).square() * share).sum()
    if variance == 0:
        raise ConfigError(
            "Every value of every centroid of the codebook is the same: there is nothing to "
            "predict. Fit one to pictures with `patchcache fit`."
        )
    centroids[0] -= means.sum()
    return (centroids / variance.sqrt()).float(), 1.0
