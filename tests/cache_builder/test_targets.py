"""Soft targets are softmax(-d^2 / (T s)) over the nearest centroids; the first is the token."""

import numpy as np
import pytest
import torch

from cache_builder.errors import ConfigError
from cache_builder.formats import CacheSpec, Codebook, FeatureSpec, SoftSpec, ViewSpec
from cache_builder.formats.manifest import SourceInfo
from cache_builder.soft_targets import DEFAULT_TEMPERATURE, soft_spec
from cache_builder.targets import TargetMaker, feature_spec, fidelity
from cache_builder.tokenizers import PatchTokenizer
from tests import factories

NUM_VIEWS = 3


def views(size, num=NUM_VIEWS):
    photos = np.stack([factories.draw_photo(seed, size, size) for seed in range(num)])
    return torch.from_numpy(photos).permute(0, 3, 1, 2)


def pixel_codebook(**changes):
    """Thirty centroids around grey, with an objective as a fit would have it."""
    rng = np.random.default_rng(0)
    colours = rng.integers(60, 200, (30, 3)).astype(np.uint8)
    return factories.colour_codebook(colours=colours, objective=(9e4,), **changes)


def cosine_pixel_codebook():
    directions = np.random.default_rng(1).uniform(size=(1, 30, 48)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    pixel = pixel_codebook()
    return Codebook(
        directions,
        np.ones((1, 30), np.int64),
        metric="cosine",
        pixel_rule=pixel.pixel_rule,
        extractor=pixel.extractor,
        objective=(0.3,),
    )


CODEBOOKS = {
    "pixel l2": pixel_codebook,
    "pixel cosine": cosine_pixel_codebook,
    "model l2": factories.feature_codebook,
    "model cosine": lambda: factories.feature_codebook(metric="cosine"),
}


@pytest.fixture(params=CODEBOOKS)
def tokenizer(request):
    return PatchTokenizer.load(CODEBOOKS[request.param]())


def maker_of(tokenizer, soft=None, dtype=None):
    rule = tokenizer.pixel_rule
    spec = CacheSpec(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        num_stages=tokenizer.codebook.num_stages,
        grid=tokenizer.grid,
        view_spec=ViewSpec(size=rule.size, patch_size=rule.patch_size, num_views=1),
        layout="webdataset",
        images_in_cache="original",
        unit_size=1,
        source=SourceInfo(kind="folder", location="/photos", num_samples=1),
        soft=soft,
        features=FeatureSpec(dtype=dtype, dim=tokenizer.codebook.dim) if dtype else None,
    )
    return TargetMaker(tokenizer, spec)


def softmax_by_hand(tokenizer, pixels, bandwidth):
    """Return ids and probabilities of all K, nearest first: the definition, patch by patch."""
    features = tokenizer.features(pixels).double().numpy()
    centroids = tokenizer.codebook.centroids[0].astype(np.float64)
    distances = np.square(features[:, :, None] - centroids).sum(-1)
    order = distances.argsort(-1, kind="stable")
    weights = np.exp(-(distances - distances.min(-1, keepdims=True)) / bandwidth)
    probabilities = weights / weights.sum(-1, keepdims=True)
    return order, np.take_along_axis(probabilities, order, -1)


def test_soft_targets_are_those_of_the_definition(tokenizer):
    pixels = views(tokenizer.pixel_rule.size)
    soft = soft_spec(tokenizer.codebook, 5, 0.3)
    maker = maker_of(tokenizer, soft)
    targets = maker.make(pixels)
    ids, probabilities = softmax_by_hand(tokenizer, pixels, soft.bandwidth)
    shape = (NUM_VIEWS, *tokenizer.grid, 5)
    assert targets.soft_ids.shape == targets.soft_probs.shape == shape
    assert (targets.soft_ids.dtype, targets.soft_probs.dtype) == (np.uint16, np.float16)
    np.testing.assert_array_equal(targets.soft_ids, ids[..., :5].reshape(shape))
    kept = probabilities[..., :5]
    renormalised = kept / kept.sum(-1, keepdims=True)
    found = targets.soft_probs.reshape(kept.shape).astype(float)
    np.testing.assert_allclose(found, renormalised, rtol=2.0**-11, atol=1e-7)
    totals = maker.soft_totals(num_bytes=7)
    entropy = -(renormalised * np.log(renormalised.clip(1e-300))).sum(-1)
    assert totals.perplexity == pytest.approx(np.exp(entropy).mean(), rel=1e-5)
    assert 1.05 < totals.perplexity < 4.95
    masses = kept.sum(-1).ravel()[::61]
    assert totals.mass == pytest.approx(masses.mean(), rel=1e-5)
    assert (totals.bytes, totals.num_patches) == (7, entropy.size)


def test_token_ids_do_not_depend_on_what_else_is_stored(tokenizer):
    pixels = views(tokenizer.pixel_rule.size, num=70)  # more than one batch
    expected = tokenizer.encode(pixels).numpy()
    soft = soft_spec(tokenizer.codebook, 4, None)
    for settings in ({}, {"soft": soft}, {"dtype": "int8"}, {"soft": soft, "dtype": "float16"}):
        if "dtype" in settings and tokenizer.codebook.extractor.id == "pixel":
            continue
        targets = maker_of(tokenizer, **settings).make(pixels)
        assert targets.token_ids.dtype == np.uint16
        np.testing.assert_array_equal(targets.token_ids, expected)
        if "soft" in settings:
            np.testing.assert_array_equal(targets.soft_ids[..., 0], expected)


@pytest.mark.parametrize("temperature", [1e-9, 1e9])
def test_a_temperature_near_zero_gives_the_token_and_a_large_one_the_same_to_all(temperature):
    tokenizer = PatchTokenizer.load(pixel_codebook())
    maker = maker_of(tokenizer, soft_spec(tokenizer.codebook, 4, temperature))
    probabilities = maker.make(views(16)).soft_probs
    expected = [1, 0, 0, 0] if temperature < 1 else [0.25] * 4
    assert (probabilities == np.array(expected, np.float16)).all()
    assert maker.soft_totals(0).mass == pytest.approx(1 if temperature < 1 else 4 / 30, abs=1e-6)


def test_all_centroids_hold_all_the_mass():
    tokenizer = PatchTokenizer.load(pixel_codebook())
    maker = maker_of(tokenizer, soft_spec(tokenizer.codebook, 30, 0.3))
    maker.make(views(16))
    assert maker.soft_totals(0).mass == 1


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_stored_features_are_what_was_quantised_and_their_fidelity_is_measured(metric, dtype):
    tokenizer = PatchTokenizer.load(factories.feature_codebook(metric=metric))
    pixels = views(64)
    maker = maker_of(tokenizer, dtype=dtype)
    targets = maker.make(pixels)
    exact = tokenizer.features(pixels).numpy().astype(np.float64)
    assert targets.features.shape == (NUM_VIEWS, 8, 8, exact.shape[-1])
    stored = targets.features.astype(np.float64)
    if dtype == "int8":
        stored *= targets.feature_scales[..., None]
    stored = stored.reshape(exact.shape)
    lengths = np.linalg.norm(exact, axis=-1)
    if metric == "cosine":
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    errors = np.linalg.norm(exact - stored, axis=-1) / lengths
    cosines = (exact * stored).sum(-1) / (lengths * np.linalg.norm(stored, axis=-1))
    totals = maker.feature_totals(num_bytes=9)
    assert totals.relative_error == pytest.approx(errors.mean(), rel=1e-4)
    assert totals.cosine == pytest.approx(cosines.mean(), abs=1e-8)
    assert (totals.bytes, totals.num_patches) == (9, errors.size)
    assert 0 < totals.relative_error < (2.0**-11 if dtype == "float16" else 0.02)


def test_residual_stages_keep_their_ids_beside_features():
    codebook = factories.feature_codebook()
    centroids = np.concatenate([codebook.centroids, codebook.centroids / 9])
    two = Codebook(
        centroids,
        np.ones(centroids.shape[:2], np.int64),
        metric="l2",
        pixel_rule=codebook.pixel_rule,
        extractor=codebook.extractor,
    )
    tokenizer = PatchTokenizer.load(two)
    targets = maker_of(tokenizer, dtype="float16").make(views(64))
    assert targets.token_ids.shape == (NUM_VIEWS, 8, 8, 2)
    np.testing.assert_array_equal(targets.token_ids, tokenizer.encode(views(64)))
    with pytest.raises(ConfigError, match="needs a codebook of one stage, and this one has 2"):
        soft_spec(two, 4, None)


def test_fidelity_of_a_zero_is_that_of_its_copy():
    zero, one = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    for exact, stored, expected in (
        (zero, zero, (1, 0)),
        (one, one, (1, 0)),
        (one, zero, (0, 1)),
        (one, -one, (-1, 2)),
    ):
        cosines, errors = fidelity(exact, stored)
        assert (cosines[0], errors[0]) == pytest.approx(expected)


def test_nothing_made_has_no_totals():
    maker = maker_of(
        PatchTokenizer.load(pixel_codebook()), SoftSpec(top_k=2, temperature=1, scale=1)
    )
    assert maker.soft_totals(0) is None
    assert maker.feature_totals(0) is None


def test_settings_come_from_the_command_and_the_codebook():
    codebook = pixel_codebook()
    assert soft_spec(codebook, None, None) is None
    expected = SoftSpec(top_k=8, temperature=DEFAULT_TEMPERATURE, scale=9e4)
    assert soft_spec(codebook, 8, None) == expected
    assert soft_spec(codebook, 8, 2.0).bandwidth == 1.8e5
    features = factories.feature_codebook()
    assert feature_spec(features, "int8") == FeatureSpec(dtype="int8", dim=features.dim)
    assert feature_spec(codebook, None) is None


@pytest.mark.parametrize(
    ("top_k", "temperature", "changes", "message"),
    [
        (None, 1.0, {}, r"has no meaning without --soft-top-k"),
        (1, None, {}, r"must be 2 to 30, the centroids of this codebook, not 1"),
        (31, None, {}, r"must be 2 to 30, .*not 31"),
        (4, 0.0, {}, r"--soft-temperature must be positive, not 0.0"),
        (4, float("nan"), {}, r"must be positive, not nan"),
        (4, None, {"objective": ()}, r"the codebook records none\. Fit it again"),
        (4, None, {"objective": (2.0, 0.0)}, r"records one of 0\.0\. Fit it again"),
    ],
)
def test_soft_targets_that_cannot_be_made_are_refused(top_k, temperature, changes, message):
    codebook = factories.colour_codebook(
        colours=np.arange(90, dtype=np.uint8).reshape(30, 3), **({"objective": (9e4,)} | changes)
    )
    with pytest.raises(ConfigError, match=message):
        soft_spec(codebook, top_k, temperature)


def test_features_of_pixels_are_not_stored():
    with pytest.raises(ConfigError, match=r"no meaning for a pixel tokenizer: .*Leave it out"):
        feature_spec(pixel_codebook(), "int8")
