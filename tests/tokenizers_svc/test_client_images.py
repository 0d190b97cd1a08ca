"""What the client sends for a picture: files as they are, pixels without loss."""

import io

import numpy as np
import pytest
from PIL import Image

from cache_builder import imaging
from cache_builder.errors import ConfigError, ImageError
from tests.tokenizers_svc.support import draw, encode_image, jpeg
from tokenizers_svc.client.images import image_bytes


def decoded(body):
    return imaging.decode(body).permute(1, 2, 0).numpy()


def test_files_and_bytes_are_sent_as_they_are(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    for picture in (path, str(path), jpeg(), bytearray(jpeg()), memoryview(jpeg())):
        assert image_bytes(picture) == jpeg()


def test_pixels_arrive_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    for array in (pixels, pixels[::-1, ::2], np.asfortranarray(pixels)):
        assert np.array_equal(decoded(image_bytes(array)), array)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"])
def test_an_image_of_pillow_is_what_its_file_would_be(mode):
    image = draw(mode="L").convert("I;16") if mode == "I;16" else draw(mode=mode)
    expected = decoded(encode_image(image, "PNG"))
    assert np.array_equal(decoded(image_bytes(image)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_pillow_is_turned_upright_like_its_file(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encode_image(draw(), "PNG", exif=exif)
    sent = image_bytes(Image.open(io.BytesIO(body)))
    assert np.array_equal(decoded(sent), decoded(body))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
)
def test_arrays_of_another_kind_are_refused(pixels):
    with pytest.raises(ConfigError, match=r"\(H, W, 3\) of uint8, not \("):
        image_bytes(pixels)


@pytest.mark.parametrize("picture", [None, 7, [1, 2], object()])
def test_other_things_are_refused(picture):
    with pytest.raises(ConfigError, match=f"not a {type(picture).__name__}"):
        image_bytes(picture)


@pytest.mark.parametrize("picture", ["no/such.jpg", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(picture):
    with pytest.raises(ImageError, match="cannot be read"):
        image_bytes(picture)


def test_pixels_that_are_none_are_an_error_of_the_picture():
    with pytest.raises(ImageError, match="hold no picture"):
        image_bytes(np.zeros((0, 4, 3), np.uint8))


def test_an_image_that_png_cannot_hold_is_refused_with_a_way_out():
    with pytest.raises(ImageError, match=r"mode CMYK.*Convert it to RGB"):
        image_bytes(draw(mode="CMYK"))


def test_a_truncated_image_of_pillow_is_refused():
    with pytest.raises(ImageError, match="cannot be sent as PNG"):
        image_bytes(Image.open(io.BytesIO(jpeg()[:1000])))
