"""`verify` finds every kind of damage to soft targets and features, digests right or wrong."""

import re

import numpy as np
import pytest
import torch

from cache_builder.formats import TokenCache
from cache_builder.formats.manifest import CacheManifest, to_json
from cache_builder.payload_checks import num_near_ties
from cache_builder.retokenize import Retokenized
from cache_builder.verify import run as verify
from tests import factories
from tests.cache_builder.test_verify import rewrite_unit

NUM_TOKENS = 3 * 2 * 64  # three images of two views


@pytest.fixture(scope="module", params=["int8", "float16"])
def finished(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    factories.write_folder(root / "images", factories.photo_images(3))
    factories.feature_codebook().save(root / "codebook.safetensors")
    for layout in ("webdataset", "zarr"):
        factories.build_cache(
            images=str(root / "images"), codebook=root / "codebook.safetensors", out=root / layout,
            layout=layout, num_views=2, unit_size=3, soft_top_k=4, soft_temperature=0.5,
            store_features=request.param,
        )  # fmt: skip
    return root


@pytest.fixture
def cache(finished, tmp_path):
    """Return a copy of a cache of three photographs in one tar, to be damaged."""
    return factories.write_folder(tmp_path / "cache", factories.contents(finished / "webdataset"))


def changed(cache, field, change):
    """Change one array of every sample in place, every digest to match; return the problems."""

    def on_copy(sample):
        array = getattr(sample, field).copy()
        change(array)
        return sample._replace(**{field: array})

    rewrite_unit(cache, 0, on_copy)
    return verify(cache, device="cpu").problems


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_a_whole_cache_has_the_same_targets_again(finished, layout):
    report = verify(finished / layout, retokenize=3, device="cpu")
    assert report.problems == []
    expected = Retokenized(
        3, NUM_TOKENS, 0, 0, num_soft_ids=NUM_TOKENS * 4, num_features=NUM_TOKENS
    )
    # In batches of another size a model may round otherwise, and a near tie fall the other way.
    (again,) = report.retokenized.values()
    assert again._replace(num_soft_near_ties=0, num_near_ties=0) == expected
    assert again.num_soft_near_ties < 20


def swap_first_two(array):
    array[0, 0, 0, [0, 1]] = array[0, 0, 0, [1, 0]]


def assign(where, value):
    def change(array):
        array[where] = value

    return change


FIRST = (0, 0, 0)


@pytest.mark.parametrize(
    ("field", "change", "expected"),
    [
        ("soft_ids", assign((1, 2, 3, 3), 999), r"soft id 999 is not below K=16"),
        ("soft_ids", swap_first_two, r"the first soft id of 1 patches is not their token id"),
        ("token_ids", assign(FIRST, 16), r"token id 16 is not below K=16"),
        ("soft_probs", assign((*FIRST, 2), np.nan), r"probabilities are negative, infinite or NaN"),
        ("soft_probs", assign((*FIRST, 3), -0.1), r"probabilities are negative, infinite or NaN"),
        ("soft_probs", assign(FIRST, [0.4, 0.1, 0.3, 0.2]), r"probabilities of 1 patches increase"),
        (
            "soft_probs",
            assign(FIRST, [0.5, 0.2, 0.2, 0.09]),
            r"1 patches do not add up to 1, one t",
        ),
    ],
)
def test_soft_targets_that_are_none_are_found(cache, field, change, expected):
    problems = changed(cache, field, change)
    assert len(problems) == 3
    assert all(re.search(expected, problem) for problem in problems)


def test_a_soft_id_that_occurs_twice_is_found(cache):
    def repeat(array):
        array[0, 0, 0, 3] = array[0, 0, 0, 1]

    problems = changed(cache, "soft_ids", repeat)
    assert [problem.split(": ")[2] for problem in problems] == [
        "1 patches have a soft id twice"
    ] * 3


def is_int8(cache):
    with TokenCache.open(cache) as opened:
        return opened.manifest.spec.features.dtype == "int8"


def test_features_that_are_none_are_found(cache):
    cases = [("features", assign((*FIRST, 5), np.inf), "features hold NaN or infinity")]
    if is_int8(cache):
        cases = [
            ("features", assign((*FIRST, 5), -128), "a feature value is -128"),
            ("feature_scales", assign(FIRST, np.nan), "scales are negative, infinite or NaN"),
            ("feature_scales", assign(FIRST, -1), "scales are negative, infinite or NaN"),
        ]
    whole = factories.contents(cache)
    for field, change, expected in cases:
        problems = changed(cache, field, change)
        assert len(problems) == 3
        assert all(expected in problem for problem in problems)
        factories.write_folder(cache, whole)


@pytest.mark.parametrize("field", ["soft_ids", "soft_probs", "features"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda array: array[:, :4], r"\(2, 4, 8, \d+\) \w+"),
        (lambda array: array.astype(np.float32), r"\(2, 8, 8, \d+\) float32"),
        (lambda array: None, "missing"),
    ],
)
def test_an_array_of_another_shape_or_type_or_none_at_all_is_found(cache, field, change, found):
    rewrite_unit(cache, 0, lambda s: s._replace(**{field: change(getattr(s, field))}))
    problem = verify(cache, device="cpu").problems[0]
    name = field.replace("_", " ")
    assert re.search(rf"{name} of a/000 are {found}, expected \(2, 8, 8, \d+\) \w+", problem)


