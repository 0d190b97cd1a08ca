"""What is added to a cache later is what it would have had from the beginning."""

from pathlib import Path

import numpy as np
import pytest

from cache_builder import build, extend, units
from cache_builder.errors import ArtifactError, ConfigError, TokenizerMismatchError
from cache_builder.formats import TokenCache
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import open_store
from tests import factories

LAYOUTS = ["webdataset", "zarr"]
PER_VIEW = ("views", "token_ids", "soft_ids", "soft_probs")

HERE = ClusterOptions(num_workers=0)


@pytest.fixture
def images(tmp_path):
    content = factories.photo_images(5) | {"b/bad.jpg": b"text"}
    return factories.write_folder(tmp_path / "images", content)


@pytest.fixture
def grey_path(tmp_path):
    """A second pixel tokenizer: four greys, patches of 8 pixels, 3 x 3 of them."""
    greys = np.repeat(np.array([[0], [80], [160], [255]], np.uint8), 3, axis=1)
    path = tmp_path / "grey.safetensors"
    return factories.write_codebook(path, colours=greys, size=24, patch_size=8)


@pytest.fixture
def make(tmp_path, images, codebook_path):
    def make(name="cache", codebook=codebook_path, **changes):
        settings: dict = {"num_views": 2, "unit_size": 2, "device": "cpu", "cluster": HERE}
        settings |= changes
        build.run(build.BuildOptions(str(images), codebook, tmp_path / name, **settings))
        return tmp_path / name

    return make


def grow(cache, **changes):
    return extend.run(extend.ExtendOptions(cache, device="cpu", cluster=HERE, **changes))


def samples_of(cache, tokenizer=None):
    with TokenCache.open(cache, tokenizer) as opened:
        return [opened[index] for index in range(len(opened))]


def assert_same(found, expected):
    assert [sample.key for sample in found] == [sample.key for sample in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.image, a.label) == (b.image, b.label)
        for name in PER_VIEW:
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images_in_cache", ["original", "resized", "none"])
def test_a_cache_with_added_views_reads_like_one_built_with_them(make, layout, images_in_cache):
    settings = {"layout": layout, "images_in_cache": images_in_cache}
    at_once = samples_of(make("whole", num_views=5, **settings))
    cache = make(**settings)
    before = factories.contents(cache)
    grow(cache, num_views=3)
    summary = grow(cache, num_views=5)
    assert [(layer.first_view, layer.num_views) for layer in summary.manifest.layers] == [
        (2, 1), (3, 2),
    ]  # fmt: skip
    assert_same(samples_of(cache), at_once)
    with TokenCache.open(cache) as opened:
        assert opened.manifest.view_spec.num_views == 5
        assert opened.manifest.spec.images_in_cache == images_in_cache
    after = factories.contents(cache)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"manifest.json"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_further_tokenizer_has_the_tokens_of_a_cache_of_its_own(
    tmp_path, make, images, grey_path, layout
):
    alone = samples_of(make("alone", codebook=grey_path, layout=layout))
    cache = make(layout=layout)
    first = samples_of(cache)
    grow(cache, codebooks=(grey_path,))
    fingerprint = build.Codebook.load(grey_path).fingerprint
    assert_same(samples_of(cache), first)
    assert_same(samples_of(cache, fingerprint[:8]), alone)
    with TokenCache.open(cache, fingerprint) as opened:
        assert opened.manifest.grid == (3, 3)
        assert opened.codebook.fingerprint == fingerprint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_tokenizers_in_one_pass_give_the_bytes_of_an_extension(make, grey_path, layout):
    together = factories.contents(make("together", further_codebooks=(grey_path,), layout=layout))
    cache = make(layout=layout)
    grow(cache, codebooks=(grey_path,))
    apart = factories.contents(cache)
    # The plan alone tells that both were asked for at once.
    assert together.keys() == apart.keys()
    assert {name for name in apart if apart[name] != together[name]} == {"plan.json"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "damaged"), [("webdataset", "shards/000000.tar"), ("zarr", "tokens.zarr/zarr.json")]
)
def test_a_unit_whose_layer_is_damaged_leaves_no_file_open(make, layout, damaged):
    cache = make(layout=layout)
    summary = grow(cache, num_views=3)
    with TokenCache.open(cache) as opened:
        assert opened[0].image
        assert factories.open_files(cache)
    (cache / summary.manifest.layers[0].name / damaged).unlink()
    opened = TokenCache.open(cache)
    with pytest.raises(ArtifactError, match="verify"):
        opened.shard(0)
    assert not factories.open_files(cache)


def test_more_views_reach_every_tokenizer(make, grey_path):
    cache = make(further_codebooks=(grey_path,))
    grow(cache, num_views=4)
    whole = make("whole", further_codebooks=(grey_path,), num_views=4)
    fingerprint = build.Codebook.load(grey_path).fingerprint
    assert_same(samples_of(cache), samples_of(whole))
    assert_same(samples_of(cache, fingerprint), samples_of(whole, fingerprint))


def test_an_image_is_decoded_once_for_all_tokenizers(make, grey_path, monkeypatch):
    decoded = []
    decode = units.decode
    monkeypatch.setattr(units, "decode", lambda data: decoded.append(data) or decode(data))
    make(further_codebooks=(grey_path,))
    assert len(decoded) == 6


def test_a_cache_with_images_is_extended_without_its_source(make, images):
    cache = make()
    images.rename(images.with_name("gone"))
    grow(cache, num_views=4)
    assert samples_of(cache)[0].token_ids.shape == (4, 4, 4)


