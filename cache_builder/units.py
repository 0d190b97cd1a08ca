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
from cache_builder.formats.manifest import (
    BuildPlan,
    CacheSpec,
    PlanRow,
    SkippedSample,
    UnitRecord,
    Written,
)
from cache_builder.formats.sample import CachedSample, NewSample
from cache_builder.formats.shards import ShardWriter
from cache_builder.formats.views import View, draw_views
from cache_builder.formats.zarr_store import RowWriter
from cache_builder.image_types import image_extension
from cache_builder.imaging import apply_view, decode, shrink
from cache_builder.sources import image_bytes
from cache_builder.stores import Store
from cache_builder.targets import TargetMaker
from cache_builder.tokenizers import PatchTokenizer

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH = 16


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
    found: list[SkippedSample] = []
    makers = [TargetMaker(target.tokenizer, target.plan.spec, turn) for target in targets]
    specs = [target.plan.spec for target in targets]

    def cut(picture: Picture) -> _Cut | SkippedSample:
        try:
            return _cut(picture, specs, shrink_to)
        except ImageError as exc:
            if skipped is not None:
                raise ImageError(
                    f"{picture.row.source} was tokenised before and now {exc}. Restore the image."
                ) from exc
            return SkippedSample(key=picture.row.key, source=picture.row.source, reason=str(exc))

    with contextlib.ExitStack() as stack:
        writers = [_open_writer(target, unit) for target in targets]
        for writer in writers:
            stack.enter_context(writer)
        cuts = decoders.map(cut, pictures) if decoders else map(cut, pictures)
        drawn = _kept(cuts, found)
        while batch := list(islice(drawn, _IMAGES_PER_BATCH)):
            for number, (maker, writer) in enumerate(zip(makers, writers, strict=True)):
                for new in _tokenise(batch, number, specs[number], maker):
                    writer.add(new)
        return [
            _record(unit, writer.finish(), maker, tuple(found) if skipped is None else skipped)
            for writer, maker in zip(writers, makers, strict=True)
        ]


class _Cut(NamedTuple):
    """An image that has been decoded and cut into views, but not yet tokenised."""

    row: PlanRow
    data: bytes
    extension: str
    image_size: tuple[int, int]
    views: list[np.ndarray]  # of every target, (V, 5) int32
    pixels: list[list[Tensor]]  # of every target, V of (3, S, S)


def _cut(picture: Picture, specs: list[CacheSpec], shrink_to: tuple[int, int] | None) -> _Cut:
    data = image_bytes(picture.data)
    if shrink_to is not None:
        # The tokens must be those of the pixels that the trainer will see.
        data = shrink(data, *shrink_to)
    pixels = decode(data)
    image_size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    resized: dict[tuple[View, int, str], Tensor] = {}
    views, crops = [], []
    for spec in specs:
        rule = spec.view_spec
        drawn = draw_views(rule, picture.row.key, image_size)
        for view in drawn:
            if (view, rule.size, rule.interpolation) not in resized:
                resized[view, rule.size, rule.interpolation] = apply_view(
                    pixels, view, rule.size, rule.interpolation
                )
        views.append(np.array(drawn, np.int32))
        crops.append([resized[view, rule.size, rule.interpolation] for view in drawn])
    return _Cut(picture.row, data, image_extension(data), image_size, views, crops)


def _tokenise(
    batch: list[_Cut], number: int, spec: CacheSpec, maker: TargetMaker
) -> Iterator[NewSample]:
    try:
        made = maker.make(torch.stack([view for image in batch for view in image.pixels[number]]))
    except ConfigError as exc:
        raise ConfigError(f"{batch[0].row.key} to {batch[-1].row.key}: {exc}") from exc
    embedded = spec.images_in_cache != "none"
    for image, targets in zip(batch, made.split(len(batch)), strict=True):
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


def _kept(images: Iterable[_Cut | SkippedSample], skipped: list[SkippedSample]) -> Iterator[_Cut]:
    for image in images:
        if isinstance(image, SkippedSample):
            logger.warning("skipped %s: %s", image.source, image.reason)
            skipped.append(image)
        else:
            yield image


def _open_writer(target: Target, unit: int) -> ShardWriter | RowWriter:
    if target.plan.spec.layout == "webdataset":
        return ShardWriter(target.store, unit)
    return RowWriter(target.store, target.plan.spec, target.plan.num_units, unit)


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
