"""A codebook file is what it says, or it is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from cache_builder.errors import ArtifactError, FormatVersionError
from cache_builder.formats import Codebook, ExtractorSpec, PixelRule
from tests import factories

FEATURES = ExtractorSpec(id="timm:vit", layer="last", args={"pre_norm": True}, weights_digest="ab")


def feature_codebook(centroids=None, **changes):
    centroids = np.arange(6, dtype=np.float32).reshape(1, 2, 3) if centroids is None else centroids
    fields = {"metric": "cosine", "pixel_rule": PixelRule(), "extractor": FEATURES}
    return Codebook(centroids, np.zeros(centroids.shape[:2], np.int64), **(fields | changes))


def file_with_header(path, **changes):
    """Write a codebook file whose header says something else."""
    codebook = factories.colour_codebook()
    header = codebook.header.model_dump(mode="json") | changes
    tensors = {"centroids": codebook.centroids, "counts": codebook.counts}
    path.write_bytes(save(tensors, metadata={"patchcache": json.dumps(header)}))
    return path


@pytest.mark.parametrize("codebook", [factories.colour_codebook(), feature_codebook()])
def test_what_is_saved_is_loaded(codebook, tmp_path):
    codebook.save(tmp_path / "c.safetensors")
    loaded = Codebook.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.centroids, codebook.centroids)
    np.testing.assert_array_equal(loaded.counts, codebook.counts)
    assert loaded.centroids.dtype == codebook.centroids.dtype
    assert loaded.header == codebook.header
    assert loaded.to_bytes() == codebook.to_bytes()


def test_sizes_come_from_the_centroids():
    codebook = feature_codebook(np.zeros((2, 5, 7), np.float32))
    assert (codebook.num_stages, codebook.vocab_size, codebook.dim) == (2, 5, 7)


def test_every_part_of_a_tokenizer_changes_its_fingerprint():
    codebooks = [
        feature_codebook(),
        feature_codebook(metric="l2"),
        feature_codebook(np.ones((1, 2, 3), np.float32)),
        feature_codebook(np.ones((1, 3, 2), np.float32)),
        feature_codebook(pixel_rule=PixelRule(patch_size=32)),
        feature_codebook(pixel_rule=PixelRule(interpolation="bilinear")),
        feature_codebook(pixel_rule=PixelRule(mean=(0.5, 0.5, 0.5))),
        *(
            feature_codebook(extractor=FEATURES.model_copy(update=change))
            for change in ({"id": "x"}, {"layer": "3"}, {"args": {}}, {"weights_digest": "cd"})
        ),
    ]
    assert len({codebook.fingerprint for codebook in codebooks}) == len(codebooks)


def test_how_a_codebook_was_fitted_does_not_change_its_fingerprint():
    elsewhere = FEATURES.model_copy(update={"weights": "file:/elsewhere"})
    other = feature_codebook(extractor=elsewhere, fit={"seed": 7}, versions={"torch": "9"})
    assert other.fingerprint == feature_codebook().fingerprint


def test_one_wrong_byte_is_refused_or_changes_nothing_that_tokens_depend_on(tmp_path):
    codebook = feature_codebook(num_points=6)
    codebook.counts[:] = [[2, 4]]
    path = tmp_path / "c.safetensors"
    content = codebook.to_bytes()
    num_refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        try:
            loaded = Codebook.load(path)
        except ArtifactError:
            num_refused += 1
            continue
        assert loaded.fingerprint == codebook.fingerprint
        np.testing.assert_array_equal(loaded.centroids, codebook.centroids)
        np.testing.assert_array_equal(loaded.counts, codebook.counts)
    assert num_refused > len(content) / 2


def test_a_wrong_centroid_is_refused_by_both_digests(tmp_path):
    path = factories.write_codebook(tmp_path / "c.safetensors")
    content = path.read_bytes()
    other = factories.colour_codebook(colours=factories.COLOURS[::-1].copy())
    digest = factories.colour_codebook().header.digest
    path.write_bytes(content.replace(digest.encode(), other.header.digest.encode()))
    with pytest.raises(ArtifactError, match=f"says digest {other.header.digest}.*has {digest}"):
        Codebook.load(path)


def test_a_wrong_pixel_rule_is_refused_by_both_fingerprints(tmp_path):
    codebook = factories.colour_codebook()
    wrong = factories.colour_codebook(pixel_rule=PixelRule(size=32, patch_size=4))
    path = file_with_header(tmp_path / "c.safetensors", pixel_rule={"size": 32, "patch_size": 4})
    message = f"fingerprint {codebook.fingerprint} but its content has {wrong.fingerprint}"
    with pytest.raises(ArtifactError, match=message):
        Codebook.load(path)


def test_a_cut_file_is_refused(tmp_path):
    path = factories.write_codebook(tmp_path / "c.safetensors")
    content = path.read_bytes()
    for size in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactError, match="Copy it again"):
            Codebook.load(path)


def test_a_newer_format_is_refused_and_says_how_to_upgrade(tmp_path):
    path = file_with_header(tmp_path / "c.safetensors", format_version=2, new_field=1)
    with pytest.raises(FormatVersionError, match=r"version 2; .* reads up to 1.*pip install -U"):
        Codebook.load(path)


@pytest.mark.parametrize("change", [{"format_version": 0}, {"metric": "l1"}, {"colour": "red"}])
def test_a_header_that_makes_no_sense_is_refused(tmp_path, change):
    with pytest.raises(ArtifactError, match="damaged"):
        Codebook.load(file_with_header(tmp_path / "c.safetensors", **change))


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtifactError, match=r"no codebook at .*patchcache fit --out"):
        Codebook.load(tmp_path / "c.safetensors")


def test_another_safetensors_file_is_not_a_codebook(tmp_path):
    path = tmp_path / "weights.safetensors"
    header = b'{"__metadata__":null}'
    for content in (
        save({"w": np.zeros(3, np.float32)}),
        len(header).to_bytes(8, "little") + header,
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a codebook"):
            Codebook.load(path)


@pytest.mark.parametrize(
    ("centroids", "message"),
    [
        (np.zeros((2, 3), np.float32), r"must be \(M, K, D\)"),
        (np.zeros((1, 2, 3), np.float64), "float64"),
        (np.zeros((1, 0, 3), np.float32), "1 to 65,535 centroids, not 0"),
        (np.zeros((1, 65_536, 1), np.uint8), "1 to 65,535 centroids, not 65,536"),
        (np.full((1, 2, 3), np.nan, np.float32), "NaN"),
        (np.full((1, 2, 3), np.inf, np.float32), "infinity"),
    ],
)
def test_impossible_centroids_are_refused(centroids, message):
    with pytest.raises(ArtifactError, match=message):
        Codebook(
            centroids,
            np.zeros(centroids.shape[:2], np.int64),
            metric="l2",
            pixel_rule=PixelRule(),
            extractor=FEATURES,
        )


def test_65535_centroids_are_the_most():
    most = np.zeros((1, 65_535, 1), np.uint8)
    assert feature_codebook(most).vocab_size == 65_535


def test_counts_must_match_the_centroids():
    with pytest.raises(ArtifactError, match=r"counts must be \(1, 6\) int64"):
        Codebook(
            factories.colour_codebook().centroids,
            np.zeros((1, 5), np.int64),
            metric="l2",
            pixel_rule=PixelRule(),
            extractor=FEATURES,
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 224, "patch_size": 15}, "not a multiple"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ],
)
def test_a_pixel_rule_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PixelRule(**fields)