def test_soft_ids_of_other_centroids_are_found_by_tokenising_again(cache):
    def roll_the_rest(array):
        array[..., 1:] = np.roll(array[..., 1:], 1, axis=-1)

    assert changed(cache, "soft_ids", roll_the_rest) == []
    report = verify(cache, retokenize=3, device="cpu")
    (again,) = report.retokenized.values()
    assert again.num_soft_different + again.num_soft_near_ties == NUM_TOKENS * 3
    assert again.num_soft_near_ties < NUM_TOKENS / 4
    assert f"{again.num_soft_different:,} of 1,536 soft ids differ" in report.problems[0]


def test_probabilities_of_another_temperature_are_found_by_tokenising_again(cache):
    def sharpen(array):
        sharper = array.astype(np.float64) ** 2
        array[:] = sharper / sharper.sum(-1, keepdims=True)

    assert changed(cache, "soft_probs", sharpen) == []
    (problem,) = verify(cache, retokenize=3, device="cpu").problems
    assert "soft probabilities differ from those of the same views tokenised again" in problem


def test_features_of_other_patches_are_found_by_tokenising_again(cache):
    def mirror(array):
        array[0] = array[0, :, ::-1].copy()

    assert changed(cache, "features", mirror) == []
    report = verify(cache, retokenize=3, device="cpu")
    # One of the two views of every image.
    (again,) = report.retokenized.values()
    assert NUM_TOKENS * 0.45 < again.num_features_different <= NUM_TOKENS / 2
    assert re.search(r"of 384 features differ from those of the same views", report.problems[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"payloads": ("tokens", "views", "image", "soft")},
            r"manifest.json is not that of its files: payloads is \[.*\"soft\"\], not \[",
        ),
        ({"soft": None}, r"manifest.json is not that of its files: soft is null, not \{"),
    ],
)
def test_a_manifest_that_contradicts_its_records_is_found(cache, changes, expected):
    manifest = CacheManifest.load(cache).model_copy(update=changes)
    (cache / "manifest.json").write_bytes(to_json(manifest))
    (problem,) = verify(cache, device="cpu").problems
    assert re.search(expected, problem)


def test_centroids_that_float32_cannot_tell_apart_are_near_ties():
    generator = torch.Generator().manual_seed(0)
    # Far from the origin and near to each other: |x|^2 - 2 xc + |c|^2 cancels.
    centroids, features = (
        20 + 0.08 * torch.randn(num, 32, generator=generator) for num in (64, 2000)
    )
    rounded = torch.cdist(features, centroids, compute_mode="use_mm_for_euclid_dist").argmin(1)
    exact = torch.cdist(features.double(), centroids.double()).argmin(1)
    turned = rounded != exact
    assert 20 < int(turned.sum()) < 2000
    parts = (features[turned], rounded[turned], exact[turned])
    assert num_near_ties(centroids.numpy(), *parts) == int(turned.sum())
    farthest = torch.cdist(features.double(), centroids.double()).argmax(1)
    assert num_near_ties(centroids.numpy(), features, farthest, exact) < 20
