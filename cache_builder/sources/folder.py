"""Images as files below a folder, by class or flat, on a disk or an object store.

ImageFolder     root/class/.../name.jpg; the label is the rank of the class by name
flat folder     root/.../name.jpg with at least one image in root itself; no labels
"""

import logging
import os
from collections.abc import Iterator

from cache_builder.errors import SourceError
from cache_builder.formats.keys import escape_key
from cache_builder.sources import remote
from cache_builder.sources.classes import FolderClasses
from cache_builder.sources.listing import Listing, Row, list_rows
from cache_builder.sources.names import (
    IMAGE_EXTENSIONS,
    check_listed_name,
    is_hidden,
    is_image,
    is_remote,
    join,
    size_problem,
)

logger = logging.getLogger(__name__)


def scan_folder(root: str, unit_size: int | None) -> Listing:
    """Walk a folder.

    Raises:
        SourceError: No image, two with one key, or a folder that cannot be read.
    """
    listing = list_rows("folder", root, _rows(root), FolderClasses(), unit_size)
    if not listing.info.num_samples:
        raise SourceError(
            f"{root} holds no images. Known extensions: {', '.join(sorted(IMAGE_EXTENSIONS))}."
        )
    return listing


def _rows(root: str) -> Iterator[Row]:
    num_ignored = 0
    for path, num_bytes in _walk_remote(root) if is_remote(root) else _walk(root):
        if is_hidden(path.rpartition("/")[2]) or not is_image(path):
            num_ignored += 1
            continue
        check_listed_name(path, root)
        yield Row(
            key=escape_key(path.rpartition(".")[0]),
            source=path,
            label=path.split("/", 1)[0] if "/" in path else None,
            refused=size_problem(num_bytes),
        )
    if num_ignored:
        logger.info("%s: %d files are not images by their names", root, num_ignored)


def _walk(root: str) -> Iterator[tuple[str, int]]:
    """Yield the path of every file below a folder; sizes are looked at when they are read."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        status = os.stat(folder)  # noqa: PTH116  a Path per folder and file would cost the most
        if (status.st_dev, status.st_ino) in seen:
            logger.warning("%s leads to a folder that is listed already; it is left out", folder)
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        inner = folder[len(root) :].strip("/")
        prefix = f"{inner}/" if inner else ""
        for name in names:
            yield prefix + name, 0


def _walk_remote(root: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file below a remote folder; one folder is held at a time."""
    folders = [""]
    while folders:
        folder = folders.pop()
        inner = []
        for entry in remote.list_folder(join(root, folder) if folder else root):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if not entry.is_folder:
                yield path, entry.num_bytes
            elif not is_hidden(entry.name):
                inner.append(path)
        folders += sorted(inner, reverse=True)


def _refuse_folder(exc: OSError) -> None:
    raise SourceError(f"{exc.filename} cannot be listed: {exc.strerror}.") from exc
