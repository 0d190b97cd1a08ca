"""Images as members of WebDataset tars, plain or compressed: one tar is one unit.

A sample is the members with one name up to the first dot. Its label is the integer in `.cls`, or
`label` in `.json`; further fields of `.json` and the texts of `.txt`, `.caption` and `.text` travel
along. The plan holds where each image lies, so that no tar is walked twice.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.headers import shorten
from cache_builder.formats.keys import escape_key
from cache_builder.formats.plan import PlanRow
from cache_builder.prefetch import map_ahead
from cache_builder.sources.classes import ValueClasses
from cache_builder.sources.columns import clean_json
from cache_builder.sources.containers import (
    Container,
    InflatedFile,
    inflated,
    open_container,
    streamed,
)
from cache_builder.sources.listing import Listing, Part, Row, list_parts
from cache_builder.sources.names import (
    is_gzip,
    is_hidden,
    is_image,
    is_remote,
    name_problem,
    printable,
    size_problem,
)
from cache_builder.sources.tar_headers import BLOCK_BYTES, TarMember, parse_header, tar_members

logger = logging.getLogger(__name__)

_TEXTS = frozenset({"txt", "caption", "text"})
_MAX_TEXT_BYTES = 1 << 20  # of a member beside an image
_TARS_AT_ONCE = 4  # of remote ones


def scan_tars(location: str, tars: list[str], unit_size: int | None) -> Listing:
    """Read the headers of every tar.

    Raises:
        SourceError: A tar is damaged, holds no image, or two images share a key.
        ConfigError: A unit size was asked for.
    """
    if unit_size is not None:
        raise ConfigError("--unit-size has no meaning for tars: one tar is one unit.")
    if any(map(is_remote, tars)):
        parts = map_ahead(_scan_tar, tars, _TARS_AT_ONCE)
    else:
        parts = map(_scan_tar, tars)
    listing = list_parts("webdataset", location, parts, ValueClasses())
    if not listing.info.num_samples:
        raise SourceError(f"{location}: no tar holds an image. Name others.")
    return listing


def read_member(tar: Container, row: PlanRow) -> bytes:
    """Return the content of a member.

    Raises:
        SourceError: It is not where it was.
    """
    if row.span is None:
        raise SourceError(f"The plan does not say where {row.source} lies in {tar.location}.")
    offset, num_bytes = row.span
    data = tar.read(offset - BLOCK_BYTES, BLOCK_BYTES + num_bytes)
    header = parse_header(data[:BLOCK_BYTES])
    if header is None or not _is_header_of(header.name, row.source):
        raise SourceError(
            f"{tar.location} has no member {shorten(row.source)} any more. Restore the tar."
        )
    if len(data) < BLOCK_BYTES + num_bytes:
        raise SourceError(f"{tar.location} is cut short at member {row.source}.")
    return data[BLOCK_BYTES:]


class _Found(NamedTuple):
    """The members of one sample."""

    members: dict[str, TarMember]  # by extension
    texts: dict[str, bytes]
    problems: dict[str, str]  # why a member is not believed, by extension


def _scan_tar(location: str) -> Part:
    with open_container(location) as container:
        samples: dict[str, _Found] = {}
        num_bytes = container.num_bytes
        stream = inflated(container) if is_gzip(location) else streamed(container)
        num_odd = 0
        for member in tar_members(stream, location):
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = base.partition(".")
            if is_hidden(base) or member.kind == "folder":
                continue
            extension = extension.lower()
            problem = _problem(member)
            if problem and not is_image("." + extension):
                num_odd += 1
                continue
            key = f"{folder}/{stem}" if folder else stem
            found = samples.setdefault(key, _Found({}, {}, {}))
            other = found.members.setdefault(extension, member).name
            if other != member.name:
                raise SourceError(
                    f"{location}: {printable(other)} and {printable(member.name)} are one name. "
                    "Rename one of them."
                )
            found.members[extension] = member  # as tar does: of two with one name the last counts
            found.problems[extension] = problem
            if _is_text(extension) and member.num_bytes <= _MAX_TEXT_BYTES:
                found.texts[extension] = stream.read(member.num_bytes)
        if isinstance(stream, InflatedFile):
            stream.seek_end()  # the checksum is there
        if num_odd:
            logger.warning("%s: %d links, devices or strange names left out", location, num_odd)
    rows = [row for key, found in samples.items() for row in _rows_of(location, key, found)]
    rows.sort(key=lambda row: row.key)
    return Part(location, num_bytes, rows)


def _rows_of(location: str, key: str, found: _Found) -> Iterator[Row]:
    images = [extension for extension in found.members if is_image("." + extension)]
    if len(images) > 1:
        names = ", ".join(printable(found.members[image].name) for image in images[:3])
        raise SourceError(
            f"{location}: {len(images)} images share the key {printable(key)!r}: {names}. "
            "WebDataset ends a key at the first dot; rename them."
        )
    if not images:
        return
    image = found.members[images[0]]
    problem = found.problems[images[0]]
    label: int | None = None
    extra: dict[str, Any] = {}
    large = [
        member for extension, member in found.members.items()
        if _is_text(extension) and extension not in found.texts
    ]  # fmt: skip
    if not problem and large:
        problem = f"its {large[0].name} has {large[0].num_bytes:,} bytes, more than " + (
            f"the limit of {_MAX_TEXT_BYTES:,}"
        )
    if not problem:
        label, extra = _label_and_extra(location, found)
    span = None if problem else (image.offset, image.num_bytes)
    yield Row(escape_key(key), printable(image.name), label, extra or None, problem, span)


def _label_and_extra(location: str, found: _Found) -> tuple[int | None, dict[str, Any]]:
    label: object = None
    extra: dict[str, Any] = {}
    extension = "cls"
    try:
        if "cls" in found.texts:
            label = int(found.texts["cls"].decode().strip())
        if "json" in found.texts:
            extension = "json"
            fields = _json_object(found.texts["json"])
            named = fields.pop("label", None)
            label = named if "cls" not in found.texts else label
            extra = clean_json(fields)
    except (ValueError, TypeError, RecursionError) as exc:
        name = found.members[extension].name
        raise SourceError(
            f"{location}: The label in {name} cannot be read: {shorten(str(exc))}. "
            "Restore the tar, or leave it out."
        ) from exc
    for text in sorted(_TEXTS & found.texts.keys()):
        extra.setdefault(text, found.texts[text].decode("utf-8", "replace"))
    # Negative numbers are in use for "no label".
    is_label = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    return (label if is_label else None), extra  # type: ignore[return-value]


def _json_object(data: bytes) -> dict[str, Any]:
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise TypeError("it is no object")
    return fields


def _problem(member: TarMember) -> str:
    if member.kind != "file":
        return (
            f"it is a {member.kind}, not a file"
            if member.kind != "sparse"
            else ("it is a sparse file")
        )
    return name_problem(member.name) or size_problem(member.num_bytes)


def _is_text(extension: str) -> bool:
    return extension in ("cls", "json") or extension in _TEXTS


def _is_header_of(name: bytes, source: str) -> bool:
    """Compare a header's name with a member's; long ones and others than ASCII lie elsewhere."""
    return name == source.encode() or len(source) > 100 or not source.isascii()
