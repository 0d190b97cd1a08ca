r"""Which samples of a cache a subset takes.

Samples that are drawn are those for which the SHA-256 of `"{seed}\0{key}"` is least: the same on
every run, wherever they lie, and a larger draw holds a smaller one of the same seed.
"""

import difflib
import hashlib
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from cache_builder.arrangement import Entry, InputCache, Place
from cache_builder.errors import ConfigError

_MAX_NAMED = 5


class Selection(NamedTuple):
    """What is asked for; a sample has to meet all of it."""

    labels: frozenset[int] | None = None
    keys: frozenset[str] | None = None
    max_per_class: int | None = None
    sample: int | None = None  # of those that are left
    seed: int = 0


class Chosen(NamedTuple):
    """What a selection comes to in one cache."""

    has: Callable[[Entry], bool]
    num_rows: int


def choose(cache: InputCache, selection: Selection) -> Chosen:
    """Go through the plan of a cache once.

    Skipped images are chosen by label and key like any other, so that the output lists them; they
    are never drawn.

    Raises:
        ConfigError: A key is not in the cache, or nothing, or not enough, is left.
    """
    missing = set(selection.keys or ())
    is_draw = selection.sample is not None or selection.max_per_class is not None
    num_rows = num_samples = 0
    draws: defaultdict[int | None, _Draw] = defaultdict(
        lambda: _Draw(selection.max_per_class or selection.sample or 0)
    )
    for entry in cache.rows():
        missing.discard(entry.row.key)
        if not _matches(entry, selection):
            continue
        num_rows += 1
        if not isinstance(entry.outcome, Place):
            continue
        num_samples += 1
        by_class = selection.max_per_class is not None
        if is_draw and not (by_class and entry.row.label is None):
            draws[entry.row.label if by_class else None].add(entry.row.key, selection.seed)
    if missing:
        raise ConfigError(f"{cache.location} has no sample of {_named(missing, 'key')}.")
    if not is_draw:
        _refuse_nothing(cache, num_samples)
        return Chosen(lambda entry: _matches(entry, selection), num_rows)
    ranked = [pair for draw in draws.values() for pair in draw.pairs]
    if selection.sample is not None:
        if len(ranked) < selection.sample:
            raise ConfigError(
                f"--sample {selection.sample:,}: {len(ranked):,} samples of {cache.location} are "
                "left to draw from. Ask for fewer."
            )
        ranked = heapq.nlargest(selection.sample, ranked)
    _refuse_nothing(cache, len(ranked))
    drawn = frozenset(key for _, key in ranked)
    return Chosen(lambda entry: entry.row.key in drawn, len(drawn))


def labels_named(class_names: tuple[str, ...], words: Iterable[str]) -> frozenset[int]:
    """Return the labels of class names, or of several with commas between.

    Raises:
        ConfigError: There is no class of that name.
    """
    known = set(class_names)
    names = [
        name.strip() for word in words for name in ([word] if word in known else word.split(","))
    ]
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], class_names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f". It has {len(known):,} classes."
        if not class_names:
            hint = ": it has no class names."
        raise ConfigError(f"The cache has no class {unknown[0]!r}{hint}")
    return frozenset(label for label, name in enumerate(class_names) if name in names)


class _Draw:
    """The keys of least hash."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.pairs: list[tuple[int, str]] = []  # a heap whose first is to go next

    def add(self, key: str, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
        pair = (-int.from_bytes(digest), key)
        if len(self.pairs) < self._size:
            heapq.heappush(self.pairs, pair)
        else:
            heapq.heappushpop(self.pairs, pair)


def _matches(entry: Entry, selection: Selection) -> bool:
    if selection.labels is not None and entry.row.label not in selection.labels:
        return False
    return selection.keys is None or entry.row.key in selection.keys


def _refuse_nothing(cache: InputCache, num_samples: int) -> None:
    if not num_samples:
        raise ConfigError(
            f"No sample of {cache.location} is left. `patchcache inspect {cache.location}` shows "
            "its labels."
        )


def _named(names: Iterable[str], noun: str) -> str:
    """Name a few of many: key a, b and 3 more."""
    first = sorted(names)
    more = f" and {len(first) - _MAX_NAMED:,} more" if len(first) > _MAX_NAMED else ""
    return f"{noun} {', '.join(first[:_MAX_NAMED])}{more}"
