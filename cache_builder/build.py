"""`patchcache build`: tokenise every image of a source into a cache.

The driver lists the source and writes the plan once; workers take units, and each unit makes one
tar, or the rows of one Zarr shard, and then its commit record. When every record is there, the
driver writes the manifest. Units share nothing, no device batch crosses a unit, and every file has
a fixed name and fixed bytes: a build that was killed is continued by the same command and ends
with the same cache.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from cache_builder import files
from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    ImageError,
    TokenizerMismatchError,
)
from cache_builder.formats import shards, zarr_store
from cache_builder.formats.codebook import Codebook, first_problem
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    SKIPPED_NAME,
    BuildPlan,
    CacheManifest,
    CacheSpec,
    FileDigest,
    ImagesInCache,
    Layout,
    PlanRow,
    PlanUnit,
    ShardInfo,
    SkippedSample,
    UnitRecord,
    plan_unit_path,
    read_model,
    to_json,
    unit_record_path,
)
from cache_builder.formats.payloads import FeatureType, sum_features, sum_soft
from cache_builder.formats.sample import CachedSample, NewSample
from cache_builder.formats.views import ViewSpec, draw_views
from cache_builder.imaging import apply_view, decode, image_extension, shrink
from cache_builder.planning import settle_plan
from cache_builder.ray_jobs import ClusterOptions, map_units
from cache_builder.sources import Listing, open_source
from cache_builder.targets import TargetMaker, feature_spec, soft_spec
from cache_builder.tokenizers import PatchTokenizer

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH = 16


class BuildOptions(NamedTuple):
    """What a user may say about a build."""

    images: str
    codebook: Path
    out: Path
    num_views: int = 1
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    seed: int = 0
    layout: Layout = "webdataset"
    images_in_cache: ImagesInCache = "original"
    resized_short_side: int = 256
    jpeg_quality: int = 92
    unit_size: int | None = None
    soft_top_k: int | None = None  # None: no soft targets
    soft_temperature: float | None = None  # None: the default of `targets`
    store_features: FeatureType | None = None
    device: str = "auto"
    weights: str | None = None
    cluster: ClusterOptions = ClusterOptions()


class UnitReport(NamedTuple):
    """A unit is finished."""

    unit: int
    num_samples: int
    num_skipped: int
    num_views: int
    bytes: int  # written
    bytes_read: int  # from the source, by this run
    was_there: bool  # finished by an earlier run and found undamaged
    node: str = ""  # where it was done
    seconds: float = 0  # how long it took there


class BuildSummary(NamedTuple):
    """What a build did."""

    manifest: CacheManifest
    num_units_kept: int
    num_samples_built: int


Progress = Callable[[UnitReport, int], None]
"""Called after every unit with its report and the number of samples of the whole plan."""


def run(options: BuildOptions, progress: Progress | None = None) -> BuildSummary:
    """Build a cache, or continue or confirm one that is there.

    Raises:
        ConfigError: The output belongs to a build with other settings or other images.
        SourceError: The images cannot be listed or read.
        ArtifactError: The codebook is damaged, or not one image could be tokenised.
    """
    codebook = Codebook.load(options.codebook)
    listing = open_source(options.images).scan(options.unit_size)
    spec = _cache_spec(options, codebook, listing)
    plan = settle_plan(options.out, spec, listing, codebook)
    worker = partial(
        BuildWorker,
        str(options.out.resolve()),
        listing.info.location,
        options.device,
        options.weights,
    )
    reports = []
    units = map_units(
        worker,
        range(plan.num_units),
        options.cluster,
        job="build",
        describe=partial(_unit_name, options.out),
        count=_counts,
    )
    with contextlib.closing(units):
        for result, node, seconds in units:
            reports.append(result._replace(node=node, seconds=seconds))
            if progress:
                progress(reports[-1], spec.source.num_samples)
    manifest = _finish(options.out, plan)
    return BuildSummary(
        manifest=manifest,
        num_units_kept=sum(report.was_there for report in reports),
        num_samples_built=sum(r.num_samples for r in reports if not r.was_there),
    )


def _unit_name(out: Path, unit: int) -> str:
    return f"unit {unit}, whose images {plan_unit_path(out, unit)} lists"


def _counts(report: UnitReport) -> dict[str, float]:
    """Return what a unit adds to the metrics of the cluster."""
    if report.was_there:
        return {"units_kept": 1}
    return {
        "images": report.num_samples,
        "views": report.num_views,
        "bytes_read": report.bytes_read,
        "skipped": report.num_skipped,
    }


class BuildWorker:
    """Builds units, in a process of its own."""

    def __init__(
        self, cache_dir: str, images: str, device: str, weights: str | None = None
    ) -> None:
        """Load the tokenizer; everything else is read from the plan."""
        self._cache_dir = Path(cache_dir)
        self._plan = read_model(BuildPlan, self._cache_dir / PLAN_NAME)
        self._source = open_source(images)
        self._tokenizer = PatchTokenizer.load(self._cache_dir / CODEBOOK_NAME, device, weights)

    def run(self, unit: int) -> UnitReport:
        """Build one unit, unless its record is there and its files are what the record says."""
        path = unit_record_path(self._cache_dir, unit)
        if path.is_file():
            record = self._whole_record(path)
            if record is not None:
                return self._report(record)
            logger.warning("unit %d is damaged and is built again", unit)
            path.unlink()
        plan_unit = read_model(PlanUnit, plan_unit_path(self._cache_dir, unit))
        images = _Counted(self._source.read(plan_unit))
        record = build_unit(self._cache_dir, self._plan.spec, unit, images, self._tokenizer)
        try:
            files.publish_new(path, to_json(record))
        except FileExistsError:
            # Another attempt at this unit lived on and was faster; the bytes are the same.
            record = read_model(UnitRecord, path)
        return self._report(record, images.num_bytes)

    def _report(self, record: UnitRecord, bytes_read: int | None = None) -> UnitReport:
        """Describe a unit; of one that was there, nothing was read."""
        return UnitReport(
            unit=record.unit,
            num_samples=record.num_samples,
            num_skipped=len(record.skipped),
            num_views=record.num_samples * self._plan.spec.view_spec.num_views,
            bytes=sum(file.bytes for file in record.files),
            bytes_read=bytes_read or 0,
            was_there=bytes_read is None,
        )

    def _whole_record(self, path: Path) -> UnitRecord | None:
        """Return a commit record if it and the files that it names are undamaged."""
        try:
            record = read_model(UnitRecord, path)
        except ArtifactError:
            return None
        return None if any(file.damage(self._cache_dir) for file in record.files) else record


class _Counted(Iterator[tuple[PlanRow, bytes]]):
    """Images of a source, their bytes counted."""

    def __init__(self, images: Iterator[tuple[PlanRow, bytes]]) -> None:
        self._images = images
        self.num_bytes = 0

    def __next__(self) -> tuple[PlanRow, bytes]:
        row, data = next(self._images)
        self.num_bytes += len(data)
        return row, data


def build_unit(
    cache_dir: Path,
    spec: CacheSpec,
    unit: int,
    images: Iterator[tuple[PlanRow, bytes]],
    tokenizer: PatchTokenizer,
) -> UnitRecord:
    """Tokenise the images of one unit and write its shard; the caller writes the record.

    Raises:
        TokenizerMismatchError: `tokenizer` is not the one that the cache was planned for.
        ConfigError: Features to store are not finite, or too large for float16.
    """
    if tokenizer.fingerprint != spec.fingerprint:
        raise TokenizerMismatchError(
            f"{cache_dir} was planned for tokenizer {spec.fingerprint}, "
            f"not for {tokenizer.fingerprint}. Use another --out."
        )
    skipped: list[SkippedSample] = []
    maker = TargetMaker(tokenizer, spec)
    samples = _tokenise(spec, images, maker, skipped)
    if spec.layout == "webdataset":
        path = shards.shard_path(cache_dir, unit)
        entries = shards.write_shard(path, samples)
        written = [FileDigest.of(cache_dir, path)]
        num_samples = len(entries)
        num_bytes = shards.payload_bytes(entries)
    else:
        entries, rows = [], list(samples)
        written = zarr_store.write_unit(cache_dir, spec, unit, rows)
        num_samples = len(rows)
        num_bytes = zarr_store.payload_bytes(written)
    return UnitRecord(
        unit=unit,
        num_samples=num_samples,
        files=tuple(written),
        skipped=tuple(skipped),
        samples=tuple(entries),
        soft=maker.soft_totals(num_bytes["soft"]),
        features=maker.feature_totals(num_bytes["features"]),
    )


class _Drawn(NamedTuple):
    """An image that has been decoded and cut into views, but not yet tokenised."""

    row: PlanRow
    data: bytes
    extension: str
    image_size: tuple[int, int]
    views: np.ndarray
    pixels: Tensor  # (V, 3, S, S)


def _tokenise(
    spec: CacheSpec,
    images: Iterator[tuple[PlanRow, bytes]],
    maker: TargetMaker,
    skipped: list[SkippedSample],
) -> Iterator[NewSample]:
    drawn = _draw(spec, images, skipped)
    while batch := list(islice(drawn, _IMAGES_PER_BATCH)):
        try:
            made = maker.make(torch.cat([image.pixels for image in batch]))
        except ConfigError as exc:
            raise ConfigError(f"{batch[0].row.key} to {batch[-1].row.key}: {exc}") from exc
        for image, targets in zip(batch, made.split(len(batch)), strict=True):
            embedded = spec.images_in_cache != "none"
            sample = CachedSample(
                key=image.row.key,
                image=image.data if embedded else None,
                label=image.row.label,
                views=image.views,
                **targets._asdict(),
            )
            extension = image.extension if embedded else ""
            yield NewSample(sample, extension, image.row.source, image.image_size)


def _draw(
    spec: CacheSpec, images: Iterator[tuple[PlanRow, bytes]], skipped: list[SkippedSample]
) -> Iterator[_Drawn]:
    for row, original in images:
        try:
            yield _draw_one(spec, row, original)
        except ImageError as exc:
            logger.warning("skipped %s: %s", row.source, exc)
            skipped.append(SkippedSample(key=row.key, source=row.source, reason=str(exc)))


def _draw_one(spec: CacheSpec, row: PlanRow, data: bytes) -> _Drawn:
    if spec.images_in_cache == "resized":
        # The tokens must be those of the pixels that the trainer will see.
        data = shrink(data, spec.resized_short_side, spec.jpeg_quality)
    pixels = decode(data)
    image_size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    views = draw_views(spec.view_spec, row.key, image_size)
    size, interpolation = spec.view_spec.size, spec.view_spec.interpolation
    return _Drawn(
        row=row,
        data=data,
        extension=image_extension(data),
        image_size=image_size,
        views=np.array(views, np.int32),
        pixels=torch.stack([apply_view(pixels, view, size, interpolation) for view in views]),
    )


def _cache_spec(options: BuildOptions, codebook: Codebook, listing: Listing) -> CacheSpec:
    rule = codebook.pixel_rule
    try:
        return CacheSpec(
            fingerprint=codebook.fingerprint,
            vocab_size=codebook.vocab_size,
            num_stages=codebook.num_stages,
            grid=rule.grid,
            view_spec=ViewSpec(
                size=rule.size,
                patch_size=rule.patch_size,
                interpolation=rule.interpolation,
                num_views=options.num_views,
                scale=options.scale,
                ratio=options.ratio,
                hflip=options.hflip,
                seed=options.seed,
            ),
            layout=options.layout,
            images_in_cache=options.images_in_cache,
            resized_short_side=options.resized_short_side,
            jpeg_quality=options.jpeg_quality,
            unit_size=listing.unit_size,
            source=listing.info,
            class_names=listing.class_names,
            soft=soft_spec(codebook, options.soft_top_k, options.soft_temperature),
            features=feature_spec(codebook, options.store_features),
        )
    except ValidationError as exc:
        raise ConfigError(f"{first_problem(exc)}.") from exc


def _finish(out: Path, plan: BuildPlan) -> CacheManifest:
    """Check that every unit is there and write the manifest."""
    records, infos = [], []
    for unit in range(plan.num_units):
        path = unit_record_path(out, unit)
        record = read_model(UnitRecord, path)
        records.append(record)
        infos.append(
            ShardInfo(
                name=f"{unit:06d}",
                num_samples=record.num_samples,
                num_skipped=len(record.skipped),
                files=record.files,
                record=FileDigest.of(out, path),
            )
        )
    num_samples = sum(info.num_samples for info in infos)
    skipped = [sample for record in records for sample in record.skipped]
    files.publish(out / SKIPPED_NAME, b"".join(to_json(sample) for sample in skipped))
    files.sweep(out)
    if not num_samples:
        raise ArtifactError(
            f"Not one of {plan.spec.source.num_samples} images could be tokenised; "
            f"{out / SKIPPED_NAME} has the reasons. The first: {skipped[0].reason}."
        )
    manifest = CacheManifest(
        spec=plan.spec,
        payloads=plan.spec.payloads,
        num_samples=num_samples,
        num_skipped=len(skipped),
        shards=tuple(infos),
        codebook=FileDigest.of(out, out / CODEBOOK_NAME),
        soft=sum_soft(record.soft for record in records if record.soft),
        features=sum_features(record.features for record in records if record.features),
    )
    files.publish(out / MANIFEST_NAME, to_json(manifest))
    return manifest
