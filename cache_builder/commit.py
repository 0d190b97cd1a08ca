"""From commit records to the manifest: what makes a unit, and then a cache, finished.

A unit is finished when its record is there and every file that it names has the digest that it
says. The manifest is put together from what workers say of finished units, not by reading the
records again: it takes the driver no request per unit.
"""

import logging
import os
import socket
from collections.abc import Iterable
from typing import NamedTuple

from cache_builder.errors import ArtifactError
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    MANIFEST_NAME,
    SKIPPED_NAME,
    CacheManifest,
    CacheSpec,
    FileDigest,
    LayerInfo,
    ShardInfo,
    SkippedSample,
    UnitRecord,
    read_model,
    to_json,
    unit_record_name,
)
from cache_builder.formats.payloads import FeatureTotals, SoftTotals, sum_features, sum_soft
from cache_builder.formats.plan import BuildPlan
from cache_builder.formats.zarr_store import metadata_files
from cache_builder.stores import Store, join_location, open_store

logger = logging.getLogger(__name__)


class UnitSummary(NamedTuple):
    """What the manifest needs to know of one finished unit."""

    unit: int
    shard: ShardInfo
    skipped: tuple[SkippedSample, ...]
    soft: SoftTotals | None
    features: FeatureTotals | None


def whole_unit(store: Store, unit: int) -> tuple[UnitRecord, UnitSummary] | None:
    """Return the record of a finished unit; None if a file of it is damaged or missing."""
    name = unit_record_name(unit)
    try:
        record = read_model(UnitRecord, store, name)
    except ArtifactError:
        return None
    if any(file.damage(store) for file in record.files):
        return None
    return record, summarise(unit, record)


def take_unit(store: Store, unit: int) -> UnitSummary | None:
    """Return a unit that is finished; remove the record of one that is damaged."""
    there = whole_unit(store, unit)
    if there is not None:
        return there[1]
    name = unit_record_name(unit)
    if store.exists(name):
        logger.warning("unit %d of %s is damaged and is built again", unit, store.location)
        store.remove(name)
    return None


def commit_unit(store: Store, record: UnitRecord) -> UnitSummary:
    """Write the record of a unit whose files are written: the unit is finished.

    Another attempt that lived on may have been faster; its bytes are the same.
    """
    name = unit_record_name(record.unit)
    try:
        store.publish_new(name, to_json(record))
    except FileExistsError:
        record = read_model(UnitRecord, store, name)
    return summarise(record.unit, record)


def summarise(unit: int, record: UnitRecord) -> UnitSummary:
    """Return what the manifest says of a unit."""
    shard = ShardInfo(
        name=f"{unit:06d}",
        num_samples=record.num_samples,
        num_skipped=len(record.skipped),
        files=record.files,
        record=FileDigest.of_content(unit_record_name(unit), to_json(record)),
    )
    return UnitSummary(unit, shard, record.skipped, record.soft, record.features)


def write_manifest(
    store: Store,
    plan: BuildPlan,
    summaries: Iterable[UnitSummary],
    layers: tuple[LayerInfo, ...] = (),
) -> CacheManifest:
    """Write the manifest of a cache or layer whose units are all finished.

    Raises:
        ArtifactError: Not one image could be tokenised.
    """
    units = sorted(summaries, key=lambda summary: summary.unit)
    skipped = [sample for unit in units for sample in unit.skipped]
    num_samples = sum(unit.shard.num_samples for unit in units)
    store.publish(SKIPPED_NAME, b"".join(to_json(sample) for sample in skipped))
    store.sweep()
    if not num_samples:
        raise ArtifactError(
            f"Not one of {plan.spec.source.num_samples} images could be tokenised; "
            f"{store.where(SKIPPED_NAME)} has the reasons. The first: {skipped[0].reason}."
        )
    manifest = CacheManifest(
        spec=plan.spec,
        payloads=plan.spec.payloads,
        num_samples=num_samples,
        num_skipped=len(skipped),
        shards=tuple(unit.shard for unit in units),
        codebook=FileDigest.of(store, CODEBOOK_NAME),
        store_files=metadata_files(plan.spec, plan.num_units),
        layers=layers,
        soft=sum_soft(unit.soft for unit in units if unit.soft),
        features=sum_features(unit.features for unit in units if unit.features),
    )
    store.publish(MANIFEST_NAME, to_json(manifest))
    return manifest


def holder() -> str:
    """Return who writes, for a second driver's message."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def layer_name(spec: CacheSpec) -> str:
    """Return the folder of a layer below its cache."""
    return f"targets/{spec.fingerprint[:12]}-{spec.view_spec.first_view:03d}"


def layer_store(store: Store, name: str) -> Store:
    """Return the store of a layer of a cache."""
    return open_store(join_location(store.location, name))


def describe_layer(name: str, manifest: CacheManifest) -> LayerInfo:
    """Return what a cache's manifest says of a finished layer."""
    views = manifest.spec.view_spec
    return LayerInfo(
        name=name,
        fingerprint=manifest.fingerprint,
        first_view=views.first_view,
        num_views=views.num_views,
        manifest=FileDigest.of_content(f"{name}/{MANIFEST_NAME}", to_json(manifest)),
    )
