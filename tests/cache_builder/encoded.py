"""Encoded pictures, and how they are read."""

import struct
import zlib

import pytest
from PIL import ExifTags, Image

from cache_builder import imaging
from cache_builder.imaging import decode
from tests.factories import draw_photo

PHOTO = draw_photo(0, 40, 56)
JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "restart markers": {"restart_marker_rows": 1},
    "RGB inside": {"keep_rgb": True},
    "quality 10": {"quality": 10},
    "quality 100": {"quality": 100},
}


def pixels_of(data):
    return decode(data).permute(1, 2, 0).numpy()


def orientation(value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def without_torchcodec(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imaging, "_decode_jpeg", None)
        return decode(data)


def png_chunks(*, width, height, bits, colour, rows):
    """Write a PNG by hand."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
