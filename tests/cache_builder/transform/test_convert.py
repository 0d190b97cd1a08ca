"""A converted cache is the one that a build in the other layout writes."""

import json

import numpy as np
import pytest

from cache_builder import build
from cache_builder.errors import ConfigError
from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.manifest import CacheManifest
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.transform import (
    ConvertOptions,
    MergeOptions,
    SubsetOptions,
)
from tests import factories
from tests.cache_builder.transform.support import (
    LAYOUTS,
    OTHER,
    assert_whole,
    convert,
    extend,
    merge,
    samples_of,
    subset,
)


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
