"""Nearest centroids by their definition, and how an index is compared with it."""

import numpy as np
import torch

from cache_builder.tokenizers import CentroidIndex


def brute_force(x, centroids):
    """The definition, written so that nobody can get it wrong."""
    exact = np.float64 if "f" in x.dtype.kind + centroids.dtype.kind else np.int64
    distances = np.array([np.square(row.astype(exact) - centroids).sum(1) for row in x])
    distances = distances.reshape(len(x), len(centroids))
    return distances.argmin(1), distances.min(1)


def assert_exact(x, centroids, device="cpu"):
    index = CentroidIndex(torch.from_numpy(centroids).to(device))
    ids, distances = index.assign(torch.from_numpy(x).to(device))
    expected_ids, expected_distances = brute_force(x, centroids)
    np.testing.assert_array_equal(ids.cpu(), expected_ids)
    if distances.dtype == torch.int64:
        np.testing.assert_array_equal(distances.cpu(), expected_distances)
    else:
        np.testing.assert_allclose(distances.cpu(), expected_distances, rtol=1e-12)


def bytes_of(rng, *shape):
    return rng.integers(0, 256, shape).astype(np.uint8)
