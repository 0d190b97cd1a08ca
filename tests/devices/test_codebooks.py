"""A codebook of pixels does not depend on the device, nor do its tokens."""

import numpy as np
import torch

from cache_builder.formats import Codebook, ExtractorSpec, PixelRule
from cache_builder.kmeans import fit_centroids
from cache_builder.tokenizers import PatchTokenizer
from tests import factories


def pixel_codebook(stages=1):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (1, 500, 48)).astype(np.int16)
    further = rng.integers(-100, 100, (stages - 1, 500, 48)).astype(np.int16)
    centroids = np.concatenate([first, further])
    return Codebook(
        centroids if stages > 1 else centroids.astype(np.uint8),
        np.ones((stages, 500), np.int64),
        metric="l2",
        pixel_rule=PixelRule(size=16, patch_size=4),
        extractor=ExtractorSpec(id="pixel"),
    )


def test_a_pixel_codebook_is_the_same_on_every_device(device):
    points = factories.photo_patches()
    expected, found = fit_centroids(points, 100), fit_centroids(points.to(device), 100)
    assert torch.equal(found.centroids.cpu(), expected.centroids)
    assert torch.equal(found.counts.cpu(), expected.counts)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-9)


def test_features_are_fitted_as_well_on_every_device(device):
    points = torch.nn.functional.normalize(factories.photo_patches().float(), dim=1)
    for metric in ("l2", "cosine"):
        expected = fit_centroids(points, 50, metric=metric)
        found = fit_centroids(points.to(device), 50, metric=metric)
        np.testing.assert_allclose(found.objective[-1], expected.objective[-1], rtol=0.02)


def test_pixel_tokens_are_the_same_on_every_device(device):
    views = factories.photo_views(70, 16)
    for stages in (1, 3):
        here, there = (PatchTokenizer.load(pixel_codebook(stages), d) for d in ("cpu", device))
        token_ids = there.encode(views)
        assert token_ids.device.type == "cpu"
        assert torch.equal(token_ids, here.encode(views))
        assert torch.equal(there.decode(token_ids), here.decode(token_ids))


def test_features_of_a_model_are_close_and_so_are_its_tokens(device):
    views = factories.photo_views(8, 64)
    codebook = factories.feature_codebook()
    here, there = (PatchTokenizer.load(codebook, d) for d in ("cpu", device))
    expected, found = here.features(views), there.features(views)
    assert found.device.type == torch.device(device).type
    # Convolutions of a GPU round their inputs to TF32, ten bits, by default.
    torch.testing.assert_close(found.cpu(), expected, rtol=0.05, atol=0.05 * float(expected.std()))
    differing = (there.encode(views) != here.encode(views)).double().mean()
    assert differing < 0.05


def test_a_cache_holds_the_same_bytes_on_every_device(device, tmp_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(12))
    codebook = factories.write_codebook(tmp_path / "codebook.safetensors")
    for name, where in (("expected", "cpu"), ("found", device)):
        factories.build_cache(
            images=str(images), codebook=codebook, out=tmp_path / name, num_views=2, unit_size=5,
            device=where,
        )  # fmt: skip
    expected, found = (factories.contents(tmp_path / name) for name in ("expected", "found"))
    shards = [name for name in expected if name.startswith("shards/")]
    assert len(shards) == 3
    assert {name: found[name] for name in shards} == {name: expected[name] for name in shards}
