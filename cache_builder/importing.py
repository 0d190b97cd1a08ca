"""`patchcache import`: a cache of token ids that another tool made.

The tokenizer is foreign: all that is known of it is the name that it is given, K, and the size of a
view and of a patch. That stands in a codebook without centroids. Its fingerprint follows from the
same, so two imports under one name count as one tokenizer: a name should say which weights it was.
What needs ids alone (`verify`, `train beit`, `convert`, ...) works on such a cache; what needs
centroids or the tokenizer itself refuses it.

Which boxes the ids belong to is said as well, for the trainer cuts the pixels by them: centred
squares, or the crop settings that 4M's token saver writes beside its tokens.
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from cache_builder.commit import holder, write_manifest
from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import MAX_VOCAB_SIZE, Codebook
from cache_builder.formats.codebook_header import FOREIGN_PREFIX, ExtractorSpec, PixelRule
from cache_builder.formats.headers import first_problem
from cache_builder.formats.manifest import CacheManifest, CacheSpec, Layout
from cache_builder.formats.views import Interpolation, ViewSpec
from cache_builder.import_worker import ImportTask, ImportUnit, ImportWorker
from cache_builder.planning import settle_plan
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units
from cache_builder.reporting import Progress
from cache_builder.sources import Listing, open_source
from cache_builder.stores import absolute_location, open_store
from cache_builder.token_files import TokenRows, names_of, open_rows, read_keys

_NAME = re.compile(r"[A-Za-z0-9._/@+-]{1,200}")
_MAX_NAMED = 3


class ImportOptions(NamedTuple):
    """What a user says about token ids of another tool."""

    tokens: Path
    images: str
    out: str
    tokenizer: str  # a name for it
    vocab_size: int
    keys: Path | None = None
    image_size: int = 224
    patch_size: int = 16
    interpolation: Interpolation = "bicubic"
    num_views: int = 1
    resized_short_side: int | None = None  # None: that of the view, the largest centred square
    crop_settings: Path | None = None
    layout: Layout = "webdataset"
    images_in_cache: Literal["original", "none"] = "original"
    unit_size: int | None = None
    cluster: ClusterOptions = ClusterOptions()


class ImportSummary(NamedTuple):
    """What was imported."""

    manifest: CacheManifest
    num_units_kept: int


def run(options: ImportOptions, progress: Progress | None = None) -> ImportSummary:
    """Import token ids, or continue an import that was stopped.

    Raises:
        ConfigError: The files cannot be read, keys and rows do not fit, or settings contradict.
        SourceError: The images cannot be listed or read.
        ArtifactError: Not one image has token ids.
        CacheInUseError: Another driver writes there.
    """
    _check_views(options)
    rows = open_rows(options.tokens)
    boxes = open_rows(options.crop_settings) if options.crop_settings else None
    places = _places(options, rows, boxes)
    codebook = _foreign_codebook(options)
    store = open_store(options.out)
    with store.lock(holder()):
        listing = open_source(options.images).scan(options.unit_size)
        _refuse_strangers(options, places, listing)
        plan = settle_plan(store, _spec(options, codebook, listing), listing.units, codebook)
        task = ImportTask(
            out=absolute_location(options.out),
            images=listing.info.location,
            tokens=str(options.tokens.resolve()),
            crop_settings=str(options.crop_settings.resolve()) if options.crop_settings else None,
            resized_short_side=options.resized_short_side or options.image_size,
        )
        units = _units(listing, places)
        reports, num_done = [], 0
        finished = map_units(partial(ImportWorker, task), units, options.cluster, job="import")
        with contextlib.closing(finished):
            for report, _, _ in finished:
                reports.append(report)
                num_done += report.summary.shard.num_samples + len(report.summary.skipped)
                if progress:
                    progress(num_done, plan.spec.source.num_samples)
        manifest = write_manifest(store, plan, (report.summary for report in reports))
    return ImportSummary(manifest, sum(report.was_there for report in reports))


def _foreign_codebook(options: ImportOptions) -> Codebook:
    """Return what stands for a tokenizer of which only the ids are known.

    Raises:
        ConfigError: Name, K or sizes are none that a tokenizer can have.
    """
    if not _NAME.fullmatch(options.tokenizer):
        raise ConfigError(
            f"--tokenizer {options.tokenizer!r} is no name: use up to 200 letters, digits and "
            "._/@+-, which say what made the ids and with which weights."
        )
    if not 1 <= options.vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(f"-k {options.vocab_size} is not between 1 and {MAX_VOCAB_SIZE:,}.")
    try:
        rule = PixelRule(
            size=options.image_size,
            patch_size=options.patch_size,
            interpolation=options.interpolation,
        )
    except ValidationError as exc:
        raise ConfigError(f"{first_problem(exc)}.") from exc
    return Codebook(
        np.empty((1, options.vocab_size, 0), np.float32),
        np.zeros((1, options.vocab_size), np.int64),
        metric="l2",
        pixel_rule=rule,
        extractor=ExtractorSpec(id=f"{FOREIGN_PREFIX}{options.tokenizer}"),
    )


def _check_views(options: ImportOptions) -> None:
    if options.crop_settings is None and options.num_views > 1:
        raise ConfigError(
            f"--views {options.num_views}: the boxes of several views are not known. Say where "
            "they are with --crop-settings."
        )
    short_side = options.resized_short_side
    if short_side is None:
        return
    if options.crop_settings is not None:
        raise ConfigError("--crop-settings has the boxes, and --resize would be ignored.")
    if short_side < options.image_size:
        raise ConfigError(
            f"--resize {short_side}: a square of {options.image_size} pixels does not fit into a "
            "picture of that short side."
        )


def _spec(options: ImportOptions, codebook: Codebook, listing: Listing) -> CacheSpec:
    rule = codebook.pixel_rule
    cropped = (options.resized_short_side or rule.size) != rule.size
    return CacheSpec(
        fingerprint=codebook.fingerprint,
        vocab_size=codebook.vocab_size,
        num_stages=1,
        grid=rule.grid,
        view_spec=ViewSpec(
            size=rule.size,
            patch_size=rule.patch_size,
            interpolation=rule.interpolation,
            num_views=options.num_views,
            given=cropped or options.crop_settings is not None,
        ),
        layout=options.layout,
        images_in_cache=options.images_in_cache,
        unit_size=listing.unit_size,
        source=listing.info,
        class_names=listing.class_names,
        has_extra=listing.has_extra,
    )


def _places(
    options: ImportOptions, rows: TokenRows, boxes: TokenRows | None
) -> dict[str, int] | None:
    """Return the row of every name, None where the files have names of their own."""
    if rows.is_named and (boxes is None or boxes.is_named):
        if options.keys is not None:
            raise ConfigError(
                f"{options.tokens} has names of its own, and --keys would be ignored. Leave it out."
            )
        return None
    if options.keys is None:
        nameless = options.crop_settings if rows.is_named else options.tokens
        raise ConfigError(
            f"{nameless} has rows without names. Say with --keys which image each belongs "
            "to: the order of files is no evidence of it."
        )
    names = read_keys(options.keys)
    for file, opened in ((options.tokens, rows), (options.crop_settings, boxes)):
        if opened is not None and not opened.is_named and opened.num_rows != len(names):
            raise ConfigError(
                f"{file} has {opened.num_rows:,} rows, and --keys {options.keys} names "
                f"{len(names):,} images. They must be equal."
            )
    return {name: row for row, name in enumerate(names)}


def _refuse_strangers(
    options: ImportOptions, places: dict[str, int] | None, listing: Listing
) -> None:
    """Refuse a list of keys that names images which are not there: it belongs to others."""
    if places is None:
        return
    left = dict(places)
    for unit in listing.units:
        for row in unit.rows:
            for name in names_of(row.key):
                left.pop(name, None)
    if left:
        shown = ", ".join(repr(name) for name in list(left)[:_MAX_NAMED])
        raise ConfigError(
            f"{len(left):,} of the {len(places):,} keys of {options.keys} are not images of "
            f"{options.images}: {shown}. Pass the images that the ids were made of, and paths "
            "below that place as keys."
        )


def _units(listing: Listing, places: dict[str, int] | None) -> Iterator[ImportUnit]:
    for unit in listing.units:
        found = (_row_of(row.key, places) for row in unit.rows)
        yield ImportUnit(unit.unit, tuple(found))


def _row_of(key: str, places: dict[str, int] | None) -> int | None:
    if places is None:
        return None
    return next((places[name] for name in names_of(key) if name in places), None)
