"""No sample is lost or doubled, and a batch follows from the number of its step."""

import hashlib

import numpy as np
import pytest
import torch

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats import TokenCache, View
from cache_builder.imaging import apply_view, decode
from tests import factories
from tests.trainer.caches import make_cache
from trainer.data import BatchOrder, CachedViews, Pick, epoch_order, view_index
from trainer.workers import load_ahead

CPU = torch.device("cpu")


def test_an_epoch_holds_every_sample_once():
    sizes = [5, 0, 9, 1, 30]
    order = epoch_order(sizes, seed=1, epoch=3)
    expected = sorted((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    assert sorted(map(tuple, order.tolist())) == expected


def test_epochs_and_seeds_are_shuffled_differently():
    sizes = [50] * 4
    first = epoch_order(sizes, seed=0, epoch=0).tolist()
    assert first == epoch_order(sizes, seed=0, epoch=0).tolist()
    assert first != epoch_order(sizes, seed=0, epoch=1).tolist()
    assert first != epoch_order(sizes, seed=1, epoch=0).tolist()
    assert first != sorted(first)


def test_batches_run_on_into_the_next_epoch_and_drop_the_tail():
    order = BatchOrder([10, 3], 4, seed=0)
    assert order.steps_per_epoch == 3
    epoch = [pick for step in range(3) for pick in order.picks(step)]
    assert len(set(epoch)) == 12
    assert {pick.epoch for pick in epoch} == {0}
    assert {pick.epoch for pick in order.picks(3)} == {1}


def test_fewer_samples_than_one_batch_say_what_to_set():
    with pytest.raises(ConfigError, match=r"13 samples.*batch of 64.*data.batch_size=13"):
        BatchOrder([10, 3], 64, seed=0)


def test_every_view_is_seen_once_in_as_many_epochs_as_there_are_views():
    assert sorted(view_index("a/b", epoch, 4) for epoch in range(4)) == [0, 1, 2, 3]
    digest = hashlib.sha256(b"a/b").digest()
    assert view_index("a/b", 0, 4) == int.from_bytes(digest[:8]) % 4


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_pixels_and_tokens_of_a_batch_belong_together(tmp_path, layout):
    # Whole pictures, some mirrored: every patch is one plain colour, and its token names it.
    path = make_cache(
        tmp_path, num_images=12, layout=layout, views=4, scale=(1.0, 1.0), ratio=(1.0, 1.0)
    )
    dataset = CachedViews(path, image_size=factories.SIZE)
    picks = [Pick(epoch, shard, row) for epoch in range(4) for shard in (0, 1) for row in (0, 1)]
    batch = dataset.read(picks)
    with TokenCache.open(path) as cache:
        assert any(cache.read(p.shard, p.row).views[:, 4].any() for p in picks)
    for pixels, token_ids in zip(batch.pixels, batch.token_ids, strict=True):
        drawn = factories.draw_patches(token_ids.view(factories.GRID, factories.GRID).numpy())
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), drawn)


def test_another_image_size_shows_the_same_boxes(tmp_path):
    path = make_cache(tmp_path, num_images=3)
    batch = CachedViews(path, image_size=2 * factories.SIZE).read([Pick(1, 0, 2)])
    with TokenCache.open(path) as cache:
        sample = cache.read(0, 2)
    index = view_index(sample.key, 1, 2)
    top, left, height, width, hflip = sample.views[index].tolist()
    expected = apply_view(
        decode(sample.image), View(top, left, height, width, bool(hflip)), 2 * factories.SIZE
    )
    assert torch.equal(batch.pixels[0], expected)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    path = make_cache(tmp_path)
    order = BatchOrder([10, 10, 4], 6, seed=5)

    def batches(num_workers):
        dataset = CachedViews(path, image_size=factories.SIZE)
        picks = map(order.picks, range(2, 6))
        return list(load_ahead(dataset, picks, num_workers=num_workers, device=CPU))

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert alone.keys == shared.keys
        assert torch.equal(alone.pixels, shared.pixels)
        assert torch.equal(alone.token_ids, shared.token_ids)


def test_a_cache_without_images_is_joined_to_them_by_key(tmp_path):
    whole = make_cache(tmp_path / "whole")
    bare = make_cache(tmp_path / "bare", images_in_cache="none")
    picks = [Pick(0, 1, 3), Pick(2, 0, 9)]
    expected = CachedViews(whole, image_size=factories.SIZE).read(picks)
    batch = CachedViews(bare, image_size=factories.SIZE).read(picks)
    assert batch.keys == expected.keys
    assert torch.equal(batch.pixels, expected.pixels)


def test_images_that_have_moved_are_found_where_they_are_said_to_be(tmp_path):
    bare = make_cache(tmp_path, images_in_cache="none")
    (tmp_path / "images").rename(tmp_path / "moved")
    picks = [Pick(0, 0, 0)]
    with pytest.raises(ConfigError, match=r"holds no images.*--set data.images="):
        CachedViews(bare, image_size=factories.SIZE).read(picks)
    moved = CachedViews(bare, image_size=factories.SIZE, images=str(tmp_path / "moved"))
    assert moved.read(picks).keys == ["a/000"]


def test_a_damaged_image_is_named(tmp_path):
    bare = make_cache(tmp_path, images_in_cache="none")
    (tmp_path / "images" / "a" / "000.png").write_bytes(b"no longer an image")
    with pytest.raises(ArtifactError, match=r"image of a/000 is not the one that was tokenised"):
        CachedViews(bare, image_size=factories.SIZE).read([Pick(0, 0, 0)])


def test_an_error_in_a_worker_reaches_the_caller_as_it_is(tmp_path):
    bare = make_cache(tmp_path, images_in_cache="none")
    (tmp_path / "images" / "a" / "000.png").unlink()
    dataset = CachedViews(bare, image_size=factories.SIZE)
    with pytest.raises(ConfigError, match="a/000"):
        list(load_ahead(dataset, [[Pick(0, 0, 0)]], num_workers=1, device=CPU))
