"""Damaged caches that were made of caches are mended from what they were made of."""

import re
from pathlib import Path

import pytest

from cache_builder.formats.manifest import CacheManifest
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.transform import (
    MergeOptions,
    SubsetOptions,
)
from cache_builder.verify import run as verify
from tests import factories
from tests.cache_builder.transform.support import LAYOUTS, extend, merge, samples_of, subset


def test_a_damaged_unit_of_a_subset_is_repaired_from_the_source(make, tmp_path):
    out = tmp_path / "out"
    subset(SubsetOptions(str(make()), str(out), sample=5))
    before = factories.contents(out)
    factories.flip_byte(out / "shards/000001.tar")
    report = verify(out, repair=True, device="cpu", cluster=ClusterOptions(num_workers=0))
    assert report.repaired == ["shards/000001.tar"]
    assert report.problems == []
    assert factories.contents(out) == before


def repair(cache_dir, **options):
    return verify(
        cache_dir, repair=True, device="cpu", cluster=ClusterOptions(num_workers=0), **options
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit_size", [None, 5])
def test_damaged_units_of_a_cache_of_several_sources_are_copied_again_from_the_merged_caches(
    two_caches, tmp_path, layout, unit_size
):
    further = factories.write_codebook(
        tmp_path / "two.safetensors", colours=factories.COLOURS[:3], objective=(1000.0,)
    )
    (tmp_path / "second images/c").mkdir(parents=True)
    (tmp_path / "second images/c/bad.jpg").write_bytes(b"text")
    codebook = factories.write_codebook(tmp_path / "one.safetensors", objective=(1000.0,))
    caches = two_caches(codebook=codebook, further_codebooks=(further,), soft_top_k=2)
    out = tmp_path / "out"
    manifest = merge(MergeOptions(caches, str(out), layout, unit_size)).manifest
    assert (manifest.spec.source.kind, manifest.num_skipped) == ("cache", 1)
    before = factories.contents(out)
    for name in ("first images", "second images"):  # nothing is tokenised again
        (tmp_path / name).rename(tmp_path / f"{name} gone")
    layer = manifest.layers[0].name
    inner = CacheManifest.load(out / layer)
    damaged = [
        manifest.shards[1].files[0].path,
        "units/000002.json",
        f"{layer}/{inner.shards[1].files[0].path}",
        f"{layer}/{inner.shards[3].files[0].path}",
    ]
    for name in damaged:
        factories.flip_byte(out / name)
    report = repair(out)
    assert (report.problems, report.refused) == ([], [])
    assert sorted(report.repaired) == sorted(damaged)
    assert factories.contents(out) == before


@pytest.mark.parametrize("unit_size", [None, 5])
def test_the_plan_of_a_cache_of_several_sources_is_written_again_from_the_merged_caches(
    two_caches, tmp_path, unit_size
):
    out = tmp_path / "out"
    merge(MergeOptions(two_caches(), str(out), unit_size=unit_size))
    before = factories.contents(out)
    factories.flip_byte(out / "plan/000002.json")
    (out / "plan/000003.json").unlink()
    report = repair(out)
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(out) == before


def test_merged_caches_of_one_name_are_told_apart_by_their_folders(two_caches, tmp_path):
    places = []
    for cache in two_caches():
        place = tmp_path / f"of {Path(cache).name}" / "cache"
        place.parent.mkdir()
        places.append(str(Path(cache).rename(place)))
    out = tmp_path / "out"
    merge(MergeOptions(tuple(places), str(out)))
    before = factories.contents(out)
    factories.flip_byte(out / "plan/000000.json")
    report = repair(out)
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(out) == before


def test_merged_caches_that_have_moved_are_read_where_they_lie_now(two_caches, tmp_path):
    caches, out, there = two_caches(), tmp_path / "out", tmp_path / "there"
    merge(MergeOptions(caches, str(out)))
    before = factories.contents(out)
    there.mkdir()
    for name in ("first", "second"):
        (tmp_path / name).rename(there / name)
    for name in ("shards/000001.tar", "shards/000002.tar"):
        factories.flip_byte(out / name)
    refused = repair(out).refused
    named = [re.match(r"unit \d: its samples come from the cache (\S+),", r)[1] for r in refused]
    assert named == [*caches]
    assert all("--images names the place" in reason for reason in refused)
    assert repair(out, images=str(there)).problems == []
    factories.flip_byte(out / "plan/000003.json")
    assert repair(out, images=f"{there}/{{first,second}}").problems == []
    assert factories.contents(out) == before


def test_views_added_after_a_merge_are_repaired_from_the_images_in_the_cache(two_caches, tmp_path):
    out = tmp_path / "out"
    merge(MergeOptions(two_caches(), str(out)))
    extend(out, 3)
    before = factories.contents(out)
    (layer,) = CacheManifest.load(out).layers
    for name in ("shards/000001.tar", f"{layer.name}/shards/000001.tar"):
        factories.flip_byte(out / name)
    report = repair(out)
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(out) == before


def test_a_merged_cache_that_has_lost_a_sample_since_is_refused(two_caches, tmp_path):
    first, second = two_caches()
    out = tmp_path / "out"
    merge(MergeOptions((first, second), str(out)))
    keys = frozenset(sorted(samples_of(first))[:-1])
    subset(SubsetOptions(first, str(tmp_path / "fewer"), keys=keys))
    (tmp_path / "first").rename(tmp_path / "gone")
    (tmp_path / "fewer").rename(tmp_path / "first")
    factories.flip_byte(out / "shards/000001.tar")
    damaged = factories.contents(out)
    (reason,) = repair(out).refused
    assert re.search(r"unit 1: the cache .*first that it comes from has no b/\S+ any more", reason)
    assert factories.contents(out) == damaged
