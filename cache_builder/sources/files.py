"""Images that are files of their own: read one by one, remote ones a few at once."""

import os
import stat
from collections.abc import Iterator
from functools import partial

from cache_builder.errors import ImageError, NotServedError, SourceError
from cache_builder.formats.headers import shorten
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.prefetch import map_ahead
from cache_builder.sources import names, remote

_FILES_AT_ONCE = 8  # of remote ones
_NO_FILES = {
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
}


def read_files(root: str, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
    """Yield the rows of a unit with their files, in order.

    Raises:
        SourceError: A listed file cannot be read.
    """
    read = partial(read_row, root)
    is_remote = names.is_remote(root) or any(names.is_remote(row.source) for row in unit.rows)
    found = map_ahead(read, unit.rows, _FILES_AT_ONCE) if is_remote else map(read, unit.rows)
    yield from zip(unit.rows, found, strict=True)


def resolve(root: str, source: str) -> str:
    """Return where a row's file lies: below the root, unless it says itself."""
    if names.is_remote(source) or source.startswith("/"):
        return source
    return names.join(root, source)


def read_row(root: str, row: PlanRow) -> bytes | ImageError:
    """Read one file, or say why it is refused.

    Raises:
        SourceError: It cannot be read.
    """
    if row.refused:
        return ImageError(row.refused)
    location = resolve(root, row.source)
    if not names.is_remote(location):
        return _read_local(location)
    try:
        data, problem = remote.read_image(location)
    except NotServedError as exc:
        # An address that a list names may be dead; what a folder listed was there.
        if names.is_remote(row.source):
            return ImageError(str(exc))
        raise
    return ImageError(problem) if problem else data


def _read_local(path: str) -> bytes | ImageError:
    try:
        # A Path and a buffer for every image would take as long as reading it.
        status = os.stat(path)  # noqa: PTH116
        kind = stat.S_IFMT(status.st_mode)
        if kind in _NO_FILES:  # they may have no end, and reading may wait for ever
            return ImageError(f"it is a {_NO_FILES[kind]}, not a file")
        problem = names.size_problem(status.st_size)
        if problem:
            return ImageError(problem)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()
    except (OSError, ValueError) as exc:  # a name with a zero byte is a ValueError
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise SourceError(
            f"{shorten(path)} cannot be read: {reason}. It was there "
            "when the source was listed; restore it and run the same command again."
        ) from exc