def test_other_images_for_a_cache_that_holds_its_own_are_refused(make, images):
    cache = make()
    with pytest.raises(ConfigError, match=r"holds its images.*Leave --images out"):
        grow(cache, num_views=4, images=str(images))


def test_a_cache_without_images_asks_for_them(make, images):
    cache = make(images_in_cache="none")
    moved = images.rename(images.with_name("moved"))
    with pytest.raises(Exception, match=r"images"):
        grow(cache, num_views=4)
    assert samples_of(cache)[0].token_ids.shape == (2, 4, 4)
    grow(cache, num_views=4, images=str(moved))
    assert samples_of(cache)[0].token_ids.shape == (4, 4, 4)


def test_an_extension_that_was_stopped_goes_on(make):
    cache = make()
    grow(cache, num_views=4)
    whole = factories.contents(cache)
    # As it was when the extension was killed: one unit lacks its record, the manifest is the old.
    (layer,) = factories.read(build.CacheManifest, cache, "manifest.json").layers
    (cache / layer.name / "units/000001.json").unlink()
    (cache / layer.name / "manifest.json").unlink()
    open_store(cache).publish(
        "manifest.json",
        build.to_json(
            factories.read(build.CacheManifest, cache, "manifest.json").model_copy(
                update={"layers": ()}
            )
        ),
    )
    assert samples_of(cache)[0].token_ids.shape == (2, 4, 4)
    summary = grow(cache, num_views=4)
    assert summary.num_units_kept == 2
    assert factories.contents(cache) == whole


def test_the_first_command_again_keeps_what_was_added(make):
    cache = make()
    grow(cache, num_views=4)
    before = factories.contents(cache)
    make()
    assert factories.contents(cache) == before


def test_nothing_to_add_changes_nothing(make, codebook_path):
    cache = make()
    before = factories.contents(cache)
    grow(cache, codebooks=(codebook_path,), num_views=2)
    assert factories.contents(cache) == before


def test_fewer_views_are_refused(make):
    with pytest.raises(ConfigError, match=r"has 2 views, more than --views 1"):
        grow(make(), num_views=1)


def test_a_place_without_a_cache_is_left_alone(tmp_path):
    with pytest.raises(ArtifactError, match="is not a cache"):
        grow(tmp_path / "nothing", num_views=2)
    assert not (tmp_path / "nothing").exists()


def test_a_tokenizer_that_is_not_there_is_named(make):
    with pytest.raises(TokenizerMismatchError, match=r"'beef' names none of them"):
        TokenCache.open(make(), "beef")


def test_one_codebook_twice_is_refused(make, codebook_path):
    with pytest.raises(ConfigError, match="twice"):
        make(further_codebooks=(codebook_path,))


def test_soft_targets_are_added_with_views(make, tmp_path):
    codebook = factories.feature_codebook(layer="4", num_centroids=4)
    codebook.save(tmp_path / "features.safetensors")
    settings = {"codebook": tmp_path / "features.safetensors", "soft_top_k": 3}
    cache = make(**settings)
    grow(cache, num_views=3)
    assert_same(samples_of(cache), samples_of(make("whole", num_views=3, **settings)))


@pytest.mark.parametrize(
    ("option", "settings"),
    [("--soft-top-k 3", {"soft_top_k": 3}), ("--store-features int8", {"store_features": "int8"})],
)
def test_payloads_without_a_tokenizer_to_add_are_refused(make, option, settings):
    cache = make()
    before = factories.contents(cache)
    with pytest.raises(ConfigError, match=f"{option} is for a tokenizer that --codebook adds"):
        grow(cache, num_views=3, **settings)
    assert factories.contents(cache) == before


def test_payloads_cannot_be_added_to_a_tokenizer_that_is_there(make, tmp_path):
    codebook = tmp_path / "features.safetensors"
    factories.feature_codebook(layer="4", num_centroids=4).save(codebook)
    cache = make(codebook=codebook, soft_top_k=3)
    before = factories.contents(cache)
    for payloads in ({"soft_top_k": 2}, {"store_features": "int8"}):
        with pytest.raises(ConfigError, match=r"features\.safetensors already, with other payloa"):
            grow(cache, codebooks=(codebook,), num_views=3, **payloads)
    assert factories.contents(cache) == before
    for payloads in ({}, {"soft_top_k": 3}):
        grow(cache, codebooks=(codebook,), num_views=3, **payloads)
    assert samples_of(cache)[0].soft_ids.shape[0] == 3


def test_the_command_extends_and_refuses_what_is_settled(make, patchcache, grey_path):
    cache = make()
    done = patchcache(
        "build", "--extend", "--out", cache, "--codebook", grey_path, "--views", 3, "--workers", 0
    )
    assert done.status == 0, done.err
    assert "-002: views 2 to 2 of tokenizer" in done.out
    assert len(samples_of(cache)[0].views) == 3
    refused = patchcache("build", "--extend", "--out", cache, "--seed", 7)
    assert refused.status == 1
    assert "--seed cannot be given with --extend" in refused.err


def test_a_cache_on_an_object_store_is_built_extended_and_read(
    make, bucket, tmp_path, codebook_path, images
):
    out = f"{bucket}/caches/photos"
    settings = {"unit_size": 2, "device": "cpu", "cluster": HERE}
    build.run(build.BuildOptions(str(images), codebook_path, out, num_views=2, **settings))
    extend.run(extend.ExtendOptions(out, num_views=4, device="cpu", cluster=HERE))
    local = make()
    grow(local, num_views=4)
    store = open_store(out)
    assert {name: store.read(name) for name in store.names()} == factories.contents(local)
    assert_same(samples_of(out), samples_of(local))
