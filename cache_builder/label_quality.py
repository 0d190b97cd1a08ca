"""What token ids say of the labels of their images.

All of these drift with K and with n, for meaningless tokens too: more ids and fewer tokens look
better. So every value comes with the one for shuffled labels beside it, and values of two codebooks
are compared at equal K, equal grid and equal n only. The labels are shuffled among images, not
among patches: the patches of one image are alike, and a shuffle that parted them would flatter
every codebook.

Measures of single patches (mutual information, purity, TCAS) can rank two codebooks one way and
the image probe the other. The probe is nearer to what pre-training wants of a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]  # (B, N) token ids of B images
Labels = NDArray[np.int64]  # (B,) in [0, C)
Counts = NDArray[np.int64]  # (K, C): how often an id occurs in images of a class

_NUM_SHUFFLES = 5
_NUM_FOLDS = 5
_IMAGES_PER_BLOCK = 128


class Compared(NamedTuple):
    """A measure beside the mean of the same one for shuffled labels."""

    value: float
    shuffled: float


class Recall(NamedTuple):
    """How well labels of images are told from histograms of their tokens."""

    accuracy: float
    mean_recall: float  # of the classes, so that a large one does not count for more


class ImageProbe(NamedTuple):
    """Naive Bayes on token histograms of images, each predicted by a model that did not see it."""

    num_images: int  # of classes with two images or more
    num_classes: int
    accuracy: Compared
    largest_class: float  # accuracy of always naming the most frequent class
    mean_recall: Compared
    chance_recall: float  # 1 / num_classes


class LabelQuality(NamedTuple):
    """What tokens say of labels."""

    num_images: int
    num_classes: int  # that occur
    mutual_information: Compared  # nats, Miller-Madow
    normalised: Compared  # mutual information over the mean of the two entropies, in [0, 1]
    purity: Compared
    tcas_reconstructed: Compared
    probe: ImageProbe | None  # None where no two classes have two images


def label_quality(token_ids: Ids, labels: Labels, vocab_size: int, seed: int = 0) -> LabelQuality:
    """Measure everything here, beside the mean of five shuffles.

    Args:
        token_ids: (B, N).
        labels: (B,), any integers.
        vocab_size: K.
        seed: Of the shuffles.

    Raises:
        ValueError: There are fewer than two classes.
    """
    classes, labels = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"two classes or more are needed, not {len(classes)}")
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(labels) for _ in range(_NUM_SHUFFLES)]
    joints = [
        joint_counts(token_ids, given, vocab_size, len(classes)) for given in (labels, *shuffles)
    ]

    def compare(measure: Callable[[Counts], float]) -> Compared:
        value, *others = (measure(joint) for joint in joints)
        return Compared(value, float(np.mean(others)))

    return LabelQuality(
        num_images=len(labels),
        num_classes=len(classes),
        mutual_information=compare(mutual_information),
        normalised=compare(normalised_mutual_information),
        purity=compare(purity),
        tcas_reconstructed=compare(tcas_reconstructed),
        probe=image_probe(token_ids, labels, vocab_size, rng),
    )


def joint_counts(token_ids: Ids, labels: Labels, vocab_size: int, num_classes: int) -> Counts:
    """Return how often every id occurs in images of every class, (K, C)."""
    counts = np.zeros((num_classes, vocab_size), np.int64)
    for ids, label in zip(token_ids, labels, strict=True):
        counts[label] += np.bincount(ids, minlength=vocab_size)
    return counts.T


def mutual_information(joint: Counts) -> float:
    """Return the mutual information of id and class, nats, with the Miller-Madow correction.

    The plug-in value is too large by about (K_xy - K_x - K_y + 1) / 2n, K counting cells that
    occur. The correction assumes independent tokens; those of one image are not, so what is left of
    the bias shows in the value for shuffled labels.
    """
    occurring = [int((counts > 0).sum()) for counts in (joint, joint.sum(1), joint.sum(0))]
    bias = (occurring[0] - occurring[1] - occurring[2] + 1) / (2 * int(joint.sum()))
    return _plug_in(joint) - bias


def normalised_mutual_information(joint: Counts) -> float:
    """Return the plug-in mutual information over the mean of the two entropies, in [0, 1]."""
    entropies = _entropy(joint.sum(1)) + _entropy(joint.sum(0))
    return 2 * _plug_in(joint) / entropies if entropies else 0.0


def purity(joint: Counts) -> float:
    """Return the share of patches whose class is the most frequent one of their id."""
    return float(joint.max(1).sum() / joint.sum())


def tcas_reconstructed(joint: Counts) -> float:
    """Return how alike the id histograms of different classes are; lower is better.

    Reconstructed from a description of the token-class alignment similarity of ClusterMIM
    (arXiv:2407.09087), whose formula was not at hand, so values need not be those of the paper. The
    columns of the counts are L2-normalised, and the squared cosines of all pairs of different
    classes averaged: 0 where no id is shared by two classes, 1 where all classes have the same
    histogram.
    """
    columns = joint / np.linalg.norm(joint, axis=0)
    squared = np.square(columns.T @ columns)
    num_classes = joint.shape[1]
    total = squared.sum() - np.trace(squared)
    return float(total / (num_classes * (num_classes - 1)))


def image_probe(
    token_ids: Ids, labels: Labels, vocab_size: int, rng: np.random.Generator
) -> ImageProbe | None:
    """Tell the class of an image from the histogram of its ids, beside shuffled labels.

    Images of classes that have only one are left out: nothing could be learned of them. Returns
    None where fewer than two classes are left.
    """
    sizes = np.bincount(labels)
    kept = sizes[labels] > 1
    classes, labels = np.unique(labels[kept], return_inverse=True)
    if len(classes) < 2:
        return None
    token_ids = token_ids[kept]
    found = naive_bayes(token_ids, labels, vocab_size)
    shuffled = [
        naive_bayes(token_ids, rng.permutation(labels), vocab_size) for _ in range(_NUM_SHUFFLES)
    ]
    return ImageProbe(
        num_images=len(labels),
        num_classes=len(classes),
        accuracy=Compared(found.accuracy, float(np.mean([one.accuracy for one in shuffled]))),
        largest_class=float(np.bincount(labels).max() / len(labels)),
        mean_recall=Compared(
            found.mean_recall, float(np.mean([one.mean_recall for one in shuffled]))
        ),
        chance_recall=1 / len(classes),
    )


def naive_bayes(token_ids: Ids, labels: Labels, vocab_size: int) -> Recall:
    """Predict every label by multinomial naive Bayes learned from the other folds.

    The images of each class are dealt to five folds in their order. Counts are smoothed by one, and
    all classes are equally likely beforehand.

    Args:
        token_ids: (B, N).
        labels: (B,), every class in [0, C) at least twice.
        vocab_size: K.
    """
    num_classes = int(labels.max()) + 1
    folds = np.empty(len(labels), np.int64)
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        folds[members] = np.arange(len(members)) % _NUM_FOLDS
    everything = joint_counts(token_ids, labels, vocab_size, num_classes)
    right = np.zeros(len(labels), bool)
    for fold in range(_NUM_FOLDS):
        (tested,) = np.nonzero(folds == fold)
        seen = everything - joint_counts(token_ids[tested], labels[tested], vocab_size, num_classes)
        smooth = seen + 1.0
        log_shares = np.log(smooth / smooth.sum(0))
        for start in range(0, len(tested), _IMAGES_PER_BLOCK):
            block = tested[start : start + _IMAGES_PER_BLOCK]
            histograms = np.stack([np.bincount(token_ids[i], minlength=vocab_size) for i in block])
            right[block] = (histograms @ log_shares).argmax(1) == labels[block]
    recalls = [right[labels == label].mean() for label in range(num_classes)]
    return Recall(float(right.mean()), float(np.mean(recalls)))


def _plug_in(joint: Counts) -> float:
    total = joint.sum()
    expected = joint.sum(1, keepdims=True) * (joint.sum(0, keepdims=True) / total)
    there = joint > 0
    counts = joint[there]
    return float((counts * np.log(counts / expected[there])).sum() / total)


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
