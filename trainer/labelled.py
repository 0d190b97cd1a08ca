"""Labelled images to evaluate on, from a cache or from any source that a cache can be built of.

Of a cache only the images and labels are used, so it may be any tokenizer's. Classes of two places
are the same where their names are; places without names agree on the numbers. Images without a
label, and images that cannot be decoded, are left out and counted in a warning, never in silence.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from cache_builder import imaging
from cache_builder.errors import ConfigError, ImageError, SourceError
from cache_builder.formats import TokenCache
from cache_builder.formats.columns import NO_LABEL
from cache_builder.formats.manifest import MANIFEST_NAME, PLAN_NAME
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.formats.units import IMAGE_ALONE
from cache_builder.formats.views import centre_square
from cache_builder.sources import ImageJoin, image_bytes, open_source
from cache_builder.stores import open_store
from trainer.data import stable_hash

logger = logging.getLogger(__name__)

TEST_SHARE: Final = 0.2

_REMOTE_CACHES = ("s3://", "gs://", "az://")


class Place(NamedTuple):
    """Where an image lies: unit and row of a cache or a source."""

    key: str
    unit: int
    row: int


class Labelled(NamedTuple):
    """An encoded image, or why there is none, and its class."""

    key: str
    image: bytes | ImageError
    label: int | None


class LabelledImages(Protocol):
    """A place of labelled images. A copy in another process opens its files for itself."""

    location: str
    class_names: tuple[str, ...]  # of label 0, 1, ...; empty where there are only numbers

    def places(self) -> list[Place]:
        """Return where every image lies, in order."""

    def labels(self) -> list[int | None]:
        """Return the class of every image, in the order of `places`."""

    def read(self, places: Sequence[Place]) -> Iterator[Labelled]:
        """Yield images in the order of their places."""

    def close(self) -> None:
        """Close what this process has opened."""


def open_labelled(location: str | Path, images: str | None = None) -> LabelledImages:
    """Open a cache, or a source of images.

    Args:
        location: A cache; or a folder, tars, zips, Parquet files or a list.
        images: Where the images of a cache that holds none lie now.

    Raises:
        ArtifactError: The cache is unfinished or damaged.
        SourceError: There is nothing there.
        ConfigError: The place is of a kind that cannot be read.
    """
    text = str(location)
    if _is_cache(text):
        return _CacheImages(text, images)
    if images is not None:
        raise ConfigError(f"{text} is no cache: it is where the images lie. Leave --images out.")
    return _SourceImages(text)


def choose(places: Iterable[Place], max_samples: int | None) -> list[Place]:
    """Return up to `max_samples` places, chosen by a hash of their keys, in order."""
    if max_samples is None:
        return list(places)
    ranked = sorted((stable_hash(f"probe {place.key}"), place) for place in places)
    return sorted((place for _, place in ranked[:max_samples]), key=lambda place: place[1:])


def is_test_key(key: str) -> bool:
    """Return whether a sample is kept for testing: a fifth of all keys, the same in every run."""
    return stable_hash(f"test {key}") % 1000 < 1000 * TEST_SHARE


def class_mapping(train: LabelledImages, test: LabelledImages) -> list[int] | None:
    """Return which class of `train` each class of `test` is; None if the numbers are the same.

    Raises:
        ConfigError: A class of `test` is none of `train`.
    """
    if not train.class_names or not test.class_names or train.class_names == test.class_names:
        return None
    unknown = [name for name in test.class_names if name not in train.class_names]
    if unknown:
        raise ConfigError(
            f"{test.location} has the class {unknown[0]!r}, which {train.location} does not have "
            f"({len(unknown)} such classes). Test on images of the classes that are trained on."
        )
    return [train.class_names.index(name) for name in test.class_names]


def _centre_pixels(image: bytes, size: int, share: float = 1.0) -> Tensor:
    """Return the centred square of an image, (3, size, size) uint8.

    Args:
        image: Encoded.
        size: Side, pixels.
        share: Of the largest centred square's side.

    Raises:
        ImageError: It cannot be decoded.
    """
    picture = imaging.decode(image)
    height, width = picture.shape[-2:]
    side = max(1, round(min(height, width) * share))
    square = centre_square((height, width))._replace(
        top=(height - side) // 2, left=(width - side) // 2, height=side, width=side
    )
    return imaging.apply_view(picture, square, size)


class Squares(NamedTuple):
    """Labelled images that could be decoded."""

    pixels: Tensor | None  # (B, 3, S, S) uint8; None without any
    labels: Tensor  # (B,)
    keys: list[str]
    refused: list[str]


class CentreSquares:
    """Reads labelled images as batches of centred squares."""

    def __init__(self, images: LabelledImages, size: int, share: float = 1.0) -> None:
        """Take the side in pixels, and which share of the largest square it stands for."""
        self._images = images
        self._size = size
        self._share = share

    def read(self, places: Sequence[Place]) -> Squares:
        """Return the images at these places that have a label.

        Raises:
            PatchCacheError: An image is not there any more, or its file or cache is damaged.
        """
        pixels, labels, keys, refused = [], [], [], []
        for sample in self._images.read(places):
            if sample.label is None:
                continue
            try:
                pixels.append(_centre_pixels(image_bytes(sample.image), self._size, self._share))
            except ImageError as exc:
                refused.append(f"{sample.key}: {exc}")
                continue
            labels.append(sample.label)
            keys.append(sample.key)
        stacked = torch.stack(pixels) if pixels else None
        return Squares(stacked, torch.tensor(labels, dtype=torch.int64), keys, refused)


class _CacheImages:
    def __init__(self, location: str, images: str | None) -> None:
        self.location = location
        self._moved = images
        self._opened: TokenCache | None = None
        self._join: ImageJoin | None = None
        self.class_names = self._cache.manifest.spec.class_names

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: open files belong to this one."""
        return {**self.__dict__, "_opened": None, "_join": None}

    def places(self) -> list[Place]:
        cache = self._cache
        return [
            Place(key, unit, row)
            for unit in range(len(cache.manifest.shards))
            for row, key in enumerate(cache.shard(unit).keys)
        ]

    def labels(self) -> list[int | None]:
        units = range(len(self._cache.manifest.shards))
        found = (label for unit in units for label in self._cache.columns(unit).labels.tolist())
        return [None if label == NO_LABEL else label for label in found]

    def read(self, places: Sequence[Place]) -> Iterator[Labelled]:
        for place in places:
            sample = self._cache.read(place.unit, place.row, payloads=IMAGE_ALONE)
            image = self._outside(place) if sample.image is None else sample.image
            yield Labelled(sample.key, image, sample.label)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened = self._join = None

    @property
    def _cache(self) -> TokenCache:
        if self._opened is None:
            self._opened = TokenCache.open(self.location)
        return self._opened

    def _outside(self, place: Place) -> bytes:
        source = self._cache.manifest.spec.source
        try:
            if self._join is None:
                self._join = ImageJoin(self._cache.store, source, self._moved)
            return self._join.read(place.unit, place.key)
        except SourceError as exc:
            raise ConfigError(
                f"{self.location} holds no images, and the image of {place.key} is not found in "
                f"{self._moved or source.location}: {exc} Say where the images lie with --images."
            ) from exc


