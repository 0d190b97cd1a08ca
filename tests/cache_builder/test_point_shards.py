"""A fit does not depend on where its points lie."""

import numpy as np
import pytest
import torch

from cache_builder.errors import ConfigError
from cache_builder.kmeans import fit_centroids
from cache_builder.point_shards import PointShard, RemoteShard, ShardedPoints, pieces
from cache_builder.points import PointSet
from cache_builder.tokenizers.quantizer import ResidualQuantizer
from tests.factories import photo_patches


def spread(points, num_shards, metric="l2"):
    """Shards in this process that are asked like those in actors."""
    parts = pieces(points, num_shards)
    sizes = [size for size, _ in parts]
    shards = []
    for number, (_, arrays) in enumerate(parts):
        shards.append(RemoteShard(sum(sizes[:number]), metric, "cpu"))
        for array in arrays:
            shards[-1].load(array)

    def call(method, arguments):
        return [shard.call(method, *args) for shard, args in zip(shards, arguments, strict=True)]

    return ShardedPoints(sizes, call)


@pytest.fixture(scope="module")
def patches():
    return photo_patches(20)


@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize("batch_size", [None, 1500])
def test_a_pixel_codebook_does_not_depend_on_the_shards(patches, num_shards, batch_size):
    settings = {"iterations": 12, "batch_size": batch_size, "seed": 3}
    whole = fit_centroids(patches, 40, **settings)
    parts = fit_centroids(spread(PointSet.of(patches), num_shards), 40, **settings)
    assert torch.equal(parts.centroids, whole.centroids)
    assert torch.equal(parts.counts, whole.counts)
    assert parts.objective == whole.objective


def test_more_workers_than_points_are_a_worker_for_each_point():
    points = torch.tensor([[0], [100], [200]], dtype=torch.uint8)
    fit = fit_centroids(spread(PointSet.of(points), 5), 2)
    assert fit.counts.sum() == 3


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_feature_codebook_depends_on_the_shards_by_rounding_alone(patches, metric):
    points = patches.float() / 255
    whole = fit_centroids(points, 40, metric=metric)
    parts = fit_centroids(spread(PointSet.of(points), 3, metric), 40, metric=metric)
    torch.testing.assert_close(parts.centroids, whole.centroids, rtol=1e-6, atol=1e-7)
    assert parts.objective == pytest.approx(whole.objective, rel=1e-12)


