"""A merged cache has the samples of all, or says why they do not go together."""

import re

import numpy as np
import pytest

from cache_builder.errors import (
    ConfigError,
    TokenizerMismatchError,
)
from cache_builder.formats.manifest import CacheManifest
from cache_builder.formats.plan import PlanUnit
from cache_builder.sources import open_source
from cache_builder.transform import (
    ConvertOptions,
    MergeOptions,
    SubsetOptions,
)
from tests import factories
from tests.cache_builder.transform.support import (
    LAYOUTS,
    assert_whole,
    convert,
    merge,
    rename_classes,
    samples_of,
    subset,
)


def test_what_was_divided_is_merged_to_the_bytes_it_had(make, tmp_path):
    cache = make()
    keys = sorted([*samples_of(cache), "b/bad"])
    for name, some in (("first", keys[:5]), ("rest", keys[5:])):
        subset(SubsetOptions(str(cache), str(tmp_path / name), keys=frozenset(some)))
    parts = (str(tmp_path / "first"), str(tmp_path / "rest"))
    merge(MergeOptions(parts, str(tmp_path / "out"), unit_size=3))
    assert factories.contents(tmp_path / "out") == factories.contents(cache)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit_size", [None, 5])
def test_a_merged_cache_has_the_samples_of_all_and_their_classes_by_name(
    two_caches, tmp_path, layout, unit_size
):
    caches = two_caches(second={"layout": "zarr"})
    out = tmp_path / "out"
    summary = merge(MergeOptions(caches, str(out), layout, unit_size))
    assert summary.num_relabelled == 1
    spec = summary.manifest.spec
    assert (spec.layout, spec.class_names) == (layout, ("a", "b", "c"))
    assert spec.source.kind == "cache"
    assert spec.source.location == f"{tmp_path}/{{first,second}}"
    assert [s.num_samples for s in summary.manifest.shards] == (
        [4, 2, 4, 2] if unit_size is None else [5, 1, 5, 1]
    )
    assert factories.read(PlanUnit, out, "plan/000002.json").container == caches[1]
    assert_whole(out, 12)
    merged = samples_of(out)
    for cache in caches:
        for key, sample in samples_of(cache).items():
            found = merged.pop(key)
            assert found.label == "abc".index(key[0])
            assert found.image == sample.image
            np.testing.assert_array_equal(found.views, sample.views)
            np.testing.assert_array_equal(found.token_ids, sample.token_ids)
    assert merged == {}
    message = "was merged from caches of several sources.*Keep the images"
    with pytest.raises(ConfigError, match=message):
        convert(ConvertOptions(str(out), str(tmp_path / "none"), drop_images=True))


def test_skipped_images_of_every_cache_are_listed_in_the_merged_one(make, tmp_path):
    caches = []
    for name in ("one", "two"):
        content = {f"{name}/{path[2:]}": data for path, data in factories.photo_images(3).items()}
        content |= {f"{name}/bad.jpg": b"text"}
        images = factories.write_folder(tmp_path / f"{name} images", content)
        caches.append(str(make(name, images=str(images))))
    summary = merge(MergeOptions(tuple(caches), str(tmp_path / "out")))
    assert (summary.manifest.num_samples, summary.manifest.num_skipped) == (6, 2)
    listed = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [re.search(r'"key":"(\w+/\w+)"', line)[1] for line in listed] == ["one/bad", "two/bad"]
    assert_whole(tmp_path / "out", 6)


def test_caches_without_images_are_merged_where_their_tars_name_them(tmp_path, codebook_path):
    caches = []
    for name in ("one", "two"):
        photos = factories.photo_images(4).items()
        members = [(f"{name}{path[2:]}", data) for path, data in photos]
        tar = factories.write_tar(tmp_path / f"{name}.tar", members)
        factories.build_cache(
            images=str(tar), codebook=codebook_path, out=tmp_path / name, images_in_cache="none"
        )
        caches.append(str(tmp_path / name))
    out = str(tmp_path / "out")
    summary = merge(MergeOptions(tuple(caches), out, unit_size=100))
    source = summary.manifest.spec.source
    assert source.location == f"{tmp_path}/{{one.tar,two.tar}}"
    assert open_source(source.location).scan(None).info == source
    assert [shard.num_samples for shard in summary.manifest.shards] == [4, 4]
    assert_whole(out, 8)


def test_caches_without_images_of_two_folders_are_not_merged(two_caches, tmp_path):
    caches = two_caches(images_in_cache="none")
    with pytest.raises(ConfigError, match=r"in different places: .*first images and .*second"):
        merge(MergeOptions(caches, str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 3}, r"settings differ: view_spec.num_views: 2 and 3\. Build one"),
        ({"seed": 5}, r"view_spec.seed: 0 and 5"),
        ({"images_in_cache": "none"}, r"images_in_cache: original and none"),
    ],
)
def test_caches_of_different_settings_are_not_merged(two_caches, tmp_path, change, message):
    caches = two_caches(second=change)
    with pytest.raises(ConfigError, match=message):
        merge(MergeOptions(caches, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_payloads_must_be_equal(two_caches, tmp_path):
    codebook = tmp_path / "spread.safetensors"
    factories.colour_codebook(objective=(900.0,)).save(codebook)
    caches = two_caches(codebook=codebook, first={"soft_top_k": 2}, second={"soft_top_k": 3})
    with pytest.raises(ConfigError, match=r"settings differ: soft\.top_k: 2 and 3\."):
        merge(MergeOptions(caches, str(tmp_path / "out")))


def test_tokens_of_two_tokenizers_are_not_merged(two_caches, tmp_path):
    other = factories.write_codebook(tmp_path / "other.safetensors", colours=factories.COLOURS[:5])
    caches = two_caches(second={"codebook": other})
    one, two = (CacheManifest.load(cache).fingerprint for cache in caches)
    message = f"first holds tokens from {one}, .*second from {two}"
    with pytest.raises(TokenizerMismatchError, match=message):
        merge(MergeOptions(caches, str(tmp_path / "out")))


def test_equal_keys_are_named_and_skipped_images_count(make, tmp_path):
    cache, twin = str(make()), str(make("twin", "zarr"))
    message = (
        rf"{cache} and {twin} share 8 keys: a/000, a/002, a/004, a/006, b/001 and 3 more\. .*"
        r"with `patchcache subset`"
    )
    with pytest.raises(ConfigError, match=message):
        merge(MergeOptions((cache, twin), str(tmp_path / "out")))
    subset(SubsetOptions(cache, str(tmp_path / "bad"), keys=frozenset({"b/bad", "b/001"})))
    subset(SubsetOptions(twin, str(tmp_path / "rest"), keys=frozenset({"b/bad", "a/000"})))
    with pytest.raises(ConfigError, match=r"share 1 keys: b/bad\."):
        merge(MergeOptions((str(tmp_path / "bad"), str(tmp_path / "rest")), str(tmp_path / "out")))


def test_one_cache_is_not_merged(make, tmp_path):
    with pytest.raises(ConfigError, match="takes two caches or more"):
        merge(MergeOptions((str(make()),), str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("crane", "crane"), r"second calls the classes 0 and 1 'crane', and the class names"),
        (("only",), r"second has no name for label 1, and the class names of the caches differ"),
    ],
)
def test_classes_that_names_do_not_tell_apart_are_not_united(two_caches, tmp_path, names, message):
    caches = two_caches()
    rename_classes(caches[1], names)
    with pytest.raises(ConfigError, match=message):
        merge(MergeOptions(caches, str(tmp_path / "out")))
