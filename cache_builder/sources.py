"""Where images come from, and in which order they are worked on.

A source is listed once, into rows (key, place, label) sorted by key; which sample is in which unit
is a function of that list and of nothing else. Three kinds:

    ImageFolder     root/class/.../name.jpg; the label is the rank of the class by name
    flat folder     root/.../name.jpg with at least one image in root itself; no labels
    WebDataset      tars, with brace patterns (`train-{000..146}.tar`), or a folder of tars; one
                    tar is one unit; the label is the integer in `.cls`, or `label` in `.json`

A bad image is no error here: its bytes are returned like any other's. A file that is listed and
cannot be read is one, because then the source itself is broken.
"""

import json
import logging
import os
import tarfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.keys import escape_key
from cache_builder.formats.manifest import (
    PlanRow,
    PlanUnit,
    SourceInfo,
    plan_unit_name,
    read_model,
)
from cache_builder.formats.shards import check_end
from cache_builder.stores import Store

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff"})
_MIN_UNIT_SIZE = 64
_MAX_UNIT_SIZE = 1024
_TARGET_UNITS = 64


class Listing(NamedTuple):
    """Everything that a build needs to know of a source before it reads an image."""

    info: SourceInfo
    units: list[PlanUnit]
    class_names: tuple[str, ...]
    unit_size: int


class Source(Protocol):
    """A place that holds images."""

    def scan(self, unit_size: int | None) -> Listing:
        """Return the units of the source; `unit_size` None chooses one."""

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes]]:
        """Yield every row of a unit with the bytes of its image, in order."""


def open_source(location: str) -> Source:
    """Return the source at `location`: a folder, a tar, or a brace pattern of tars.

    Raises:
        SourceError: There is nothing there.
        ConfigError: The place is of a kind that cannot be read.
    """
    if "://" in location:
        raise ConfigError(f"{location}: only local folders and tars can be read.")
    path = Path(location)
    if path.is_dir():
        tars = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not _is_hidden(p.name))
        return TarSource(location, tars) if tars else FolderSource(path)
    return TarSource(location, _expand(location))


class FolderSource:
    """Images as files below a folder, by class or flat."""

    def __init__(self, root: Path) -> None:
        """Take the folder; it is walked by `scan`."""
        self._root = root

    def scan(self, unit_size: int | None) -> Listing:
        """Walk the folder.

        Raises:
            SourceError: No image, two with one key, or a folder that cannot be read.
        """
        paths, num_ignored = self._walk()
        if num_ignored:
            logger.info("%s: %d files are not images by their names", self._root, num_ignored)
        if not paths:
            raise SourceError(
                f"{self._root} holds no images. Known extensions: "
                f"{', '.join(sorted(IMAGE_EXTENSIONS))}."
            )
        by_class = all("/" in path for path in paths)
        classes = sorted({path.split("/")[0] for path in paths}) if by_class else []
        labels = {name: index for index, name in enumerate(classes)}
        rows = [
            PlanRow(
                key=escape_key(path.rpartition(".")[0]),
                source=path,
                label=labels.get(path.split("/")[0]),
            )
            for path in paths
        ]
        rows.sort(key=lambda row: row.key)
        _check_names(rows, str(self._root))
        size = unit_size or _choose_unit_size(len(rows))
        units = [
            PlanUnit(unit=unit, rows=tuple(rows[start : start + size]))
            for unit, start in enumerate(range(0, len(rows), size))
        ]
        info = SourceInfo(kind="folder", location=str(self._root.resolve()), num_samples=len(rows))
        return Listing(info, units, tuple(classes), size)

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes]]:
        """Yield the unit's rows and files.

        Raises:
            SourceError: A listed file cannot be read.
        """
        for row in unit.rows:
            yield row, _read_file(self._root / row.source)

    def _walk(self) -> tuple[list[str], int]:
        found, num_ignored = [], 0
        seen = set()
        for folder, subfolders, names in os.walk(
            self._root, followlinks=True, onerror=_refuse_folder
        ):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link back up the tree
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
            for name in names:
                if _is_hidden(name) or not _is_image(name):
                    num_ignored += 1
                    continue
                found.append((Path(folder) / name).relative_to(self._root).as_posix())
        return found, num_ignored


