"""A bound that skips most centroids never skips the nearest, whatever the instruction set."""

import logging

import numpy as np
import pytest
import torch

from cache_builder.tokenizers import CentroidIndex, prefix
from cache_builder.tokenizers.kernels import library
from cache_builder.tokenizers.kernels.build import BuildError, build
from cache_builder.tokenizers.prefix import Basis, Plan, PrefixSearch
from tests.exactness import brute_force

MODES = ["torch", "portable", "avx2", "avx512"]
K, D = 300, 48  # not a whole number of groups


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Searches in torch, and with every compiled variant that runs here."""
    if request.param == "torch":
        monkeypatch.setattr(prefix, "kernels", lambda: None)
        yield request.param
        return
    kernels = library.kernels()
    if kernels is None:
        pytest.skip("the kernels were not built: no C++ compiler")
    if not kernels.choose(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    kernels.choose(None)


def correlated(rng, n, dtype=np.float32, dim=D):
    """Vectors whose variance falls from dimension to dimension, in a random rotation."""
    rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(dim, dim)))).Q.numpy()
    values = rng.normal(size=(n, dim)) * np.arange(1, dim + 1) ** -1.0 @ rotation
    if dtype == np.uint8:
        return (128 + 60 * values).clip(0, 255).astype(dtype)
    return (200 * values).astype(dtype)


def plan(centroids, length):
    return Plan(Basis.of(centroids), length, torch.arange(len(centroids)))


def assert_finds(x, centroids, length=24, hints=None):
    x, centroids = torch.from_numpy(x), torch.from_numpy(centroids)
    search = PrefixSearch(centroids, plan(centroids, length))
    ids, distances, measured = search.assign(x, hints)
    expected, expected_distances = brute_force(x.numpy(), centroids.numpy())
    np.testing.assert_array_equal(ids, expected)
    if distances.dtype == torch.int64:
        np.testing.assert_array_equal(distances, expected_distances)
    else:
        np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)
    return measured


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("length", [1, 24, 48])
def test_the_nearest_is_found_with_few_measured(mode, dtype, length):
    rng = np.random.default_rng(0)
    centroids = correlated(rng, K, dtype)
    noise = correlated(rng, 500, np.float32)[:500] * 0.02
    x = (centroids[rng.integers(0, K, 500)] + noise).clip(0, None).astype(dtype)
    measured = assert_finds(x, centroids, length)
    if length > 1:
        assert measured < 0.2 * K


@pytest.mark.parametrize("n", [0, 1, 5, 6, 7, 24, 25, 1000])
def test_any_number_of_rows(mode, n):
    rng = np.random.default_rng(1)
    assert_finds(correlated(rng, n, np.uint8), correlated(rng, K, np.uint8))


@pytest.mark.parametrize("k", [1, 63, 64, 65, 300])
def test_any_number_of_centroids(mode, k):
    rng = np.random.default_rng(2)
    assert_finds(correlated(rng, 100, np.uint8), correlated(rng, k, np.uint8))


@pytest.mark.parametrize("dim", [32, 33, 64, 65, 100, 1100])
def test_any_dimension(mode, dim):
    rng = np.random.default_rng(3)
    for dtype in (np.uint8, np.int16, np.float32):
        assert_finds(correlated(rng, 60, dtype, dim), correlated(rng, 80, dtype, dim))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_tie_goes_to_the_lowest_index(mode, dtype):
    rng = np.random.default_rng(4)
    once = correlated(rng, 100, dtype)
    centroids = once[rng.permutation(np.arange(100).repeat(3))]
    x = np.concatenate([once, correlated(rng, 200, dtype)])
    assert_finds(x, centroids)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_flat_and_extreme_vectors(mode, dtype):
    # Nothing is left of a flat vector outside the prefix: the worst case of the residual's margin.
    levels = np.array([0, 1, 127, 128, 254, 255]).astype(dtype)
    flat = levels[:, None].repeat(D, 1)
    steps = np.tril(np.full((D, D), 255)).astype(dtype)
    rng = np.random.default_rng(5)
    centroids = np.concatenate([flat, steps, correlated(rng, 50, dtype)])
    assert_finds(np.concatenate([flat, steps, correlated(rng, 100, dtype)]), centroids)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("offset", [0, 1, 1000])
def test_any_scale_and_offset_of_floats(mode, scale, offset):
    rng = np.random.default_rng(6)
    centroids, x = correlated(rng, K) + 200 * offset, correlated(rng, 200) + 200 * offset
    assert_finds((x * scale).astype(np.float32), (centroids * scale).astype(np.float32))


def test_near_ties_are_decided_in_float64(mode):
    rng = np.random.default_rng(7)
    centroids = correlated(rng, K)
    twins = np.nextafter(centroids, np.float32(np.inf))
    x = centroids + np.float32(1e-6) * rng.normal(size=centroids.shape).astype(np.float32)
    assert_finds(x, np.concatenate([twins, centroids]))


def test_hints_right_and_wrong_change_nothing_but_the_work(mode):
    rng = np.random.default_rng(8)
    centroids, x = correlated(rng, K, np.uint8), correlated(rng, 300, np.uint8)
    right = torch.from_numpy(brute_force(x, centroids)[0])
    measured = [
        assert_finds(x, centroids, hints=hints)
        for hints in (right, torch.from_numpy(rng.integers(0, K, 300)))
    ]
    assert measured[0] < measured[1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_the_k_nearest_come_in_order_and_ties_go_to_the_lowest_index(mode, dtype, k):
    rng = np.random.default_rng(14)
    once = correlated(rng, 100, dtype)
    centroids = torch.from_numpy(once[rng.permutation(np.arange(100).repeat(3))])
    x = torch.from_numpy(np.concatenate([once[:50], correlated(rng, 100, dtype)]))
    index = CentroidIndex(centroids)
    index._plan = plan(centroids, 24)
    ids, distances = index.top_k(x, k)
    exact = torch.float64 if x.is_floating_point() else torch.int64
    every = torch.stack([(row.to(exact) - centroids.to(exact)).square().sum(1) for row in x])
    nearest, order = every.sort(dim=1, stable=True)
    torch.testing.assert_close(distances, nearest[:, :k].to(distances.dtype), rtol=1e-12, atol=0)
    assert torch.equal(ids, order[:, :k])
    assert torch.equal(ids[:, 0], index.assign(x)[0])


def test_rows_without_a_bound_are_ranked_by_the_whole_matrix(mode):
    rng = np.random.default_rng(15)
    centroids = torch.from_numpy(correlated(rng, K))
    x = torch.from_numpy(correlated(rng, 100))
    x[7] = 1e30
    index = CentroidIndex(centroids)
    index._plan = plan(centroids, 24)
    ids, distances = index.top_k(x, 3)
    every = (x[7].double() - centroids.double()).square().sum(1)
    assert torch.equal(ids[7], every.sort(stable=True).indices[:3])
    assert distances[7, 0] == every.min()


@pytest.mark.parametrize("scale", [1e18, 1e25])
def test_centroids_too_long_for_a_bound_in_float32(mode, scale):
    rng = np.random.default_rng(16)
    signs = np.sign(rng.normal(size=(400, 1)))
    centroids = torch.from_numpy((correlated(rng, 400) * signs * scale).astype(np.float32))
    x = torch.from_numpy(np.concatenate([correlated(rng, 100), correlated(rng, 100) * scale]))
    x = x.float()
    ids, _ = CentroidIndex(centroids).assign(x)
    np.testing.assert_array_equal(ids, brute_force(x.numpy(), centroids.numpy())[0])


def test_rows_that_float32_cannot_bound_are_left_to_the_caller(mode):
    rng = np.random.default_rng(9)
    centroids = torch.from_numpy(correlated(rng, K))
    x = torch.from_numpy(correlated(rng, 100))
    x[3, 1], x[5, 0], x[7] = torch.nan, torch.inf, 1e30
    ids, _, _ = PrefixSearch(centroids, plan(centroids, 24)).assign(x)
    assert (ids < 0).nonzero().flatten().tolist() == [3, 5, 7]
    index = CentroidIndex(centroids)
    assert (
        index.assign(x[7:])[0].tolist() == brute_force(x[7:].numpy(), centroids.numpy())[0].tolist()
    )
    with pytest.raises(ValueError, match="x holds NaN or infinity"):
        index.assign(x)


def test_an_index_plans_by_the_first_rows_and_again_like_another(mode):
    rng = np.random.default_rng(10)
    pixels = torch.from_numpy(correlated(rng, 2500, np.uint8, 256))
    centroids, x = pixels[:2000], pixels[2000:]
    index = CentroidIndex(centroids)
    ids, distances = index.assign(x)
    assert index._plan.prefix is not None
    moved = CentroidIndex(centroids.flip(0), like=index)
    assert moved._plan is index._plan
    ids_of_moved, distances_of_moved = moved.assign(x, hints=ids)
    assert torch.equal(distances_of_moved, distances)
    assert (
        (centroids[ids].short() - x)
        .square()
        .sum(1)
        .equal((centroids.flip(0)[ids_of_moved].short() - x).square().sum(1))
    )


def test_noise_in_which_no_prefix_pays_is_left_to_the_whole_matrix(mode):
    rng = np.random.default_rng(11)
    centroids, x = (
        torch.from_numpy(rng.normal(size=(n, 256)).astype(np.float32)) for n in (400, 100)
    )
    index = CentroidIndex(centroids)
    np.testing.assert_array_equal(index.assign(x)[0], brute_force(x.numpy(), centroids.numpy())[0])
    assert index._plan.prefix is None


def test_constant_centroids_are_one_tie(mode):
    centroids = np.full((K, D), 7, np.uint8)
    x = np.random.default_rng(12).integers(0, 256, (100, D)).astype(np.uint8)
    assert_finds(x, centroids)
    assert_finds(x.astype(np.float32), centroids.astype(np.float32))


def test_the_number_of_threads_does_not_change_the_answer(mode):
    rng = np.random.default_rng(13)
    centroids, x = (torch.from_numpy(correlated(rng, n)) for n in (K, 3000))
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        answers.append(PrefixSearch(centroids, plan(centroids, 24)).assign(x))
    torch.set_num_threads(before)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_a_library_of_another_version_is_left_alone_and_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "kernels.so")
    library.kernels.cache_clear()
    assert library.kernels() is None
    (tmp_path / "kernels.so").write_bytes(b"not a library")
    library.kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert library.kernels() is None
    assert "the compiled kernels cannot be loaded" in caplog.text
    monkeypatch.undo()
    library.kernels.cache_clear()


def test_without_a_compiler_the_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        build(tmp_path / "kernels.so")
    assert list(tmp_path.iterdir()) == []
