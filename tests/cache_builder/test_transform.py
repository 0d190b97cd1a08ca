"""Caches that are made of caches hold what a build would have written, and nothing is lost on the
way."""

import json
import re
import shlex
from functools import partial

import numpy as np
import pytest

from cache_builder import build, transform
from cache_builder.cli import app
from cache_builder.commit import describe_layer, layer_name, layer_store, read_summaries
from cache_builder.commit import write_manifest as finish_store
from cache_builder.errors import (
    ArtifactError,
    CacheInUseError,
    ConfigError,
    TokenizerMismatchError,
)
from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.manifest import CacheManifest, UnitRecord
from cache_builder.formats.plan import BuildPlan, PlanUnit
from cache_builder.planning import LayerSpec, settle_layer
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.sources import open_source
from cache_builder.stores import open_store
from cache_builder.transform import (
    ConvertOptions,
    MergeOptions,
    SubsetOptions,
)
from cache_builder.verify import run as verify
from tests import factories

LAYOUTS = ["webdataset", "zarr"]
OTHER = {"webdataset": "zarr", "zarr": "webdataset"}


def here(command, options, progress=None):
    """Run a command in this process: what Ray does with units is tested elsewhere."""
    return command(options._replace(cluster=ClusterOptions(num_workers=0)), progress)


convert, merge, subset = (
    partial(here, each) for each in (transform.convert, transform.merge, transform.subset)
)


@pytest.fixture
def make(tmp_path, codebook_path):
    """Build a cache of seven photographs and a bad image in units of three."""
    content = factories.photo_images(7) | {"b/bad.jpg": b"text"}
    factories.write_folder(tmp_path / "images", content)

    def build_it(name="cache", layout="webdataset", **changes):
        settings = {
            "images": str(tmp_path / "images"),
            "codebook": codebook_path,
            "num_views": 2,
            "unit_size": 3,
            "resized_short_side": 20,
        } | changes
        factories.build_cache(out=tmp_path / name, layout=layout, **settings)
        return tmp_path / name

    return build_it


def samples_of(cache_dir):
    with TokenCache.open(cache_dir) as cache:
        return {sample.key: sample for sample in map(cache.__getitem__, range(len(cache)))}


def assert_whole(cache_dir, num_samples):
    report = verify(cache_dir, retokenize=100, device="cpu")
    assert report.problems == []
    assert report.num_samples == num_samples
    (again,) = report.retokenized.values()
    assert (again.num_images, again.num_different) == (num_samples, 0)


def extend(cache_dir, num_views):
    """Add views to a finished cache, as a layer below it."""
    store = open_store(cache_dir)
    plan = factories.read(BuildPlan, cache_dir, "plan.json")
    views = plan.spec.view_spec
    later = views.model_copy(update={"first_view": views.num_views, "num_views": num_views})
    spec = plan.spec.model_copy(update={"view_spec": later, "images_in_cache": "none"})
    name = layer_name(spec)
    codebook = Codebook.load(cache_dir / "codebook.safetensors")
    below = layer_store(store, name)
    layer = settle_layer(below, plan, LayerSpec(name, spec, codebook))
    worker = factories.make_worker(cache_dir, plan, names=(name,))
    for unit in range(plan.num_units):
        worker.run(unit)
    manifest = finish_store(below, layer, read_summaries(below, plan.num_units))
    build.publish_layers(store, (describe_layer(name, manifest),))


