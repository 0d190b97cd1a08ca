"""Which labelled images are trained on, and which are kept for testing."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from cache_builder.errors import ConfigError
from trainer.labelled import LabelledImages, Place, class_mapping, is_test_key, open_labelled


class Split(NamedTuple):
    """Labelled images in two parts; classes are those of the training part."""

    train: LabelledImages
    places: list[Place]
    labels: list[int]
    test: LabelledImages
    test_places: list[Place]
    test_labels: list[int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those that no image is of."""
        return max(len(self.class_names), max(self.labels) + 1)

    def digest(self) -> str:
        """Return the SHA-256 of the keys and labels of the training part."""
        digest = hashlib.sha256()
        for place, label in zip(self.places, self.labels, strict=True):
            digest.update(f"{label} {place.key}\n".encode())
        return digest.hexdigest()

    def chance(self) -> float:
        """Return how often the commonest class of the training part is right in the test part."""
        counts = [0] * self.num_classes
        for label in self.labels:
            counts[label] += 1
        commonest = counts.index(max(counts))
        return self.test_labels.count(commonest) / len(self.test_labels)


def open_split(
    data: str | Path, test_data: str | Path | None = None, images: str | None = None
) -> Split:
    """Open labelled images; without `test_data`, a fifth by key is kept for testing.

    Raises:
        ArtifactError: A cache is unfinished or damaged.
        SourceError: There are no images at a place.
        ConfigError: They are of fewer than two classes, or those to test on of other classes.
    """
    train = open_labelled(data, images)
    every = _labelled(train)
    if test_data is None:
        test = train
        kept = [pair for pair in every if not is_test_key(pair[0].key)]
        tested = [pair for pair in every if is_test_key(pair[0].key)]
    else:
        test = open_labelled(test_data)
        kept, tested = every, _labelled(test)
        if (mapping := class_mapping(train, test)) is not None:
            tested = [(place, mapping[label]) for place, label in tested]
    num_classes = len({label for _, label in kept})
    if num_classes < 2 or not tested:
        raise ConfigError(
            f"{data} has {len(kept)} labelled images of {num_classes} classes to train on, and "
            f"there are {len(tested)} to test on. Fine-tuning needs two classes or more: a folder "
            "with one subfolder per class, tars with .cls members, or a cache of such images."
        )
    return Split(
        train,
        [place for place, _ in kept],
        [label for _, label in kept],
        test,
        [place for place, _ in tested],
        [label for _, label in tested],
        train.class_names,
    )


def _labelled(images: LabelledImages) -> list[tuple[Place, int]]:
    pairs = zip(images.places(), images.labels(), strict=True)
    return [(place, label) for place, label in pairs if label is not None]
