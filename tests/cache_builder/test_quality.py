"""What a codebook is worth, in numbers that can be checked by hand."""

import math

import numpy as np
import pytest

from cache_builder.quality import psnr, usage


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
