"""One decoder and one cropper: every kind of picture becomes upright RGB, or an error."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from cache_builder import imaging
from cache_builder.errors import ImageError
from cache_builder.formats import View
from cache_builder.image_types import image_extension
from cache_builder.imaging import (
    apply_view,
    decode,
    patchify,
    shrink,
    unpatchify,
)
from tests.factories import draw_photo, encode

VECTORS = Path(__file__).parents[1] / "vectors"
PHOTO = draw_photo(0, 40, 56)
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


def png_chunks(*, width, height, bits, colour, rows):
    """Write a PNG by hand."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


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
    assert decode(data, max_pixels=40 * 56).shape == (3, 40, 56)
    with pytest.raises(ImageError, match=r"56 x 40 pixels are more than the limit of 2,239"):
        decode(data, max_pixels=40 * 56 - 1)


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
            pixels = decode(bytes(damaged), max_pixels=1_000_000)
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


def test_a_view_of_the_same_size_is_a_plain_cut():
    pixels = torch.from_numpy(PHOTO).permute(2, 0, 1)
    cut = apply_view(pixels, View(3, 7, 16, 16, False), 16)
    assert torch.equal(cut, pixels[:, 3:19, 7:23])
    assert cut.is_contiguous()


def test_a_mirrored_view_is_the_mirror_of_the_view():
    pixels = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for interpolation in ("bicubic", "bilinear"):
        plain, mirrored = (
            apply_view(pixels, View(2, 3, 30, 40, hflip), 16, interpolation)
            for hflip in (False, True)
        )
        assert torch.equal(mirrored, plain.flip(-1))
        assert mirrored.is_contiguous()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [16, 21, 40])
def test_a_view_written_into_its_place_is_what_torch_itself_resizes(side, interpolation):
    crop = (slice(None), slice(0, side), slice(4, 4 + side))
    picture = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for pixels in (picture, picture.contiguous()):  # as decoders give it, and planes
        expected = interpolate(pixels[crop][None], (16, 16), mode=interpolation, antialias=True)[0]
        places = torch.full((4, 3, 16, 16), 7, dtype=torch.uint8)
        for row, hflip in ((1, False), (2, True)):
            view = View(0, 4, side, side, hflip)
            returned = apply_view(pixels, view, 16, interpolation, out=places[row])
            assert torch.equal(places[row], expected.flip(-1) if hflip else expected)
            assert returned.data_ptr() == places[row].data_ptr()
        assert (places[[0, 3]] == 7).all()


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_that_of_pillow_to_one_level(size, interpolation):
    pixels = torch.from_numpy(PHOTO).permute(2, 0, 1)
    ours = apply_view(pixels, View(5, 1, 33, 41, False), size, interpolation)
    cut = Image.fromarray(PHOTO[5:38, 1:42])
    resample = Image.Resampling[interpolation.upper()]
    theirs = np.array(cut.resize((size, size), resample)).astype(int)
    difference = np.abs(ours.permute(1, 2, 0).numpy() - theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.05


def test_a_crop_of_the_official_beit_code_is_ours_to_one_level():
    recorded = np.load(VECTORS / "beit_crops.npz")
    pixels = torch.from_numpy(recorded["img"]).permute(2, 0, 1)
    ours = apply_view(pixels, View(*recorded["box"].tolist(), hflip=False), 32)
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - recorded["a"])
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def test_the_crop_comes_before_the_resize():
    # Black outside the box must not bleed into the view.
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    pixels[:, 10:20, 10:20] = 200
    assert (apply_view(pixels, View(10, 10, 10, 10, False), 24) == 200).all()


@pytest.mark.parametrize(
    "view", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 41, 5), (0, 52, 5, 5), (3, 3, 0, 5), (3, 3, 5, 0)]
)
def test_a_box_outside_the_picture_is_refused(view):
    pixels = torch.from_numpy(PHOTO).permute(2, 0, 1)
    with pytest.raises(ImageError, match="does not lie within a picture of 40 x 56"):
        apply_view(pixels, View(*view, hflip=False), 16)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 150), (50, 75)), ((150, 100), (75, 50)), ((60, 61), (50, 51)), ((200, 51), (196, 50))],
)
def test_a_picture_is_shrunk_to_its_short_side(size, expected):
    small = shrink(encode(draw_photo(0, *size)), 50, 92)
    assert decode(small).shape[-2:] == expected
    assert image_extension(small) == "jpg"


def test_a_small_picture_is_not_enlarged_and_not_encoded_again():
    data = encode(PHOTO)
    assert shrink(data, 40, 92) is data


def test_a_shrunk_picture_is_upright_and_looks_the_same():
    data = encode(PHOTO, "JPEG", quality=95, exif=orientation(6))
    small = shrink(data, 20, 95)
    with Image.open(io.BytesIO(small)) as image:
        assert not image.getexif()
        expected = Image.fromarray(pixels_of(data)).resize(image.size, Image.Resampling.BICUBIC)
        assert np.abs(np.array(image).astype(int) - np.array(expected)).mean() < 6


def test_quality_is_the_one_asked_for():
    data = encode(draw_photo(0, 100, 100))
    assert len(shrink(data, 50, 20)) < len(shrink(data, 50, 90))


def test_patches_are_in_row_major_order_and_their_values_in_channel_row_column_order():
    pixels = torch.arange(2 * 3 * 6 * 4).reshape(2, 3, 6, 4)
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 6, 12)
    for b in range(2):
        for row in range(3):
            for col in range(2):
                expected = [
                    pixels[b, channel, 2 * row + i, 2 * col + j].item()
                    for channel in range(3)
                    for i in range(2)
                    for j in range(2)
                ]
                assert patches[b, 2 * row + col].tolist() == expected
    assert torch.equal(unpatchify(patches, (3, 2), 2), pixels)


def test_patches_are_those_of_the_official_ccvit_code():
    recorded = np.load(VECTORS / "ccvit_step.npz")
    images = np.random.RandomState(14).random_sample((2, 3, 224, 224)).astype(np.float32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalised = (torch.from_numpy(images) - mean) / std
    ours = patchify(normalised, 16)[0, recorded["x_patch_rows"]]
    np.testing.assert_allclose(ours, recorded["x_patches"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_view_is_what_torchvision_cuts_and_resizes(interpolation):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    picture = decode(encode(draw_photo(3, 120, 170)))
    for box in ((0, 0, 120, 170), (7, 31, 64, 50), (20, 20, 48, 48), (100, 150, 3, 5)):
        expected = resized_crop(
            picture, *box, [48, 48], InterpolationMode(interpolation), antialias=True
        )
        assert torch.equal(apply_view(picture, View(*box, False), 48, interpolation), expected)
