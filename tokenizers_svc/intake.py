"""From an HTTP request to a resized view: everything that can be wrong with what a client sends.

Headers and query are checked first, then the body is read, then the picture is decoded; each step
refuses what the next one would pay for. Decoding, cropping and resizing are those of
`cache_builder.imaging`, with nothing added, so that a token does not depend on who asked for it.
"""

import asyncio
import io
import re

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import QueryParams
from starlette.requests import Request
from torch import Tensor

from cache_builder.errors import ImageError
from cache_builder.formats.codebook import PixelRule
from cache_builder.formats.views import View, centre_square
from cache_builder.imaging import apply_view, decode
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError

_VIEW = re.compile(r"([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9})(?:,([01]))?")
_HOW_TO_SEND = "Send the bytes of one image file as the body: curl --data-binary @photo.jpg URL"


def check_headers(request: Request, limits: Limits) -> None:
    """Refuse a body by what its headers say, before a byte of it is read.

    Raises:
        ProblemError: 415 for JSON, forms and compressed bodies, 413 for a body that is too long.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith("multipart/"):
        raise ProblemError("unsupported-body", f"Multipart forms are not read. {_HOW_TO_SEND}")
    if media_type == "application/json" or media_type.endswith("+json"):
        raise ProblemError("unsupported-body", f"JSON is not read. {_HOW_TO_SEND}")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ProblemError(
            "unsupported-body",
            "Compressed bodies are not read; image files are compressed already. "
            "Send the file as it is, without Content-Encoding.",
            headers={"Accept-Encoding": "identity"},
        )
    length = int(request.headers.get("content-length", 0))
    if length > limits.max_body_bytes:
        raise _body_too_large(limits, length)


def parse_view(query: QueryParams) -> View | None:
    """Return the view that the query names, None where it names none.

    Raises:
        ProblemError: 400, the query holds anything but one well-formed `view`.
    """
    parameters = query.multi_items()
    if not parameters:
        return None
    if len(parameters) > 1 or "view" not in query:
        raise ProblemError("bad-request", "The one query parameter of this path is `view`.")
    match = _VIEW.fullmatch(query["view"])
    if match is None:
        raise ProblemError(
            "bad-request",
            "`view` is top,left,height,width in pixels of the upright picture, and ,1 to mirror "
            "it: view=0,32,224,224 or view=0,32,224,224,1",
        )
    top, left, height, width = (int(number) for number in match.groups()[:4])
    return View(top, left, height, width, hflip=match.group(5) == "1")


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        ProblemError: 413 as soon as it is too long, 408 when it takes too long, 400 if empty.
        ClientDisconnect: The client hung up.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > limits.max_body_bytes:
                    raise _body_too_large(limits, None)
                chunks.append(chunk)
    except TimeoutError:
        raise ProblemError(
            "body-timeout",
            f"The body has to arrive within {limits.body_timeout_s:g} s; "
            f"{num_bytes:,} bytes of it did.",
            limit=limits.body_timeout_s,
            headers={"Connection": "close"},
        ) from None
    if not num_bytes:
        raise ProblemError("empty-body", _HOW_TO_SEND)
    return b"".join(chunks)


def make_view(body: bytes, view: View | None, rule: PixelRule, max_pixels: int) -> Tensor:
    """Decode a picture and cut a view out of it.

    Args:
        body: An encoded image.
        view: A box in the upright picture; None is the largest centred square.
        rule: Size and interpolation of the resized view.
        max_pixels: Largest width x height that is decoded.

    Returns:
        (3, S, S) uint8.

    Raises:
        ProblemError: 413, 415 or 422.
    """
    try:
        pixels = decode(body, max_pixels=max_pixels)
    except ImageError as exc:
        raise _image_problem(exc, body, max_pixels) from exc
    height, width = pixels.shape[-2:]
    try:
        return apply_view(
            pixels, view or centre_square((height, width)), rule.size, rule.interpolation
        )
    except ImageError as exc:
        raise ProblemError(
            "view-outside",
            f"The upright picture is {height} pixels high and {width} wide; the view needs "
            "height and width of at least 1, "
            f"top + height <= {height} and left + width <= {width}.",
        ) from exc


def _body_too_large(limits: Limits, actual: int | None) -> ProblemError:
    return ProblemError(
        "body-too-large",
        f"A body has at most {limits.max_body_bytes:,} bytes. Send a smaller file.",
        limit=limits.max_body_bytes,
        actual=actual,
    )


def _image_problem(error: ImageError, body: bytes, max_pixels: int) -> ProblemError:
    """Tell what the decoder's one exception stands for."""
    detail = f"The picture is refused: {error}."
    if isinstance(error.__cause__, UnidentifiedImageError):
        return ProblemError("not-an-image", detail)
    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)
    if isinstance(error.__cause__, too_large):
        return ProblemError("image-too-large", detail, limit=max_pixels)
    if error.__cause__ is None:
        with Image.open(io.BytesIO(body)) as header:
            num_pixels = header.width * header.height
        if num_pixels > max_pixels:
            return ProblemError("image-too-large", detail, limit=max_pixels, actual=num_pixels)
    return ProblemError("corrupt-image", detail)
