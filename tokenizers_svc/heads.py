"""The head of a request: what is refused of it although it parses.

httptools takes heads of any length, and some that a proxy in front may read in another way; who
makes two programs disagree about where a request ends can slip one past the first of them. It
refuses by itself a length beside `chunked`, two lengths, folded lines, control characters and lines
that end otherwise than in CR LF; here are the rest:

    a body in an encoding other than `chunked`, or in any encoding under HTTP/1.0
    no host, or two of them
    a version of HTTP that is not 1.0 or 1.1
    a target without a path
"""

from collections.abc import Sequence
from typing import Final

import httptools

from tokenizers_svc.problems import ProblemError

MAX_FIELDS: Final = 256

Fields = Sequence[tuple[bytes, bytes]]


def check_head(version: str, target: bytes, fields: Fields) -> None:
    """Refuse what another program may read in another way.

    Args:
        version: Of HTTP: `1.1`.
        target: Of the first line.
        fields: Names, in lower case, and values.

    Raises:
        ProblemError: 400.
    """
    if version not in ("1.0", "1.1"):
        raise no_http()
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name == b"host" and name in found:
            raise no_http("A request names one host.")
        found[name] = value
    if b"host" not in found and version == "1.1":
        raise no_http("A request names its host.")
    encoding = found.get(b"transfer-encoding", b"chunked")
    if encoding.lower() != b"chunked":
        raise no_http("A body comes with its length or in chunks, and in no other encoding.")
    if b"transfer-encoding" in found and (version == "1.0" or b"content-length" in found):
        raise no_http("A body comes with its length or in chunks, which need HTTP/1.1.")
    if not target.startswith(b"/") and httptools.parse_url(target).path is None:
        raise no_http("A request names a path.")


def check_length(target: bytes, fields: Fields, max_bytes: int) -> None:
    """Refuse a head that is too long.

    Raises:
        ProblemError: 431.
    """
    if len(target) + sum(len(name) + len(value) + 4 for name, value in fields) > max_bytes:
        raise too_long(max_bytes)


def length_of(fields: Fields) -> int:
    """Return the length of the body of a request that asks for another protocol.

    Raises:
        ProblemError: 400, it comes in chunks, which the parser would leave unread.
    """
    found = dict(fields)
    if b"transfer-encoding" in found:
        raise no_http("A request in chunks cannot ask for another protocol.")
    return int(found.get(b"content-length", 0))


def no_http(detail: str = "This is no HTTP/1.1 request.") -> ProblemError:
    """Return the refusal of what is no request."""
    return ProblemError("bad-request", detail)


def too_long(max_bytes: int) -> ProblemError:
    """Return the refusal of a head, a line between chunks or a trailer that is too long."""
    return ProblemError("header-too-large", "The head of the request is too long.", limit=max_bytes)


def too_many_fields() -> ProblemError:
    """Return the refusal of a head that is none of a browser or a library."""
    return ProblemError(
        "header-too-large",
        f"The head of a request has at most {MAX_FIELDS} fields.",
        limit=MAX_FIELDS,
    )


def too_many_connections(most: int) -> ProblemError:
    """Return the refusal of a connection beyond those that there may be."""
    return ProblemError(
        "too-many-connections",
        "Every connection of the service is at work. Ask again later.",
        limit=most,
    )
