"""Every file gives pixels or an `ImageError` with the reason, and nothing else."""

import random
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cache_builder import imaging
from cache_builder.errors import ImageError
from cache_builder.image_types import image_extension
from cache_builder.imaging import EncodedImage, decode
from tests.cache_builder.encoded import (
    JPEGS,
    PHOTO,
    orientation,
    pixels_of,
    png_chunks,
    without_torchcodec,
)
from tests.factories import draw_photo, encode


def test_32_bit_pixels_have_no_defined_range():
    for dtype in (np.int32, np.float32):
        data = encode(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
        with pytest.raises(ImageError, match="no defined range; convert them to 8 or 16 bits"):
            decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow thinks of the damage
@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
    ],
)
def test_a_cut_picture_is_refused(image_format, options):
    data = encode(PHOTO, image_format, **options)
    for size in (1, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError):
            decode(data[:size])


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
def test_a_jpeg_cut_anywhere_is_refused_by_both_decoders(options):
    data = encode(PHOTO, "JPEG", **options)
    for size in range(0, len(data), 17):
        for read in (decode, without_torchcodec):
            with pytest.raises(ImageError):
                read(data[:size])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image", "not an image of a known format"),
        (b"\xff\xd8\xff" + b"\0" * 50, "not an image of a known format|cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_the_reason_is_one_line():
    with pytest.raises(ImageError) as caught:
        decode(encode(PHOTO, "JPEG")[:-200])
    assert str(caught.value).startswith("cannot be decoded: ")
    assert "\n" not in str(caught.value)


def huge_jpeg():
    """A small JPEG whose header claims 60,000 x 60,000."""
    data = bytearray(encode(PHOTO, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png_chunks(width=100_000, height=100_000, bits=8, colour=2, rows=b""),
        png_chunks(width=13_000, height=13_000, bits=8, colour=2, rows=b""),  # Pillow only warns
        png_chunks(width=10_000, height=9_000, bits=8, colour=2, rows=b""),
        huge_jpeg(),
    ],
)
def test_a_bomb_is_refused_before_a_pixel_is_decoded(data, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(imaging, "_decode_jpeg", never)
    monkeypatch.setattr(Image.Image, "load", never)
    for action in ("error", "ignore"):
        with warnings.catch_warnings(), pytest.raises(ImageError, match=r"limit of|too large"):
            warnings.simplefilter(action)
            decode(data)


def test_the_caller_may_set_a_lower_limit():
    data = encode(PHOTO)
    assert EncodedImage(data, max_pixels=40 * 56).decode().shape == (3, 40, 56)
    with pytest.raises(ImageError, match=r"56 x 40 pixels are more than the limit of 2,239"):
        EncodedImage(data, max_pixels=40 * 56 - 1).decode()


def odd_pictures():
    image = Image.fromarray(draw_photo(0, 24, 30))
    exif = orientation(6)
    exif[ExifTags.Base.ImageDescription] = "a picture"
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    return [
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG", exif=exif),
        encode(image, "PNG", exif=exif),
        encode(image.convert("RGBA"), "PNG", **frames),
        encode(image.quantize(16), "PNG", transparency=3),
        encode(image, "GIF", **frames),
        encode(image, "WEBP", exif=exif),
        encode(image, "WEBP", lossless=True, **frames),
        encode(image, "BMP"),
        encode(image, "TIFF", compression="tiff_lzw"),
        encode(image, "TIFF", compression="jpeg"),
        encode(image.convert("1"), "TIFF", compression="group4"),
    ]


def test_damaged_exif_does_not_lose_the_picture():
    exif = orientation(6)
    exif[ExifTags.Base.ImageDescription] = "a"
    data = encode(PHOTO, "WEBP", lossless=True, exif=exif)
    entry = struct.pack(">HHI", ExifTags.Base.ImageDescription, 2, 2)
    assert data.count(entry) == 1
    # The description is of type "integer" and still a text.
    damaged = data.replace(entry, entry[:3] + b"\0" + entry[4:])
    np.testing.assert_array_equal(pixels_of(damaged), np.rot90(PHOTO, -1))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow thinks of the damage
@pytest.mark.parametrize("data", odd_pictures())
def test_damage_gives_pixels_or_an_image_error_and_nothing_else(data):
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            damaged[rng.randrange(min(len(data), rng.choice([64, 200, len(data)])))] = (
                rng.randrange(256)
            )
        try:
            pixels = EncodedImage(bytes(damaged), max_pixels=1_000_000).decode()
        except ImageError:
            continue
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3
        assert image_extension(bytes(damaged))


@pytest.mark.parametrize(
    ("image_format", "extension"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
    ],
)
def test_the_extension_is_that_of_the_content(image_format, extension):
    assert image_extension(encode(PHOTO, image_format)) == extension


def test_what_is_no_picture_has_no_extension():
    with pytest.raises(ImageError):
        image_extension(b"text")
