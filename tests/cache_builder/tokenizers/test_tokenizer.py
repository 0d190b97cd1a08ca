"""The token of patch i is the token of patch i's pixels."""

import numpy as np
import pytest
import torch

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats import Codebook, ExtractorSpec, PixelRule
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from cache_builder.tokenizers.tokenizer import choose_device
from tests import factories

CPU = torch.device("cpu")


def views_of(*pictures):
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])


def random_codebook(k=20, stages=1, **changes):
    rng = np.random.default_rng(0)
    centroids = rng.integers(0, 256, (stages, k, 48)).astype(np.uint8)
    fields = {
        "metric": "l2",
        "pixel_rule": PixelRule(size=16, patch_size=4),
        "extractor": ExtractorSpec(id="pixel"),
    }
    return Codebook(centroids, np.ones((stages, k), np.int64), **(fields | changes))


def token_ids_by_hand(picture, centroids, patch_size=4):
    """Cut and compare patch by patch."""
    rows, cols = picture.shape[0] // patch_size, picture.shape[1] // patch_size
    ids = np.empty((rows, cols), int)
    for row in range(rows):
        for col in range(cols):
            patch = picture[row * patch_size :, col * patch_size :][:patch_size, :patch_size]
            values = patch.transpose(2, 0, 1).reshape(-1).astype(int)
            ids[row, col] = np.square(values - centroids).sum(1).argmin()
    return ids


def test_colours_come_back_in_row_major_order():
    ids = np.stack([factories.random_ids(seed) for seed in range(70)])  # more than one batch
    tokenizer = PatchTokenizer.load(factories.colour_codebook())
    encoded = tokenizer.encode(views_of(*(factories.draw_patches(i) for i in ids)))
    np.testing.assert_array_equal(encoded, ids)
    assert encoded.dtype == torch.int64


def test_a_photograph_gives_the_tokens_found_by_hand():
    photos = [factories.draw_photo(seed, 16, 16) for seed in range(5)]
    codebook = random_codebook()
    encoded = PatchTokenizer.load(codebook).encode(views_of(*photos))
    expected = [token_ids_by_hand(photo, codebook.centroids[0]) for photo in photos]
    np.testing.assert_array_equal(encoded, expected)


def test_tokens_do_not_depend_on_the_batch():
    views = views_of(*(factories.draw_photo(seed, 16, 16) for seed in range(70)))
    tokenizer = PatchTokenizer.load(random_codebook())
    alone = torch.cat([tokenizer.encode(view[None]) for view in views])
    assert torch.equal(tokenizer.encode(views), alone)


def test_decoding_gives_the_pixels_of_the_centroids():
    ids = np.stack([factories.random_ids(seed) for seed in range(3)])
    pictures = views_of(*(factories.draw_patches(i) for i in ids))
    tokenizer = PatchTokenizer.load(factories.colour_codebook())
    for dtype in (torch.int64, torch.uint8, torch.uint16):
        assert torch.equal(tokenizer.decode(torch.from_numpy(ids).to(dtype)), pictures)


def test_residual_stages_are_one_more_axis_and_their_sum_is_decoded():
    codebook = random_codebook(stages=3)
    tokenizer = PatchTokenizer.load(codebook)
    views = views_of(factories.draw_photo(0, 16, 16))
    ids = tokenizer.encode(views)
    assert ids.shape == (1, 4, 4, 3)
    np.testing.assert_array_equal(
        ids[0, ..., 0], token_ids_by_hand(views[0].permute(1, 2, 0).numpy(), codebook.centroids[0])
    )
    patch = sum(codebook.centroids[m, ids[0, 1, 2, m]].astype(int) for m in range(3))
    expected = np.clip(patch, 0, 255).reshape(3, 4, 4)
    np.testing.assert_array_equal(tokenizer.decode(ids)[0, :, 4:8, 8:12], expected)


def test_a_cosine_codebook_compares_directions():
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(8, 48))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codebook = Codebook(
        directions[None].astype(np.float32),
        np.ones((1, 8), np.int64),
        metric="cosine",
        pixel_rule=PixelRule(size=16, patch_size=4),
        extractor=ExtractorSpec(id="pixel"),
    )
    photo = factories.draw_photo(3, 16, 16)
    encoded = PatchTokenizer.load(codebook).encode(views_of(photo))
    for row in range(4):
        for col in range(4):
            patch = photo[4 * row : 4 * row + 4, 4 * col : 4 * col + 4].transpose(2, 0, 1).ravel()
            assert encoded[0, row, col] == (codebook.centroids[0] @ patch.astype(float)).argmax()


def test_only_pixel_codebooks_can_be_decoded():
    features = make_extractor(
        FeatureOptions("timm:resnet10t", image_size=64, random_weights_seed=0), CPU
    )
    codebook = Codebook(
        np.zeros((1, 3, 512), np.float32),
        np.zeros((1, 3), np.int64),
        metric="l2",
        pixel_rule=features.pixel_rule,
        extractor=features.spec,
    )
    tokenizer = PatchTokenizer.load(codebook)
    assert tokenizer.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 2, 2)
    cosine = random_codebook(metric="cosine")
    for refused in (tokenizer, PatchTokenizer.load(cosine)):
        assert not refused.decodes_to_pixels
        with pytest.raises(ConfigError, match="only those of l2 codebooks of pixels"):
            refused.decode(torch.zeros(1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("stages", [1, 2])
def test_no_views_give_no_tokens(stages):
    tokenizer = PatchTokenizer.load(random_codebook(stages=stages))
    ids = tokenizer.encode(torch.zeros(0, 3, 16, 16, dtype=torch.uint8))
    assert ids.shape == ((0, 4, 4) if stages == 1 else (0, 4, 4, 2))
    assert tokenizer.decode(ids).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 16, 16),
        torch.zeros(1, 3, 16, 20, dtype=torch.uint8),
        torch.zeros(1, 1, 16, 16, dtype=torch.uint8),
        torch.zeros(3, 16, 16, dtype=torch.uint8),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused(pixels):
    with pytest.raises(ValueError, match=r"pixels must be \(B, 3, 16, 16\) uint8, not"):
        PatchTokenizer.load(random_codebook()).encode(pixels)


def test_an_id_out_of_range_is_refused():
    ids = torch.zeros(1, 4, 4, dtype=torch.int64)
    ids[0, 3, 3] = 6
    with pytest.raises(ConfigError, match=r"0..6 do not lie in \[0, 6\)"):
        PatchTokenizer.load(factories.colour_codebook()).decode(ids)


def test_ids_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"must be \(B, \*\(4, 4\)\), not \(1, 2, 8\)"):
        PatchTokenizer.load(factories.colour_codebook()).decode(torch.zeros(1, 2, 8).long())


def test_a_tokenizer_is_loaded_from_a_file_or_a_codebook(codebook_path):
    from_file, direct = (
        PatchTokenizer.load(source) for source in (codebook_path, factories.colour_codebook())
    )
    assert from_file.fingerprint == direct.fingerprint
    assert (from_file.grid, from_file.vocab_size, from_file.pixel_rule.size) == ((4, 4), 6, 16)
    with pytest.raises(ArtifactError, match="no codebook at"):
        PatchTokenizer.load(codebook_path.with_name("other.safetensors"))


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match=r"Unknown device 'gpu'. Use auto, cpu, cuda"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"torch sees no GPU. Use --device cpu"):
        choose_device("cuda:0")


def test_a_gpu_beyond_the_last_one_is_refused_with_the_number_of_that(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"Device cuda:2 .* the last GPU .* is cuda:1\."):
        choose_device("cuda:2")