# --- convert


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images_in_cache", ["original", "resized", "none"])
def test_a_converted_cache_is_byte_for_byte_the_one_that_build_writes(
    make, tmp_path, layout, images_in_cache
):
    cache = make(layout=layout, images_in_cache=images_in_cache)
    built = make("built", OTHER[layout], images_in_cache=images_in_cache)
    told = []
    options = ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout])
    summary = convert(options, lambda *step: told.append(step))
    assert factories.contents(tmp_path / "out") == factories.contents(built)
    assert summary.manifest == CacheManifest.load(built)
    assert told == [(3, 8), (6, 8), (8, 8)]
    convert(ConvertOptions(str(tmp_path / "out"), str(tmp_path / "back"), layout))
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_targets_features_and_what_was_measured_of_them_are_converted(make, tmp_path, layout):
    factories.feature_codebook().save(tmp_path / "model.safetensors")
    payloads = {
        "codebook": tmp_path / "model.safetensors",
        "soft_top_k": 4,
        "soft_temperature": 0.5,
        "store_features": "int8",
    }
    cache = make(layout=layout, **payloads)
    built = make("built", OTHER[layout], **payloads)
    convert(ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout]))
    assert factories.contents(tmp_path / "out") == factories.contents(built)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_its_images_a_cache_is_the_one_that_is_built_without_them(make, tmp_path, layout):
    cache = make(layout=layout)
    built = make("built", layout, images_in_cache="none")
    convert(ConvertOptions(str(cache), str(tmp_path / "out"), drop_images=True))
    assert factories.contents(tmp_path / "out") == factories.contents(built)
    assert_whole(tmp_path / "out", 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_further_columns_and_places_in_tars_travel_along(tmp_path, codebook_path, layout):
    caches = []
    for name, captions in (("one", ["first", "\u00e4"]), ("two", [])):
        members = []
        for number, photo in enumerate(factories.photo_images(4).values()):
            members.append((f"{name}{number}.jpg", photo))
            if number < len(captions):
                info = {"caption": captions[number], "label": number}
                members.append((f"{name}{number}.json", json.dumps(info).encode()))
        tar = factories.write_tar(tmp_path / f"{name}.tar", members)
        for kind in LAYOUTS:
            out = tmp_path / f"{name} {kind}"
            factories.build_cache(images=str(tar), codebook=codebook_path, out=out, layout=kind)
        caches.append(str(tmp_path / f"{name} {layout}"))
    convert(ConvertOptions(caches[0], str(tmp_path / "out"), OTHER[layout]))
    built = factories.contents(tmp_path / f"one {OTHER[layout]}")
    assert factories.contents(tmp_path / "out") == built
    merge(MergeOptions(tuple(reversed(caches)), str(tmp_path / "both")))
    extras = {key: sample.extra for key, sample in samples_of(tmp_path / "both").items()}
    assert extras.pop("one1") == {"caption": "\u00e4"}
    assert extras.pop("one0") == {"caption": "first"}
    assert len(extras) == 6
    assert not any(extras.values())
    assert_whole(tmp_path / "both", 8)


def test_images_that_the_tokens_belong_to_are_not_left_out(make, tmp_path):
    cache = make(images_in_cache="resized")
    message = r"belong to its re-encoded images, of short side 20.*Keep the images"
    with pytest.raises(ConfigError, match=message):
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), drop_images=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_that_were_added_later_lie_beside_the_first_in_the_output(make, tmp_path, layout):
    cache = make(layout=layout)
    extend(cache, 3)
    built = make("built", OTHER[layout], num_views=5)
    convert(ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout]))
    assert factories.contents(tmp_path / "out") == factories.contents(built)


@pytest.mark.ray
@pytest.mark.slow
def test_further_tokenizers_are_converted_with_the_first(tmp_path, codebook_path, ray_cluster):
    factories.write_folder(tmp_path / "images", factories.photo_images(5))
    dark = factories.write_codebook(
        tmp_path / "dark.safetensors", colours=factories.COLOURS[::-1] // 2
    )
    options = build.BuildOptions(
        str(tmp_path / "images"), codebook_path, tmp_path / "cache", num_views=2, unit_size=2,
        further_codebooks=(dark,), cluster=ClusterOptions(num_workers=1),
    )  # fmt: skip
    build.run(options)
    convert(ConvertOptions(str(tmp_path / "cache"), str(tmp_path / "zarr"), "zarr"))
    convert(ConvertOptions(str(tmp_path / "zarr"), str(tmp_path / "back"), "webdataset"))
    assert factories.contents(tmp_path / "back") == factories.contents(tmp_path / "cache")
    subset(SubsetOptions(str(tmp_path / "zarr"), str(tmp_path / "first"), num_views=1))
    fingerprint = Codebook.load(dark).fingerprint
    with (
        TokenCache.open(tmp_path / "cache", fingerprint) as whole,
        TokenCache.open(tmp_path / "first", fingerprint) as part,
    ):
        assert len(part) == 5
        for index in range(5):
            assert part[index].image == whole[index].image
            np.testing.assert_array_equal(part[index].token_ids, whole[index].token_ids[:1])


# --- merge


def test_what_was_divided_is_merged_to_the_bytes_it_had(make, tmp_path):
    cache = make()
    keys = sorted([*samples_of(cache), "b/bad"])
    for name, some in (("first", keys[:5]), ("rest", keys[5:])):
        subset(SubsetOptions(str(cache), str(tmp_path / name), keys=frozenset(some)))
    parts = (str(tmp_path / "first"), str(tmp_path / "rest"))
    merge(MergeOptions(parts, str(tmp_path / "out"), unit_size=3))
    assert factories.contents(tmp_path / "out") == factories.contents(cache)


