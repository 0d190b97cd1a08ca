"""Views are boxes that depend on (seed, key, view, picture size) and on nothing else."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache_builder.formats import View, ViewSpec, draw_views
from cache_builder.formats.views import centre_square, random_box

VECTORS = Path(__file__).parents[2] / "vectors"
SIDES = st.integers(1, 500)


def test_boxes_are_those_of_the_official_beit_code():
    recorded = np.load(VECTORS / "beit_crops.npz")
    rng, last_size = random.Random(), None
    for width, height, *box in recorded["rows"].tolist():
        if (height, width) != last_size:
            rng.seed(int(recorded["seed"]))
            last_size = (height, width)
        assert random_box((height, width), (0.2, 1.0), (3 / 4, 4 / 3), rng) == tuple(box)


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((10, 10), (0, 0, 10, 10)),
        ((10, 20), (0, 5, 10, 10)),
        ((20, 11), (4, 0, 11, 11)),
        ((3, 1), (1, 0, 1, 1)),
    ],
)
def test_view_0_is_the_largest_centred_square_and_not_mirrored(image_size, expected):
    assert centre_square(image_size) == View(*expected, hflip=False)
    assert draw_views(ViewSpec(hflip=1), "key", image_size) == [View(*expected, hflip=False)]


@given(height=SIDES, width=SIDES, key=st.text(), seed=st.integers(-5, 5))
def test_every_view_lies_within_the_picture(height, width, key, seed):
    spec = ViewSpec(num_views=4, seed=seed, scale=(0.01, 1.0), ratio=(0.1, 10.0))
    for top, left, h, w, hflip in draw_views(spec, key, (height, width)):
        assert top >= 0
        assert left >= 0
        assert h >= 1
        assert w >= 1
        assert top + h <= height
        assert left + w <= width
        assert hflip in (True, False)


@given(height=st.integers(30, 500), width=st.integers(30, 500), seed=st.integers(0, 10**6))
def test_a_crop_keeps_to_its_share_and_its_ratio(height, width, seed):
    scale, ratio = (0.3, 0.6), (0.8, 1.25)
    _, _, h, w = random_box((height, width), scale, ratio, random.Random(seed))
    if ratio[0] <= width / height <= ratio[1]:
        # Sides are whole pixels, each off by a half at most.
        assert scale[0] * height * width <= (h + 0.5) * (w + 0.5)
        assert (h - 0.5) * (w - 0.5) <= scale[1] * height * width
    assert (w + 0.5) / (h - 0.5) >= ratio[0]
    assert (w - 0.5) / (h + 0.5) <= ratio[1]


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        ((10, 1000), (0, 493, 10, 13)),  # 4/3 of ten rows
        ((1000, 10), (493, 0, 13, 10)),
        ((1, 5000), (0, 2499, 1, 1)),
    ],
)
def test_where_no_crop_fits_the_centre_within_the_ratio_is_taken(image_size, expected):
    box = random_box(image_size, (1.0, 1.0), (3 / 4, 4 / 3), random.Random(0))
    assert box == expected


def test_a_view_does_not_depend_on_how_many_follow_it():
    few = draw_views(ViewSpec(num_views=2), "a/b", (60, 80))
    many = draw_views(ViewSpec(num_views=7), "a/b", (60, 80))
    assert many[:2] == few


@pytest.mark.parametrize(
    ("spec", "key", "image_size"),
    [
        (ViewSpec(num_views=3, seed=1), "key", (60, 80)),
        (ViewSpec(num_views=3), "other", (60, 80)),
        (ViewSpec(num_views=3), "key", (61, 80)),
    ],
)
def test_seed_key_and_size_each_change_the_random_views(spec, key, image_size):
    reference = draw_views(ViewSpec(num_views=3), "key", (60, 80))
    assert draw_views(spec, key, image_size)[1:] != reference[1:]


def test_view_size_and_patch_size_do_not_change_the_boxes():
    # So that two tokenizers of different grids can look at the same crops.
    small = ViewSpec(num_views=3, size=32, patch_size=4)
    assert draw_views(small, "key", (60, 80)) == draw_views(ViewSpec(num_views=3), "key", (60, 80))


def test_random_views_differ_among_themselves():
    views = draw_views(ViewSpec(num_views=9), "key", (200, 300))
    assert len({view[:4] for view in views}) == 9


@pytest.mark.parametrize(("hflip", "low", "high"), [(0, 0, 0), (0.5, 420, 580), (1, 999, 999)])
def test_the_share_of_mirrored_views_is_the_one_asked_for(hflip, low, high):
    views = draw_views(ViewSpec(num_views=1000, hflip=hflip), "key", (60, 80))
    assert low <= sum(view.hflip for view in views) <= high


def test_areas_are_spread_evenly_over_the_scale():
    views = draw_views(ViewSpec(num_views=2000, scale=(0.2, 0.6)), "key", (300, 300))[1:]
    shares = np.array([v.height * v.width / 90_000 for v in views])
    assert np.histogram(shares, 4, (0.2, 0.6))[0] == pytest.approx([500] * 4, rel=0.15)
    # The logarithm of the ratio is uniform, so wide and tall crops are equally many.
    assert np.mean([math.log(v.width / v.height) for v in views]) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 30, "patch_size": 16}, "30 is not a multiple of patch size 16"),
        ({"scale": (0.5, 0.2)}, r"scale must be 0 < low <= high <= 1"),
        ({"scale": (0.0, 1.0)}, r"scale must be"),
        ({"scale": (0.5, 1.5)}, r"scale must be"),
        ({"ratio": (2.0, 1.0)}, r"ratio must be 0 < low <= high"),
        ({"num_views": 0}, "num_views"),
        ({"hflip": 1.5}, "hflip"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ViewSpec(**fields)


def test_the_grid_is_size_over_patch_size():
    assert ViewSpec(size=32, patch_size=4).grid == (8, 8)
