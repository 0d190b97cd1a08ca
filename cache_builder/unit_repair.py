"""Building damaged units again, beside the cache: only what is as it was goes into it.

A unit is built in a folder of its own, a cache of this one unit. If its files have the digests that
the damaged ones had, they replace them; if not, the source or the tokenizer is not what it was, and
the cache is left as it is.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cache_builder.arrangement import ArrangedUnit
from cache_builder.build_worker import BuildTask, BuildWorker
from cache_builder.commit import UnitSummary, layer_store
from cache_builder.damage import full_name, is_misspelt, is_whole, measure
from cache_builder.errors import PatchCacheError
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    PLAN_NAME,
    FileDigest,
    ShardInfo,
    UnitRecord,
    read_model,
    to_json,
    unit_record_name,
)
from cache_builder.formats.plan import BuildPlan, plan_unit_name
from cache_builder.formats.zarr_store import create_store
from cache_builder.stores import LocalStore, Store, open_store
from cache_builder.transform_worker import TransformTask, TransformWorker

_COPY_BYTES = 1 << 20


class RebuildTask(NamedTuple):
    """What every worker is told."""

    cache: str  # where it lies
    plans: Mapping[str, BuildPlan]  # by layer; "" is the cache itself
    images: str  # where the images lie now
    device: str
    weights: str | None


class RebuildJob(NamedTuple):
    """A unit that is to be built again."""

    unit: int
    plan: bytes  # of the unit; its container is where it lies now
    expected: Mapping[str, ShardInfo | None]  # by layer; None takes what comes
    reads_source: bool  # the images are not in the cache, or not whole
    copied: ArrangedUnit | None = None  # from the cache that the plan's container is


class RebuildResult(NamedTuple):
    """What became of it."""

    unit: int
    written: tuple[str, ...]  # names relative to the cache
    refused: str  # why nothing was; empty if all went well


class UnitRebuilder:
    """Builds units again, in a process of its own."""

    def __init__(self, task: RebuildTask) -> None:
        """Make the folder beside the cache."""
        self._task = task
        self._store = open_store(task.cache)
        self._folder = tempfile.mkdtemp(prefix="patchcache-repair-")
        self._staging = LocalStore(Path(self._folder))
        self._workers: dict[tuple[tuple[str, ...], str], BuildWorker] = {}
        self.close = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def run(self, job: RebuildJob) -> RebuildResult:
        """Build one unit of the cache, its layers or both again, or copy it again."""
        names = tuple(job.expected)
        try:
            self._prepare(job, names)
            summaries = self._make(job, names)
            made = {name: each.shard for name, each in zip(names, summaries, strict=True)}
            for name, shard in made.items():
                _refuse_other(shard, job.expected[name], name)
            written = [file for name, shard in made.items() for file in self._publish(name, shard)]
        except PatchCacheError as exc:
            return RebuildResult(job.unit, (), str(exc))
        finally:
            self._clear(job.unit)
        return RebuildResult(job.unit, tuple(written), "")

    def _make(self, job: RebuildJob, names: tuple[str, ...]) -> tuple[UnitSummary, ...]:
        if job.copied is None:
            images = self._task.images if job.reads_source else self._folder
            return self._worker(names, images).run(job.unit).summaries
        targets = tuple((name, self._task.plans[name].spec.fingerprint) for name in names)
        task = TransformTask(self._folder, (job.copied.plan.container,), targets)
        return TransformWorker(task).run(job.copied).summaries

    def _prepare(self, job: RebuildJob, names: tuple[str, ...]) -> None:
        """Lay out what a worker of a build finds."""
        self._staging.publish(plan_unit_name(job.unit), job.plan)
        for name in {"", *names}:
            store, staged = self._stores(name)
            plan = self._task.plans[name]
            if name in names and not staged.exists(CODEBOOK_NAME):
                staged.publish(CODEBOOK_NAME, store.read(CODEBOOK_NAME))
            if staged.exists(PLAN_NAME):
                continue
            staged.publish(PLAN_NAME, to_json(plan))
            if plan.spec.layout == "zarr":
                create_store(staged, plan.spec, plan.num_units)
        if "" in names or job.copied is not None:
            return
        record = unit_record_name(job.unit)
        _copy(self._store, self._staging, record)
        if not job.reads_source:
            for file in read_model(UnitRecord, self._staging, record).files:
                _copy(self._store, self._staging, file.path)

    def _publish(self, name: str, shard: ShardInfo) -> list[str]:
        """Replace what is damaged; the record comes last."""
        store, staged = self._stores(name)
        written = []
        for file in (*shard.files, shard.record):
            if not is_whole(measure(store, file.path), file):
                _copy(staged, store, file.path)
                written.append(full_name(name, file.path))
        return written

    def _clear(self, unit: int) -> None:
        for name in self._task.plans:
            _, staged = self._stores(name)
            record = unit_record_name(unit)
            if staged.exists(record):
                for file in read_model(UnitRecord, staged, record).files:
                    staged.remove(file.path)
                staged.remove(record)

    def _worker(self, names: tuple[str, ...], images: str) -> BuildWorker:
        if (names, images) not in self._workers:
            task = BuildTask(
                cache=self._folder,
                names=names,
                images=images,
                device=self._task.device,
                weights=self._task.weights,
            )
            self._workers[names, images] = BuildWorker(task)
        return self._workers[names, images]

    def _stores(self, name: str) -> tuple[Store, Store]:
        if not name:
            return self._store, self._staging
        return layer_store(self._store, name), layer_store(self._staging, name)


def _refuse_other(made: ShardInfo, expected: ShardInfo | None, layer: str) -> None:
    """Refuse a unit that is not what it was.

    Raises:
        PatchCacheError: A file has another digest.
    """
    if expected is None:
        return
    pairs = zip((*made.files, made.record), (*expected.files, expected.record), strict=False)
    if len(made.files) == len(expected.files) and all(_is_same(*pair) for pair in pairs):
        return
    place = f"layer {layer}, " if layer else ""
    raise PatchCacheError(
        f"{place}unit {made.name}, built again, is not what it was: its images have changed since, "
        "or it was built on another device or with other versions of the libraries. It was left "
        "as it is. Restore the images, or run the `patchcache build` command of the cache again, "
        "which takes the images as they are now."
    )


def _is_same(made: FileDigest, expected: FileDigest) -> bool:
    return made.sha256 == expected.sha256 or is_misspelt(made.sha256, expected.sha256)


def _copy(source: Store, target: Store, name: str) -> None:
    size, reader = source.size(name), source.open(name)
    try:
        with target.publishing(name) as file:
            for start in range(0, size, _COPY_BYTES):
                file.write(reader.read(start, min(_COPY_BYTES, size - start)))
    finally:
        reader.close()
