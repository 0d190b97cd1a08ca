"""`nearest_centroid` is the definition, exactly, however the sums are taken.

What must hold on a GPU as well is in tests/devices/test_nearest.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cache_builder.errors import ConfigError
from cache_builder.tokenizers import CentroidIndex, nearest_centroid
from cache_builder.tokenizers.dense import FloatForm
from cache_builder.tokenizers.quantizer import ResidualQuantizer, residual
from tests.exactness import assert_exact, brute_force, bytes_of

VECTORS = Path(__file__).parents[2] / "vectors"


def test_a_mix_of_uint8_and_float_is_exact():
    rng = np.random.default_rng(4)
    pixels, means = bytes_of(rng, 200, 12), (rng.random((30, 12)) * 255).astype(np.float32)
    assert_exact(pixels, means)
    assert_exact(means, pixels)
    assert_exact(means.astype(np.float64), pixels)


def test_half_precision_is_taken_at_its_value():
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.normal(size=(100, 16)))
    centroids = torch.from_numpy(rng.normal(size=(20, 16)))
    for dtype in (torch.float16, torch.bfloat16):
        ids = nearest_centroid(x.to(dtype), centroids.to(dtype))
        expected, _ = brute_force(
            x.to(dtype).double().numpy(), centroids.to(dtype).double().numpy()
        )
        np.testing.assert_array_equal(ids, expected)


@settings(max_examples=50)
@given(
    arrays.arrays(np.uint8, (5, 3), elements=st.integers(0, 4)),
    arrays.arrays(np.uint8, (6, 3), elements=st.integers(0, 4)),
)
def test_small_integers_with_many_ties_agree_in_every_type(x, centroids):
    for a, b in ((np.uint8, np.uint8), (np.float32, np.uint8), (np.float32, np.float32)):
        assert_exact(x.astype(a), centroids.astype(b))


@settings(max_examples=50)
@given(
    st.integers(1, 40),
    st.integers(1, 2000),
    st.sampled_from([1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e18, 1e25, 1e38]),
    st.integers(0, 10**6),
)
def test_any_scale_of_floats_is_exact(k, dim, scale, seed):
    rng = np.random.default_rng(seed)
    x = (rng.uniform(-1, 1, (7, dim)) * scale).astype(np.float32)
    centroids = (rng.uniform(-1, 1, (k, dim)) * scale).astype(np.float32)
    assert_exact(x, centroids)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_blocks_do_not_change_the_answer(dtype, monkeypatch):
    rng = np.random.default_rng(6)
    x, centroids = (bytes_of(rng, n, 6).astype(dtype) for n in (1000, 100))
    whole = nearest_centroid(torch.from_numpy(x), torch.from_numpy(centroids))
    monkeypatch.setattr("cache_builder.tokenizers.dense._SCORES_PER_BLOCK", 1000)
    assert torch.equal(nearest_centroid(torch.from_numpy(x), torch.from_numpy(centroids)), whole)
    one_by_one = [nearest_centroid(torch.from_numpy(row[None]), torch.from_numpy(centroids))
                  for row in x[:50]]  # fmt: skip
    assert torch.equal(torch.cat(one_by_one), whole[:50])


def test_the_number_of_threads_does_not_change_the_answer():
    rng = np.random.default_rng(7)
    x = torch.from_numpy(rng.normal(size=(2000, 48)).astype(np.float32))
    centroids = torch.from_numpy(rng.normal(size=(300, 48)).astype(np.float32))
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append(nearest_centroid(x, centroids))
    torch.set_num_threads(before)
    assert torch.equal(*answers)


def test_ids_are_those_of_the_official_ccvit_code():
    from cache_builder.imaging import patchify

    recorded = np.load(VECTORS / "ccvit_step.npz")
    centroids = np.random.RandomState(13).random_sample((64, 768)).astype(np.float32)
    images = np.random.RandomState(14).random_sample((2, 3, 224, 224)).astype(np.float32)
    patches = patchify(torch.from_numpy(images), 16)
    ids = nearest_centroid(patches.reshape(-1, 768), torch.from_numpy(centroids))
    np.testing.assert_array_equal(ids.view(2, 196), recorded["codes"])


def test_precision_settings_of_the_caller_are_overridden_and_restored():
    torch.set_float32_matmul_precision("medium")
    try:
        rng = np.random.default_rng(8)
        assert_exact(bytes_of(rng, 100, 300), bytes_of(rng, 20, 300))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_rows_give_no_ids():
    for dtype in (torch.uint8, torch.float32):
        ids, distances = CentroidIndex(torch.zeros(2, 3, dtype=dtype)).assign(
            torch.zeros(0, 3, dtype=dtype)
        )
        assert ids.shape == distances.shape == (0,)
        assert ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "centroids", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"x must be \(n, 4\).* not \(2, 3\)"),
        (torch.zeros(3), torch.zeros(2, 3), r"x must be \(n, 3\)"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "K > 0"),
        (torch.zeros(2, 3), torch.zeros(3), r"centroids must be \(K, D\)"),
        (torch.tensor([[0.0, torch.nan]]), torch.zeros(2, 2), "x holds NaN"),
        (torch.tensor([[0.0, torch.inf]]), torch.zeros(2, 2), "x holds NaN or infinity"),
        (torch.zeros(2, 1), torch.tensor([[torch.nan]]), "centroids hold NaN"),
    ],
)
def test_what_has_no_nearest_centroid_is_refused(x, centroids, message):
    with pytest.raises(ValueError, match=message):
        nearest_centroid(x, centroids)


def residual_by_hand(x, stages):
    """Quantise row by row, stage by stage."""
    rows = []
    for row in x.astype(np.float64):
        left, ids = row, []
        for centroids in stages.astype(np.float64):
            ids.append(int(np.square(left - centroids).sum(1).argmin()))
            left = left - centroids[ids[-1]]
        rows.append(ids)
    return np.array(rows)


@pytest.mark.parametrize("k", [0, 5])
def test_more_neighbours_than_centroids_are_refused(k):
    with pytest.raises(ValueError, match=f"k must be 1 to 4, not {k}"):
        CentroidIndex(torch.zeros(4, 2)).top_k(torch.zeros(1, 2), k)


@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_rounding_the_inputs_of_the_product_to_float16_changes_no_answer(scale):
    # What a GPU does; the margin must cover it.
    rng = np.random.default_rng(10)
    centroids = (rng.normal(size=(200, 24)) * scale).astype(np.float32)
    near = centroids[rng.integers(0, 200, 300)] * (1 + 1e-3 * rng.normal(size=(300, 24)))
    far = 100 * scale * rng.normal(size=(20, 24))
    x = np.concatenate([near, far]).astype(np.float32)
    form = FloatForm(torch.from_numpy(centroids), half=True)
    ids, distances = form.assign(torch.from_numpy(x))
    expected_ids, expected_distances = brute_force(x, centroids)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


def test_integer_residuals_stay_exact_integers():
    rng = np.random.default_rng(11)
    x = torch.from_numpy(bytes_of(rng, 100, 6))
    first = torch.from_numpy(bytes_of(rng, 5, 6)).to(torch.int16)
    second = torch.from_numpy(rng.integers(-255, 256, (5, 6)).astype(np.int16))
    quantizer = ResidualQuantizer(torch.stack([first, second]))
    ids = quantizer.encode(x)
    expected, _ = brute_force(x.numpy(), first.numpy())
    np.testing.assert_array_equal(ids[:, 0], expected)
    left = x.numpy().astype(np.int16) - first.numpy()[expected]
    np.testing.assert_array_equal(ids[:, 1], brute_force(left, second.numpy())[0])
    assert torch.equal(residual(x, first, ids[:, 0]), torch.from_numpy(left))


def test_residual_stages_quantise_what_is_left_over():
    rng = np.random.default_rng(9)
    x = rng.integers(-500, 500, (200, 5)).astype(np.float32)  # exact in every step
    stages = rng.integers(-200, 200, (3, 8, 5)).astype(np.float32)
    quantizer = ResidualQuantizer(torch.from_numpy(stages))
    ids = quantizer.encode(torch.from_numpy(x))
    np.testing.assert_array_equal(ids, residual_by_hand(x, stages))
    decoded = quantizer.decode(ids)
    np.testing.assert_array_equal(decoded, stages[np.arange(3), ids].sum(1))
    errors = [np.square(x - stages[np.arange(m), ids[:, :m]].sum(1)).sum() for m in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_one_stage_is_the_nearest_centroid():
    rng = np.random.default_rng(10)
    x, centroids = bytes_of(rng, 100, 6), bytes_of(rng, 9, 6)
    ids = ResidualQuantizer(torch.from_numpy(centroids[None])).encode(torch.from_numpy(x))
    np.testing.assert_array_equal(ids[:, 0], brute_force(x, centroids)[0])


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_id_out_of_range_cannot_be_decoded(bad):
    quantizer = ResidualQuantizer(torch.zeros(1, 4, 2))
    with pytest.raises(ConfigError, match=r"do not lie in \[0, 4\)"):
        quantizer.decode(torch.tensor([[0], [bad]]))
