"""DTM: tokens merge as in the official code, with ties too."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cache_builder.errors import ConfigError
from cache_builder.formats import TokenCache
from tests import factories
from tests.trainer.caches import build_small
from tests.trainer.methods import draws, make_objective, paint, read_batch
from trainer.objectives.dtm import draw_schedule, group_means, merge_labels
from trainer.objectives.feature_targets import principal_directions, standardise

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "dtm_morph.npz")


@pytest.fixture(scope="module", params=["float16", "int8"])
def feature_cache(tmp_path_factory, request):
    """A cache of 8 x 8 unit vectors of a small network, and their ids."""
    root = tmp_path_factory.mktemp("features")
    codebook = factories.feature_codebook(metric="cosine")
    return build_small(root, codebook, factories.photo_images(4), store_features=request.param)


def codebook_of(cache_path):
    with TokenCache.open(cache_path) as cache:
        return cache.codebook


def groups_of(labels):
    found = {}
    for token, label in enumerate(labels.tolist()):
        found.setdefault(label, set()).add(token)
    return sorted(map(sorted, found.values()))


def merge_slowly(features, r, iterations, protect_first):
    """The definition: lists of members, means, one token after another."""
    groups = [[token] for token in range(len(features))]
    for _ in range(iterations):
        count = min(r, (len(groups) - 1) // 2)
        if count <= 0:
            break
        means = [features[group].mean(0) for group in groups]
        units = [mean / np.linalg.norm(mean) for mean in means]
        first, second = range(0, len(groups), 2), range(1, len(groups), 2)
        best = {}
        for a in first:
            cosines = [round(float(units[a] @ units[b]), 9) for b in second]
            if cosines and not (protect_first and a == 0):
                best[a] = max(cosines), second[cosines.index(max(cosines))]
        ranked = sorted(best, key=lambda a: -best[a][0])
        joins = ranked[:count]
        after = {b: list(groups[b]) for b in second}
        for a in joins:
            after[best[a][1]] += groups[a]
        groups = [groups[a] for a in first if a not in joins] + [after[b] for b in second]
    labels = np.empty(len(features), np.int64)
    for label, group in enumerate(groups):
        labels[group] = label
    return labels


@pytest.mark.parametrize("case", range(int(VECTORS["n"])))
def test_groups_are_those_of_the_official_code(case):
    num_tokens, dim, r, iterations = VECTORS[f"cfg_{case}"].tolist()
    random = np.random.RandomState(int(VECTORS[f"seed_{case}"]))
    features = torch.from_numpy(random.standard_normal((2, num_tokens, dim)).astype(np.float32))
    labels = merge_labels(features, r, iterations, protect_first=True)
    assert labels.tolist() == VECTORS[f"labels_{case}"].tolist()
    assert int(labels.max()) + 1 == VECTORS[f"n_{case}"][-1]


@pytest.mark.parametrize(
    ("protect_first", "iterations", "expected"),
    [
        (True, 1, [[0], [1, 2], [3, 4], [5]]),
        (True, 2, [[0], [1, 2], [3, 4, 5]]),
        (False, 1, [[0], [1, 2], [3, 4], [5]]),
        (False, 2, [[0, 1, 2], [3, 4], [5]]),
    ],
)
def test_six_directions_merge_by_their_angles(protect_first, iterations, expected):
    angles = torch.tensor([0.0, 10, 12, 80, 78, 40]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], -1)[None]
    assert groups_of(merge_labels(features, 2, iterations, protect_first)[0]) == expected


@pytest.mark.parametrize("protect_first", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_merging_is_its_definition_with_ties_too(protect_first, num_tokens, is_tied):
    random = np.random.default_rng(num_tokens)
    features = random.standard_normal((5, num_tokens, 4))
    if is_tied:
        features = np.eye(4)[random.integers(0, 4, (5, num_tokens))]
    for r, iterations in [(0, 3), (1, 1), (2, 3), (3, 4), (99, 2)]:
        found = merge_labels(torch.from_numpy(features).float(), r, iterations, protect_first)
        expected = [merge_slowly(each, r, iterations, protect_first) for each in features]
        assert np.array_equal(found, np.stack(expected))


def test_equal_tokens_merge_first():
    ids = torch.tensor([[0, 1, 0, 1, 2, 0, 3, 2]])
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))[ids]
    # The even positions 0, 2 and 4 have an equal at an odd one; 6 has none.
    assert groups_of(merge_labels(features, 3, 1)[0]) == [[0, 2, 5], [1], [3], [4, 7], [6]]


def test_a_sample_merges_the_same_in_any_batch():
    features = torch.randn(6, 49, 12, generator=torch.Generator().manual_seed(0))
    whole = merge_labels(features, 5, 6)
    assert torch.equal(whole[3:], merge_labels(features[3:], 5, 6))


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="r and iterations are 0 or more, not -1 and 2"):
        merge_labels(torch.zeros(1, 4, 2), -1, 2)


def test_a_group_is_replaced_by_its_mean():
    rows = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 0, 2, 0], [3, 3, 3, 0, 1]])
    found = group_means(rows, labels)
    for sample in range(2):
        for token in range(5):
            members = rows[sample, labels[sample] == labels[sample, token]]
            torch.testing.assert_close(found[sample, token], members.mean(0))


def test_schedules_are_those_of_the_official_code():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_schedule(generator, 196, 14) for _ in range(4000)]
    assert {k for _, k in drawn} == set(range(1, 15))
    assert all(0 <= r * k <= 196 for r, k in drawn)
    left = []
    for r, k in drawn:
        count = 196
        for _ in range(k):
            count -= min(r, (count - 1) // 2)
        left.append(count)
    # Recorded of that code: mean 99, least 8, 0.5 % without any merging.
    assert np.mean(left) == pytest.approx(99, abs=3)
    assert min(left) == pytest.approx(8, abs=2)
    assert np.mean(np.array(left) == 196) == pytest.approx(0.005, abs=0.004)


@pytest.mark.parametrize("loss", ["smoothl1", "negcosine", "l1", "l2"])
def test_the_loss_compares_group_means_at_every_patch(tiny_cache, loss):
    objective = make_objective(tiny_cache, "dtm", loss=loss, num_schedules=3).eval()
    images, targets = read_batch(tiny_cache, objective)
    result = objective(images, targets, draws())
    predicted = objective.predict(images, objective.masks.draw(draws()))
    wanted = objective.targets(targets)
    shared, total = draws().shared, 0.0
    for _ in range(3):
        r, iterations = draw_schedule(shared, 16, 14)
        for p, t in zip(predicted, wanted, strict=True):
            labels = merge_labels(t[None], r, iterations)[0]
            for label in labels:
                x = p[labels == label].mean(0) - t[labels == label].mean(0)
                total += {
                    "smoothl1": torch.where(x.abs() < 2, x**2 / 4, x.abs() - 1).mean(),
                    "l1": x.abs().mean(),
                    "l2": x.square().mean(),
                    "negcosine": 1 - normalize(p[labels == label].mean(0), dim=0)
                    @ normalize(t[labels == label].mean(0), dim=0),
                }[loss]  # fmt: skip
    torch.testing.assert_close(result["loss"], total / (3 * 4 * 16), rtol=1e-4, atol=1e-5)
    cosine = (normalize(predicted, dim=-1) * normalize(wanted, dim=-1)).sum(-1).mean()
    torch.testing.assert_close(result["cosine"], cosine.detach())


def test_targets_are_normalised_after_they_are_merged(tiny_cache):
    objective = make_objective(
        tiny_cache, "dtm", loss="l2", normalize_target=True, max_iterations=1, max_merged=7
    )
    _, targets = read_batch(tiny_cache, objective)
    wanted = objective.targets(targets)
    labels = merge_labels(wanted, 7, 1)
    merged = group_means(wanted, labels)
    torch.testing.assert_close(merged.shape, wanted.shape)
    assert objective._loss(standardise(merged), wanted, labels) < 1e-6
    assert objective._loss(merged, wanted, labels) > 0.01


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_masked_patch_shows_changes_no_prediction(tiny_cache, masked_tokens):
    objective = make_objective(tiny_cache, "dtm", masked_tokens=masked_tokens).eval()
    images, _ = read_batch(tiny_cache, objective)
    masks = objective.masks.draw(draws())
    predicted = objective.predict(images, masks)
    assert predicted.shape == (4, 16, 48)
    assert torch.equal(predicted, objective.predict(paint(images, masks.hidden, 0.9), masks))


def test_pixel_targets_have_mean_0_and_variance_1_over_the_codebook(tiny_cache):
    objective = make_objective(tiny_cache, "dtm")
    _, targets = read_batch(tiny_cache, objective)
    found = objective.targets(targets)
    pixels = torch.from_numpy(factories.colour_codebook().centroids[0]).double()
    expected = (pixels - pixels.mean()) / pixels.std(correction=0)
    torch.testing.assert_close(found, expected.float()[targets.token_ids])


def test_targets_of_several_stages_are_the_sums_of_their_centroids(residual_cache):
    objective = make_objective(residual_cache, "dtm", source="residual")
    _, targets = read_batch(residual_cache, objective)
    assert targets.token_ids.shape == (4, 16, 2)
    stages = torch.from_numpy(codebook_of(residual_cache).centroids).double()
    sums = sum(stage[targets.token_ids[..., m]] for m, stage in enumerate(stages))
    spread = sum(stage.var(correction=0) for stage in stages).sqrt()
    mean = sum(stage.mean() for stage in stages)
    torch.testing.assert_close(objective.targets(targets), ((sums - mean) / spread).float())


@pytest.mark.parametrize("source", ["centroids", "features"])
def test_unit_vectors_are_scaled_so_that_a_value_is_of_order_one(feature_cache, source):
    objective = make_objective(feature_cache, "dtm", source=source)
    _, targets = read_batch(feature_cache, objective)
    found = objective.targets(targets)
    scale = math.sqrt(found.shape[-1])
    if source == "centroids":
        centroids = torch.from_numpy(codebook_of(feature_cache).centroids[0])
        torch.testing.assert_close(found, centroids[targets.token_ids] * scale)
    else:
        torch.testing.assert_close(found, targets.features * scale)
    torch.testing.assert_close(found.square().mean(-1), torch.ones(4, 64), rtol=0.02, atol=0)


def train_once(cache, **settings):
    objective = make_objective(cache, "dtm", **settings)
    images, targets = read_batch(cache, objective)
    objective(images, targets, draws())["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())
    ids = objective.preview(images, targets, draws()).token_ids
    assert ids.shape == targets.token_ids.shape[:2]
    assert 0 <= ids.min() <= ids.max() < codebook_of(cache).vocab_size


@pytest.mark.parametrize("settings", [{}, {"target_dim": 8, "masked_tokens": "drop"}])
def test_sums_of_centroids_are_trained_on(residual_cache, settings):
    train_once(residual_cache, source="residual", **settings)


@pytest.mark.parametrize("settings", [{}, {"target_dim": 8, "masked_tokens": "drop"}])
def test_stored_features_are_trained_on(feature_cache, settings):
    train_once(feature_cache, source="features", **settings)


def test_a_projection_keeps_what_the_centroids_span():
    table = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    # Vectors of 9 values in a space of 3.
    table = (table @ torch.randn(3, 9, generator=torch.Generator().manual_seed(1)).double()).float()
    weights = torch.full((1, 6), 1 / 6).double()
    directions = principal_directions(table, weights, 3)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3))
    assert (directions.max(0).values > -directions.min(0).values).all()
    projected = table[0] @ directions
    torch.testing.assert_close(projected @ projected.T, table[0] @ table[0].T)
    lengths = projected.square().sum(0)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_a_projection_is_part_of_a_checkpoint_and_a_table_without_one_is_not(tiny_cache):
    def buffers(**settings):
        objective = make_objective(tiny_cache, "dtm", **settings)
        return [name for name in objective.state_dict() if name.startswith("targets.")]

    assert buffers() == []
    assert buffers(target_dim=5) == ["targets.projection", "targets.table"]


@pytest.mark.parametrize("normalize_target", [False, True])
def test_a_preview_names_the_nearest_centroid(residual_cache, normalize_target):
    objective = make_objective(
        residual_cache, "dtm", source="residual", normalize_target=normalize_target
    ).eval()
    images, targets = read_batch(residual_cache, objective)
    wanted = objective.targets.table[0][3]
    if normalize_target:
        wanted = standardise(wanted)
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias.copy_(wanted)
    preview = objective.preview(images, targets, draws())
    assert preview.predicted.all()
    assert preview.token_ids.unique().tolist() == [3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0, "loss": "l1"}, "beta belongs to loss = 'smoothl1'"),
        ({"max_merged": 17}, "max_merged 17 is more than the 16 patches"),
        ({"target_dim": 48}, "target_dim 48 is no projection: targets have 48 values"),
        ({"source": "residual"}, "the cache holds one. Set objective.source=centroids"),
        ({"source": "features"}, "payload 'features', which the cache does not have"),
    ],
)
def test_settings_that_the_cache_cannot_serve_are_refused(tiny_cache, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(tiny_cache, "dtm", **settings)


def test_one_centroid_per_patch_is_refused_of_a_cache_of_several_ids(residual_cache):
    with pytest.raises(ConfigError, match=r"2 token ids per patch.*objective.source=residual"):
        make_objective(residual_cache, "dtm")
