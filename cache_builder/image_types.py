"""Which format an encoded image is in, without decoding it."""

import io
import re
import struct
import zlib
from typing import Final

from PIL import Image

from cache_builder.errors import ImageError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What decoders raise on damaged files is not documented; all of it means the same.
DECODER_ERRORS: Final = (
    OSError, ValueError, SyntaxError, RuntimeError, EOFError, LookupError, ArithmeticError,
    TypeError, struct.error, zlib.error,
)  # fmt: skip

Image.init()  # without it, naming a format whose plug-in has not been loaded yet is a KeyError


def image_extension(data: bytes) -> str:
    """Return the file extension of the format that `data` really is in, whatever its name says."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            name = image.format or ""
    except DECODER_ERRORS as exc:
        raise ImageError(f"cannot be decoded: {decoder_reason(exc)}") from exc
    return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(name, name.lower())


def decoder_reason(exc: BaseException) -> str:
    """Return what a decoder says, on one line."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    # torchcodec puts the function and the C++ source line in front of the reason.
    return re.sub(r"^\w+, \S+:\d+, ", "", lines[0])
