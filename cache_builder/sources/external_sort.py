"""Sorting more rows than memory holds: sorted runs on disk, merged when they are read.

Rows are plain tuples of what `marshal` knows (text, numbers, None, tuples, lists and dicts of
them), ordered by their first item. Up to `max_in_memory` rows nothing is written. Beyond that each
run of so many rows is sorted and written to an unlinked temporary file, and 64 runs become one
longer run, so that neither memory nor the number of open files grows with the number of rows.
"""

import heapq
import marshal
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import IO, Any

Record = tuple[Any, ...]

_MAX_IN_MEMORY = 1 << 18
_MAX_RUNS = 64  # of one length
_CHUNK_ROWS = 1024
_FIRST = itemgetter(0)


class Spool:
    """Things that `marshal` knows, in the order in which they came, on disk."""

    def __init__(self) -> None:
        """Open an unlinked temporary file."""
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this
        self._num_bytes = 0
        weakref.finalize(self, self._file.close)

    def append(self, thing: Any) -> None:
        """Add one thing."""
        data = marshal.dumps(thing)
        self._file.seek(self._num_bytes)
        self._file.write(len(data).to_bytes(8, "little"))
        self._file.write(data)
        self._num_bytes += 8 + len(data)

    def __iter__(self) -> Iterator[Any]:
        """Yield the things; several iterations may go on at once."""
        position = 0
        while position < self._num_bytes:
            self._file.seek(position)
            size = int.from_bytes(self._file.read(8), "little")
            yield marshal.loads(self._file.read(size))  # this process wrote it
            position += 8 + size


class SortedRows:
    """Rows in the order of their first item, iterated as often as wanted."""

    def __init__(self, rows: Iterable[Record], *, max_in_memory: int = _MAX_IN_MEMORY) -> None:
        """Take all rows in."""
        self._num_rows = 0
        self._levels: list[list[Spool]] = []
        self._rest: list[Record] = []
        for row in rows:
            self._rest.append(row)
            self._num_rows += 1
            if len(self._rest) >= max_in_memory:
                self._rest.sort(key=_FIRST)
                self._keep(_spooled(self._rest), level=0)
                self._rest = []
        self._rest.sort(key=_FIRST)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._num_rows

    def __iter__(self) -> Iterator[Record]:
        """Yield the rows in order."""
        runs = [_rows(spool) for level in self._levels for spool in level]
        if not runs:
            return iter(self._rest)
        return heapq.merge(*runs, self._rest, key=_FIRST)

    def _keep(self, run: Spool, level: int) -> None:
        if level == len(self._levels):
            self._levels.append([])
        runs = self._levels[level]
        runs.append(run)
        if len(runs) == _MAX_RUNS:
            longer = _spooled(heapq.merge(*map(_rows, runs), key=_FIRST))
            runs.clear()
            self._keep(longer, level + 1)


def _spooled(rows: Iterable[Record]) -> Spool:
    spool, chunk = Spool(), []
    for row in rows:
        chunk.append(tuple(row))  # marshal takes no named tuples
        if len(chunk) == _CHUNK_ROWS:
            spool.append(chunk)
            chunk = []
    spool.append(chunk)
    return spool


def _rows(spool: Spool) -> Iterator[Record]:
    for chunk in spool:
        yield from chunk
