"""`patchcache convert`, `merge` and `subset`: finished caches become another one.

No image is decoded and no tokenizer is loaded: samples are copied as they are. What comes out is an
ordinary cache, planned, committed and finished as `build` does it, so a run that was killed is
continued by the same command and ends with the same bytes. Views that were added later lie beside
the first ones in the output; further tokenizers have a layer each.

    convert   every unit stays; the output is, byte for byte, what `build` writes in that layout
    merge     the units of the caches follow one another, or are filled up to `unit_size`
    subset    the samples that are chosen fill units of `unit_size`
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from cache_builder.arrangement import ArrangedUnit, Arrangement, InputCache
from cache_builder.commit import (
    describe_layer,
    holder,
    layer_name,
    layer_store,
    write_manifest,
)
from cache_builder.errors import ConfigError
from cache_builder.formats.manifest import (
    PLAN_NAME,
    CacheManifest,
    CacheSpec,
    Layout,
    SourceInfo,
    read_model,
)
from cache_builder.formats.plan import BuildPlan
from cache_builder.merging import (
    common_source,
    in_braces,
    refuse_differences,
    refuse_equal_keys,
    unite_classes,
)
from cache_builder.planning import LayerSpec, settle_plan
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units
from cache_builder.reporting import Progress
from cache_builder.selection import Selection, choose, labels_named
from cache_builder.stores import absolute_location, open_store
from cache_builder.transform_worker import TransformReport, TransformTask, TransformWorker


class ConvertOptions(NamedTuple):
    """What a user may say about a conversion."""

    cache: str
    out: str
    layout: Layout | None = None  # None: as it is
    drop_images: bool = False
    cluster: ClusterOptions = ClusterOptions()


class MergeOptions(NamedTuple):
    """What a user may say about a merge."""

    caches: tuple[str, ...]
    out: str
    layout: Layout | None = None  # None: that of the first cache
    unit_size: int | None = None  # None: the units stay
    cluster: ClusterOptions = ClusterOptions()


class SubsetOptions(NamedTuple):
    """What a user may say about a subset; a sample has to meet all of it."""

    cache: str
    out: str
    labels: tuple[str, ...] = ()  # class names
    keys: frozenset[str] | None = None
    max_per_class: int | None = None
    sample: int | None = None
    seed: int = 0
    num_views: int | None = None  # the first so many
    layout: Layout | None = None  # None: as it is
    unit_size: int | None = None  # None: as it is
    cluster: ClusterOptions = ClusterOptions()


class TransformSummary(NamedTuple):
    """What was done."""

    manifest: CacheManifest
    num_units_kept: int
    num_relabelled: int = 0  # caches of a merge some of whose labels are others now


def convert(options: ConvertOptions, progress: Progress | None = None) -> TransformSummary:
    """Write a cache in another layout, or without its images.

    Raises:
        ConfigError: The images cannot be left out, or the output holds something else.
        ArtifactError: The cache is not finished, or damaged.
        CacheInUseError: Another driver writes there.
    """
    cache = InputCache(options.cache)
    changes: dict[str, Any] = {"layout": options.layout or cache.spec.layout}
    if options.drop_images:
        _refuse_lost_images(cache)
        changes["images_in_cache"] = "none"
    job = _Job([cache], options.out, Arrangement([cache]), changes)
    return _run(job, options.cluster, progress)


def merge(options: MergeOptions, progress: Progress | None = None) -> TransformSummary:
    """Write the samples of several caches into one.

    Raises:
        ConfigError: Settings differ, keys are equal, or the images lie in no one place.
        TokenizerMismatchError: The caches come from different tokenizers.
        ArtifactError: A cache is not finished, or damaged.
        CacheInUseError: Another driver writes there.
    """
    inputs = [InputCache(location) for location in options.caches]
    if len(inputs) < 2:
        raise ConfigError("Merging takes two caches or more. Name another one.")
    refuse_differences(inputs)
    classes = unite_classes(inputs)
    source = common_source(inputs)
    is_joined = inputs[0].spec.images_in_cache == "none"
    if source is None and is_joined:
        raise ConfigError(
            "The caches hold no images, and their images lie in different places: "
            f"{' and '.join(cache.spec.source.location for cache in inputs[:2])}. A cache is "
            "joined to one source. Build them with their images, or from one source."
        )
    refuse_equal_keys(inputs)
    arrangement = Arrangement(
        inputs,
        unit_size=options.unit_size,
        relabel=classes.relabel,
        as_containers=source is None,
    )
    changes = {
        "layout": options.layout or inputs[0].spec.layout,
        "unit_size": options.unit_size or max(cache.spec.unit_size for cache in inputs),
        "class_names": classes.names,
        "has_extra": any(cache.spec.has_extra for cache in inputs),
        "source": source
        or SourceInfo(
            kind="cache",
            location=in_braces([cache.location for cache in inputs]),
            num_samples=sum(cache.spec.source.num_samples for cache in inputs),
        ),
    }
    summary = _run(_Job(inputs, options.out, arrangement, changes), options.cluster, progress)
    return summary._replace(num_relabelled=sum(bool(each) for each in classes.relabel))


def subset(options: SubsetOptions, progress: Progress | None = None) -> TransformSummary:
    """Write some samples, or some views, of a cache into another one.

    Raises:
        ConfigError: Nothing is chosen or left out, or a label, key or view is not there.
        ArtifactError: The cache is not finished, or damaged.
        CacheInUseError: Another driver writes there.
    """
    cache = InputCache(options.cache)
    selection = Selection(
        labels=labels_named(cache.spec.class_names, options.labels) if options.labels else None,
        keys=options.keys,
        max_per_class=options.max_per_class,
        sample=options.sample,
        seed=options.seed,
    )
    if selection._replace(seed=0) == Selection() and options.num_views is None:
        raise ConfigError(
            "Say what to take: --labels, --keys, --max-per-class, --sample or --views. "
            "`patchcache convert` copies a whole cache."
        )
    _check_views(cache, options.num_views)
    chosen = choose(cache, selection)
    unit_size = options.unit_size or cache.spec.unit_size
    arrangement = Arrangement([cache], unit_size=unit_size, choose=chosen.has)
    changes = {
        "layout": options.layout or cache.spec.layout,
        "unit_size": unit_size,
        "source": cache.spec.source.model_copy(update={"num_samples": chosen.num_rows}),
    }
    job = _Job([cache], options.out, arrangement, changes, options.num_views)
    return _run(job, options.cluster, progress)


class _Job(NamedTuple):
    """A transformation, whichever it is."""

    inputs: Sequence[InputCache]
    out: str
    arrangement: Arrangement
    changes: dict[str, Any]  # fields of the first input's settings that are others in the output
    num_views: int | None = None

    def spec(self, fingerprint: str) -> CacheSpec:
        """Return the settings of the output or of one of its layers."""
        spec = self.inputs[0].by_tokenizer[fingerprint].manifest.spec
        views = spec.view_spec
        if self.num_views is not None:
            views = views.model_copy(update={"num_views": self.num_views})
        is_base = fingerprint == self.inputs[0].spec.fingerprint
        images = {} if is_base else {"images_in_cache": "none"}
        return spec.model_copy(update={"view_spec": views, **self.changes, **images})


def _run(job: _Job, cluster: ClusterOptions, progress: Progress | None) -> TransformSummary:
    out = absolute_location(job.out)
    for cache in job.inputs:
        if cache.location == out:
            raise ConfigError(f"--out {job.out} is a cache that is read. Choose another place.")
    first = job.inputs[0]
    base, *others = first.by_tokenizer
    layers = [
        LayerSpec(layer_name(spec), spec, first.by_tokenizer[fingerprint].codebook)
        for fingerprint in others
        for spec in [job.spec(fingerprint)]
    ]
    store = open_store(job.out)
    with store.lock(holder()):
        plan = settle_plan(store, job.spec(base), job.arrangement, first.cache.codebook, layers)
        task = TransformTask(
            out=out,
            inputs=tuple(cache.location for cache in job.inputs),
            targets=(("", base), *((layer.name, layer.spec.fingerprint) for layer in layers)),
        )
        reports, num_done = [], 0
        with contextlib.closing(_map_units(task, job.arrangement.units(), cluster)) as done:
            for report in done:
                reports.append(report)
                num_done += report.num_samples + report.num_skipped
                if progress:
                    progress(num_done, plan.spec.source.num_samples)
        infos = []
        for number, layer in enumerate(layers, 1):
            below = layer_store(store, layer.name)
            manifest = write_manifest(
                below,
                read_model(BuildPlan, below, PLAN_NAME),
                (report.summaries[number] for report in reports),
            )
            infos.append(describe_layer(layer.name, manifest))
        infos.sort(key=lambda info: info.name)
        summaries = (report.summaries[0] for report in reports)
        manifest = write_manifest(store, plan, summaries, tuple(infos))
    return TransformSummary(manifest, sum(report.was_there for report in reports))


def _map_units(
    task: TransformTask, units: Iterator[ArrangedUnit], cluster: ClusterOptions
) -> Generator[TransformReport, None, None]:
    finished = map_units(partial(TransformWorker, task), units, cluster, job="transform")
    with contextlib.closing(finished):
        for result, _, _ in finished:
            yield result


def _refuse_lost_images(cache: InputCache) -> None:
    if cache.spec.images_in_cache == "resized":
        raise ConfigError(
            f"The token ids in {cache.location} belong to its re-encoded images, of short side "
            f"{cache.spec.resized_short_side}, and not to those of the source: without them "
            "nothing fits the ids. Keep the images, or build with `--images-in-cache none`."
        )
    if cache.spec.source.kind == "cache":
        raise ConfigError(
            f"{cache.location} was merged from caches of several sources, and a cache without "
            "images is joined to one. Keep the images."
        )


def _check_views(cache: InputCache, num_views: int | None) -> None:
    fewest = min(each.manifest.view_spec.num_views for each in cache.by_tokenizer.values())
    if num_views is not None and not 1 <= num_views <= fewest:
        raise ConfigError(
            f"--views {num_views}: {cache.location} holds {fewest} views. Ask for 1 to {fewest}."
        )
