"""Hostile files are refused from their heads, and good ones cost and change nothing."""

import contextlib
import io
import lzma
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, TiffImagePlugin

from cache_builder import imaging
from cache_builder.errors import ImageError, ImageTooLargeError
from cache_builder.image_headers import check_header
from cache_builder.imaging import MAX_PIXELS, EncodedImage, decode
from tests import hostile
from tests.factories import draw_photo, encode, peak_memory_since_reset

LARGE = (7000, 7000)
PHOTO = draw_photo(0, 40, 56)
EMPTY = hostile.png_chunk(b"prVt", b"")
PROFILE = hostile.png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
TEXT = hostile.png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
HOSTILE = {
    "scans": (lambda: hostile.jpeg_of_many_scans(2000, LARGE), "more than 100 JPEG scans"),
    "segments": (
        lambda: hostile.jpeg_of_many_segments(100_000),
        "more than 4,096 JPEG segments before the first scan",
    ),
    "chunks": (lambda: hostile.png_with(EMPTY * 70_000), "more than 65,536 chunks in a PNG"),
    "late chunks": (
        lambda: hostile.png_with(EMPTY * 70_000, before=b"IEND"),
        "more than 65,536 chunks in a PNG",
    ),
    "profiles": (lambda: hostile.png_with(PROFILE * 5000), "more than 16 colour profiles"),
    "texts": (lambda: hostile.png_with(TEXT * 100), "Too much memory used in text chunks"),
    "strips": (
        lambda: hostile.tiff_of_many_strips(1_000_000),
        "1,000,000 strips or tiles where 64 are enough",
    ),
    "needed strips": (
        lambda: hostile.tiff_of_many_strips(100_001, (1, 100_001)),
        "more than 100,000 strips or tiles",
    ),
    "values": (
        lambda: hostile.tiff_of_overlapping_values(2000, 1_000_000),
        "name more bytes than there are",
    ),
    "fields": (lambda: hostile.tiff_of_overlapping_values(5000, 8), "more than 4,096 fields"),
    "tile": (
        lambda: hostile.tiff_of_a_huge_tile(9_999),
        "tiles of 9999 x 9999 pixels are more than the limit",
    ),
    "jpeg in tiff": (
        lambda: hostile.tiff_of_one_jpeg(hostile.jpeg_of_many_scans(2000), 1),
        "more than 116 JPEG scans in a TIFF",
    ),
    "shared jpeg in tiff": (
        lambda: hostile.tiff_of_one_jpeg(hostile.jpeg_of_many_scans(90), 64),
        "strips or tiles of the TIFF overlap",
    ),
    "comments": (
        lambda: hostile.gif_of_many_extensions(100_000),
        "more than 65,536 blocks before the first frame",
    ),
    "large frame": (lambda: hostile.gif_of_a_large_frame(13_000), "pixels"),
    "large runs": (
        lambda: hostile.bmp_of_runs(LARGE, b"\0\0\1\1" * 7000),
        "more than 10,000,000 pixels in a BMP",
    ),
    "many runs": (
        lambda: hostile.bmp_of_runs((10, 1_000_000), b"\1\1" * 2_500_000),
        "more than 4,000,000 bytes of a BMP",
    ),
    "canvas": (lambda: hostile.webp_of_a_large_canvas(9500, 9500), "pixels"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_costs_more_than_its_pixels_is_refused_at_once(kind):
    make, message = HOSTILE[kind]
    data = make()
    assert len(data) < 10_000_000
    started = time.process_time()
    with pytest.raises(ImageError, match=message):
        decode(data)
    # Minutes without the bound; a hundredth of this with it.
    assert time.process_time() - started < 5


def encode_tiff(size=(64, 64), **options):
    image = Image.fromarray(draw_photo(0, *size))
    return encode(image, "TIFF", **options)


GOOD = {
    "progressive": lambda: encode(PHOTO, "JPEG", progressive=True),
    "restart markers": lambda: encode(PHOTO, "JPEG", restart_marker_blocks=1),
    "ninety scans": lambda: hostile.jpeg_of_many_scans(90),
    "what looks like scans": lambda: hostile.jpeg_with_comment(b"\xff\xda" * 20_000),
    "scans behind the end": lambda: encode(PHOTO, "JPEG") + b"\xff\xda" * 1000,
    "large profile": lambda: encode(PHOTO, "JPEG", icc_profile=bytes(1_000_000)),
    "png": lambda: encode(PHOTO, "PNG"),
    "gif": lambda: encode(PHOTO, "GIF", comment=b"x" * 100_000),
    "webp": lambda: encode(PHOTO, "WEBP"),
    "webp of many frames": lambda: hostile.webp_of_many_frames(1000),
    "bmp": lambda: encode(PHOTO, "BMP"),
    "bmp of runs": lambda: hostile.bmp_of_runs((4, 2), b"\4\7\0\0\4\x09\0\1"),
    "tiff": lambda: encode_tiff(),
    "tiff of strips": lambda: encode_tiff(compression="tiff_lzw", strip_size=200),
    "tiff of jpeg strips": lambda: encode_tiff((640, 640), compression="jpeg", strip_size=10_000),
    "big tiff": lambda: encode_tiff(big_tiff=True),
    "many rows": lambda: hostile.tiff_of_many_strips(800, (2, 800)),
    "planes": lambda: hostile.tiff_of_planes(),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", GOOD)
def test_a_good_file_is_not_refused(kind):
    data = GOOD[kind]()
    check_header(data, max_pixels=MAX_PIXELS)
    assert decode(data).shape[0] == 3


def test_the_values_of_a_big_endian_tiff_are_read():
    ifd = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")
    ifd[256] = ifd[257] = 8
    ifd[273] = tuple(range(100))
    buffer = io.BytesIO(b"MM\0\x2a\0\0\0\x08")
    buffer.seek(8)
    ifd.save(buffer)
    with pytest.raises(ImageError, match="100 strips or tiles where 1 are enough"):
        check_header(buffer.getvalue(), max_pixels=MAX_PIXELS)


def test_damaged_heads_are_left_to_the_decoder():
    rng = np.random.default_rng(0)
    for make in GOOD.values():
        data = make()[:600]
        for size in range(0, len(data), 29):
            damaged = bytearray(data[:size])
            for place in rng.integers(0, max(1, size), 3) if size else ():
                damaged[place] = rng.integers(256)
            try:
                check_header(bytes(damaged), max_pixels=MAX_PIXELS)
            except ImageError:  # a count has grown
                continue


PLAIN = {
    "colour": lambda: encode(PHOTO, "JPEG"),
    "progressive": lambda: encode(PHOTO, "JPEG", progressive=True),
    "greyscale": lambda: encode(PHOTO[..., 0], "JPEG"),
    "with a profile": lambda: encode(PHOTO, "JPEG", icc_profile=bytes(100_000)),
    "with a comment": lambda: with_segment(hostile.segment(0xFE, b"\xff\xda" * 20_000)),
}
AMBIGUOUS = {
    "four components": lambda: encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "bytes between segments": lambda: with_segment(b"\0\0"),
    "an index of further pictures": lambda: with_segment(hostile.segment(0xE2, b"MPF\0\0\0")),
    "two frames": lambda: with_segment(
        hostile.segment(0xC0, b"\x08\0\x09\0\x07\x03\1\x22\0\2\x11\1\3\x11\1")
    ),
    "a marker of arithmetic coding": lambda: with_segment(hostile.segment(0xCC, b"\0\0")),
    "no scan": lambda: encode(PHOTO, "JPEG").partition(b"\xff\xda")[0],
    "a png": lambda: encode(PHOTO, "PNG"),
}


def with_segment(content):
    """A JPEG with something before its first segment."""
    data = encode(PHOTO, "JPEG")
    return data[:2] + content + data[2:]


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_jpeg_tells_its_size(kind):
    assert check_header(PLAIN[kind](), max_pixels=MAX_PIXELS) == (56, 40)


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_head_that_could_be_read_in_two_ways_is_left_to_pillow(kind):
    assert check_header(AMBIGUOUS[kind](), max_pixels=MAX_PIXELS) is None


def test_a_picture_has_the_size_that_its_head_was_admitted_with():
    rng = np.random.default_rng(0)
    num_decoded = 0
    for make in PLAIN.values():
        data = make()
        for _ in range(200):
            damaged = bytearray(data)
            for place in rng.integers(2, min(700, len(data)), 2):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(ImageError):
                image = EncodedImage(bytes(damaged), max_pixels=1_000_000)
                _, height, width = image.decode().shape
                assert {width, height} == {image.width, image.height}
                num_decoded += 1
    assert num_decoded > 200


@pytest.mark.skipif(imaging._decode_jpeg is None, reason="torchcodec is not installed")
def test_pillow_does_not_open_what_torchcodec_decodes(monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert decode(encode(PHOTO, "JPEG")).shape == (3, 40, 56)
    with pytest.raises(ImageError):
        decode(encode(PHOTO, "PNG"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_dictionary_of_gigabytes_is_no_reason_to_hold_them():
    """LZMA announces how much memory it wants: here 1.5 GB for 64 bytes."""
    packed = bytearray(lzma.compress(bytes(64), lzma.FORMAT_XZ))
    packed[16] = 37  # of the block's header: 3 << 29 bytes
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    data = hostile.tiff_of_lzma(bytes(packed))

    def try_it():
        with contextlib.suppress(ImageError):  # it cannot have that much here
            assert decode(data).shape == (3, 8, 8)

    assert peak_memory_since_reset(try_it) < 300_000_000


def test_a_picture_that_is_too_large_says_how_large_it_is():
    with pytest.raises(ImageTooLargeError) as caught:
        EncodedImage(encode(PHOTO), max_pixels=100).decode()
    assert caught.value.num_pixels == 40 * 56


RGBA = np.random.default_rng(1).integers(0, 256, (40, 56, 4)).astype(np.uint8)
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6
UNUSUAL = {
    "palette": lambda: encode(Image.fromarray(PHOTO).quantize(16), "PNG", transparency=3),
    "alpha": lambda: encode(RGBA, "PNG"),
    "grey with alpha": lambda: encode(Image.fromarray(RGBA).convert("LA"), "PNG"),
    "16 bits": lambda: encode(np.arange(2240, dtype=np.uint16).reshape(40, 56) * 29, "PNG"),
    "CMYK": lambda: encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "LAB": lambda: encode(Image.fromarray(PHOTO).convert("LAB"), "TIFF"),
    "turned": lambda: encode(RGBA, "PNG", exif=TURNED),
    "one bit": lambda: encode(Image.fromarray(PHOTO).convert("1"), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("band_pixels", [1, 500])
def test_a_picture_converted_some_rows_at_a_time_is_the_same(monkeypatch, kind, band_pixels):
    data = UNUSUAL[kind]()
    whole = decode(data)
    monkeypatch.setattr(imaging, "_BAND_PIXELS", band_pixels)
    assert torch.equal(decode(data), whole)
