"""What can be wrong with a request before its pictures are looked at.

Headers are checked first, then the body is read; each step refuses what the next one would pay for.
The query is for `queries.py`, the pictures themselves are for `decoding.py`.
"""

import re
from collections.abc import AsyncGenerator

from starlette.requests import ClientDisconnect, Request

from cache_builder.formats.views import View
from tokenizers_svc.admission import Place
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.request_fields import field_of

_VIEW = re.compile(r"([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9})(?:,([01]))?")
HOW_TO_SEND = "Send the bytes of one image file as the body: curl --data-binary @photo.jpg URL"


def parse_view(text: str | None) -> View | None:
    """Return the view that a query or a form names, None where it names none.

    Raises:
        ProblemError: 400, it is malformed.
    """
    if text is None:
        return None
    match = _VIEW.fullmatch(text)
    if match is None:
        raise ProblemError(
            "bad-request",
            "`view` is top,left,height,width in pixels of the upright picture, and ,1 to mirror "
            "it: view=0,32,224,224 or view=0,32,224,224,1",
        )
    top, left, height, width = (int(number) for number in match.groups()[:4])
    return View(top, left, height, width, hflip=match.group(5) == "1")


def media_type_of(request: Request) -> str:
    """Return the media type of a request's body, lower case, without its parameters."""
    return field_of(request.scope, b"content-type", "").partition(";")[0].strip().lower()


class Upload:
    """The body of one request, while it arrives."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        """Refuse a body by what its headers say, before a byte of it is read.

        Raises:
            ProblemError: 415 for a compressed body, 413 for one that is too long.
        """
        self._request, self._max_bytes = request, max_bytes
        self._num_bytes = 0
        self._has_more = True
        self.place: Place | None = None  # where the bytes of a body without a length are counted
        encoding = field_of(request.scope, b"content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise ProblemError(
                "unsupported-body",
                "Compressed bodies are not read; image files are compressed already. "
                "Send the file as it is, without Content-Encoding.",
                headers={"Accept-Encoding": "identity"},
            )
        length = field_of(request.scope, b"content-length")
        self.length = None if length is None else int(length)
        if self.length is not None and self.length > max_bytes:
            raise self._too_large(self.length)

    async def read(self) -> bytes:
        """Return the whole body.

        Raises:
            ProblemError: 413 as soon as it is too long, 429 when there is no room for it, 400 if
                empty.
            ClientDisconnect: The client hung up.
        """
        chunks = []
        while self._has_more:
            chunks.append(await self._next_chunk())
        if not self._num_bytes:
            raise ProblemError("empty-body", HOW_TO_SEND)
        return b"".join(chunks)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Give the body as it arrives; errors are those of `read`, but for an empty one."""
        while self._has_more:
            yield await self._next_chunk()

    async def _next_chunk(self) -> bytes:
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._has_more = message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise self._too_large(None)
        if self.length is None and self.place is not None:
            self.place.hold_bytes(self._num_bytes)
        return chunk

    def _too_large(self, actual: int | None) -> ProblemError:
        return ProblemError(
            "body-too-large",
            f"A body of this path has at most {self._max_bytes:,} bytes. Send a smaller file, or "
            "fewer at once.",
            limit=self._max_bytes,
            actual=actual,
        )