@pytest.fixture
def two_caches(tmp_path, codebook_path):
    """Build caches of two folders: classes a and b, and classes b and c."""

    def build_them(first=None, second=None, **settings):
        content = factories.photo_images(6)
        for name, classes, changes in (("first", "ab", first), ("second", "bc", second)):
            some = {
                f"{classes['ab'.index(path[0])]}/{name}{path[2:]}": data
                for path, data in content.items()
            }
            images = factories.write_folder(tmp_path / f"{name} images", some)
            options = {"num_views": 2, "unit_size": 4, "codebook": codebook_path} | settings
            options |= {"images": str(images), "out": tmp_path / name} | (changes or {})
            factories.build_cache(**options)
        return str(tmp_path / "first"), str(tmp_path / "second")

    return build_them


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


def rename_classes(cache, names):
    """Give a cache other class names, in its plan and its manifest."""
    store = open_store(cache)
    for model, name in ((BuildPlan, "plan.json"), (CacheManifest, "manifest.json")):
        there = factories.read(model, cache, name)
        spec = there.spec.model_copy(update={"class_names": names})
        content = there.model_copy(update={"spec": spec}).model_dump_json()
        store.publish(name, content.encode())


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


# --- subset


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_views_are_the_cache_that_is_built_with_fewer(make, tmp_path, layout):
    cache = make(layout=layout, num_views=4)
    built = make("built", layout, num_views=2)
    subset(SubsetOptions(str(cache), str(tmp_path / "out"), num_views=2))
    assert factories.contents(tmp_path / "out") == factories.contents(built)
    with pytest.raises(ConfigError, match=r"--views 5: .* holds 4 views\. Ask for 1 to 4"):
        subset(SubsetOptions(str(cache), str(tmp_path / "more"), num_views=5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_keep_their_numbers_and_units_are_filled(make, tmp_path, layout):
    cache = make(layout=layout)
    summary = subset(SubsetOptions(str(cache), str(tmp_path / "out"), labels=("b",)))
    assert summary.manifest.spec.class_names == ("a", "b")
    assert [shard.num_samples for shard in summary.manifest.shards] == [3, 0]
    assert summary.manifest.num_skipped == 1
    expected = {k: s for k, s in samples_of(cache).items() if s.label == 1}
    found = samples_of(tmp_path / "out")
    assert list(found) == list(expected)
    for key, sample in expected.items():
        assert (found[key].label, found[key].image) == (1, sample.image)
        np.testing.assert_array_equal(found[key].token_ids, sample.token_ids)
    assert_whole(tmp_path / "out", 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draw_depends_on_key_and_seed_alone_and_grows_with_its_size(make, tmp_path, layout):
    cache = make(layout=layout)

    def draw(name, **wanted):
        subset(SubsetOptions(str(cache), str(tmp_path / name), **wanted))
        return set(samples_of(tmp_path / name))

    two = draw("two", sample=2)
    assert two < draw("four", sample=4)
    assert draw("other", sample=2, seed=3) != two
    # The same of a cache in other units, that has fewer samples.
    again = make("again", layout, unit_size=8)
    assert draw("same", sample=2) == two
    subset(SubsetOptions(str(again), str(tmp_path / "again two"), sample=2))
    assert set(samples_of(tmp_path / "again two")) == two
    assert_whole(tmp_path / "four", 4)
    per_class = draw("classes", max_per_class=2)
    assert sorted(key[0] for key in per_class) == ["a", "a", "b", "b"]
    assert draw("of classes", max_per_class=2, sample=3) < per_class
    assert CacheManifest.load(tmp_path / "classes").num_skipped == 0
    assert draw("of one class", labels=("a",), sample=3) < {f"a/00{n}" for n in (0, 2, 4, 6)}
    message = "--sample 9: 7 samples of .* are left to draw from"
    with pytest.raises(ConfigError, match=message):
        draw("nine", sample=9)


def test_what_is_not_in_the_cache_cannot_be_chosen(make, tmp_path):
    cache = str(make())
    rename_classes(tmp_path / "cache", ("tabby cat", "dog, any"))

    def refused(message, **wanted):
        with pytest.raises(ConfigError, match=message):
            subset(SubsetOptions(cache, str(tmp_path / "out"), **wanted))
        assert not (tmp_path / "out").exists()

    refused(r"has no class 'taby cat'; did you mean 'tabby cat'\?", labels=("taby cat",))
    refused(r"has no class 'zebra'\. It has 2 classes\.", labels=("dog, any", "tabby cat,zebra"))
    six = frozenset(f"c/{n}" for n in range(6)) | {"a/000"}
    refused(r"has no sample of key c/0, c/1, c/2, c/3, c/4 and 1 more", keys=six)
    refused(r"No sample of .* is left\.", labels=("tabby cat",), keys=frozenset({"b/001"}))
    refused(r"No sample of .* is left\.", keys=frozenset({"b/bad"}))
    refused(r"Say what to take: --labels")


def test_of_tars_each_keeps_units_of_its_own_and_images_are_found_in_them(tmp_path, codebook_path):
    photos = list(factories.photo_images(9).values())
    (tmp_path / "tars").mkdir()
    for number in range(3):
        members = [(f"{number}{i}.jpg", photos[3 * number + i]) for i in range(3)]
        factories.write_tar(tmp_path / "tars" / f"{number}.tar", members)
    factories.build_cache(
        images=str(tmp_path / "tars"), codebook=codebook_path, out=tmp_path / "cache",
        images_in_cache="none",
    )  # fmt: skip
    keys = frozenset({"00", "01", "20"})
    subset(SubsetOptions(str(tmp_path / "cache"), str(tmp_path / "out"), keys=keys))
    units = [factories.read(PlanUnit, tmp_path / "out", f"plan/00000{n}.json") for n in (0, 1)]
    assert [unit.container[-5:] for unit in units] == ["0.tar", "2.tar"]
    assert [[row.key for row in unit.rows] for unit in units] == [["00", "01"], ["20"]]
    assert_whole(tmp_path / "out", 3)


def test_what_was_measured_is_weighted_by_the_patches_that_are_taken(make, tmp_path):
    codebook = tmp_path / "spread.safetensors"
    factories.colour_codebook(objective=(9000.0,)).save(codebook)
    cache = make(codebook=codebook, soft_top_k=3)
    # a/000 lies in unit 0, a/006 and b/001 in unit 1.
    keys = frozenset({"a/000", "a/006", "b/001"})
    subset(SubsetOptions(str(cache), str(tmp_path / "out"), keys=keys))
    first, second = (
        factories.read(UnitRecord, cache, f"units/00000{unit}.json").soft for unit in (0, 1)
    )
    assert first.perplexity != second.perplexity
    soft = CacheManifest.load(tmp_path / "out").soft
    assert soft.num_patches == 3 * 2 * 16
    expected = (first.perplexity + 2 * second.perplexity) / 3
    assert soft.perplexity == pytest.approx(expected, abs=1e-6)
    assert soft.bytes == sum(
        size
        for entry in factories.read(UnitRecord, tmp_path / "out", "units/000000.json").samples
        for name, (_, size) in entry.members.items()
        if name.startswith("soft")
    )
    assert_whole(tmp_path / "out", 3)


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


# --- whole or not at all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_taken_from_a_damaged_shard(make, tmp_path, layout):
    cache = make(layout=layout)
    with TokenCache.open(cache) as opened:
        damaged = opened.manifest.shards[1].files[0].path
    factories.flip_byte(cache / damaged)
    message = rf"{re.escape(damaged)} has SHA-256 .*Nothing is taken from a damaged shard"
    with pytest.raises(ArtifactError, match=message):
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout]))
    with pytest.raises(ArtifactError, match="has not finished"):
        CacheManifest.load(tmp_path / "out")
    # Mended, the same command ends as if nothing had happened.
    factories.flip_byte(cache / damaged)
    convert(ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout]))
    built = make("built", OTHER[layout])
    assert factories.contents(tmp_path / "out") == factories.contents(built)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("plan/000001.json", b'"label":0', b'"label":1', r"plan/ are not those of plan\.json"),
        ("plan/000001.json", b'{"key":"b/001"', b'{"key":"b/bad"', r"unit 1 plans"),
        ("skipped.jsonl", b"\n", b"", None),
        ("skipped.jsonl", b"}\n", b"\n", r"skipped\.jsonl: "),
    ],
)
def test_a_damaged_plan_is_refused(make, tmp_path, name, old, new, message):
    cache = make()
    data = (cache / name).read_bytes()
    assert old in data
    (cache / name).write_bytes(data.replace(old, new, 1))
    if message is None:  # a last line without its end is still that line
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), "zarr"))
        return
    with pytest.raises(ArtifactError, match=message + r".*patchcache verify"):
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), "zarr"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_was_stopped_anywhere_ends_with_the_bytes_of_one_that_was_not(
    make, tmp_path, layout
):
    cache, out = make(layout=layout), tmp_path / "out"
    built = make("built", OTHER[layout])
    options = ConvertOptions(str(cache), str(out), OTHER[layout])

    def stop(done, total):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            convert(options, stop)
    record = out / "units/000000.json"
    before = record.stat().st_mtime_ns
    (out / "units" / ".000001.json.0123.tmp").write_bytes(b"half")
    assert convert(options).num_units_kept == 1
    assert record.stat().st_mtime_ns == before
    assert factories.contents(out) == factories.contents(built)
    # A finished unit that is damaged is filled again.
    with TokenCache.open(out) as opened:
        factories.flip_byte(out / opened.manifest.shards[1].files[0].path)
    assert convert(options).num_units_kept == 2
    assert factories.contents(out) == factories.contents(built)


