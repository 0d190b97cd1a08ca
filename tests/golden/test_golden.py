"""Files of format version 1 are read as they were written, now and by every later version."""

import json
import re
import shutil
from pathlib import Path

import pytest
import zarr

from cache_builder import verify
from cache_builder.errors import FormatVersionError
from cache_builder.formats import Codebook, TokenCache
from tests import factories
from tests.golden.make import LAYOUTS, PAYLOAD_CACHES, make, payloads_of

V1 = Path(__file__).parent / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())


def test_the_codebook_of_version_1_is_read():
    codebook = Codebook.load(V1 / "codebook.safetensors")
    assert codebook.fingerprint == EXPECTED["fingerprint"]
    assert codebook.header.digest == EXPECTED["digest"]
    assert int(codebook.centroids.sum(dtype="int64")) == EXPECTED["centroid_sum"]
    assert codebook.header.objective == (1.5, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_of_version_1_are_read(layout):
    with TokenCache.open(V1 / layout) as cache:
        assert cache.manifest.fingerprint == cache.codebook.fingerprint == EXPECTED["fingerprint"]
        assert cache.manifest.num_skipped == EXPECTED["num_skipped"]
        samples = [cache[i] for i in range(len(cache))]
    found = [
        {
            "key": sample.key,
            "label": sample.label,
            "image_bytes": len(sample.image),
            "views": sample.views.tolist(),
            "token_ids": sample.token_ids.tolist(),
        }
        for sample in samples
    ]
    assert found == EXPECTED["samples"]


@pytest.mark.parametrize(("layout", "dtype"), PAYLOAD_CACHES)
def test_soft_targets_and_features_of_version_1_are_read(layout, dtype):
    expected = json.loads((V1 / "payloads" / f"{layout}.json").read_text())
    with TokenCache.open(V1 / "payloads" / layout) as cache:
        assert cache.manifest.payloads == ("tokens", "views", "soft", "features")
        assert cache.manifest.spec.soft.top_k == 3
        assert cache.manifest.spec.features.dtype == dtype
        assert cache.manifest.features.num_patches == 3 * 2 * 4
        assert [payloads_of(sample) for sample in cache] == expected
    assert verify.run(V1 / "payloads" / layout).problems == []


def test_making_them_again_gives_the_same_bytes(tmp_path):
    make(tmp_path)
    # The source's absolute path is part of a cache, and it is another one here.
    here, there = str(tmp_path / "images"), "GOLDEN"
    for name in ("codebook.safetensors", "expected.json", "webdataset/shards/000000.tar"):
        assert (tmp_path / name).read_bytes() == (V1 / name).read_bytes(), name
    made, golden = (
        json.loads((root / "webdataset" / "manifest.json").read_text()) for root in (tmp_path, V1)
    )
    made["spec"]["source"]["location"] = golden["spec"]["source"]["location"]
    assert made == golden, (here, there)


def test_the_zarr_store_holds_the_same_values_when_made_again(tmp_path):
    make(tmp_path)
    made, golden = (
        zarr.open_group(root / "zarr" / "tokens.zarr", mode="r") for root in (tmp_path, V1)
    )
    assert sorted(made.array_keys()) == sorted(golden.array_keys())
    for name in golden.array_keys():
        assert (made[name][:] == golden[name][:]).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_later_version_is_refused_by_number(tmp_path, layout):
    cache = shutil.copytree(V1 / layout, tmp_path / "cache")
    manifest = cache / "manifest.json"
    manifest.write_text(
        re.sub('"format_version":1', '"format_version":9', manifest.read_text(), count=1)
    )
    with pytest.raises(
        FormatVersionError, match=r"format version 9; this patchcache reads up to 1"
    ):
        TokenCache.open(cache)


def test_one_wrong_byte_in_the_codebook_is_refused_by_both_fingerprints(tmp_path):
    path = tmp_path / "codebook.safetensors"
    data = (V1 / "codebook.safetensors").read_bytes()
    path.write_bytes(data)
    factories.flip_byte(path, len(data) - 60)
    with pytest.raises(
        Exception, match=rf"fingerprint {EXPECTED['fingerprint']}.*has [0-9a-f]{{64}}"
    ):
        Codebook.load(path)
