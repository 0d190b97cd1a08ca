"""Stored features stand for float32 ones within their rounding, and say so when they cannot."""

import numpy as np
import pytest

from cache_builder.errors import ConfigError
from cache_builder.formats import CachedSample, FeatureSpec, SoftSpec, restore_features
from cache_builder.formats.payloads import (
    FeatureTotals,
    SoftTotals,
    pack_features,
    payload_arrays,
    sum_features,
    sum_soft,
)


def features(*shape, scale=1.0):
    return (np.random.default_rng(0).normal(size=shape) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_float16_keeps_every_value_to_one_part_in_two_thousand(scale):
    exact = features(5, 7, 64, scale=scale)
    values, scales = pack_features(exact, "float16")
    assert (values.dtype, scales) == (np.float16, None)
    restored = restore_features(values)
    assert restored.dtype == np.float32
    assert (np.abs(restored - exact) <= np.abs(exact) * 2.0**-11 + 2.0**-25).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1, 1e4, 1e30])
def test_int8_keeps_every_value_to_half_a_step_of_its_patch_whatever_the_size(scale):
    exact = features(5, 7, 64, scale=scale)
    values, scales = pack_features(exact, "int8")
    assert (values.dtype, values.shape) == (np.int8, exact.shape)
    assert (scales.dtype, scales.shape) == (np.float32, (5, 7))
    assert (np.abs(values).max(-1) == 127).all()
    errors = np.abs(restore_features(values, scales) - exact)
    assert (errors <= scales[..., None] * 0.5001).all()


def test_patches_of_zeros_and_of_the_tiniest_values_are_stored():
    exact = np.array([[0, 0, 0], [1e-44, -1e-45, 0], [3, -3, 0]], np.float32)
    values, scales = pack_features(exact, "int8")
    restored = restore_features(values, scales)
    assert np.isfinite(restored).all()
    np.testing.assert_array_equal(restored[0], 0)
    np.testing.assert_allclose(restored[2], exact[2], rtol=1e-6)
    assert np.abs(restored[1] - exact[1]).max() < 2e-44


def test_a_value_beyond_float16_is_refused_with_its_size():
    exact = features(2, 3)
    exact[1, 2] = -70_000
    with pytest.raises(
        ConfigError, match=r"value is 70000 in size.*65,504. Use --store-features i"
    ):
        pack_features(exact, "float16")
    values, scales = pack_features(exact, "int8")
    assert restore_features(values, scales)[1, 2] == pytest.approx(-70_000)
    exact[1, 2] = 65_504
    assert pack_features(exact, "float16")[0][1, 2] == 65_504


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dtype, value):
    exact = features(2, 3)
    exact[0, 1] = value
    with pytest.raises(ConfigError, match=r"NaN or infinity\. Check the model"):
        pack_features(exact, dtype)


def test_int8_needs_its_scales_and_float16_has_none():
    values, scales = pack_features(features(2, 3), "int8")
    with pytest.raises(ValueError, match="int8 without scales"):
        restore_features(values)
    with pytest.raises(ValueError, match="float16 with scales"):
        restore_features(values.astype(np.float16), scales)


def test_a_sample_gives_its_features_as_float32_or_says_how_to_get_them():
    exact = features(1, 2, 2, 8)
    values, scales = pack_features(exact, "int8")
    views, ids = np.zeros((1, 5), np.int32), np.zeros((1, 2, 2), np.uint16)
    sample = CachedSample("a", None, None, views, ids, features=values, feature_scales=scales)
    np.testing.assert_array_equal(sample.float_features(), restore_features(values, scales))
    with pytest.raises(ConfigError, match=r"Sample a was read without features.*--store-features"):
        CachedSample("a", None, None, views, ids).float_features()


def test_every_array_of_a_payload_has_a_shape_and_a_type():
    soft = SoftSpec(top_k=8, temperature=0.05, scale=2)
    arrays = payload_arrays((4, 14, 14), soft, FeatureSpec(dtype="int8", dim=512))
    found = {name: (a.payload, a.shape, str(a.dtype), a.fill) for name, a in arrays.items()}
    assert found == {
        "soft_ids": ("soft", (4, 14, 14, 8), "uint16", 65_535),
        "soft_probs": ("soft", (4, 14, 14, 8), "float16", 0),
        "features": ("features", (4, 14, 14, 512), "int8", 0),
        "feature_scales": ("features", (4, 14, 14), "float32", 0),
    }
    assert list(payload_arrays((1, 2, 2), None, FeatureSpec(dtype="float16", dim=3))) == [
        "features"
    ]
    assert payload_arrays((1, 2, 2), None, None) == {}


def test_totals_of_units_are_weighted_by_their_patches():
    soft = [
        SoftTotals(bytes=10, num_patches=1, perplexity=2, mass=1),
        SoftTotals(bytes=20, num_patches=3, perplexity=6, mass=0.6),
    ]
    assert sum_soft(soft) == SoftTotals(bytes=30, num_patches=4, perplexity=5, mass=0.7)
    stored = [
        FeatureTotals(bytes=1, num_patches=2, cosine=1, relative_error=0),
        FeatureTotals(bytes=2, num_patches=2, cosine=0.5, relative_error=0.5),
    ]
    expected = FeatureTotals(bytes=3, num_patches=4, cosine=0.75, relative_error=0.25)
    assert sum_features(stored) == expected
    assert sum_soft([]) is None
    assert sum_features([]) is None
