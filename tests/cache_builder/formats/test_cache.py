"""`TokenCache` gives every sample in any order, from either layout."""

import random

import numpy as np
import pytest

from cache_builder.errors import ArtifactError, TokenizerMismatchError
from cache_builder.formats import Codebook, TokenCache, cache
from tests import factories


@pytest.fixture(params=["webdataset", "zarr"])
def cache_dir(request, tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(7))
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=tmp_path / "cache", unit_size=3,
        layout=request.param,
    )  # fmt: skip
    return tmp_path / "cache"


def test_every_sample_is_found_in_any_order(cache_dir):
    with TokenCache.open(cache_dir) as tokens:
        keys = [sample.key for sample in tokens]
        assert keys == sorted(keys)
        order = list(range(7))
        random.Random(0).shuffle(order)
        assert [tokens[index].key for index in order] == [keys[index] for index in order]


def test_an_index_and_a_place_are_the_same(cache_dir):
    with TokenCache.open(cache_dir) as tokens:
        places = [tokens.place(index) for index in range(len(tokens))]
        assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
        assert tokens.read(1, 2).key == tokens[5].key
        for index in (-1, 7):
            with pytest.raises(IndexError, match=f"sample {index} of a cache of 7"):
                tokens[index]


def test_a_shard_is_read_from_any_row_on(cache_dir):
    with TokenCache.open(cache_dir) as tokens:
        assert [s.key for s in tokens.read_shard(1, skip=1)] == [tokens[4].key, tokens[5].key]
        assert list(tokens.read_shard(2, skip=1)) == []


def test_token_ids_are_the_colours_in_row_major_order(cache_dir):
    with TokenCache.open(cache_dir) as tokens:
        for sample in tokens:
            number = int(sample.key.split("/")[1])
            np.testing.assert_array_equal(sample.token_ids[0], factories.random_ids(number))


def test_few_shards_stay_open_and_all_are_still_read(cache_dir, monkeypatch):
    monkeypatch.setattr(cache, "_MAX_OPEN_SHARDS", 1)
    with TokenCache.open(cache_dir) as tokens:
        keys = [sample.key for sample in tokens]
        assert [tokens[index].key for index in (6, 0, 3, 6)] == [keys[i] for i in (6, 0, 3, 6)]
        assert len(tokens._open) == 1
    assert not tokens._open


def test_the_codebook_of_another_tokenizer_is_refused_by_both_fingerprints(cache_dir):
    ours = factories.colour_codebook().fingerprint
    other = factories.colour_codebook(colours=factories.COLOURS[:5])
    other.save(cache_dir / "codebook.safetensors")
    with (
        TokenCache.open(cache_dir) as tokens,
        pytest.raises(TokenizerMismatchError, match=f"{other.fingerprint}.*{ours}"),
    ):
        assert tokens.codebook


def test_the_cache_brings_its_codebook(cache_dir):
    with TokenCache.open(cache_dir) as tokens:
        assert tokens.codebook.to_bytes() == factories.colour_codebook().to_bytes()
        assert isinstance(tokens.codebook, Codebook)


def test_targets_of_another_shape_than_the_manifest_says_are_refused(cache_dir):
    path = cache_dir / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"grid":[4,4]', b'"grid":[2,8]'))
    with pytest.raises(ArtifactError, match=r"grid is not that of plan.json.*verify --repair"):
        TokenCache.open(cache_dir)
    (cache_dir / "plan.json").unlink()
    with (
        TokenCache.open(cache_dir) as tokens,
        pytest.raises(ArtifactError, match=r"\(1, 4, 4\) uint16, expected \(1, 2, 8\) uint16"),
    ):
        tokens[0]


def test_a_record_that_is_not_the_one_of_the_manifest_is_refused(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(4))
    out = tmp_path / "cache"
    factories.build_cache(images=str(images), codebook=codebook_path, out=out, unit_size=3)
    (out / "units/000001.json").replace(out / "units/000000.json")
    with (
        TokenCache.open(out) as tokens,
        pytest.raises(
            ArtifactError, match=r"units/000000.json has \d+ bytes, expected \d+\..*verify"
        ),
    ):
        tokens[0]
