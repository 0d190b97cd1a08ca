"""What a name says: is it an image, which kind of container is it, may it be believed?"""

import re
from functools import lru_cache
from typing import Literal

from cache_builder.errors import ConfigError, SourceError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_IMAGE_BYTES = 256 << 20  # of one encoded image; larger ones are refused

ContainerKind = Literal["webdataset", "zip", "parquet"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SUFFIXES: dict[ContainerKind, tuple[str, ...]] = {
    "webdataset": TAR_SUFFIXES,
    "zip": (".zip",),
    "parquet": (".parquet",),
}
LIST_SUFFIXES = (".txt", ".tsv", ".lst", ".list")
KNOWN_SUFFIXES = (*TAR_SUFFIXES, ".zip", ".parquet", *LIST_SUFFIXES)

_DRIVE = re.compile(r"[A-Za-z]:")


def is_remote(location: str) -> bool:
    """Say whether a place is a URL."""
    return "://" in location


def is_image(name: str) -> bool:
    """Say whether a name is that of an image, by what stands behind its last dot."""
    _, dot, extension = name.rpartition(".")
    return bool(dot) and extension.lower() in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Say whether a file name, without its folder, is hidden."""
    return name.startswith(".")


def is_gzip(location: str) -> bool:
    """Say whether a tar is compressed."""
    return _path(location).endswith((".gz", ".tgz"))


def container_kind(location: str) -> ContainerKind | None:
    """Return what kind of container a file is by its name, None if it is none."""
    path = _path(location)
    for kind, suffixes in _SUFFIXES.items():
        if path.endswith(suffixes):
            return kind
    return None


def is_list(location: str) -> bool:
    """Say whether a file is a list of images by its name."""
    return _path(location).endswith(LIST_SUFFIXES)


def base_name(location: str) -> str:
    """Return the last part of a path or URL."""
    return _without_query(location).rstrip("/").rpartition("/")[2]


def parent(location: str) -> str:
    """Return the folder that a path or URL lies in."""
    folder, slash, _ = _without_query(location).rstrip("/").rpartition("/")
    return folder or slash or "."


def join(folder: str, path: str) -> str:
    """Return the path or URL of something below a folder."""
    return f"{folder.rstrip('/')}/{path}"


def expand_braces(pattern: str) -> list[str]:
    """Return every name that a pattern stands for, in order.

    Raises:
        ConfigError: It is not a valid pattern.
    """
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as exc:
        raise ConfigError(f"The pattern {pattern!r} is not a valid brace pattern: {exc}") from exc


def moved_place(container: str, location: str) -> str:
    """Return where a tar, say, lies if the source lies at `location`; its name stays.

    Raises:
        ConfigError: `location` is not a valid pattern.
    """
    name, places = base_name(container), _places(location)
    if name in places:
        return places[name]
    first = next(iter(places.values()))
    return join(parent(first) if container_kind(first) else location, name)


@lru_cache(maxsize=4)
def _places(pattern: str) -> dict[str, str]:
    """Return the places that a pattern names, by their last parts."""
    return {base_name(place): place for place in expand_braces(pattern)}


def _has_surrogates(name: str) -> bool:
    """Say whether a name is not UTF-8; JSON cannot hold such a name."""
    return not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name)


def printable(name: str) -> str:
    """Return a name that JSON can hold: bytes that are not UTF-8 become their hexadecimals."""
    if not _has_surrogates(name):
        return name
    raw = name.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")


def name_problem(name: str) -> str:
    """Say why the name of an archive's member is not believed; empty if it is."""
    path = name.replace("\\", "/")
    if path.startswith("/") or _DRIVE.match(path):
        return "its name is an absolute path"
    if ".." in path.split("/"):
        return "its name leads out of its folder (..)"
    if _has_surrogates(name):
        return "its name is not UTF-8"
    return ""


def size_problem(num_bytes: int) -> str:
    """Say that an encoded image is larger than is read; empty if it is not."""
    if num_bytes <= MAX_IMAGE_BYTES:
        return ""
    return f"it has {num_bytes:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}"


def check_listed_name(name: str, where: str) -> None:
    """Refuse a file name that JSON cannot hold.

    Raises:
        SourceError: It is not UTF-8.
    """
    if _has_surrogates(name):
        raise SourceError(f"{where}: the name {name!r} is not UTF-8. Rename the file.")


def _path(location: str) -> str:
    return _without_query(location).lower()


def _without_query(location: str) -> str:
    """Return a location without what a web address carries behind its path, as signed ones do."""
    if location.startswith(("http://", "https://")):
        return re.split(r"[?#]", location, maxsplit=1)[0]
    return location
