"""A subset holds what was chosen of a cache, and nothing else has changed."""

import numpy as np
import pytest

from cache_builder.errors import ConfigError
from cache_builder.formats.manifest import CacheManifest, UnitRecord
from cache_builder.formats.plan import PlanUnit
from cache_builder.transform import SubsetOptions
from tests import factories
from tests.cache_builder.transform.support import (
    LAYOUTS,
    assert_whole,
    rename_classes,
    samples_of,
    subset,
)


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
