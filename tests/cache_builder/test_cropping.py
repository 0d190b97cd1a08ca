"""One cropper: views are cut, then resized, then mirrored; patches are in row-major order."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

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
from tests.cache_builder.encoded import PHOTO, orientation, pixels_of
from tests.factories import draw_photo, encode

VECTORS = Path(__file__).parents[1] / "vectors"


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
