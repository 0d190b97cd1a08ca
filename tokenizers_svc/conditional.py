"""Conditional requests and ranges: 304 for what a client has, 206 for the part that it wants.

Content lies in memory and is sent in pieces, so that a slow reader holds one piece and no copy of
the whole.
"""

import re
from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tokenizers_svc.problems import ProblemError
from tokenizers_svc.request_fields import field_of

_PIECE_BYTES = 262_144
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def is_known(request: Request, etag: str) -> bool:
    """Tell whether If-None-Match names this representation."""
    offered = field_of(request.scope, b"if-none-match", "")
    tags = [tag.strip().removeprefix("W/") for tag in offered.split(",")]
    return etag in tags or tags == ["*"]


def content_response(
    request: Request,
    parts: tuple[bytes | memoryview, ...],
    *,
    etag: str,
    media_type: str,
    headers: Mapping[str, str],
) -> Response:
    """Return content, or the range of it that is asked for, or 304.

    Several ranges at once are answered with everything, as RFC 9110 allows.

    Args:
        request: Whose If-None-Match, Range and If-Range decide.
        parts: The content, one after the other.
        etag: Strong; names the content.
        media_type: Of the content.
        headers: More headers.

    Raises:
        ProblemError: 416, the range lies behind the end.
    """
    common = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
    if is_known(request, etag):
        return Response(status_code=304, headers=common)
    length = sum(len(part) for part in parts)
    start, end, status = 0, length, 200
    asked = _RANGE.fullmatch(field_of(request.scope, b"range", "").strip().lower())
    bounds = _bounds(asked[1], asked[2], length) if asked else None
    if bounds and field_of(request.scope, b"if-range", etag) == etag:
        start, end = bounds
        if start >= end:
            raise ProblemError(
                "range-not-satisfiable",
                f"The content has {length:,} bytes, and the range lies outside.",
                headers={"Content-Range": f"bytes */{length}"},
            )
        status = 206
        common["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
    common["Content-Length"] = str(end - start)
    return StreamingResponse(_pieces(parts, start, end), status, common, media_type)


def _bounds(first: str, last: str, length: int) -> tuple[int, int] | None:
    """Return start and end of a range; None for one that has no meaning."""
    if not first:
        return (max(0, length - int(last)), length) if last else None
    start = int(first)
    if last and int(last) < start:
        return None
    return start, min(int(last) + 1 if last else length, length)


async def _pieces(
    parts: tuple[bytes | memoryview, ...], start: int, end: int
) -> AsyncIterator[bytes]:
    offset = 0
    for part in parts:
        low, high = max(start - offset, 0), min(end - offset, len(part))
        for place in range(low, high, _PIECE_BYTES):
            yield bytes(part[place : min(place + _PIECE_BYTES, high)])
        offset += len(part)
