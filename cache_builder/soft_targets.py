"""Soft targets: how the nearest centroids of a patch share its probability.

`build` stores them and the service answers with them; both make them here, so that they are the
same numbers.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.payloads import SoftSpec
from cache_builder.tokenizers.quantizer import CentroidIndex

# Measured on the 250 photographs of the tests: see "Optional payloads" in docs/formats.md.
DEFAULT_TEMPERATURE = 0.05


class Softened(NamedTuple):
    """Soft targets of n patches, and what they were made from."""

    ids: NDArray[np.uint16]  # (n, k), nearest first
    stored: NDArray[np.float16]  # (n, k)
    probabilities: Tensor  # (n, k) float64
    distances: Tensor  # (n, k), squared


def soften(index: CentroidIndex, features: Tensor, soft: SoftSpec) -> Softened:
    """Return the soft targets of features (n, D); the first id of a patch is its token id."""
    ids, distances = index.top_k(features, soft.top_k)
    probabilities = soft_probabilities(distances, soft)
    return Softened(
        ids.cpu().numpy().astype(np.uint16),
        # From float64 at once: by way of float32 a value could be rounded twice.
        probabilities.cpu().numpy().astype(np.float16),
        probabilities,
        distances,
    )


def soft_probabilities(
    distances: Tensor,  # (n, k), squared
    soft: SoftSpec,
) -> Tensor:
    """Return softmax(-d^2 / (T s)) over the k, float64 (n, k), as mc-BEiT has its soft targets.

    mc-BEiT (arXiv:2203.15371) softens the logits of a learned tokenizer. A k-means tokenizer has
    distances instead, which are the logits of a mixture of Gaussians of variance T s / 2.
    """
    return torch.softmax(distances.double() / -soft.bandwidth, dim=1)


def soft_spec(
    codebook: Codebook,
    top_k: int | None,
    temperature: float | None,
    names: tuple[str, str] = ("--soft-top-k", "--soft-temperature"),
) -> SoftSpec | None:
    """Return how soft targets are made with this codebook, None if they are not asked for.

    Args:
        codebook: That of the tokenizer.
        top_k: Centroids per patch; None is none.
        temperature: In units of the codebook's mean squared distance; None is 0.05.
        names: What the caller calls the two, for errors.

    Raises:
        ConfigError: The codebook has several stages, too few centroids or no spread, or was not
            fitted here.
    """
    name, temperature_name = names
    if top_k is None:
        if temperature is not None:
            raise ConfigError(
                f"{temperature_name} has no meaning without {name}. Add it, for example {name} 8, "
                f"or leave {temperature_name} out."
            )
        return None
    if not codebook.is_fitted:
        raise ConfigError(
            f"{name} measures distances to centroids of a fit, and {codebook.extractor.id} "
            "quantises by itself. Leave it out."
        )
    if codebook.num_stages > 1:
        raise ConfigError(
            f"{name} needs a codebook of one stage, and this one has {codebook.num_stages}: "
            "what a stage quantises depends on the id of the stage before. Leave it out."
        )
    if not 2 <= top_k <= codebook.vocab_size:
        raise ConfigError(
            f"{name} must be 2 to {codebook.vocab_size:,}, the centroids of this codebook, "
            f"not {top_k}."
        )
    temperature = DEFAULT_TEMPERATURE if temperature is None else temperature
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"{temperature_name} must be positive, not {temperature}.")
    objective = codebook.header.objective
    if not objective or not 0 < objective[-1] < float("inf"):
        found = f"one of {objective[-1]}" if objective else "none"
        raise ConfigError(
            f"{name} measures distances in units of the mean squared distance of the "
            f"codebook's fit, and the codebook records {found}. Fit it again with `patchcache fit` "
            "to patches that are not all equal to a centroid."
        )
    return SoftSpec(top_k=top_k, temperature=temperature, scale=objective[-1])
