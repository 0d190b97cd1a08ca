"""Listing the units of a finished cache again, for plans that are damaged.

A listing is a function of the source and of the unit size that was asked for, but a cache of
Parquet files records the size of its largest unit instead: their rows are cut where the commit
records say that the units end. Of a merged cache it is not recorded whether its units were filled,
so that both ways are tried; the digest of the plan tells which it was.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from cache_builder.arrangement import Arrangement, InputCache
from cache_builder.formats.manifest import CacheSpec
from cache_builder.formats.plan import PlanUnit
from cache_builder.merging import unite_classes
from cache_builder.sources import open_source
from cache_builder.sources.names import expand_braces, moved_place


def list_again(
    spec: CacheSpec, images: str | None, num_rows: Sequence[int] | None
) -> Iterator[Iterable[PlanUnit]]:
    """Yield every list of units that may be that of the cache; one, for most sources.

    Args:
        spec: Of the cache.
        images: Where its images lie now, if they have moved.
        num_rows: Of every unit, skipped images counted; None if that is not known.

    Raises:
        PatchCacheError: The source is not there, or cannot be listed.
    """
    recorded = spec.source.location
    location = images or recorded
    for units in _listings(spec, location, num_rows):
        yield units if images is None else (_recorded(unit, recorded) for unit in units)


def moved_container(container: str, location: str) -> str:
    """Return the absolute place of a tar, say, if the source lies at `location`."""
    return _absolute(moved_place(container, location))


def _listings(
    spec: CacheSpec, location: str, num_rows: Sequence[int] | None
) -> Iterator[Iterable[PlanUnit]]:
    kind = spec.source.kind
    if kind == "cache":
        inputs = [InputCache(_absolute(place)) for place in expand_braces(location)]
        relabel = unite_classes(inputs).relabel
        for unit_size in (None, spec.unit_size):
            yield Arrangement(inputs, unit_size=unit_size, relabel=relabel, as_containers=True)
        return
    unit_size = None if kind == "webdataset" else spec.unit_size
    units = open_source(location).scan(unit_size).units
    yield _recut(units, num_rows) if kind == "parquet" and num_rows is not None else units


def _recut(units: Iterable[PlanUnit], num_rows: Sequence[int]) -> Iterator[PlanUnit]:
    """Cut the rows of each file into units of the given sizes."""
    sizes, number = iter(num_rows), 0
    for _, group in groupby(units, key=lambda unit: (unit.container, unit.container_bytes)):
        first, *others = group
        rows = [row for unit in (first, *others) for row in unit.rows]
        start, is_first = 0, True
        while is_first or start < len(rows):  # a file without rows is a unit too
            size = next(sizes, len(rows))
            part = tuple(rows[start : start + size])
            yield first.model_copy(update={"unit": number, "rows": part})
            start, number, is_first = start + size, number + 1, False


def _recorded(unit: PlanUnit, location: str) -> PlanUnit:
    if not unit.container:
        return unit
    return unit.model_copy(update={"container": moved_container(unit.container, location)})


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).absolute())
