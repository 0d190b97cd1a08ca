"""Which images and patches a codebook is fitted to, and their features on disk.

Every image has a priority, a hash of the seed and its key, and those with the smallest priorities
are taken. The smallest of several lists are the smallest of the smallest of each, so the choice
depends neither on how a source is cut into units nor on the order of anything. One image in twenty
is held out: it is never fitted, and quality is measured on it.

Workers extract the features and send them back; the driver writes them (`sample_store.py`), so the
workers need no disk in common with it.
"""

import hashlib
import heapq
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from cache_builder import files, sample_store
from cache_builder.decoders import Decoders
from cache_builder.errors import ConfigError, ImageError
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode
from cache_builder.points import PointSet
from cache_builder.prefetch import read_ahead
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units
from cache_builder.reporting import Progress
from cache_builder.sample_store import UnitSample
from cache_builder.sources import Listing, image_bytes, open_source
from cache_builder.tokenizers.features import FeatureExtractor, extract_features, load_extractor
from cache_builder.tokenizers.tokenizer import choose_device

logger = logging.getLogger(__name__)

SampleDtype = Literal["float16", "float32"]

_MIN_PATCHES_PER_IMAGE = 16  # diversity comes from images, not from their patches
_HELD_OUT_SHARE = 20  # one image in this many
_IMAGES_PER_BATCH = 16
_BATCHES_AHEAD = 2
_MAX_PATCHES_PER_TASK = 1 << 15  # 268 MB of k-CLIP's 4096 values as float16


class SampleOptions(NamedTuple):
    """Which patches to draw, and where to keep them."""

    budget: int | None  # patches; None: no limit
    images_per_class: int | None = None
    patches_per_image: int | None = None
    dtype: SampleDtype = "float16"  # of features; pixels are uint8
    seed: int = 0
    device: str = "auto"
    cluster: ClusterOptions = ClusterOptions()


class Sample(NamedTuple):
    """The sampled patches of all units, in the order of the units."""

    points: PointSet
    held_out: PointSet
    num_images: int  # that the points come from
    num_skipped: int
    num_units_kept: int  # that were in the store already


class UnitDraw(NamedTuple):
    """The images to sample of one unit."""

    unit: PlanUnit
    num_patches: tuple[int, ...]  # of every row
    held_out: tuple[bool, ...]


