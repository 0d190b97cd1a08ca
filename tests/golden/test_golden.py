"""Artifacts of an earlier version are read to the same values, and made to the same bytes."""

import json
from pathlib import Path

import pytest

from cache_builder.formats import Codebook, TokenCache
from cache_builder.verify import run as verify
from tests import factories
from tests.golden import make as golden

V1 = Path(__file__).parent / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    golden.make(folder, V1 / "images")
    return folder


def test_the_codebook_is_read_to_the_recorded_identity():
    codebook = Codebook.load(V1 / "codebook.safetensors")
    assert codebook.fingerprint == EXPECTED["fingerprint"]
    assert codebook.header.digest == EXPECTED["codebook_digest"]


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_the_cache_is_read_to_the_recorded_values(layout):
    assert golden.describe(V1 / layout) == EXPECTED
    with TokenCache.open(V1 / layout) as cache:
        images = [sample.image for sample in cache]
    names = ("cat/1.5 left.jpg", "cat/up.jpg", "dog/grey.png", "dog/plain.png")
    assert images == [(V1 / "images" / name).read_bytes() for name in names]


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_the_cache_is_whole_and_its_tokens_are_found_again(layout):
    report = verify(V1 / layout, retokenize=4, device="cpu")
    assert report.problems == []
    assert report.retokenized == (4, 4 * 3 * 16, 0, 0)


def test_the_codebook_is_made_again_byte_for_byte(made_again):
    expected = (V1 / "codebook.safetensors").read_bytes()
    assert (made_again / "codebook.safetensors").read_bytes() == expected


def test_the_webdataset_cache_is_made_again_byte_for_byte(made_again):
    assert factories.contents(made_again / "webdataset") == factories.contents(V1 / "webdataset")


def test_the_zarr_cache_is_made_again_with_the_same_values(made_again):
    # Compressed bytes belong to the version of Blosc.
    assert golden.describe(made_again / "zarr") == EXPECTED