class _Unit(NamedTuple):
    container: str
    container_bytes: int | None
    rows: list[tuple[str, str, int | None, str, tuple[int, int] | None]]


class _SourceImages:
    def __init__(self, location: str) -> None:
        self.location = location
        self._source = open_source(location)
        listing = self._source.scan(None)
        self.class_names = listing.class_names
        # Not as models, which take several times the memory.
        self._units = [
            _Unit(
                unit.container,
                unit.container_bytes,
                [(row.key, row.source, row.label, row.refused, row.span) for row in unit.rows],
            )
            for unit in listing.units
        ]

    def places(self) -> list[Place]:
        return [
            Place(row[0], number, index)
            for number, unit in enumerate(self._units)
            for index, row in enumerate(unit.rows)
        ]

    def labels(self) -> list[int | None]:
        return [label for unit in self._units for _, _, label, _, _ in unit.rows]

    def read(self, places: Sequence[Place]) -> Iterator[Labelled]:
        for number, group in groupby(places, key=lambda place: place.unit):
            container, size, rows = self._units[number]
            chosen = []
            for place in group:
                key, source, label, refused, span = rows[place.row]
                chosen.append(
                    PlanRow(key=key, source=source, label=label, refused=refused, span=span)
                )
            unit = PlanUnit(
                unit=number, container=container, container_bytes=size, rows=tuple(chosen)
            )
            for row, image in self._source.read(unit):
                yield Labelled(row.key, image, row.label)

    def close(self) -> None:
        """Nothing stays open."""


def _is_cache(location: str) -> bool:
    if location.startswith(_REMOTE_CACHES) or "://" not in location:
        store = open_store(location)
        # A build that has not finished is a cache too, and refused as one.
        return store.exists(MANIFEST_NAME) or store.exists(PLAN_NAME)
    return False
