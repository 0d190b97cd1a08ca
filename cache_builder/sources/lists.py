"""A text file that names images: one path or URL per line, and if wanted a TAB and a label.

A relative path is relative to the folder of the list. A label is the number or the name of a class.
A list from a server may name what the server has and other URLs, but no file of this machine.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.keys import escape_key
from cache_builder.sources import remote
from cache_builder.sources.classes import ValueClasses
from cache_builder.sources.listing import Listing, Row, list_rows
from cache_builder.sources.names import is_image, is_remote

_MAX_LINE_BYTES = 1 << 16
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL_SCHEMES = frozenset({"file", "local"})


def scan_list(location: str, unit_size: int | None) -> Listing:
    """Read the lines of a list.

    Raises:
        SourceError: It cannot be read, a line is none of a list, or two images share a key.
    """
    rows = _rows(location)
    listing = list_rows("list", location, rows, ValueClasses(), unit_size)
    if not listing.info.num_samples:
        raise SourceError(f"{location} names no images: one path or URL per line.")
    return listing


def _rows(location: str) -> Iterator[Row]:
    if not is_remote(location):
        try:
            with Path(location).open("rb") as file:
                yield from _rows_of(file, location)
        except OSError as exc:
            raise SourceError(f"{location} cannot be read: {exc.strerror}.") from exc
        return
    with tempfile.TemporaryFile() as file:
        remote.stage(location, remote.describe(location), file)
        file.seek(0)
        yield from _rows_of(file, location)


def _rows_of(file: IO[bytes], location: str) -> Iterator[Row]:
    number = 0
    while raw := file.readline(_MAX_LINE_BYTES):
        number += 1
        where = f"{location}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n ")
        except UnicodeDecodeError as exc:
            raise SourceError(f"{where} is not UTF-8 text.") from exc
        if "\0" in line or len(raw) == _MAX_LINE_BYTES:
            raise SourceError(f"{where} is no path or URL. Pass a text file, one image per line.")
        if not line:
            continue
        path, *columns = line.split("\t")
        if len(columns) > 1:
            raise SourceError(
                f"{where} has {len(columns) + 1} columns; a path and a label are read."
            )
        if is_remote(location):
            _refuse_local(path, where)
        name = _key_name(path)
        if not name:
            raise SourceError(f"{where} names no image: a path or URL stands first in a line.")
        label = columns[0].strip() or None if columns else None
        yield Row(escape_key(name), path, label)


def _key_name(path: str) -> str:
    """Return what becomes the key: the path, or host and path of a URL, without an extension."""
    name = _URL.sub("", path, count=1).lstrip("/").removeprefix("./")
    return name.rpartition(".")[0] if is_image(name) else name


def _refuse_local(path: str, where: str) -> None:
    url = _URL.match(path)
    is_below = not url and "://" not in path and not path.startswith("/")
    if ".." in path.split("/"):
        is_below = False
    if is_below or (url and url[1].lower() not in _LOCAL_SCHEMES):
        return
    raise SourceError(
        f"{where} names {path}: a list from a server may name URLs and what lies below its own "
        "folder, no file of this machine. Download the list if you trust it."
    )


def check_list(names: list[str], location: str) -> str:
    """Return the one list that is named.

    Raises:
        ConfigError: There are several.
    """
    if len(names) > 1:
        raise ConfigError(f"{location} names {len(names)} lists. Join them into one.")
    return names[0]
