"""The Zarr layout holds the same samples, one Zarr shard per unit, and plain zarr reads it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_builder.errors import ArtifactError
from cache_builder.formats import TokenCache
from cache_builder.formats.zarr_store import ABSENT
from tests import factories


@pytest.fixture
def images(tmp_path):
    return factories.write_folder(tmp_path / "images", factories.photo_images(5))


@pytest.fixture
def make(tmp_path, images, codebook_path):
    def build(layout, **settings):
        out = tmp_path / layout
        settings = {"images": str(images), "unit_size": 2, "num_views": 3} | settings
        factories.build_cache(codebook=codebook_path, out=out, layout=layout, **settings)
        return out

    return build


@pytest.mark.parametrize("images_in_cache", ["original", "resized", "none"])
def test_both_layouts_hold_the_same_samples(make, images_in_cache):
    settings = {"images_in_cache": images_in_cache, "resized_short_side": 20}
    with (
        TokenCache.open(make("zarr", **settings)) as ours,
        TokenCache.open(make("webdataset", **settings)) as tars,
    ):
        assert len(ours) == len(tars) == 5
        for a, b in zip(ours, tars, strict=True):
            assert (a.key, a.label, a.image) == (b.key, b.label, b.image)
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.views, b.views)
            assert (a.image is None) == (images_in_cache == "none")


def test_plain_zarr_reads_every_array(make, images):
    out = make("zarr")
    group = zarr.open_group(out / "tokens.zarr", mode="r")
    with TokenCache.open(out) as cache:
        samples = list(cache)
    present = [0, 1, 2, 3, 4]  # three units of two rows, the last one half full
    np.testing.assert_array_equal(group["tokens"][present], [s.token_ids for s in samples])
    np.testing.assert_array_equal(group["views"][present], [s.views for s in samples])
    assert group["keys"][present].tolist() == [s.key for s in samples]
    assert group["source"][present].tolist() == [s.key + ".jpg" for s in samples]
    assert group["labels"][present].tolist() == [s.label for s in samples]
    assert group["sizes"][present].tolist() == [[48, 64]] * 5
    start, stop = group["image_spans"][3]
    image = group["images/000001"][start:stop].tobytes()
    assert image == (images / f"{samples[3].key}.jpg").read_bytes()
    fingerprint = factories.colour_codebook().fingerprint
    assert group.attrs["patchcache"] == {"fingerprint": fingerprint, "vocab_size": 6}


def test_rows_without_a_sample_are_marked_absent(make):
    group = zarr.open_group(make("zarr") / "tokens.zarr", mode="r")
    assert group["tokens"].shape == (6, 3, 4, 4)
    assert (group["tokens"][5] == ABSENT).all()
    assert group["labels"][5] == -1
    assert group["keys"][5] == ""


def test_a_unit_owns_whole_zarr_shards(make):
    out = make("zarr")
    group = zarr.open_group(out / "tokens.zarr", mode="r")
    for name in ("tokens", "views", "sizes", "labels", "keys", "source", "image_spans"):
        assert group[name].shards[0] == 2
    with TokenCache.open(out) as cache:
        owned = [file.path for shard in cache.manifest.shards for file in shard.files]
        shared = [file.path for file in cache.manifest.store_files]
    # Seven arrays, and the images with their own description.
    assert len(owned) == len(set(owned)) == 3 * 9
    there = factories.contents(out / "tokens.zarr")
    assert {f"tokens.zarr/{name}" for name in there} == {*owned, *shared}


def test_the_same_build_gives_the_same_bytes(make, tmp_path):
    first = factories.contents(make("zarr"))
    (tmp_path / "zarr").rename(tmp_path / "first")
    assert factories.contents(make("zarr")) == first


def test_images_without_labels_have_none(tmp_path, make):
    flat = factories.write_folder(
        tmp_path / "flat", {f"{i}.png": factories.encode(factories.draw_photo(i)) for i in range(3)}
    )
    for layout in ("zarr", "webdataset"):
        with TokenCache.open(make(layout, images=str(flat))) as cache:
            assert [sample.label for sample in cache] == [None] * 3


def test_a_unit_of_bad_images_alone_has_no_rows(tmp_path, make):
    bad = factories.write_folder(
        tmp_path / "bad",
        {
            "a/0.png": b"bad",
            "a/1.png": b"bad",
            "a/2.png": factories.encode(factories.draw_photo(0)),
        },
    )
    for layout in ("zarr", "webdataset"):
        with TokenCache.open(make(layout, images=str(bad))) as cache:
            assert [sample.key for sample in cache] == ["a/2"]
            assert list(cache.read_shard(0)) == []


def test_residual_stages_are_one_more_axis(tmp_path, images):
    centroids = np.repeat(factories.COLOURS, 16, 1)[None].repeat(2, 0).astype(np.float32)
    codebook = factories.colour_codebook()
    two_stages = type(codebook)(
        centroids,
        np.ones((2, 6), np.int64),
        metric="l2",
        pixel_rule=codebook.pixel_rule,
        extractor=codebook.extractor,
    )
    two_stages.save(tmp_path / "two.safetensors")
    read = {}
    for layout in ("zarr", "webdataset"):
        factories.build_cache(
            images=str(images), codebook=tmp_path / "two.safetensors", out=tmp_path / layout,
            layout=layout,
        )  # fmt: skip
        with TokenCache.open(tmp_path / layout) as cache:
            assert cache.manifest.spec.tokens_shape == (1, 4, 4, 2)
            read[layout] = [sample.token_ids for sample in cache]
    np.testing.assert_array_equal(read["zarr"], read["webdataset"])


def test_a_missing_store_is_refused(make):
    out = make("zarr")
    (out / "tokens.zarr" / "zarr.json").unlink()
    (out / "tokens.zarr" / "tokens" / "zarr.json").unlink()
    with TokenCache.open(out) as cache, pytest.raises(ArtifactError, match="patchcache verify"):
        cache[0]


def test_a_damaged_chunk_is_refused(make):
    out = make("zarr")
    chunk = out / "tokens.zarr/tokens/c/0/0/0/0"
    chunk.write_bytes(b"\x00" * chunk.stat().st_size)
    with TokenCache.open(out) as cache, pytest.raises(ArtifactError, match="unit 0 cannot be read"):
        cache[0]


def test_a_cut_image_file_is_refused(make):
    out = make("zarr")
    path = out / "tokens.zarr/images/000000/c/0"
    path.write_bytes(path.read_bytes()[:-1])
    with TokenCache.open(out) as cache, pytest.raises(ArtifactError, match="ends before sample"):
        cache[1]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_a_unit_that_lacks_an_array_of_a_payload_leaves_no_image_file_open(make, codebook_path):
    factories.write_codebook(codebook_path, objective=(1e6,))
    out = make("zarr", soft_top_k=2)
    shutil.rmtree(out / "tokens.zarr" / "soft_ids")
    opened = TokenCache.open(out)
    with pytest.raises(ArtifactError, match=r"unit 0 cannot be read .*soft_ids.* verify"):
        opened.shard(0)
    assert not factories.open_files(out)
