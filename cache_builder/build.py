"""`patchcache build`: tokenise every image of a source into a cache.

The driver lists the source and writes the plan once; workers take units, and each unit makes one
tar, or the rows of one Zarr shard, and then its commit record. When every record is there, the
driver writes the manifest. Units share nothing, no device batch crosses a unit, and every file has
a fixed name and fixed bytes: a build that was killed is continued by the same command and ends
with the same cache.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from cache_builder import build_log
from cache_builder.build_worker import BuildTask, BuildWorker, UnitReport
from cache_builder.commit import (
    describe_layer,
    holder,
    layer_name,
    layer_store,
    write_manifest,
)
from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.headers import first_problem
from cache_builder.formats.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    CacheManifest,
    CacheSpec,
    ImagesInCache,
    LayerInfo,
    Layout,
    read_model,
    to_json,
)
from cache_builder.formats.payloads import FeatureType
from cache_builder.formats.plan import BuildPlan, plan_unit_name
from cache_builder.formats.views import ViewSpec
from cache_builder.planning import LayerSpec, settle_plan
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units
from cache_builder.soft_targets import soft_spec
from cache_builder.sources import Listing, open_source
from cache_builder.stores import Store, absolute_location, open_store
from cache_builder.targets import feature_spec

_UNITS_AT_A_GPU = 2  # see `units`


class BuildOptions(NamedTuple):
    """What a user may say about a build."""

    images: str
    codebook: str | Path
    out: str | Path
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
    further_codebooks: tuple[str | Path, ...] = ()  # each makes a layer in the same pass
    cluster: ClusterOptions = ClusterOptions()


class BuildSummary(NamedTuple):
    """What a build did."""

    manifest: CacheManifest
    num_units_kept: int


Progress = Callable[[UnitReport, int], None]
"""Called after every unit with its report and the number of samples of the whole plan."""


def run(options: BuildOptions, progress: Progress | None = None) -> BuildSummary:
    """Build a cache, or continue or confirm one that is there.

    Raises:
        ConfigError: The output belongs to a build with other settings or other images.
        SourceError: The images cannot be listed or read.
        ArtifactError: The codebook is damaged, or not one image could be tokenised.
        CacheInUseError: Another driver writes there.
    """
    codebook, *further = (
        Codebook.load(path) for path in (options.codebook, *options.further_codebooks)
    )
    store = open_store(options.out)
    with store.lock(holder()):
        listing = open_source(options.images).scan(options.unit_size)
        spec = _cache_spec(options, codebook, listing)
        layers = [
            layer_spec(
                spec,
                each,
                soft_top_k=options.soft_top_k,
                soft_temperature=options.soft_temperature,
                store_features=options.store_features,
            )
            for each in further
        ]
        _refuse_twins(spec, layers)
        plan = settle_plan(store, spec, listing.units, codebook, layers)
        task = BuildTask(
            cache=absolute_location(options.out),
            names=("", *(layer.name for layer in layers)),
            images=listing.info.location,
            device=options.device,
            weights=options.weights,
            decode_threads=options.cluster.threads_per_worker,
        )
        return build_targets(store, plan, task, options.cluster, progress)


def build_targets(
    store: Store,
    plan: BuildPlan,
    task: BuildTask,
    cluster: ClusterOptions,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build what a planned cache or its layers lack, and write their manifests, the cache's last.

    Args:
        store: Of the cache, locked by the caller.
        plan: Of the cache.
        task: What to build.
        cluster: Where.
        progress: Called after every unit.
    """
    reports = []
    units = map_units(
        partial(BuildWorker, task),
        range(plan.num_units),
        cluster,
        job="build",
        describe=partial(_unit_name, store),
        count=_counts,
        at_once=_UNITS_AT_A_GPU if cluster.gpus_per_worker else 1,
    )
    with build_log.recording(task.cache) as log, contextlib.closing(units):
        for result, node, seconds in units:
            report = result._replace(node=node, seconds=seconds)
            reports.append(report)
            log.unit_done(report)
            if progress:
                progress(report, plan.spec.source.num_samples)
        manifest = _write_manifests(store, plan, task, reports)
    return BuildSummary(
        manifest=manifest,
        num_units_kept=sum(report.was_there for report in reports),
    )


def _unit_name(store: Store, unit: int) -> str:
    return f"unit {unit}, whose images {store.where(plan_unit_name(unit))} lists"


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


def _write_manifests(
    store: Store, plan: BuildPlan, task: BuildTask, reports: Sequence[UnitReport]
) -> CacheManifest:
    """Write the manifests of what is built, the cache's last; return that.

    Args:
        store: Of the cache.
        plan: Of the cache.
        task: What was built.
        reports: Of every unit, in any order.
    """
    layers = {layer.name: layer for layer in _finished_layers(store)}
    for number, name in enumerate(task.names):
        if name:
            below = layer_store(store, name)
            manifest = write_manifest(
                below,
                read_model(BuildPlan, below, PLAN_NAME),
                (report.summaries[number] for report in reports),
            )
            layers[name] = describe_layer(name, manifest)
    ordered = tuple(layers[name] for name in sorted(layers))
    if "" in task.names:
        place = task.names.index("")
        summaries = (report.summaries[place] for report in reports)
        return write_manifest(store, plan, summaries, ordered)
    return publish_layers(store, ordered)


def _finished_layers(store: Store) -> tuple[LayerInfo, ...]:
    """Return the layers that a cache's manifest lists; none before it is written."""
    if not store.exists(MANIFEST_NAME):
        return ()
    return CacheManifest.load(store).layers


def publish_layers(store: Store, layers: tuple[LayerInfo, ...]) -> CacheManifest:
    """Write the manifest of a finished cache again, with these layers."""
    manifest = CacheManifest.load(store).model_copy(update={"layers": layers})
    store.publish(MANIFEST_NAME, to_json(manifest))
    return manifest


def layer_spec(
    base: CacheSpec,
    codebook: Codebook,
    *,
    soft_top_k: int | None,
    soft_temperature: float | None,
    store_features: FeatureType | None,
) -> LayerSpec:
    """Return a layer with the views of a cache and another tokenizer.

    Features are stored where there are any: tokenizers of pixels and plugins have none.
    """
    rule = codebook.pixel_rule
    stored = store_features if codebook.stores_features else None
    views = base.view_spec.model_copy(
        update={
            "size": rule.size,
            "patch_size": rule.patch_size,
            "interpolation": rule.interpolation,
        }
    )
    spec = base.model_copy(
        update={
            "fingerprint": codebook.fingerprint,
            "vocab_size": codebook.vocab_size,
            "num_stages": codebook.num_stages,
            "grid": rule.grid,
            "view_spec": views,
            "images_in_cache": "none",
            "soft": soft_spec(codebook, soft_top_k, soft_temperature),
            "features": feature_spec(codebook, stored),
        }
    )
    return LayerSpec(layer_name(spec), spec, codebook)


def _refuse_twins(base: CacheSpec, layers: list[LayerSpec]) -> None:
    fingerprints = [base.fingerprint, *(layer.spec.fingerprint for layer in layers)]
    twice = {each for each in fingerprints if fingerprints.count(each) > 1}
    if twice:
        raise ConfigError(f"--codebook names tokenizer {min(twice)} twice. Leave one of them out.")


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
            has_extra=listing.has_extra,
        )
    except ValidationError as exc:
        raise ConfigError(f"{first_problem(exc)}.") from exc
