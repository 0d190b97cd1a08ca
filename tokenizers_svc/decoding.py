"""From the bytes of a picture to a resized view, in a thread that may take its time.

Decoding, cropping and resizing are those of `cache_builder.imaging`, with nothing added, so that a
token does not depend on who asked for it. What is wrong with a picture becomes the refusal that its
sender can act on.
"""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from PIL import UnidentifiedImageError
from torch import Tensor

from cache_builder.errors import ImageError, ImageTooLargeError
from cache_builder.formats.codebook_header import PixelRule
from cache_builder.formats.views import View, centre_square
from cache_builder.imaging import EncodedImage, apply_view
from tokenizers_svc.intake import HOW_TO_SEND
from tokenizers_svc.limits import Limits
from tokenizers_svc.pixel_budget import PixelBudget
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.tokens import ImageFacts


class Cut(NamedTuple):
    """A view cut out of a picture."""

    pixels: Tensor  # (3, S, S) uint8
    view: View
    image: ImageFacts


def make_view(
    body: bytes, view: View | None, rule: PixelRule, max_pixels: int, budget: PixelBudget
) -> Cut:
    """Decode a picture and cut a view out of it.

    Args:
        body: An encoded image.
        view: A box in the upright picture; None is the largest centred square.
        rule: Size and interpolation of the resized view.
        max_pixels: Largest width x height that is decoded.
        budget: Where it waits for room.

    Raises:
        ProblemError: 400, 413, 415 or 422.
    """
    if not body:
        raise ProblemError("empty-body", HOW_TO_SEND)
    try:
        encoded = EncodedImage(body, max_pixels=max_pixels)
        # One that is too large is refused by the decoder, and takes no room for that.
        num_pixels = encoded.num_pixels
        with budget.room_for(num_pixels if num_pixels <= max_pixels else 0):
            return _cut(encoded.decode(), view, rule, encoded.format)
    except ImageError as exc:
        raise _image_problem(exc, max_pixels) from exc


def _cut(pixels: Tensor, view: View | None, rule: PixelRule, image_format: str) -> Cut:
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
            num_pixels = EncodedImage(body).num_pixels
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
    # Some decoders end their reasons with a full stop, some do not.
    detail = f"The picture is refused: {str(error).rstrip('.')}."
    if isinstance(error.__cause__, UnidentifiedImageError):
        return ProblemError("not-an-image", detail)
    if isinstance(error, ImageTooLargeError):
        return ProblemError("image-too-large", detail, limit=max_pixels, actual=error.num_pixels)
    return ProblemError("corrupt-image", detail)