def held_out_keys(keys: Sequence[str], seed: int) -> frozenset[str]:
    """Return the keys that no fit with this seed learns from: one in twenty, rounded down."""
    return frozenset(smallest(keys, len(keys) // _HELD_OUT_SHARE, seed))


def smallest(keys: Iterable[str], count: int, seed: int) -> list[str]:
    """Return the `count` keys of smallest priority, smallest first; equal ones by name."""
    ranked = heapq.nsmallest(count, ((_priority(seed, "image", key), key) for key in keys))
    return [key for _, key in ranked]


def plan_draw(listing: Listing, rule: PixelRule, options: SampleOptions) -> list[UnitDraw]:
    """Choose images and the number of patches of each.

    Args:
        listing: Of the source.
        rule: Its grid says how many patches an image has.
        options: With `images_per_class`, so many of each class and all their patches, as CCViT
            does; else as many images as give `budget` patches at `patches_per_image` (16 or more)
            each. The budget is met to the patch as long as there are images enough and none is
            damaged.

    Raises:
        ConfigError: Images per class were asked for where there are no classes, or more patches
            than an image has.
    """
    labels = {row.key: row.label for unit in listing.units for row in unit.rows}
    grid_patches = rule.grid[0] * rule.grid[1]
    if options.patches_per_image is not None and options.patches_per_image > grid_patches:
        raise ConfigError(
            f"--patches-per-image is {options.patches_per_image:,}, but an image has "
            f"{grid_patches:,} patches. Use {grid_patches:,} or fewer."
        )
    held_out = held_out_keys(list(labels), options.seed)
    free = [key for key in labels if key not in held_out]
    if options.images_per_class is not None:
        fitted = _smallest_of_each_class(free, labels, options)
        most = options.patches_per_image or grid_patches
    elif options.budget is None:
        fitted = smallest(free, len(free), options.seed)
        most = options.patches_per_image or grid_patches
    else:
        each = options.patches_per_image or min(grid_patches, _MIN_PATCHES_PER_IMAGE)
        fitted = smallest(free, -(-options.budget // each), options.seed)
        # Too few images: more patches of each.
        most = options.patches_per_image or grid_patches
    budget = len(fitted) * most if options.budget is None else options.budget
    budget = min(budget, len(fitted) * most)
    each, rest = divmod(budget, max(len(fitted), 1))
    counts = {key: each + (rank < rest) for rank, key in enumerate(fitted)}
    num_checked = min(len(held_out), -(-len(fitted) // _HELD_OUT_SHARE))
    checked = smallest(held_out, num_checked, options.seed)
    counts |= {key: max(each, 1) for key in checked}
    return list(_draws_of_units(listing, counts, held_out))


def draw_sample(
    listing: Listing,
    extractor: FeatureExtractor,
    options: SampleOptions,
    store: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> Sample:
    """Extract the features of the chosen patches into `store`, or what of them is missing there.

    Args:
        listing: Of the source.
        extractor: Of the features.
        options: What to draw.
        store: A folder, made if it is not there.
        replace: Begin anew where the store belongs to another sample; else that is an error.
        progress: Told of sampled images, done and all.

    Raises:
        ConfigError: The store belongs to another sample, or features do not fit its type.
        SourceError: An image cannot be read.
    """
    draws = plan_draw(listing, extractor.pixel_rule, options)
    sample_store.settle(store, _question(listing, extractor, options, draws), replace=replace)
    num_wanted = sum(len(draw.unit.rows) for draw in draws)
    records = {draw.unit.unit: sample_store.whole_unit(store, draw.unit.unit) for draw in draws}
    missing = [draw for draw in draws if records[draw.unit.unit] is None]
    num_seen = {draw.unit.unit: len(draw.unit.rows) for draw in draws}
    num_done = num_wanted - sum(len(draw.unit.rows) for draw in missing)
    if progress and num_done:
        progress(num_done, num_wanted)
    worker = partial(
        SampleWorker,
        listing.info.location,
        extractor.spec,
        extractor.pixel_rule,
        options.device,
        options.dtype,
        options.seed,
        options.cluster.threads_per_worker,
    )
    finished = map_units(
        worker, missing, options.cluster, job="fit", describe=_unit_name, count=_counts
    )
    for sample in (unit.result for unit in finished):
        records[sample.unit] = sample_store.write_unit(store, sample)
        num_done += num_seen[sample.unit]
        if progress:
            progress(num_done, num_wanted)
    whole = {unit: record for unit, record in records.items() if record}
    return Sample(
        points=_point_set(store, whole, held_out=False),
        held_out=_point_set(store, whole, held_out=True),
        num_images=sum(record.num_images for record in whole.values()),
        num_skipped=sum(record.num_skipped for record in whole.values()),
        num_units_kept=len(draws) - len(missing),
    )


def _unit_name(draw: UnitDraw) -> str:
    rows = draw.unit.rows
    return f"unit {draw.unit.unit}, {rows[0].source} to {rows[-1].source}"


def _counts(sample: UnitSample) -> dict[str, float]:
    return {"images": sample.num_images, "skipped": sample.num_skipped}


class SampleWorker:
    """Samples patch features of units, in a process of its own."""

    def __init__(
        self,
        images: str,
        spec: ExtractorSpec,
        rule: PixelRule,
        device: str,
        dtype: SampleDtype,
        seed: int,
        decode_threads: int = 1,
    ) -> None:
        """Load the feature model."""
        self._source = open_source(images)
        self._extractor = load_extractor(spec, rule, choose_device(device))
        self._dtype = np.dtype(np.uint8 if spec.id == "pixel" else dtype)
        self._seed = seed
        self._decoders = Decoders(decode_threads) if decode_threads > 1 else None

    def run(self, draw: UnitDraw) -> UnitSample:
        """Return the sampled features of one unit; an image that cannot be decoded is skipped."""
        chosen = {
            row.key: (num_patches, held_out)
            for row, num_patches, held_out in zip(
                draw.unit.rows, draw.num_patches, draw.held_out, strict=True
            )
        }
        parts: dict[bool, list[NDArray[np.generic]]] = {False: [], True: []}
        num_images, num_decoded, dim = 0, 0, 0
        for batch in read_ahead(self._batches(draw.unit), _BATCHES_AHEAD):
            pixels = torch.stack([view for _, view in batch])
            features = extract_features(self._extractor, pixels).cpu()
            dim = features.shape[-1]
            for (row, _), patches in zip(batch, features, strict=True):
                num_patches, held_out = chosen[row.key]
                rng = random.Random(_priority(self._seed, "patches", row.key))
                rows = sorted(rng.sample(range(len(patches)), num_patches))
                parts[held_out].append(self._stored(patches[rows], row))
                num_images += not held_out
                num_decoded += 1
        empty = np.empty((0, dim), self._dtype)
        return UnitSample(
            unit=draw.unit.unit,
            points=np.concatenate([empty, *parts[False]]),
            held_out=np.concatenate([empty, *parts[True]]),
            num_images=num_images,
            num_skipped=len(chosen) - num_decoded,
        )

    def _stored(self, features: Tensor, row: PlanRow) -> NDArray[np.generic]:
        """Return features in the type of the store.

        Raises:
            ConfigError: They are not finite, or too large for float16.
        """
        if self._dtype == np.uint8:
            pixels: NDArray[np.generic] = features.numpy()
            return pixels
        model = self._extractor.spec.id
        if not features.isfinite().all():
            raise ConfigError(
                f"The features of {row.source} by {model} hold NaN or infinity. "
                "Check the model and its weights."
            )
        largest = float(features.abs().max())
        if self._dtype == np.float16 and largest > float(np.finfo(np.float16).max):
            raise ConfigError(
                f"The features of {row.source} by {model} reach {largest:,.0f}, too much for "
                "float16. Use --sample-dtype float32."
            )
        stored: NDArray[np.generic] = features.numpy().astype(self._dtype)
        return stored

    def _batches(self, unit: PlanUnit) -> Iterator[list[tuple[PlanRow, Tensor]]]:
        """Yield decoded centre squares."""
        squares = self._squares(unit)
        while batch := list(islice(squares, _IMAGES_PER_BATCH)):
            yield batch

    def _squares(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, Tensor]]:
        pictures = self._source.read(unit)
        cut: Iterable[tuple[PlanRow, Tensor | ImageError]]
        if self._decoders is None:
            cut = map(self._cut, pictures)
        else:
            cut = self._decoders.map(self._cut, pictures, _IMAGES_PER_BATCH)
        for row, square in cut:
            if isinstance(square, ImageError):
                logger.warning("left out %s: %s", row.source, square)
            else:
                yield row, square

    def _cut(
        self, picture: tuple[PlanRow, bytes | ImageError]
    ) -> tuple[PlanRow, Tensor | ImageError]:
        """Return the centre square of an image, or why there is none."""
        row, data = picture
        rule = self._extractor.pixel_rule
        try:
            pixels = decode(image_bytes(data))
        except ImageError as exc:
            return row, exc
        view = centre_square((int(pixels.shape[-2]), int(pixels.shape[-1])))
        return row, apply_view(pixels, view, rule.size, rule.interpolation)


def _smallest_of_each_class(
    keys: Iterable[str], labels: dict[str, int | None], options: SampleOptions
) -> list[str]:
    members: dict[int, list[str]] = defaultdict(list)
    for key in keys:
        label = labels[key]
        if label is None:
            raise ConfigError(
                f"--images-per-class needs a class for every image, but {key} has none. "
                "Use a folder with a subfolder per class, or leave it out."
            )
        members[label].append(key)
    count = options.images_per_class or 0
    num_small = sum(len(keys) < count for keys in members.values())
    if num_small:
        logger.warning("%d classes have fewer than %d images; all are taken", num_small, count)
    chosen = [key for label in members for key in smallest(members[label], count, options.seed)]
    return smallest(chosen, len(chosen), options.seed)


def _draws_of_units(
    listing: Listing, counts: dict[str, int], held_out: frozenset[str]
) -> Iterator[UnitDraw]:
    """Yield the chosen images, about as many of them at once as fit a message."""
    number = 0
    for unit in listing.units:
        rows = [row for row in unit.rows if counts.get(row.key)]
        # Cut where the running total enters the next message's worth.
        totals = accumulate(counts[row.key] for row in rows)
        numbered = zip(totals, rows, strict=True)
        for _, group in groupby(numbered, key=lambda pair: (pair[0] - 1) // _MAX_PATCHES_PER_TASK):
            part = tuple(row for _, row in group)
            yield UnitDraw(
                unit.model_copy(update={"unit": number, "rows": part}),
                tuple(counts[row.key] for row in part),
                tuple(row.key in held_out for row in part),
            )
            number += 1


def _point_set(store: Path, units: Iterable[int], *, held_out: bool) -> PointSet:
    arrays = [sample_store.read_array(store, unit, held_out=held_out) for unit in units]
    # A unit of damaged images alone does not know how long a feature is.
    filled = [array for array in arrays if len(array)]
    return PointSet(filled or [np.empty((0, 0), np.uint8)])


def _question(
    listing: Listing, extractor: FeatureExtractor, options: SampleOptions, draws: list[UnitDraw]
) -> dict[str, JsonValue]:
    """Return everything that the content of a store depends on."""
    digest = hashlib.sha256()
    for draw in draws:
        rows = [[row.key, row.source] for row in draw.unit.rows]
        digest.update(files.canonical_json([rows, draw.num_patches, draw.held_out]))
    is_pixel = extractor.spec.id == "pixel"
    return {
        "images": listing.info.location,
        "extractor": extractor.spec.identity(),
        "pixel_rule": extractor.pixel_rule.model_dump(mode="json"),
        "dtype": "uint8" if is_pixel else options.dtype,
        "num_images": sum(len(draw.unit.rows) for draw in draws),
        "num_patches": sum(sum(draw.num_patches) for draw in draws),
        "draw": digest.hexdigest(),
    }


def _priority(seed: int, purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()[:8])
