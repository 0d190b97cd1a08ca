"""Which format an encoded image is in, by its first bytes."""

from typing import Final

from cache_builder.errors import ImageError

_FIRST_BYTES: Final = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II": "tif",
    b"MM": "tif",
}


def image_extension(data: bytes) -> str:
    """Return the file extension of the format that `data` really is in, whatever its name says.

    Raises:
        ImageError: It begins like none of the formats that `decode` reads.
    """
    for start, extension in _FIRST_BYTES.items():
        if data.startswith(start):
            return extension
    raise ImageError("not an image of a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)")