class TarSource:
    """Images as members of WebDataset tars; one tar is one unit."""

    def __init__(self, location: str, tars: Iterable[Path]) -> None:
        """Take the tars; their headers are read by `scan`."""
        self._location = location
        self._tars = list(tars)

    def scan(self, unit_size: int | None) -> Listing:
        """Read the headers of every tar.

        Raises:
            SourceError: A tar is damaged, holds no image, or two images share a key.
            ConfigError: A unit size was asked for.
        """
        if unit_size is not None:
            raise ConfigError("--unit-size has no meaning for tars: one tar is one unit.")
        units = [
            PlanUnit(unit=unit, container=str(tar.resolve()), rows=tuple(_tar_rows(tar)))
            for unit, tar in enumerate(self._tars)
        ]
        rows = [row for unit in units for row in unit.rows]
        if not rows:
            raise SourceError(f"{self._location}: no tar holds an image.")
        _check_names(rows, self._location)
        largest = max(len(unit.rows) for unit in units)
        size = -(-largest // _MIN_UNIT_SIZE) * _MIN_UNIT_SIZE
        labels = [row.label for row in rows if row.label is not None]
        names = tuple(str(label) for label in range(max(labels) + 1)) if labels else ()
        location = str(Path(self._location).absolute())
        info = SourceInfo(kind="webdataset", location=location, num_samples=len(rows))
        return Listing(info, units, names, size)

    def read(self, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes]]:
        """Yield the unit's rows and members.

        Raises:
            SourceError: The tar is damaged or has changed since it was listed.
        """
        with _TarReader(Path(unit.container)) as tar:
            for row in unit.rows:
                yield row, tar.read(row.source)


class ImageJoin:
    """Finds the images of a cache that holds none, by key, where they lie.

    Args of `read` name a unit and a key; positions are never compared.
    """

    def __init__(self, cache: Store, info: SourceInfo, location: str | None = None) -> None:
        """Join to the recorded source, or to `location` if the images have moved.

        Raises:
            SourceError: There is nothing at the place.
        """
        self._cache = cache
        self._root = Path(location or info.location)
        self._kind = info.kind
        self._moved = location is not None
        self._units: dict[int, tuple[str, dict[str, str]]] = {}
        self._tars: dict[str, _TarReader] = {}
        if info.kind == "folder" and not self._root.is_dir():
            raise SourceError(
                f"{cache.location} holds no images, and their folder {self._root} is not there. "
                "Name the folder that they lie in now."
            )

    def read(self, unit: int, key: str) -> bytes:
        """Return the encoded image of one sample.

        Raises:
            SourceError: It is not there.
        """
        if unit not in self._units:
            plan = read_model(PlanUnit, self._cache, plan_unit_name(unit))
            self._units[unit] = (plan.container, {row.key: row.source for row in plan.rows})
        container, places = self._units[unit]
        if key not in places:
            raise SourceError(f"{self._cache.location}: unit {unit} has no image of key {key}.")
        if self._kind == "folder":
            return _read_file(self._root / places[key])
        if container not in self._tars:
            self._tars[container] = _TarReader(self._moved_tar(Path(container)))
        return self._tars[container].read(places[key])

    def _moved_tar(self, recorded: Path) -> Path:
        if not self._moved:
            return recorded
        folder = self._root if self._root.is_dir() else self._root.parent
        return folder / recorded.name


