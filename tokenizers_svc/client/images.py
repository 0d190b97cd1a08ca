"""From what a caller has to what is sent: the bytes of an image file.

Files and bytes are sent as they are. Pixels are sent as PNG, which loses nothing.
"""

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cache_builder.errors import ConfigError, ImageError

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]

_FASTEST = 1  # a local network carries the larger file sooner than zlib makes a smaller one


def image_bytes(picture: Picture) -> bytes:
    """Return the bytes of an image file.

    Args:
        picture: A path; the bytes of a file; an image of Pillow, turned upright as the service
            does with a file; or pixels, (H, W, 3) uint8 RGB.

    Raises:
        ImageError: The file cannot be read, or the image of Pillow not be loaded.
        ConfigError: It is something else.
    """
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        return _png(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ConfigError(
                f"Pixels are an array (H, W, 3) of uint8, not {picture.shape} of {picture.dtype}."
            )
        if not picture.size:
            raise ImageError(f"pixels of shape {picture.shape} hold no picture")
        return _png(Image.fromarray(picture))
    if isinstance(picture, str | os.PathLike):
        try:
            return Path(picture).read_bytes()
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise ImageError(f"{os.fspath(picture)} cannot be read: {reason}") from exc
    raise ConfigError(
        "A picture is a path, bytes, an image of Pillow or an array (H, W, 3) of uint8, not a "
        f"{type(picture).__name__}."
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        upright.save(buffer, "PNG", compress_level=_FASTEST)
    except (OSError, ValueError, SyntaxError) as exc:
        raise ImageError(
            f"an image of Pillow, mode {image.mode}, cannot be sent as PNG: {exc}. "
            "Convert it to RGB, or pass the path or the bytes of its file."
        ) from exc
    return buffer.getvalue()
