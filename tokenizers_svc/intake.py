"""From the bytes of a request to a resized view: what can be wrong with either.

Headers and query are checked first, then the body is read, then the picture is decoded; each step
refuses what the next one would pay for. Decoding, cropping and resizing are those of
`cache_builder.imaging`, with nothing added, so that a token does not depend on who asked for it.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import NamedTuple

from PIL import UnidentifiedImageError
from starlette.requests import Request
from torch import Tensor

from cache_builder.errors import ImageError, ImageTooLargeError
from cache_builder.formats.codebook import PixelRule
from cache_builder.formats.views import View, centre_square
from cache_builder.imaging import apply_view, decode, read_header
from tokenizers_svc.admission import Place
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.tokens import ImageFacts

_VIEW = re.compile(r"([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9})(?:,([01]))?")
_HOW_TO_SEND = "Send the bytes of one image file as the body: curl --data-binary @photo.jpg URL"


def check_query(request: Request, *names: str) -> None:
    """Refuse a query that names what the route does not know, or anything twice.

    Raises:
        ProblemError: 400.
    """
    given = [name for name, _ in request.query_params.multi_items()]
    if not set(given) <= set(names) or len(set(given)) < len(given):
        known = ", ".join(f"`{name}`" for name in names) or "none"
        raise ProblemError("bad-request", f"Query parameters of this path, each once: {known}.")


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
            chunks = [chunk async for chunk in self.chunks()]
        if not self._num_bytes:
            raise ProblemError("empty-body", _HOW_TO_SEND)
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
                f"The body has to arrive within {most_s:g} s; {self._num_bytes:,} bytes of it did.",
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


class Cut(NamedTuple):
    """A view cut out of a picture."""

    pixels: Tensor  # (3, S, S) uint8
    view: View
    image: ImageFacts


def make_view(body: bytes, view: View | None, rule: PixelRule, max_pixels: int) -> Cut:
    """Decode a picture and cut a view out of it.

    Args:
        body: An encoded image.
        view: A box in the upright picture; None is the largest centred square.
        rule: Size and interpolation of the resized view.
        max_pixels: Largest width x height that is decoded.

    Raises:
        ProblemError: 400, 413, 415 or 422.
    """
    if not body:
        raise ProblemError("empty-body", _HOW_TO_SEND)
    try:
        image_format = read_header(body).format
        pixels = decode(body, max_pixels=max_pixels)
    except ImageError as exc:
        raise _image_problem(exc, max_pixels) from exc
    height, width = pixels.shape[-2:]
    view = view or centre_square((height, width))
    try:
        resized = apply_view(pixels, view, rule.size, rule.interpolation)
    except ImageError as exc:
        raise ProblemError(
            "view-outside",
            f"The upright picture is {height} pixels high and {width} wide; the view needs "
            "height and width of at least 1, "
            f"top + height <= {height} and left + width <= {width}.",
        ) from exc
    return Cut(resized, view, ImageFacts(width, height, image_format))


def check_total_pixels(bodies: Iterable[bytes], limits: Limits) -> None:
    """Refuse pictures that are too large together, by their headers.

    Those that are refused by themselves, for whatever reason, do not count.

    Raises:
        ProblemError: 413.
    """
    total = 0
    for body in bodies:
        with contextlib.suppress(ImageError):
            header = read_header(body)
            num_pixels = header.width * header.height
            total += num_pixels if num_pixels <= limits.max_pixels else 0
    if total > limits.max_batch_pixels:
        raise ProblemError(
            "image-too-large",
            f"The pictures of one request have at most {limits.max_batch_pixels:,} pixels "
            "together. Send fewer at once.",
            limit=limits.max_batch_pixels,
            actual=total,
        )


def _image_problem(error: ImageError, max_pixels: int) -> ProblemError:
    """Tell what the decoder's exception stands for."""
    detail = f"The picture is refused: {error}."
    if isinstance(error.__cause__, UnidentifiedImageError):
        return ProblemError("not-an-image", detail)
    if isinstance(error, ImageTooLargeError):
        return ProblemError("image-too-large", detail, limit=max_pixels, actual=error.num_pixels)
    return ProblemError("corrupt-image", detail)
