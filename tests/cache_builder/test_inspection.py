"""`inspect` says of everything of ours what it holds."""

import json

import numpy as np
import pytest

from cache_builder.errors import ArtifactError
from cache_builder.formats import TokenCache
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.inspection import describe
from tests import factories


@pytest.fixture(params=["webdataset", "zarr"])
def cache(request, tmp_path, codebook_path):
    images = factories.write_folder(
        tmp_path / "images", factories.patch_images(5) | {"a/bad.png": b""}
    )
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=tmp_path / "cache", layout=request.param
    )
    return tmp_path / "cache"


def test_a_cache_is_described_with_its_histogram(cache):
    description = describe(cache)
    ids = np.concatenate([factories.random_ids(i).ravel() for i in range(5)])
    shares = np.bincount(ids, minlength=6) / len(ids)
    entropy_bits = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    (stage,) = description["stages"]
    assert {name: stage[name] for name in list(stage)[:5]} == {
        "num_tokens": 80,
        "num_used": len(set(ids.tolist())),
        "entropy_bits": pytest.approx(entropy_bits, abs=1e-4),
        "perplexity": pytest.approx(2**entropy_bits, abs=0.01),
        "max_share": pytest.approx(shares.max(), abs=1e-6),
    }
    assert description["labels"] == {"a": 3, "b": 2}
    assert (description["num_samples"], description["num_skipped"]) == (5, 1)
    assert description["fingerprint"] == factories.colour_codebook().fingerprint
    with TokenCache.open(cache) as opened:
        assert description["bytes"] == opened.manifest.bytes
    assert json.loads(json.dumps(description)) == description


def test_a_codebook_is_described(codebook_path):
    description = describe(codebook_path)
    assert description["kind"] == "codebook"
    assert (description["vocab_size"], description["dim"], description["grid"]) == (6, 48, [4, 4])
    assert description["usage_in_fit"]["perplexity"] == 6
    assert json.loads(json.dumps(description)) == description


def test_every_stage_is_described_with_its_use_in_the_fit(tmp_path):
    codebook = Codebook(
        np.zeros((2, 4, 48), np.int16),
        np.array([[5, 5, 5, 5], [19, 1, 0, 0]]),
        metric="l2",
        pixel_rule=PixelRule(size=factories.SIZE, patch_size=factories.PATCH),
        extractor=ExtractorSpec(id="pixel"),
        num_points=20,
    )
    codebook.save(tmp_path / "c.safetensors")
    description = describe(tmp_path / "c.safetensors")
    assert description["usage_in_fit"]["num_dead"] == 0
    (second,) = description["usage_in_fit_of_later_stages"]
    assert (second["num_used"], second["num_dead"], second["num_single"]) == (2, 2, 1)
    assert second["max_share"] == 0.95


def test_a_shard_is_described_without_its_cache(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(3))
    factories.build_cache(images=str(images), codebook=codebook_path, out=tmp_path / "cache")
    shard = (tmp_path / "cache/shards/000000.tar").rename(tmp_path / "shard.tar")
    description = describe(shard)
    assert description["num_samples"] == 3
    assert description["first"] == {
        "key": "a/000",
        "label": 0,
        "views": [[0, 0, 16, 16, 0]],
        "token_ids_shape": [1, 4, 4],
    }
    assert description["image_bytes"] == sum(
        len(data) for data in factories.patch_images(3).values()
    )


def test_what_is_not_ours_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    factories.write_tar(tmp_path / "empty.tar", [])
    for name, message in (
        ("nothing", "There is nothing at"),
        ("notes.txt", r"is not a codebook \(.safetensors\), a cache"),
        ("empty.tar", "holds no samples"),
        ("", "is not a cache"),
    ):
        with pytest.raises(ArtifactError, match=message):
            describe(tmp_path / name)
