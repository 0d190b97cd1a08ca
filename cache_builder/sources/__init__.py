"""Where images come from, and in which order they are worked on.

A source is listed once, into rows (key, place, label) sorted by key; which sample is in which unit
is a function of that list and of nothing else. What it can be, on a disk or behind any URL that
fsspec knows:

    folder          by class or flat (`folder`)
    tars            WebDataset, plain or compressed (`webdataset`)
    zips            folders inside are classes (`zips`)
    Parquet         as Hugging Face stores images (`parquet`)
    list            a text file of paths or URLs (`lists`)

Tars, zips and Parquet files are named by brace patterns (`train-{000..146}.tar`) or by the folder
that they lie in.

A bad image is no error here: its bytes are returned like any other's, and what is refused in a
hostile archive comes with the reason. A file that is listed and cannot be read is an error, because
then the source itself is broken.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from cache_builder.errors import ConfigError, ImageError, SourceError
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.sources import remote
from cache_builder.sources.folder import scan_folder
from cache_builder.sources.image_join import ImageJoin
from cache_builder.sources.listing import Listing, Source
from cache_builder.sources.lists import check_list, scan_list
from cache_builder.sources.names import (
    IMAGE_EXTENSIONS,
    KNOWN_SUFFIXES,
    ContainerKind,
    container_kind,
    expand_braces,
    is_hidden,
    is_list,
    is_remote,
    join,
    parent,
)
from cache_builder.sources.parquet import scan_parquet
from cache_builder.sources.reading import image_bytes, read_unit
from cache_builder.sources.webdataset import scan_tars
from cache_builder.sources.zips import scan_zips

logger = logging.getLogger(__name__)

__all__ = [
    "IMAGE_EXTENSIONS", "ImageJoin", "Listing", "Source", "image_bytes", "open_source",
]  # fmt: skip


def open_source(location: str) -> Source:
    """Return the source at `location`; nothing is asked of a server yet.

    Raises:
        SourceError: There is nothing there.
        ConfigError: The place is of a kind that cannot be read.
    """
    location = location.removeprefix("file://")
    if not location:
        raise ConfigError("The place of the images is empty. Name a folder, `.` for this one.")
    if is_remote(location):
        names = expand_braces(location)
        if any(container_kind(name) or is_list(name) for name in names):
            return _files(location, names)
        return _FolderSource(location.rstrip("/"))
    if Path(location).is_dir():
        return _FolderSource(str(Path(location).resolve()))
    return _files(str(Path(location).absolute()), _local_files(location))


_SCANS = {"webdataset": scan_tars, "zip": scan_zips, "parquet": scan_parquet}


class _FolderSource:
    """A folder, of images or of containers."""

    def __init__(self, root: str) -> None:
        self._root = root

    def scan(self, unit_size: int | None) -> Listing:
        """List the folder, or the containers in it."""
        found: dict[ContainerKind, list[str]] = {}
        for name in self._files():
            kind = container_kind(name)
            if kind and not is_hidden(name):
                found.setdefault(kind, []).append(join(self._root, name))
        if len(found) > 1:
            raise ConfigError(
                f"{self._root} holds files of several kinds: {', '.join(sorted(found))}. "
                "Name those of one kind by a brace pattern."
            )
        for kind, paths in found.items():
            return _scan_containers(kind, self._root, sorted(paths), unit_size)
        return scan_folder(self._root, unit_size)

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
        """Yield every row of a unit with its image, or with why it is refused."""
        return read_unit(self._root, unit)

    def _files(self) -> Iterator[str]:
        if not is_remote(self._root):
            with os.scandir(self._root) as entries:
                for entry in entries:
                    if container_kind(entry.name) and _is_no_file(entry):
                        logger.warning("%s is not a file and is left out", entry.path)
                    else:
                        yield entry.name
            return
        for listed in remote.list_folder(self._root):
            if not listed.is_folder:
                yield listed.name


class _ContainerSource:
    """Containers of one kind, by their names."""

    def __init__(self, kind: ContainerKind, location: str, paths: list[str]) -> None:
        self._kind: ContainerKind = kind
        self._location = location
        self._paths = paths

    def scan(self, unit_size: int | None) -> Listing:
        """List what the containers hold."""
        return _scan_containers(self._kind, self._location, self._paths, unit_size)

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
        """Yield every row of a unit with its image, or with why it is refused."""
        return read_unit("", unit)


class _ListSource:
    """A text file of paths or URLs."""

    def __init__(self, location: str) -> None:
        self._location = location

    def scan(self, unit_size: int | None) -> Listing:
        """List what it names."""
        return scan_list(self._location, unit_size)

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
        """Yield every row of a unit with its image, or with why it is refused."""
        return read_unit(parent(self._location), unit)


def _scan_containers(
    kind: ContainerKind, location: str, paths: list[str], unit_size: int | None
) -> Listing:
    return _SCANS[kind](location, paths, unit_size)


def _files(location: str, names: list[str]) -> Source:
    """Return the source of files that are named, all of one kind."""
    kinds = {"list" if is_list(name) else container_kind(name) for name in names}
    wrong = [name for name in names if not is_list(name) and not container_kind(name)]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is neither a folder nor a {', '.join(KNOWN_SUFFIXES[:-1])} or "
            f"{KNOWN_SUFFIXES[-1]}."
        )
    if len(kinds) > 1:
        raise ConfigError(f"{location} names files of several kinds. Name those of one kind.")
    kind = container_kind(names[0])
    if kind:
        return _ContainerSource(kind, location, names)
    return _ListSource(check_list(names, location))


def _is_no_file(entry: os.DirEntry[str]) -> bool:
    """Say whether it is a folder, a pipe, a socket or a device; a broken link is an error later."""
    return not entry.is_file() and Path(entry.path).exists()


def _local_files(pattern: str) -> list[str]:
    paths = [Path(name) for name in expand_braces(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        what = "is neither a file nor a folder" if missing[0].exists() else "is not there"
        raise SourceError(
            f"{missing[0]} {what}"
            + (f", nor are {len(missing) - 1} others of {pattern}." if len(missing) > 1 else ".")
            + " Pass a folder of images, or tars, zips, Parquet files or a list."
        )
    return [str(_settled(path)) for path in paths]


def _settled(path: Path) -> Path:
    """Return where a file lies, links followed.

    What a link leads to may have a name that does not say what it is, as in the cache of the
    Hugging Face hub; then the link itself is the file.
    """
    place = path.resolve()
    is_known = container_kind(place.name) or is_list(place.name)
    return place if is_known else path.parent.resolve() / path.name
