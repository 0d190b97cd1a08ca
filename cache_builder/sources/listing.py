"""From rows to a listing: sorted, without doubles, cut into units, in bounded memory.

A listing does not hold its units. It makes them one by one, as often as it is iterated, from rows
that lie sorted on disk where they are many. Which row is in which unit is a function of the rows
and of nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

from cache_builder.errors import ImageError, SourceError
from cache_builder.formats.manifest import SourceInfo, SourceKind
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.sources.classes import Classes
from cache_builder.sources.external_sort import Record, SortedRows, Spool
from cache_builder.sources.names import base_name

MIN_UNIT_SIZE = 64
MAX_UNIT_SIZE = 1024
_TARGET_UNITS = 64
_CHUNK_ROWS = 1024


class Units(Protocol):
    """The units of a source: made anew by every iteration."""

    def __iter__(self) -> Iterator[PlanUnit]:
        """Yield the units in order."""

    def __len__(self) -> int:
        """Return the number of units."""


class Listing(NamedTuple):
    """Everything that a build needs to know of a source before it reads an image."""

    info: SourceInfo
    units: Units
    class_names: tuple[str, ...]
    unit_size: int
    has_extra: bool = False  # some row has columns beside its image and label

    @property
    def num_units(self) -> int:
        """Number of units."""
        return len(self.units)


class Source(Protocol):
    """A place that holds images."""

    def scan(self, unit_size: int | None) -> Listing:
        """Return the units of the source; `unit_size` None chooses one."""

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
        """Yield every row of a unit with its image, or with why it is refused, in order."""


class Row(NamedTuple):
    """What a source knows of one image; its label is not a number yet."""

    key: str
    source: str
    label: int | str | None = None
    extra: dict[str, Any] | None = None
    refused: str = ""
    span: tuple[int, int] | None = None


class Part(NamedTuple):
    """The rows of a container, or of a slice of it, which make one unit or more."""

    container: str
    container_bytes: int | None
    rows: Iterable[Record]  # sorted by key, as tuples in the manner of `Row`


def list_rows(
    kind: SourceKind,
    location: str,
    rows: Iterable[Row],
    classes: Classes,
    unit_size: int | None,
) -> Listing:
    """Sort rows by key and cut them into units.

    Raises:
        SourceError: Two rows have one key.
    """
    counted = _Counter(classes, location)
    ordered = SortedRows(map(counted.see, rows))
    _check_unique(((key, source) for key, source, *_ in ordered), location)
    size = unit_size or choose_unit_size(len(ordered))
    info = SourceInfo(kind=kind, location=location, num_samples=len(ordered))
    number_of = classes.numbering()
    return Listing(info, _Slices(ordered, size, number_of), classes.names(), size, counted.extra)


def list_parts(
    kind: SourceKind,
    location: str,
    parts: Iterable[Part],
    classes: Classes,
    cut: Callable[[int], int] | None = None,
) -> Listing:
    """Make units of containers, in the order of the parts.

    Args:
        kind: Of the source.
        location: Of the source.
        parts: Of every container at least one.
        classes: That the labels belong to.
        cut: Returns the unit size for a number of rows; None makes every part one unit.

    Raises:
        SourceError: Two rows have one key.
    """
    counted = _Counter(classes, location)
    spool = Spool()
    heads: list[_Head] = []

    def keys() -> Iterator[Record]:
        for part in parts:
            num_rows = 0
            records = iter(part.rows)
            while chunk := [counted.see(record) for record in islice(records, _CHUNK_ROWS)]:
                spool.append(chunk)
                num_rows += len(chunk)
                yield from ((key, source, len(heads)) for key, source, *_ in chunk)
            heads.append(_Head(part.container, part.container_bytes, num_rows))

    ordered = SortedRows(keys())
    names = (
        (key, f"{base_name(heads[part].container)}: {source}") for key, source, part in ordered
    )
    _check_unique(names, location)
    info = SourceInfo(kind=kind, location=location, num_samples=len(ordered))
    largest = max((head.num_rows for head in heads), default=0)
    size = cut(len(ordered)) if cut else -(-largest // MIN_UNIT_SIZE) * MIN_UNIT_SIZE
    units = _Parts(spool, heads, size if cut else None, classes.numbering())
    return Listing(info, units, classes.names(), size, counted.extra)


def choose_unit_size(num_samples: int) -> int:
    """Return a power of two that makes about 64 units, within 64 and 1,024 samples."""
    wanted = max(MIN_UNIT_SIZE, -(-num_samples // _TARGET_UNITS))
    return min(MAX_UNIT_SIZE, 1 << (wanted - 1).bit_length())


class _Counter:
    """Sees every row on its way."""

    def __init__(self, classes: Classes, location: str) -> None:
        self.extra = False
        self._classes, self._location = classes, location

    def see(self, record: Record) -> Record:
        _, source, label, extra, _, _ = record
        try:
            self._classes.add(label, source)
        except SourceError as exc:
            raise SourceError(f"{self._location}: {exc}") from exc
        if extra:
            self.extra = True
        return tuple(record)


class _Slices:
    """Units that are slices of sorted rows."""

    def __init__(self, rows: SortedRows, size: int, number_of: "_NumberOf") -> None:
        self._rows = rows
        self._size = size
        self._number_of = number_of

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[PlanUnit]:
        records = iter(self._rows)
        for unit in range(len(self)):
            yield _plan_unit(unit, islice(records, self._size), self._number_of)

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    __hash__ = None  # type: ignore[assignment]


class _Head(NamedTuple):
    container: str
    container_bytes: int | None
    num_rows: int

    def starts(self, size: int | None) -> range:
        """Return where its units start; a part without rows is a unit too, unless parts are cut."""
        return range(0, self.num_rows, size) if size else range(1)


class _Parts:
    """Units that are containers, or slices of them."""

    def __init__(
        self, spool: Spool, heads: list[_Head], size: int | None, number_of: "_NumberOf"
    ) -> None:
        self._spool = spool
        self._heads = heads
        self._size = size
        self._number_of = number_of
        self._num_units = sum(len(head.starts(size)) for head in heads)

    def __len__(self) -> int:
        return self._num_units

    def __iter__(self) -> Iterator[PlanUnit]:
        records = chain.from_iterable(self._spool)
        unit = 0
        for head in self._heads:
            for start in head.starts(self._size):
                num_rows = min(self._size or head.num_rows, head.num_rows - start)
                rows = islice(records, num_rows)
                yield _plan_unit(unit, rows, self._number_of, *head[:2])
                unit += 1

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    __hash__ = None  # type: ignore[assignment]


_NumberOf = Callable[[int | str | None], int | None]


def _same(units: _Slices | _Parts, other: object) -> bool:
    if not isinstance(other, _Slices | _Parts):
        return False
    return len(units) == len(other) and all(a == b for a, b in zip(units, other, strict=True))


def _plan_unit(
    unit: int,
    records: Iterable[Record],
    number_of: _NumberOf,
    container: str = "",
    container_bytes: int | None = None,
) -> PlanUnit:
    rows = []
    for key, source, label, extra, refused, span in records:
        row = {"key": key, "source": source, "label": number_of(label)}
        if extra:
            row["extra"] = extra
        if refused:
            row["refused"] = refused
        if span:
            row["span"] = span
        rows.append(row)
    # All rows in one call, which is faster than a row at a time.
    return PlanUnit.model_validate(
        {
            "unit": unit,
            "container": container,
            "container_bytes": container_bytes,
            "rows": rows,
        }
    )


def _check_unique(rows: Iterable[tuple[str, str]], location: str) -> None:
    """Refuse two images with one key, which are neighbours once the rows are sorted."""
    last_key = last_source = None
    for key, source in rows:
        if key == last_key:
            raise SourceError(
                f"{location}: {last_source} and {source} have the same key {key!r}. "
                "A key joins an image to its targets; rename one of them."
            )
        last_key, last_source = key, source
