"""Codebooks for other programs: the same numbers, and in faiss the same ids."""

import json

import faiss
import numpy as np
import pytest
import torch

from cache_builder.codebook_export import export_codebook
from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.imaging import decode, patchify
from cache_builder.tokenizers.quantizer import ResidualQuantizer
from tests import factories


@pytest.fixture(scope="module")
def patches(photos):
    """Patches of 8 x 8 pixels of real photographs, (n, 192) uint8."""
    paths = sorted(photos.rglob("*.JPEG"))[:12]
    views = torch.stack([decode(path.read_bytes())[:, :128, :128] for path in paths])
    return patchify(views, 8).flatten(0, 1)


def save(path, centroids, metric="l2", extractor="pixel"):
    codebook = Codebook(
        centroids,
        np.ones(centroids.shape[:2], np.int64),
        metric=metric,
        pixel_rule=PixelRule(size=128, patch_size=8),
        extractor=ExtractorSpec(id=extractor),
    )
    codebook.save(path)
    return codebook


def test_numpy_gets_the_centroids_as_they_are_and_what_they_mean(tmp_path):
    codebook = factories.colour_codebook()
    codebook.save(tmp_path / "codebook.safetensors")
    done = export_codebook(tmp_path / "codebook.safetensors", tmp_path / "centroids.npy")
    exported = np.load(done.file)
    assert exported.dtype == np.uint8
    assert np.array_equal(exported, codebook.centroids)
    header = json.loads(done.description.read_text())
    assert header["fingerprint"] == codebook.fingerprint
    assert header["pixel_rule"]["patch_size"] == factories.PATCH


def test_a_flat_index_gives_our_ids_of_real_patches(tmp_path, patches):
    codebook = save(tmp_path / "a.safetensors", patches[None, ::50].numpy().copy())
    index = faiss.read_index(
        str(export_codebook(tmp_path / "a.safetensors", tmp_path / "a.faiss").file)
    )
    ours = ResidualQuantizer(torch.from_numpy(codebook.centroids)).encode(patches)[:, 0].numpy()
    _, theirs = index.search(patches.numpy().astype(np.float32), 1)
    assert len(ours) > 3000
    assert np.array_equal(theirs[:, 0], ours)


def test_a_cosine_codebook_is_searched_by_inner_product(tmp_path, patches):
    points = torch.nn.functional.normalize(patches.float() + 1, dim=1)
    codebook = save(tmp_path / "a.safetensors", points[None, ::50].numpy().copy(), "cosine", "x:y")
    index = faiss.read_index(
        str(export_codebook(tmp_path / "a.safetensors", tmp_path / "a.faiss").file)
    )
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    ours = ResidualQuantizer(torch.from_numpy(codebook.centroids)).encode(points)[:, 0].numpy()
    similarity, theirs = index.search(points.numpy(), 1)
    chosen = (points.numpy() * codebook.centroids[0][ours]).sum(1)
    # Two that are equally near may fall either way in float32.
    assert np.mean(theirs[:, 0] == ours) > 0.99
    assert np.allclose(similarity[:, 0], chosen, atol=1e-6)


def test_stages_become_a_residual_quantiser_with_our_ids(tmp_path, patches):
    x = patches.to(torch.int16)
    first = x[::60][:32]
    left = x - first[torch.cdist(x.float(), first.float()).argmin(1)]
    codebook = save(tmp_path / "a.safetensors", torch.stack([first, left[7::60][:32]]).numpy())
    index = faiss.read_index(
        str(export_codebook(tmp_path / "a.safetensors", tmp_path / "a.faiss").file)
    )
    ours = ResidualQuantizer(torch.from_numpy(codebook.centroids)).encode(x).numpy()
    packed = index.sa_encode(patches.numpy().astype(np.float32))
    theirs = faiss.unpack_bitstrings(packed, 2, 5)
    assert np.array_equal(theirs, ours)


def test_what_faiss_has_no_index_for_is_refused(tmp_path):
    centroids = np.zeros((2, 6, 192), np.int16)
    save(tmp_path / "a.safetensors", centroids)
    with pytest.raises(ConfigError, match=r"power of two .* not 6. Write a .npy"):
        export_codebook(tmp_path / "a.safetensors", tmp_path / "a.faiss")
    with pytest.raises(ConfigError, match=r"must end in .npy or .faiss"):
        export_codebook(tmp_path / "a.safetensors", tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
