"""One unit of a build: read once, decoded once, tokenised for every cache or layer that wants it.

Between the images of a unit nothing is shared, and no device batch crosses a unit, so a unit gives
the same bytes wherever and whenever it is built.

Where the tokenizer runs on a device of its own, images are decoded ahead in threads, and a worker
has two units at hand: while one fills its first batch, or writes and publishes, the device works
for the other.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_builder.decoders import Decoders
from cache_builder.errors import ConfigError, ImageError, TokenizerMismatchError
from cache_builder.formats.manifest import CacheSpec, SkippedSample, UnitRecord, Written
from cache_builder.formats.plan import BuildPlan, PlanRow
from cache_builder.formats.sample import CachedSample, NewSample
from cache_builder.formats.views import View, draw_views
from cache_builder.formats.writers import open_writer
from cache_builder.image_types import image_extension
from cache_builder.imaging import apply_view, decode, shrink
from cache_builder.sources import image_bytes
from cache_builder.stores import Store
from cache_builder.targets import TargetMaker
from cache_builder.tokenizers import PatchTokenizer

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH = 16
_BATCHES_AHEAD = 2  # of those that threads work on: one is tokenised, one waits for it


class Target(NamedTuple):
    """A cache, or a layer of one, that units are written into."""

    store: Store
    plan: BuildPlan
    tokenizer: PatchTokenizer


class Picture(NamedTuple):
    """An encoded image on its way into a cache."""

    row: PlanRow
    data: bytes | ImageError  # or why it is not read


def build_unit(
    targets: list[Target],
    unit: int,
    pictures: Iterable[Picture],
    *,
    shrink_to: tuple[int, int] | None = None,
    skipped: tuple[SkippedSample, ...] | None = None,
    decoders: Decoders | None = None,
    turn: AbstractContextManager[object] | None = None,
) -> list[UnitRecord]:
    """Tokenise the images of one unit and write its shards; the caller writes the records.

    Args:
        targets: What is written; a unit is read and decoded once for all.
        unit: Its number.
        pictures: Its images, in order.
        shrink_to: Short side and JPEG quality of re-encoded images; None leaves the bytes.
        skipped: Images that an earlier target of the same samples left out and that `pictures` does
            not hold; a further one that cannot be decoded is then an error. None finds out.
        decoders: Threads that decode and crop; None decodes in between.
        turn: Held while a tokenizer works; whoever shares it with other threads has a lock here.

    Returns:
        The commit record of every target.

    Raises:
        TokenizerMismatchError: A tokenizer is not the one that its target was planned for.
        ConfigError: Features to store are not finite, or too large for float16.
        ImageError: An image cannot be decoded that was decoded before.
    """
    for target in targets:
        _check_tokenizer(target)
    left_out: list[SkippedSample] = []
    makers = [TargetMaker(target.tokenizer, target.plan.spec, turn) for target in targets]
    specs = [target.plan.spec for target in targets]

    def cut(pictures: list[Picture]) -> _Batch:
        return _cut_batch(pictures, specs, shrink_to, may_skip=skipped is None)

    with contextlib.ExitStack() as stack:
        writers = [open_writer(target.store, target.plan, unit) for target in targets]
        for writer in writers:
            stack.enter_context(writer)
        parts = _split(pictures, _IMAGES_PER_BATCH)
        cuts = decoders.map(cut, parts, _BATCHES_AHEAD) if decoders else map(cut, parts)
        for batch in _full(cuts, left_out):
            for number, (maker, writer) in enumerate(zip(makers, writers, strict=True)):
                for new in _tokenise(batch, number, specs[number], maker):
                    writer.add(new)
        return [
            _record(unit, writer.finish(), maker, tuple(left_out) if skipped is None else skipped)
            for writer, maker in zip(writers, makers, strict=True)
        ]


class _Cut(NamedTuple):
    """What is known of an image that has been decoded and cut into views."""

    row: PlanRow
    data: bytes
    extension: str
    image_size: tuple[int, int]
    views: list[np.ndarray]  # of every target, (V, 5) int32


class _Batch(NamedTuple):
    """Images that have been cut into views, but not yet tokenised."""

    images: list[_Cut]
    pixels: list[Tensor]  # of every target, (number of images, V, 3, S, S) uint8
    skipped: list[SkippedSample]

    def join(self, after: "_Batch") -> "_Batch":
        """Return the images of both."""
        pixels = [torch.cat(pair) for pair in zip(self.pixels, after.pixels, strict=True)]
        return _Batch(self.images + after.images, pixels, [])

    def divide(self, count: int) -> "tuple[_Batch, _Batch]":
        """Return the first `count` images and the others."""
        first = _Batch(self.images[:count], [each[:count] for each in self.pixels], [])
        return first, _Batch(self.images[count:], [each[count:] for each in self.pixels], [])


def _split(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    remaining = iter(pictures)
    while part := list(islice(remaining, size)):
        yield part


def _cut_batch(
    pictures: list[Picture],
    specs: list[CacheSpec],
    shrink_to: tuple[int, int] | None,
    *,
    may_skip: bool,
) -> _Batch:
    """Decode images and cut every view right into its place of what a tokenizer takes."""
    pixels = [
        torch.empty((len(pictures), rule.num_views, 3, rule.size, rule.size), dtype=torch.uint8)
        for rule in (spec.view_spec for spec in specs)
    ]
    images: list[_Cut] = []
    skipped: list[SkippedSample] = []
    for picture in pictures:
        places = [each[len(images)] for each in pixels]
        try:
            images.append(_cut(picture, specs, shrink_to, places))
        except ImageError as exc:
            key, source = picture.row.key, picture.row.source
            if not may_skip:
                raise ImageError(
                    f"{source} was tokenised before and now {exc}. Restore the image."
                ) from exc
            skipped.append(SkippedSample(key=key, source=source, reason=str(exc)))
    return _Batch(images, [each[: len(images)] for each in pixels], skipped)


def _cut(
    picture: Picture,
    specs: list[CacheSpec],
    shrink_to: tuple[int, int] | None,
    places: list[Tensor],  # of every target, (V, 3, S, S) uint8
) -> _Cut:
    data = image_bytes(picture.data)
    if shrink_to is not None:
        # The tokens must be those of the pixels that the trainer will see.
        data = shrink(data, *shrink_to)
    pixels = decode(data)
    image_size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    resized: dict[tuple[View, int, str], Tensor] = {}
    views = []
    for spec, room in zip(specs, places, strict=True):
        rule = spec.view_spec
        drawn = draw_views(rule, picture.row.key, image_size)
        for view, place in zip(drawn, room, strict=True):
            known = (view, rule.size, rule.interpolation)
            if known in resized:
                place.copy_(resized[known])
            else:
                resized[known] = apply_view(pixels, view, rule.size, rule.interpolation, out=place)
        views.append(np.array(drawn, np.int32))
    return _Cut(picture.row, data, image_extension(data), image_size, views)


def _full(batches: Iterable[_Batch], left_out: list[SkippedSample]) -> Iterator[_Batch]:
    """Yield batches that are full but for the last, also where images are left out.

    Which images a tokenizer takes together then depends on the images that there are and on
    nothing else: a layer that is added later, without those left out, has the same batches.
    """
    rest: _Batch | None = None
    for batch in batches:
        for sample in batch.skipped:
            logger.warning("skipped %s: %s", sample.source, sample.reason)
            left_out.append(sample)
        held = rest.join(batch) if rest and rest.images else batch
        while len(held.images) >= _IMAGES_PER_BATCH:
            full, held = held.divide(_IMAGES_PER_BATCH)
            yield full
        rest = held
    if rest and rest.images:
        yield rest


def _tokenise(
    batch: _Batch, number: int, spec: CacheSpec, maker: TargetMaker
) -> Iterator[NewSample]:
    images = batch.images
    try:
        made = maker.make(batch.pixels[number].flatten(0, 1))
    except ConfigError as exc:
        raise ConfigError(f"{images[0].row.key} to {images[-1].row.key}: {exc}") from exc
    embedded = spec.images_in_cache != "none"
    for image, targets in zip(images, made.split(len(images)), strict=True):
        sample = CachedSample(
            key=image.row.key,
            image=image.data if embedded else None,
            label=image.row.label,
            views=image.views[number],
            extra=image.row.extra,
            **targets._asdict(),
        )
        extension = image.extension if embedded else ""
        yield NewSample(sample, extension, image.row.source, image.image_size)


def _record(
    unit: int, written: Written, maker: TargetMaker, skipped: tuple[SkippedSample, ...]
) -> UnitRecord:
    return UnitRecord(
        unit=unit,
        num_samples=written.num_samples,
        files=written.files,
        skipped=skipped,
        samples=written.samples,
        soft=maker.soft_totals(written.payload_bytes["soft"]),
        features=maker.feature_totals(written.payload_bytes["features"]),
    )


def _check_tokenizer(target: Target) -> None:
    planned = target.plan.spec.fingerprint
    if target.tokenizer.fingerprint != planned:
        raise TokenizerMismatchError(
            f"{target.store.location} was planned for tokenizer {planned}, "
            f"not for {target.tokenizer.fingerprint}. Use another --out."
        )
