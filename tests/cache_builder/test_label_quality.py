"""Measures of ids and labels, against values that can be worked out by hand."""

import math

import numpy as np
import pytest

from cache_builder.label_quality import (
    image_probe,
    joint_counts,
    label_quality,
    mutual_information,
    naive_bayes,
    normalised_mutual_information,
    purity,
    tcas_reconstructed,
)

PERFECT = np.diag([300, 200, 100])  # ids are the classes
CONSTANT = np.array([[300, 200, 100], [0, 0, 0]])  # one id for everything
MIXED = np.array([[30, 10, 0], [5, 25, 20], [0, 0, 60], [40, 10, 0]])


def test_pairs_of_id_and_class_are_counted():
    ids = np.array([[0, 0, 2], [1, 1, 1], [2, 0, 0]], np.uint16)
    counts = joint_counts(ids, np.array([0, 1, 0]), 4, 2)
    assert counts.tolist() == [[4, 0], [0, 3], [2, 0], [0, 0]]


def test_ids_that_are_the_classes_hold_their_whole_entropy():
    shares = np.array([300, 200, 100]) / 600
    entropy = -(shares * np.log(shares)).sum()
    # Three cells, three ids, three classes: 3 - 3 - 3 + 1 = -2.
    assert mutual_information(PERFECT) == pytest.approx(entropy + 2 / 1200)
    assert normalised_mutual_information(PERFECT) == pytest.approx(1)
    assert purity(PERFECT) == 1


def test_one_id_for_everything_says_nothing():
    assert mutual_information(CONSTANT) == pytest.approx(0)
    assert normalised_mutual_information(CONSTANT) == 0
    assert purity(CONSTANT) == 0.5


def test_the_correction_takes_the_bias_of_independent_tokens_away():
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 64, (400, 25)), rng.integers(0, 8, 400)
    joint = joint_counts(ids, labels, 64, 8)
    counts = joint[joint > 0]
    expected = (joint.sum(1, keepdims=True) * joint.sum(0) / joint.sum())[joint > 0]
    plug_in = (counts * np.log(counts / expected)).sum() / joint.sum()
    assert plug_in > 0.018
    assert abs(mutual_information(joint)) < 0.003


def test_reconstructed_tcas_is_zero_when_ids_are_classes_and_one_when_there_is_one_id():
    assert tcas_reconstructed(PERFECT) == 0
    assert tcas_reconstructed(CONSTANT) == pytest.approx(1)


def test_reconstructed_tcas_is_the_mean_squared_cosine_of_two_classes():
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    columns = MIXED.T.tolist()
    pairs = [cosine(columns[i], columns[j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert tcas_reconstructed(MIXED) == pytest.approx(sum(pairs) / 3)


@pytest.mark.parametrize(
    "measure", [mutual_information, normalised_mutual_information, purity, tcas_reconstructed]
)
def test_names_of_ids_and_classes_do_not_matter(measure):
    rng = np.random.default_rng(0)
    renamed = MIXED[rng.permutation(4)][:, rng.permutation(3)]
    assert measure(renamed) == pytest.approx(measure(MIXED))


def two_kinds(num_images, num_classes=2, seed=0):
    """Return ids of images whose class decides which ids are frequent."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    ids = rng.integers(0, 6, (num_images, 40))
    liked = rng.random(ids.shape) < 0.4
    ids[liked] = np.broadcast_to(labels[:, None], ids.shape)[liked]
    return ids.astype(np.uint16), labels


def test_naive_bayes_is_the_textbook_one():
    ids, labels = two_kinds(20, num_classes=2)
    right = []
    for image in range(20):
        fold = image // 2 % 5  # the images of both classes alternate
        others = [i for i in range(20) if i // 2 % 5 != fold]
        scores = []
        for label in range(2):
            seen = np.concatenate([ids[i] for i in others if labels[i] == label])
            scores.append(
                sum(math.log((np.sum(seen == j) + 1) / (len(seen) + 6)) for j in ids[image])
            )
        right.append(scores[labels[image]] > scores[1 - labels[image]])
    assert naive_bayes(ids, labels, 6) == pytest.approx((np.mean(right), np.mean(right)))


def test_the_image_probe_tells_classes_by_their_histograms_and_shuffled_labels_do_not():
    probe = image_probe(*two_kinds(200, num_classes=4), 6, np.random.default_rng(0))
    assert probe.accuracy.value > 0.95
    assert probe.accuracy.shuffled < 0.4
    assert (probe.num_images, probe.num_classes, probe.chance_recall) == (200, 4, 0.25)


def test_the_probe_leaves_out_classes_of_one_image():
    ids, labels = two_kinds(11, num_classes=2)
    labels[-1] = 7
    probe = image_probe(ids, np.unique(labels, return_inverse=True)[1], 6, np.random.default_rng(0))
    assert (probe.num_images, probe.num_classes) == (10, 2)


def test_there_is_no_probe_where_every_class_has_one_image():
    ids, _ = two_kinds(5)
    scores = label_quality(ids, np.arange(5), 6)
    assert scores.probe is None
    # Each image is its own class, so a shuffle renames classes and nothing else.
    assert scores.mutual_information.shuffled == pytest.approx(scores.mutual_information.value)


def test_ids_drawn_without_a_look_at_the_labels_score_as_shuffled_ones():
    rng = np.random.default_rng(1)
    # Every image has an id of its own that fills half of it, as skies and walls do.
    ids = rng.integers(0, 32, (120, 36))
    ids[:, :18] = rng.integers(0, 32, (120, 1))
    scores = label_quality(ids, rng.integers(0, 4, 120), 32)
    assert scores.mutual_information.shuffled > 0.05  # the correction does not know of images
    ratio = scores.mutual_information.value / scores.mutual_information.shuffled
    assert 0.7 < ratio < 1.4


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes or more are needed, not 1"):
        label_quality(np.zeros((3, 4), np.uint16), np.zeros(3, np.int64), 2)
