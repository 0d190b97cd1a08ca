"""One decoder and one cropper: every kind of picture becomes upright RGB, or an error."""

import io
import struct
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder import imaging
from cache_builder.imaging import decode
from tests.cache_builder.encoded import (
    JPEGS,
    PHOTO,
    orientation,
    pixels_of,
    png_chunks,
    without_torchcodec,
)
from tests.factories import draw_photo, encode

VECTORS = Path(__file__).parents[1] / "vectors"
ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_lossless_picture_gives_its_pixels(image_format, options):
    decoded = decode(encode(PHOTO, image_format, **options))
    assert decoded.dtype == torch.uint8
    np.testing.assert_array_equal(decoded.permute(1, 2, 0), PHOTO)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_the_smallest_pictures_are_decoded(image_format, size):
    picture = np.full((*size, 3), 255, np.uint8)
    np.testing.assert_array_equal(pixels_of(encode(picture, image_format)), picture)


@pytest.mark.skipif(imaging._decode_jpeg is None, reason="torchcodec is not installed")
@pytest.mark.parametrize("colour", ["RGB", "L"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
@pytest.mark.parametrize("size", [(40, 56), (1, 1), (17, 3)])
def test_torchcodec_and_pillow_give_the_same_pixels(colour, options, size):
    image = Image.fromarray(draw_photo(1, *size)).convert(colour)
    data = encode(image, "JPEG", **options)
    assert torch.equal(decode(data), without_torchcodec(data))


@pytest.mark.parametrize("value", ORIENTED)
@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("TIFF", {}),
    ],
)
def test_pictures_are_turned_upright(value, image_format, options):
    plain = pixels_of(encode(PHOTO, image_format, **options))
    turned = encode(PHOTO, image_format, exif=orientation(value), **options)
    np.testing.assert_array_equal(pixels_of(turned), ORIENTED[value](plain))
    assert torch.equal(without_torchcodec(turned), decode(turned))


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_none(value):
    turned = encode(PHOTO, "JPEG", exif=orientation(value))
    np.testing.assert_array_equal(pixels_of(turned), pixels_of(encode(PHOTO, "JPEG")))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_grey_is_repeated_into_three_channels(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = pixels_of(encode(Image.fromarray(PHOTO[..., 0]), image_format, **options))
    assert decoded.shape == PHOTO.shape
    assert (decoded == decoded[..., :1]).all()
    if image_format != "JPEG":
        np.testing.assert_array_equal(decoded[..., 0], PHOTO[..., 0])


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257_and_rounded(image_format):
    deep = np.arange(0, 65_536, 13, dtype=np.uint16)[:5040].reshape(60, 84)
    deep[0, :3] = [0, 128, 65_535]
    decoded = pixels_of(encode(Image.fromarray(deep), image_format))
    np.testing.assert_array_equal(decoded[..., 0], np.round(deep / 257).astype(np.uint8))
    assert decoded[0, :3, 0].tolist() == [0, 0, 255]


def test_16_bit_colour_keeps_its_high_byte():
    deep = np.random.default_rng(0).integers(0, 65_536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    decoded = pixels_of(png_chunks(width=5, height=4, bits=16, colour=2, rows=rows))
    np.testing.assert_array_equal(decoded, deep >> 8)


def test_big_endian_16_bit_tiff_is_read():
    grey = np.array([[0, 257, 65_535]], ">u2")
    entries = [(256, 3, 3), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 110)]
    entries += [(277, 3, 1), (278, 3, 1)]
    data = struct.pack(">2sHIH", b"MM", 42, 8, len(entries))
    for tag, kind, value in entries:
        data += struct.pack(">HHI", tag, kind, 1)
        data += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
    data = data.ljust(110, b"\0") + grey.tobytes()
    assert pixels_of(data)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_is_converted_as_pillow_does(image_format):
    data = encode(Image.fromarray(PHOTO).convert("CMYK"), image_format)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(pixels_of(data), expected)


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode):
    decoded = pixels_of(encode(Image.fromarray(PHOTO).convert(mode), "TIFF"))
    # 8 bits of another space hold RGB only roughly.
    assert np.abs(decoded.astype(int) - PHOTO).mean() < 6


def test_alpha_is_composited_on_white():
    rgba = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    rgba[:10, :, 3] = 0
    rgba[10:20, :, 3] = 51  # a fifth
    decoded = pixels_of(encode(rgba)).astype(float)
    assert (decoded[:10] == 255).all()
    expected = 255 - (255 - PHOTO[10:20].astype(float)) / 5
    np.testing.assert_allclose(decoded[10:20], expected, atol=1)
    np.testing.assert_array_equal(decoded[20:], PHOTO[20:])


def test_grey_with_alpha_is_composited_on_white():
    la = np.dstack([PHOTO[..., 0], np.zeros(PHOTO.shape[:2], np.uint8)])
    assert (pixels_of(encode(Image.fromarray(la))) == 255).all()


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_palette_gives_its_colours(image_format):
    palette = Image.fromarray(PHOTO).quantize(16)
    expected = np.array(palette.convert("RGB"))
    np.testing.assert_array_equal(pixels_of(encode(palette, image_format)), expected)


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(image_format):
    palette = Image.fromarray(PHOTO).quantize(16)
    transparent = np.array(palette) == 3
    decoded = pixels_of(encode(palette, image_format, transparency=3))
    assert (decoded[transparent] == 255).all()
    expected = np.array(palette.convert("RGB"))[~transparent]
    np.testing.assert_array_equal(decoded[~transparent], expected)


def test_a_transparent_colour_of_rgb_is_white():
    black = np.zeros((2, 2, 3), np.uint8)
    black[0, 0] = 9
    decoded = pixels_of(encode(black, transparency=(0, 0, 0)))
    assert decoded[0, 0].tolist() == [9, 9, 9]
    assert (decoded[1] == 255).all()


def test_one_bit_is_black_and_white():
    bits = Image.fromarray(PHOTO).convert("1")
    expected = np.array(bits.convert("RGB"))
    np.testing.assert_array_equal(pixels_of(encode(bits)), expected)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_an_animation_is_its_first_frame(image_format, options):
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 200, 90)]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert (pixels_of(data) == 10).all()


def test_threads_that_decode_at_once_leave_the_filters_of_warnings_alone():
    body = encode(draw_photo(0), "JPEG")
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns wherever they can
    try:
        with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
            warnings.resetwarnings()
            pictures = list(pool.map(decode, [body] * 2000))
            assert warnings.filters == []
    finally:
        sys.setswitchinterval(before_s)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
