"""Where the samples of a merged cache came from.

The plan of a unit names the cache that was merged, and its rows the keys. So a damaged unit can be
copied again, targets and all, as `merge` did it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from cache_builder.arrangement import ArrangedUnit, Entry, InputCache, Place
from cache_builder.errors import PatchCacheError
from cache_builder.formats.manifest import SkippedSample
from cache_builder.formats.plan import PlanUnit


class Origin(NamedTuple):
    """What a unit was copied from: the cache that its plan names as the container."""

    unit: ArrangedUnit  # its places are in that one cache
    tokenizers: frozenset[str]  # whose targets that cache holds


def find_origins(plans: Sequence[PlanUnit]) -> dict[int, Origin | str]:
    """Find the samples of units, or say why they are not found.

    Args:
        plans: Of the units; the container is where the cache lies now.
    """
    by_cache: dict[str, list[PlanUnit]] = defaultdict(list)
    for plan in plans:
        by_cache[plan.container].append(plan)
    origins: dict[int, Origin | str] = {}
    for location, units in by_cache.items():
        wanted = {row.key for unit in units for row in unit.rows}
        try:
            cache = InputCache(location)
            entries = {entry.row.key: entry for entry in cache.rows() if entry.row.key in wanted}
        except PatchCacheError as exc:
            reason = (
                f"its samples come from the cache {location}, which cannot be read: {exc} --images "
                "names the place where the merged caches lie now"
            )
            origins |= {unit.unit: reason for unit in units}
            continue
        tokenizers = frozenset(cache.by_tokenizer)
        for unit in units:
            origins[unit.unit] = _origin(unit, entries, tokenizers)
    return origins


def _origin(plan: PlanUnit, entries: dict[str, Entry], tokenizers: frozenset[str]) -> Origin | str:
    missing = [row.key for row in plan.rows if row.key not in entries]
    if missing:
        return f"the cache {plan.container} that it comes from has no {missing[0]} any more"
    outcomes = [entries[row.key].outcome for row in plan.rows]
    places = tuple(outcome for outcome in outcomes if isinstance(outcome, Place))
    skipped = tuple(outcome for outcome in outcomes if isinstance(outcome, SkippedSample))
    return Origin(ArrangedUnit(plan, places, skipped), tokenizers)