def test_a_changed_command_is_refused_with_the_difference(make, tmp_path):
    cache, out = str(make()), str(tmp_path / "out")
    subset(SubsetOptions(cache, out, sample=3))
    with pytest.raises(ConfigError, match=r"source.num_samples: 3 there, 4 now"):
        subset(SubsetOptions(cache, out, sample=4))
    with pytest.raises(ConfigError, match="the list of images has changed"):
        subset(SubsetOptions(cache, out, sample=3, seed=1))
    with pytest.raises(ConfigError, match=r"layout: .webdataset. there, .zarr. now"):
        subset(SubsetOptions(cache, out, sample=3, layout="zarr"))
    with pytest.raises(ConfigError, match=r"is a cache that is read\. Choose another place"):
        convert(ConvertOptions(cache, f"{cache}/../cache", "zarr"))


def test_a_second_driver_is_refused(make, tmp_path):
    cache, out = str(make()), tmp_path / "out"
    with (
        open_store(out).lock("process 7 on earth"),
        pytest.raises(CacheInUseError, match="is being written by process 7 on earth"),
    ):
        convert(ConvertOptions(cache, str(out), "zarr"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_on_object_storage_are_converted_as_local_ones(make, tmp_path, bucket, layout):
    cache = make(layout=layout)
    there = f"{bucket}/caches/out"
    convert(ConvertOptions(str(cache), there, OTHER[layout]))
    store = open_store(there)
    built = make("built", OTHER[layout])
    assert {name: store.read(name) for name in store.names()} == factories.contents(built)
    convert(ConvertOptions(there, str(tmp_path / "back"), layout))
    assert factories.contents(tmp_path / "back") == factories.contents(cache)


# --- the commands


def example(name):
    (text,) = (
        " ".join(command.callback.__doc__.split())
        for command in app.registered_commands
        if command.callback.__name__ == name
    )
    return shlex.split(re.search(r"Example: `patchcache ([^`]+)`", text)[1])


@pytest.mark.ray
@pytest.mark.slow
def test_the_examples_of_the_commands_run(make, tmp_path, patchcache, ray_cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()
    make("train")
    other = {f"c/{path[2:]}": data for path, data in factories.photo_images(3).items()}
    make("more", images=str(factories.write_folder(tmp_path / "other", other)))
    for name, num_workers, words, lines in (
        ("convert", 1, [], [r"images +7, 2 views each, 1 skipped", r"size .* in 3 shards\n"]),
        ("convert", 0, [], [r"in 3 shards, 3 of them kept from before"]),
        ("merge", 0, [], [r"images +10, 2 views", r"3 classes united by name; 1 caches had other"]),
        ("subset", 0, ["--labels", "a", "--views", 1], [r"images +4, 1 views each, 0 skipped"]),
    ):
        outcome = patchcache(*example(name), *words, "--workers", num_workers)
        assert (outcome.status, outcome.err) == (0, ""), outcome.err
        for line in lines:
            assert re.search(line, outcome.out), (name, line, outcome.out)
        out = example(name)[example(name).index("--out") + 1]
        assert f"next         patchcache verify {out} --retokenize 100" in outcome.out
    (tmp_path / "keys.txt").write_text("b/001\n\na/000\n")
    outcome = patchcache(
        "subset", "cache", "--keys", "keys.txt", "--out", "two", "--workers", 0, "--json"
    )
    assert '"num_samples": 2' in outcome.out
    assert list(samples_of("two")) == ["a/000", "b/001"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert nowhere --out out", "nowhere is not a cache: it has neither manifest.json"),
        ("merge nowhere --out out", "nowhere is not a cache"),
        ("subset nowhere --keys no.txt --out out", "--keys no.txt cannot be read as text: "),
        ("subset nowhere --keys empty.txt --out out", "--keys empty.txt names no sample."),
    ],
)
def test_a_mistake_is_one_line(patchcache, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    outcome = patchcache(*words.split())
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith(f"patchcache {words.split()[0]}: {message}")
    assert len(outcome.err.splitlines()) == 1
