"""What can be wrong with a request before its pictures are looked at.

Headers are checked first, then the body is read; each step refuses what the next one would pay for.
The query is for `queries.py`, the pictures themselves are for `decoding.py`.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import Request

from cache_builder.formats.views import View
from tokenizers_svc.admission import Place
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError

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
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class Upload:
    """The body of one request, while it arrives."""

    def __init__(self, request: Request, limits: Limits, max_bytes: int) -> None:
        """Refuse a body by what its headers say, before a byte of it is read.

        Raises:
            ProblemError: 415 for a compressed body, 413 for one that is too long.
        """
        self._request, self._limits, self._max_bytes = request, limits, max_bytes
        self._num_bytes = 0
        self.place: Place | None = None  # where the bytes of a body without a length are counted
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ProblemError(
                "unsupported-body",
                "Compressed bodies are not read; image files are compressed already. "
                "Send the file as it is, without Content-Encoding.",
                headers={"Accept-Encoding": "identity"},
            )
        length = request.headers.get("content-length")
        self.length = None if length is None else int(length)
        if self.length is not None and self.length > max_bytes:
            raise self._too_large(self.length)

    async def read(self) -> bytes:
        """Return the whole body.

        Raises:
            ProblemError: 413 as soon as it is too long, 408 when it takes too long, 400 if empty.
            ClientDisconnect: The client hung up.
        """
        async with self.in_time():
            chunks = [chunk async for chunk in self.chunks() if chunk]
        if not self._num_bytes:
            raise ProblemError("empty-body", HOW_TO_SEND)
        return b"".join(chunks)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Give the body as it arrives.

        Raises:
            ProblemError: 413 as soon as it is too long, 429 when there is no room for it.
            ClientDisconnect: The client hung up.
        """
        async for chunk in self._request.stream():
            self._num_bytes += len(chunk)
            if self._num_bytes > self._max_bytes:
                raise self._too_large(None)
            if self.length is None and self.place is not None:
                self.place.hold_bytes(self._num_bytes)
            yield chunk

    @contextlib.asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Limit the time that the body may take.

        Raises:
            ProblemError: 408.
        """
        most_s = self._limits.body_timeout_s
        try:
            async with asyncio.timeout(most_s) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise ProblemError(
                "body-timeout",
                f"The body has to arrive within {most_s:g} s, and did not.",
                limit=most_s,
                headers={"Connection": "close"},
            ) from None

    def _too_large(self, actual: int | None) -> ProblemError:
        return ProblemError(
            "body-too-large",
            f"A body of this path has at most {self._max_bytes:,} bytes. Send a smaller file, or "
            "fewer at once.",
            limit=self._max_bytes,
            actual=actual,
        )