class _TarReader:
    """Random access to the members of one tar; it closes itself when nothing holds it any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with tarfile.open(path, mode="r:") as tar:
                self._places = {
                    member.name: (member.offset_data, member.size)
                    for member in tar
                    if member.isfile()
                }
                check_end(tar)
            self._handle = os.open(path, os.O_RDONLY)
        except (OSError, tarfile.TarError) as exc:
            raise SourceError(f"{path} cannot be read as a tar: {exc}") from exc
        self.close = weakref.finalize(self, os.close, self._handle)

    def read(self, name: str) -> bytes:
        if name not in self._places:
            raise SourceError(f"{self._path} has no member {name} any more. Restore the tar.")
        offset, size = self._places[name]
        data = os.pread(self._handle, size, offset)
        if len(data) < size:
            raise SourceError(f"{self._path} is cut short at member {name}.")
        return data

    def names(self) -> Iterator[str]:
        return iter(self._places)

    def __enter__(self) -> "_TarReader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _tar_rows(path: Path) -> list[PlanRow]:
    """List one tar: a sample is a run of members with one name up to the first dot."""
    with _TarReader(path) as tar:
        samples: dict[str, dict[str, str]] = defaultdict(dict)
        for name in tar.names():
            folder, _, base = name.removeprefix("./").rpartition("/")
            stem, _, extension = base.partition(".")
            if _is_hidden(base):
                continue
            members = samples[f"{folder}/{stem}" if folder else stem]
            other = members.setdefault(extension.lower(), name)
            if other != name:
                raise SourceError(f"{path}: {other} and {name} are one name. Rename one of them.")
        rows = []
        for key, members in samples.items():
            images = [name for extension, name in members.items() if _is_image("." + extension)]
            if len(images) > 1:
                raise SourceError(
                    f"{path}: {len(images)} images share the key {key!r}: {', '.join(images[:3])}. "
                    "WebDataset ends a key at the first dot; rename them."
                )
            if images:
                label = _tar_label(tar, members)
                rows.append(PlanRow(key=escape_key(key), source=images[0], label=label))
    return sorted(rows, key=lambda row: row.key)


def _tar_label(tar: _TarReader, members: dict[str, str]) -> int | None:
    label: object = None
    try:
        if "cls" in members:
            label = int(tar.read(members["cls"]).decode().strip())
        elif "json" in members:
            label = json.loads(tar.read(members["json"])).get("label")
    except (ValueError, AttributeError) as exc:
        name = members.get("cls") or members["json"]
        raise SourceError(f"The label in {name} cannot be read: {exc}") from exc
    # Negative numbers are in use for "no label".
    return label if isinstance(label, int) and label >= 0 else None


def _expand(pattern: str) -> list[Path]:
    import braceexpand

    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as exc:
        raise ConfigError(f"The pattern {pattern!r} is not a valid brace pattern: {exc}") from exc
    paths = [Path(name) for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise SourceError(
            f"{missing[0]} is not there"
            + (f", nor are {len(missing) - 1} others of {pattern}." if len(missing) > 1 else ".")
            + " Pass a folder of images, or tars."
        )
    wrong = [path for path in paths if path.suffix != ".tar"]
    if wrong:
        raise ConfigError(f"{wrong[0]} is neither a folder nor a .tar.")
    return paths


def _check_names(rows: list[PlanRow], where: str) -> None:
    """Refuse names that JSON cannot hold, and two images with one key."""
    places: dict[str, str] = {}
    for row in rows:
        if _has_surrogates(row.source):
            raise SourceError(f"{where}: the name {row.source!r} is not UTF-8. Rename the file.")
        if row.key in places:
            raise SourceError(
                f"{where}: {places[row.key]} and {row.source} have the same key {row.key!r}. "
                "A key joins an image to its targets; rename one of them."
            )
        places[row.key] = row.source


def _has_surrogates(name: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in name)


def _choose_unit_size(num_samples: int) -> int:
    """Return a power of two that makes about 64 units, within 64 and 1,024 samples."""
    wanted = max(_MIN_UNIT_SIZE, -(-num_samples // _TARGET_UNITS))
    return min(_MAX_UNIT_SIZE, 1 << (wanted - 1).bit_length())


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SourceError(
            f"{path} cannot be read: {exc.strerror}. It was there when the source was listed; "
            "restore it and run the same command again."
        ) from exc


def _refuse_folder(exc: OSError) -> None:
    raise SourceError(f"{exc.filename} cannot be listed: {exc.strerror}.") from exc


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