def test_sums_counts_and_distortion_are_those_of_the_nearest_centroids(patches):
    centroids = patches[:: len(patches) // 30][:30]
    found = ShardedPoints.local(PointSet.of(patches), "l2", "cpu").assign(centroids)
    distances, ids = torch.cdist(patches.double(), centroids.double()).square().min(1)
    for code in range(30):
        members = patches[ids == code].double()
        assert found.counts[code] == len(members)
        assert torch.equal(found.sums[code], members.sum(0))
        assert found.distortion[code] == pytest.approx(float(distances[ids == code].sum()))


def test_a_batch_is_assigned_alone(patches):
    rows = torch.arange(0, len(patches), 3)
    centroids = patches[:30]
    whole = ShardedPoints.local(PointSet.of(patches[rows]), "l2", "cpu").assign(centroids)
    for num_shards in (1, 4):
        found = spread(PointSet.of(patches), num_shards).assign(centroids, rows)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_members_are_drawn_from_their_cluster_and_never_equal_its_centroid(patches):
    centroids = patches.unique(dim=0)[::40]
    for num_shards in (1, 3):
        shards = spread(PointSet.of(patches), num_shards)
        shards.assign(centroids)
        drawn = shards.draw_members(5)
        nearest = torch.cdist(patches.double(), centroids.double()).min(1)
        for code, number in enumerate(drawn.tolist()):
            others = (nearest.indices == code) & (nearest.values > 0)
            assert (number >= 0) == bool(others.any())
            if number >= 0:
                assert others[number]
        if num_shards == 1:
            first = drawn
    assert torch.equal(drawn, first)
    assert not torch.equal(shards.draw_members(6), first)


def test_lots_are_spread_evenly():
    points = torch.zeros(20_000, 1, dtype=torch.uint8)
    points[-1] = 1
    shard = PointShard(PointSet.of(points))
    shard.assign(torch.tensor([[3], [9]], dtype=torch.uint8))
    winners = [int(shard.draw_members(salt).points[0]) for salt in range(400)]
    counts, _ = np.histogram(winners, bins=4, range=(0, 20_000))
    assert counts.min() > 70
    assert len(set(winners)) > 380


@pytest.mark.parametrize("seed", [-(10**9), 8_000, 20_000, 20_260_101, 2**62])
def test_members_are_drawn_whatever_the_seed_of_the_fit(seed):
    shard = PointShard(PointSet.of(torch.tensor([[1], [2], [200]], dtype=torch.uint8)))
    shard.assign(torch.tensor([[0], [200]], dtype=torch.uint8))
    drawn = [shard.draw_members(seed * 1009 + iteration).points.tolist() for iteration in range(20)]
    assert {first for first, _ in drawn} == {0, 1}
    assert {second for _, second in drawn} == {-1}


def test_points_are_fetched_by_number_in_any_order(patches):
    shards = spread(PointSet.of(patches), 5)
    numbers = torch.tensor([len(patches) - 1, 0, 7, 7, len(patches) // 2])
    assert torch.equal(shards.rows(numbers), patches[numbers])


def test_a_stage_leaves_the_residuals_to_the_next(patches):
    centroids = patches[:30]
    for num_shards in (1, 3):
        shards = spread(PointSet.of(patches), num_shards)
        shards.assign(centroids)
        shards.quantise(centroids)
        ids = torch.cdist(patches.double(), centroids.double()).argmin(1)
        left = patches.short() - centroids[ids].short()
        found = shards.rows(torch.arange(len(patches)))
        assert found.dtype == torch.int16
        error = left.double().square().sum(1)
        assert torch.equal(found.double().square().sum(1), error)
        fit = fit_centroids(shards, 20, iterations=5)
        assert fit.centroids.dtype == torch.int16
        assert fit.objective[-1] < float(error.mean())


def test_points_on_disk_are_fitted_like_those_in_memory(patches, tmp_path):
    halves = (patches.float() / 255).half()
    np.save(tmp_path / "points.npy", halves.numpy())
    mapped = PointSet([np.load(tmp_path / "points.npy", mmap_mode="r")])
    on_disk, in_memory = fit_centroids(mapped, 30), fit_centroids(halves.float(), 30)
    assert torch.equal(on_disk.centroids, in_memory.centroids)


def test_features_that_are_not_finite_are_refused_wherever_they_lie(patches):
    points = patches.float()
    points[-1, 0] = torch.nan
    with pytest.raises(ConfigError, match="hold NaN or infinity"):
        fit_centroids(spread(PointSet.of(points), 3), 30)


def test_what_unit_vectors_leave_over_is_not_normalised(patches):
    points = patches.float() + 1
    shards = ShardedPoints.local(PointSet.of(points), "cosine", "cpu")
    first = fit_centroids(shards, 30, metric="cosine")
    torch.testing.assert_close(first.centroids.norm(dim=1), torch.ones(30))
    shards.quantise(first.centroids)
    second = fit_centroids(shards, 30, metric="cosine", spherical=False)
    assert second.centroids.norm(dim=1).max() < 0.9
    assert second.objective[-1] < 0.7 * first.objective[-1]
    # The greedy search of the tokenizer comes to what the fit says.
    units = torch.nn.functional.normalize(points, dim=1)
    quantizer = ResidualQuantizer(torch.stack([first.centroids, second.centroids]))
    again = quantizer.decode(quantizer.encode(units))
    error = float((units - again).double().square().sum(1).mean())
    assert error == pytest.approx(second.objective[-1], rel=1e-4)
