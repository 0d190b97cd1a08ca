"""Nearest centroids are the definition, exactly."""

from itertools import product

import numpy as np
import torch

from cache_builder.tokenizers import CentroidIndex, nearest_centroid
from tests.exactness import assert_exact, bytes_of


def test_uint8_is_exact(device):
    rng = np.random.default_rng(0)
    for n, k, dim in ((1, 1, 1), (300, 7, 3), (500, 64, 768), (70, 33, 48), (200, 1024, 768)):
        assert_exact(bytes_of(rng, n, dim), bytes_of(rng, k, dim), device)


def test_uint8_is_exact_where_the_sums_pass_the_float32_integers_and_int32(device):
    # The extreme values: every term of every sum is as large as it can be.
    for dim in (1023, 1024, 3 * 32**2, 3 * 128**2):
        x = np.array([[0], [255], [255]], np.uint8).repeat(dim, 1)
        x[2, 0] = 0
        centroids = np.array([[255], [0], [0], [255]], np.uint8).repeat(dim, 1)
        centroids[2, -1] = 1
        centroids[3, 0] = 1
        assert_exact(x, centroids, device)
        rng = np.random.default_rng(1)
        near = bytes_of(rng, 4, dim).repeat(5, 0)
        near[np.arange(20), rng.integers(0, dim, 20)] ^= 1  # rows that differ in one bit
        assert_exact(near, near[::-1].copy(), device)


def test_floats_are_decided_in_float64(device):
    for dim in (2, 64, 768):
        rng = np.random.default_rng(2)
        x = rng.normal(size=(400, dim)).astype(np.float32)
        centroids = rng.normal(size=(50, dim)).astype(np.float32)
        assert_exact(x, centroids, device)
        assert_exact(x + 1000, centroids + 1000, device)  # far from the origin the squares cancel


def test_near_ties_that_float32_cannot_see_are_decided_rightly(device):
    rng = np.random.default_rng(3)
    dim = 64
    base = rng.normal(size=(20, dim)).astype(np.float32)
    centroids = base.repeat(5, 0)
    # Five copies of each, one unit in the last place apart in a few values.
    for row in centroids:
        at = rng.integers(0, dim, 3)
        row[at] = np.nextafter(row[at], np.float32(10))
    x = (base + rng.normal(size=base.shape) * 1e-3).astype(np.float32)
    assert_exact(x, centroids, device)
    assert_exact(base, centroids, device)


def test_the_precision_that_the_caller_allows_changes_no_answer(device):
    torch.set_float32_matmul_precision("medium")
    try:
        rng = np.random.default_rng(8)
        assert_exact(bytes_of(rng, 100, 300), bytes_of(rng, 20, 300), device)
        floats = (rng.normal(size=(n, 300)).astype(np.float32) for n in (100, 20))
        assert_exact(*floats, device)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_tie_goes_to_the_lowest_index(device):
    for dtype in (np.uint8, np.float32):
        x = torch.from_numpy(np.array([[4, 4], [0, 0], [9, 9]], dtype)).to(device)
        centroids = np.array([[9, 9], [0, 0], [0, 8], [8, 0], [0, 0], [9, 9]], dtype)
        ids = nearest_centroid(x, torch.from_numpy(centroids).to(device))
        assert ids.tolist() == [1, 1, 0]


def test_the_k_nearest_come_in_order_and_ties_go_to_the_lowest_index(device):
    types = {"b": np.uint8, "h": np.int16, "f": np.float32}
    for kinds, k in product(("bb", "hh", "bh", "ff", "bf"), (1, 2, 40)):
        rng = np.random.default_rng(9)
        x, centroids = (
            rng.integers(0, 4, (n, 5)).astype(types[kind])
            for n, kind in zip((60, 40), kinds, strict=True)
        )
        index = CentroidIndex(torch.from_numpy(centroids).to(device))
        ids, distances = index.top_k(torch.from_numpy(x).to(device), k)
        every = np.square(x[:, None].astype(np.float64) - centroids).sum(2)
        expected = every.argsort(1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids.cpu(), expected)
        np.testing.assert_array_equal(distances.cpu(), np.take_along_axis(every, expected, 1))
