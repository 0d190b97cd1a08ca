"""Images in zip archives; folders inside are classes as in an ImageFolder.

The plan holds where each image lies, so a unit is read by ranges and the directory of an archive is
walked once. Large archives are cut into several units.
"""

import logging
from collections.abc import Iterator

from cache_builder.errors import SourceError
from cache_builder.formats.keys import escape_key
from cache_builder.formats.plan import PlanRow
from cache_builder.prefetch import map_ahead
from cache_builder.sources.classes import FolderClasses
from cache_builder.sources.containers import Container, open_container
from cache_builder.sources.external_sort import SortedRows
from cache_builder.sources.listing import Listing, Part, Row, choose_unit_size, list_parts
from cache_builder.sources.names import (
    base_name,
    is_hidden,
    is_image,
    is_remote,
    name_problem,
    printable,
    size_problem,
)
from cache_builder.sources.zip_headers import METHODS, ZipMember, read_zip_member, zip_members

logger = logging.getLogger(__name__)

_ZIPS_AT_ONCE = 4  # of remote ones


def scan_zips(location: str, zips: list[str], unit_size: int | None) -> Listing:
    """Read the directory of every archive.

    Raises:
        SourceError: An archive is damaged, holds no image, or two images share a key.
    """
    if any(map(is_remote, zips)):
        parts = map_ahead(_scan_zip, zips, _ZIPS_AT_ONCE)
    else:
        parts = map(_scan_zip, zips)

    def cut(num_samples: int) -> int:
        return unit_size or choose_unit_size(num_samples)

    listing = list_parts("zip", location, parts, FolderClasses(), cut)
    if not listing.info.num_samples:
        raise SourceError(f"{location}: no zip holds an image. Name others.")
    return listing


def read_member(zip_file: Container, row: PlanRow) -> bytes:
    """Return the content of a member.

    Raises:
        SourceError: It is not where it was.
        ImageError: It is damaged, or too large.
    """
    if row.span is None:
        raise SourceError(f"The plan does not say where {row.source} lies in {zip_file.location}.")
    return read_zip_member(zip_file, row.source, row.span)


def _scan_zip(location: str) -> Part:
    with open_container(location) as zip_file:
        return Part(location, zip_file.num_bytes, SortedRows(_rows(zip_file)))


def _rows(zip_file: Container) -> Iterator[Row]:
    num_ignored = 0
    for member in zip_members(zip_file):
        path = member.name.removeprefix("./")
        base = base_name(path)
        hidden = any(is_hidden(part) and part != ".." for part in path.split("/"))
        # The last is what macOS adds to the archives that it writes.
        if hidden or not is_image(base) or path.startswith("__MACOSX/"):
            num_ignored += 1
            continue
        problem = _problem(member)
        yield Row(
            key=escape_key(path.rpartition(".")[0]),
            source=printable(member.name),
            label=printable(path.split("/")[0]) if "/" in path else None,
            refused=problem,
            span=None if problem else (member.offset, member.span_bytes),
        )
    if num_ignored:
        logger.info("%s: %d members are no images by their names", zip_file.location, num_ignored)


def _problem(member: ZipMember) -> str:
    if member.is_encrypted:
        return "it is encrypted"
    if member.is_link:
        return "it is a link, not a file"
    if member.method not in METHODS:
        return f"it is compressed by method {member.method}; stored, deflate and bzip2 are read"
    return (
        name_problem(member.name)
        or size_problem(member.num_bytes)
        or size_problem(member.span_bytes)
    )
