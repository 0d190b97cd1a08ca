"""What a codebook is worth, in numbers that can be checked by hand."""

import math

import numpy as np
import pytest

from cache_builder.quality import idle, near_ties, neighbour_agreement, psnr, usage


def test_an_even_spread_has_the_perplexity_of_its_size():
    measured = usage(np.array([5, 5, 5, 5]))
    assert measured == (20, 4, 4, 2.0, 4.0, 0.25)


def test_unused_ids_do_not_count():
    measured = usage(np.array([3, 0, 1, 0]))
    entropy_bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert measured.num_used == 2
    assert measured.entropy_bits == pytest.approx(entropy_bits)
    assert measured.perplexity == pytest.approx(2**entropy_bits)
    assert measured.max_share == 0.75


def test_no_tokens_have_no_spread():
    measured = usage(np.zeros(3, np.int64))
    assert (measured.num_tokens, measured.num_used, measured.max_share) == (0, 0, 0.0)


def test_psnr_is_on_the_scale_of_bytes():
    assert psnr(255**2) == 0
    assert psnr(255**2 / 1000) == pytest.approx(30)
    assert psnr(0) == math.inf


def test_idle_centroids_are_counted_by_what_falls_to_them():
    counts = np.array([0, 1, 1, 9, 10, 979, 0, 0, 0, 0])
    assert idle(counts) == (5, 2, 8)  # a tenth of the even share of 100 is 10
    assert idle(np.zeros(4, np.int64)) == (4, 0, 4)


def test_a_near_tie_is_within_a_ten_thousandth_and_an_exact_one_is_equal():
    nearest = np.array([10_000, 10_000, 10_000, 0, 5])
    second = np.array([10_001, 10_002, 10_000, 0, 6])
    assert near_ties(nearest, second) == (3, 2)


def test_neighbours_are_compared_along_rows_and_columns():
    ids = np.array([[[1, 1, 2], [3, 1, 2]]])
    agreement = neighbour_agreement(ids)
    assert agreement.horizontal == 1 / 4
    assert agreement.vertical == 2 / 3


def test_shuffled_positions_agree_as_often_as_is_expected():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (3, 5, 6)) * rng.integers(0, 2, (3, 1, 1))
    drawn = [
        neighbour_agreement(np.stack([rng.permutation(i.ravel()).reshape(5, 6) for i in ids]))
        for _ in range(400)
    ]
    expected = neighbour_agreement(ids).shuffled
    assert np.mean([one.horizontal for one in drawn]) == pytest.approx(expected, abs=0.01)
    assert np.mean([one.vertical for one in drawn]) == pytest.approx(expected, abs=0.01)


def test_a_single_patch_has_no_neighbours():
    agreement = neighbour_agreement(np.zeros((2, 1, 1), np.uint16))
    assert all(math.isnan(value) for value in agreement)
