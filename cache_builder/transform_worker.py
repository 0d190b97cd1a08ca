"""What a worker of `convert`, `merge` and `subset` does: copies samples into units, nothing else.

A shard of an input is digested before anything is taken from it, so that damage is never given a
digest of its own. Samples are read one after another: a worker holds what the writer of the
layout holds.
"""

from collections import Counter
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder.arrangement import ArrangedUnit, Place
from cache_builder.commit import UnitSummary, commit_unit, layer_store, take_unit
from cache_builder.errors import ArtifactError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.layers import PER_VIEW
from cache_builder.formats.manifest import PLAN_NAME, CacheSpec, UnitRecord, read_model
from cache_builder.formats.payloads import (
    FeatureTotals,
    PayloadName,
    SoftTotals,
    sum_features,
    sum_soft,
)
from cache_builder.formats.plan import BuildPlan, PlanRow
from cache_builder.formats.sample import CachedSample, NewSample
from cache_builder.formats.writers import open_writer
from cache_builder.image_types import image_extension
from cache_builder.stores import Store, open_store

_OPTIONAL: tuple[PayloadName, ...] = ("image", "soft", "features")


class TransformTask(NamedTuple):
    """What every worker of one transformation is told; the rest stands in the plans."""

    out: str  # where the output lies
    inputs: tuple[str, ...]
    targets: tuple[tuple[str, str], ...]  # name and tokenizer: "" is the cache, others its layers


class TransformReport(NamedTuple):
    """A unit is finished."""

    num_samples: int
    num_skipped: int
    was_there: bool  # finished by an earlier run and found undamaged
    summaries: tuple[UnitSummary, ...]  # of every target, for the manifests


class TransformWorker:
    """Fills units, in a process of its own."""

    def __init__(self, task: TransformTask) -> None:
        """Open the output; inputs are opened when a unit needs them."""
        self._task = task
        self._caches: dict[tuple[int, str], TokenCache] = {}
        self._checked: set[tuple[int, str, int]] = set()
        self._image_sizes: dict[tuple[int, str, int], NDArray[np.int32]] = {}
        self._out = open_store(task.out)

    def run(self, unit: ArrangedUnit) -> TransformReport:
        """Write what is missing of one unit; what is there and undamaged is kept.

        Raises:
            ArtifactError: A shard of an input is damaged.
        """
        summaries, is_missing = [], False
        for name, fingerprint in self._task.targets:
            target = self._targets[name]
            summary = take_unit(target.store, unit.plan.unit)
            if summary is None:
                is_missing = True
                summary = commit_unit(target.store, self._write(target, fingerprint, unit))
            summaries.append(summary)
        return TransformReport(
            num_samples=len(unit.places),
            num_skipped=len(unit.skipped),
            was_there=not is_missing,
            summaries=tuple(summaries),
        )

    def _write(self, target: "_Target", fingerprint: str, unit: ArrangedUnit) -> UnitRecord:
        number, spec = unit.plan.unit, target.plan.spec
        left_out = {sample.key for sample in unit.skipped}
        rows = (row for row in unit.plan.rows if row.key not in left_out)
        with open_writer(target.store, target.plan, number) as writer:
            for row, place in zip(rows, unit.places, strict=True):
                writer.add(self._read(row, place, fingerprint, spec))
            written = writer.finish()
        soft, features = self._totals(unit.places, fingerprint, spec)
        sizes = written.payload_bytes
        return UnitRecord(
            unit=number,
            num_samples=written.num_samples,
            files=written.files,
            skipped=unit.skipped,
            samples=written.samples,
            soft=soft and soft.model_copy(update={"bytes": sizes["soft"]}),
            features=features and features.model_copy(update={"bytes": sizes["features"]}),
        )

    def _read(self, row: PlanRow, place: Place, fingerprint: str, spec: CacheSpec) -> NewSample:
        cache = self._cache(place.cache, fingerprint)
        self._check(place, fingerprint)
        wanted = [name for name in _OPTIONAL if name in spec.payloads]
        sample = cache.read(place.shard, place.row, wanted)
        if sample.key != row.key:
            raise ArtifactError(
                f"{cache.location}: unit {place.shard} holds {sample.key} where {row.key} is "
                f"planned. Run `patchcache verify {cache.location}`."
            )
        return NewSample(
            sample=_first_views(sample, spec.view_spec.num_views)._replace(label=row.label),
            image_extension="" if sample.image is None else image_extension(sample.image),
            source=row.source,
            image_size=self._image_size(place, fingerprint),
        )

    def _image_size(self, place: Place, fingerprint: str) -> tuple[int, int]:
        where = (place.cache, fingerprint, place.shard)
        if where not in self._image_sizes:
            columns = self._cache(place.cache, fingerprint).shard(place.shard).columns()
            self._image_sizes[where] = columns.image_sizes
        height, width = self._image_sizes[where][place.row].tolist()
        return height, width

    def _totals(
        self, places: tuple[Place, ...], fingerprint: str, spec: CacheSpec
    ) -> tuple[SoftTotals | None, FeatureTotals | None]:
        """Return the means of the shards that samples come from, weighted by their patches."""
        if not spec.soft and not spec.features:
            return None, None
        rows, cols = spec.grid
        patches_per_sample = spec.view_spec.num_views * rows * cols
        all_soft, all_features = [], []
        for (cache, shard), count in Counter((p.cache, p.shard) for p in places).items():
            soft, features = self._cache(cache, fingerprint).totals(shard)
            share = {"num_patches": count * patches_per_sample}
            all_soft += [soft.model_copy(update=share)] if soft and spec.soft else []
            all_features += (
                [features.model_copy(update=share)] if features and spec.features else []
            )
        return sum_soft(all_soft), sum_features(all_features)

    def _check(self, place: Place, fingerprint: str) -> None:
        """Digest a shard of an input before the first sample is taken from it."""
        if (place.cache, fingerprint, place.shard) in self._checked:
            return
        cache = self._cache(place.cache, fingerprint)
        if damage := cache.damage(place.shard):
            raise ArtifactError(
                f"{damage}. Nothing is taken from a damaged shard; "
                f"`patchcache verify {cache.location}` shows what else is damaged."
            )
        self._checked.add((place.cache, fingerprint, place.shard))

    def _cache(self, number: int, fingerprint: str) -> TokenCache:
        if (number, fingerprint) not in self._caches:
            opened = TokenCache.open(self._task.inputs[number], fingerprint)
            self._caches[number, fingerprint] = opened
        return self._caches[number, fingerprint]

    @cached_property
    def _targets(self) -> dict[str, "_Target"]:
        stores = {
            name: layer_store(self._out, name) if name else self._out
            for name, _ in self._task.targets
        }
        return {
            name: _Target(store, read_model(BuildPlan, store, PLAN_NAME))
            for name, store in stores.items()
        }


class _Target(NamedTuple):
    store: Store
    plan: BuildPlan


def _first_views(sample: CachedSample, num_views: int) -> CachedSample:
    """Leave later views out of everything that is there once per view."""
    if len(sample.views) == num_views:
        return sample
    return sample._replace(
        **{
            name: array[:num_views]
            for name in PER_VIEW
            if (array := getattr(sample, name)) is not None
        }
    )
