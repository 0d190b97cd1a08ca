"""Bytes to pixels to views to patches: the only decoder and the only cropper.

The token of a patch depends on every step between the file and the patch, so the builder, the
service and the trainer all take these steps here. Measured on 250 ImageNet photographs, another
resampler or a fast JPEG mode changes 2-13 % of the ids.

What becomes of unusual pictures:

    EXIF orientation   applied
    greyscale          repeated into three channels
    16-bit greyscale   divided by 257 and rounded; 16-bit colour keeps its high byte
    CMYK, YCbCr, LAB   converted to RGB by Pillow
    palette, alpha     composited on white
    animation, pages   the first frame
    truncated          refused, like any file that decodes to less than it promises
"""

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from cache_builder.errors import ImageError, ImageTooLargeError
from cache_builder.formats.views import Interpolation, View
from cache_builder.image_headers import check_header

try:
    from torchcodec.decoders import decode_jpeg as _decode_jpeg
except (ImportError, OSError, RuntimeError):
    # Pillow gives the same pixels (a test compares them) at three times the CPU.
    _decode_jpeg = None

MAX_PIXELS: Final = 89_478_485  # Pillow's own warning threshold, 256 MiB of RGB

_BAND_PIXELS: Final = 1 << 20
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_DEEP_GREY_MODES: Final = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
# What decoders raise on damaged files is not documented; all of it means the same.
_DECODER_ERRORS: Final = (
    OSError, ValueError, SyntaxError, RuntimeError, EOFError, LookupError, ArithmeticError,
    TypeError, struct.error, zlib.error,
)  # fmt: skip
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESIZE: Final = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
_ALPHA_MODES: Final = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})

Image.init()  # without it, naming a format whose plug-in has not been loaded yet is a KeyError


def decode(data: bytes) -> Tensor:
    """Return the picture in `data` as upright RGB.

    The size is read from the header and checked before a pixel is decoded, and so is what makes a
    small file costly (`cache_builder.image_headers`). Plain JPEG in colour or greyscale is decoded
    by torchcodec, everything else by Pillow; both use libjpeg-turbo and give the same pixels.

    Args:
        data: An encoded image: JPEG, PNG, WebP, GIF, BMP or TIFF.

    Returns:
        (3, H, W) uint8.

    Raises:
        ImageTooLargeError: More pixels than `MAX_PIXELS`.
        ImageError: Not an image, corrupt, truncated, hostile, or without a defined range.
    """
    return EncodedImage(data).decode()


class EncodedImage:
    """A picture whose header has been read, and nothing else of it.

    `format`, `width` and `height` are what the file says; the size is the stored one, before the
    picture is turned upright.
    """

    def __init__(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
        """Read the header.

        Args:
            data: As for `decode`.
            max_pixels: Largest width x height that will be decoded.

        Raises:
            ImageError: Not an image of a known format, or its header is damaged or hostile.
        """
        if not data:
            raise ImageError("the file is empty")
        self._data = data
        self._max_pixels = max_pixels
        self._image: Image.Image | None = None  # for Pillow to decode
        with _as_image_errors():
            frame = check_header(data, max_pixels=max_pixels)
            if frame is not None and _decode_jpeg is not None:
                self.format = "JPEG"
                self.width, self.height = frame
                return
            # Of all that is not a plain JPEG, Pillow knows the many ways to be unusual.
            self._image = Image.open(io.BytesIO(data), formats=_FORMATS)
        self.format = str(self._image.format)
        self.width, self.height = self._image.size

    @property
    def num_pixels(self) -> int:
        """Width x height."""
        return self.width * self.height

    def decode(self) -> Tensor:
        """Return the picture as `decode` does; to be called once.

        Raises:
            ImageTooLargeError: It has more pixels than it may.
            ImageError: As for `decode`.
        """
        if self.num_pixels > self._max_pixels:
            raise ImageTooLargeError(
                f"{self.width} x {self.height} pixels are more than the limit of "
                f"{self._max_pixels:,}",
                num_pixels=self.num_pixels,
            )
        image = self._image
        self._image = None  # Pillow would keep what it decodes, as large as the result
        with _as_image_errors():
            if image is not None:
                return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1)
            # Of bytes torchcodec makes a tensor under changed filters of warnings, which are those
            # of the process: threads that decode at once would leave them changed.
            return _decode_jpeg(torch.frombuffer(bytearray(self._data), dtype=torch.uint8))


def apply_view(
    pixels: Tensor,  # (3, H, W) uint8
    view: View,
    size: int,
    interpolation: Interpolation = "bicubic",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Cut a view out of a decoded picture and resize it.

    Crop first, then antialiased resize (the two do not commute at the border), then mirror.

    Args:
        pixels: The picture.
        view: The box, and whether it is mirrored.
        size: Side of the result, pixels.
        interpolation: How it is resized.
        out: Where the result is written, (3, size, size) uint8, contiguous; None makes room.

    Returns:
        (3, size, size) uint8, contiguous.

    Raises:
        ImageError: The box does not lie within the picture.
    """
    height, width = pixels.shape[-2:]
    top, left, h, w, hflip = view
    if min(top, left) < 0 or min(h, w) < 1 or top + h > height or left + w > width:
        raise ImageError(f"view {tuple(view)} does not lie within a picture of {height} x {width}")
    crop = pixels[:, top : top + h, left : left + w]
    if out is None:
        out = torch.empty((3, size, size), dtype=torch.uint8)
    if hflip:
        out.copy_(_resize_into(torch.empty_like(out), crop, interpolation).flip(-1))
        return out
    return _resize_into(out, crop, interpolation)


def _resize_into(out: Tensor, pixels: Tensor, interpolation: Interpolation) -> Tensor:
    """Write uint8 (3, H, W), resized with antialiasing, into a contiguous uint8 (3, h, w).

    torchvision's v2 `resize` and torch's `interpolate` come down to these operators, but neither
    writes to a given place, and the import of torchvision takes every process 1.7 s.
    """
    size = out.shape[1:]
    if pixels.shape[1:] == size:
        return out.copy_(pixels)
    _RESIZE[interpolation](pixels[None], size, False, out=out[None])
    return out


def shrink(data: bytes, short_side: int, jpeg_quality: int) -> bytes:
    """Re-encode a picture as JPEG with the given short side; a smaller one is returned as it is.

    The aspect ratio is kept to the nearest pixel. The result is upright and carries no EXIF.

    Raises:
        ImageError: The picture cannot be decoded.
    """
    pixels = decode(data)
    height, width = pixels.shape[-2:]
    if min(height, width) <= short_side:
        return data
    factor = short_side / min(height, width)
    size = [max(short_side, round(height * factor)), max(short_side, round(width * factor))]
    if height <= width:
        size[0] = short_side
    else:
        size[1] = short_side
    small = _resize_into(torch.empty((3, *size), dtype=torch.uint8), pixels, "bicubic")
    buffer = io.BytesIO()
    Image.fromarray(small.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=jpeg_quality)
    return buffer.getvalue()


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut pictures into patches.

    Args:
        pixels: (B, C, H, W), H and W multiples of `patch_size`.
        patch_size: p, pixels.

    Returns:
        (B, N, C * p * p): patches in row-major order, the values of a patch in (c, row, col)
        order, as CCViT (arXiv:2303.04664) flattens them.
    """
    batch, channels, height, width = pixels.shape
    rows, cols, p = height // patch_size, width // patch_size, patch_size
    cut = pixels.reshape(batch, channels, rows, p, cols, p)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, channels * p * p)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches together again: (B, N, C * p * p) to (B, C, rows * p, cols * p)."""
    batch, p = patches.shape[0], patch_size
    rows, cols = grid
    channels = patches.shape[-1] // (p * p)
    cut = patches.reshape(batch, rows, cols, channels, p, p)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * p, cols * p)


@contextlib.contextmanager
def _as_image_errors() -> Iterator[None]:
    """Tell in one exception of ours what decoders say in many."""
    try:
        yield
    except UnidentifiedImageError as exc:
        raise ImageError(
            "not an image of a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)"
        ) from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as exc:
        raise ImageTooLargeError(f"too large to decode: {exc}") from exc
    except _DECODER_ERRORS as exc:
        raise ImageError(f"cannot be decoded: {_first_line(exc)}") from exc


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the first frame as upright RGB (H, W, 3)."""
    image.seek(0)
    image.load()  # turns a TIFF upright, and takes the orientation out of its EXIF
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.mode in ("I", "F") and (image.mode, image.format) != ("I", "PNG"):
        raise ImageError(
            f"pixels of mode {image.mode} have no defined range; convert them to 8 or 16 bits"
        )
    if orientation in _UPRIGHT:
        # Not ImageOps.exif_transpose: it also writes the EXIF anew, which fails on a damaged one.
        image = image.transpose(_UPRIGHT[orientation])
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    # Some rows at a time: several copies of a whole large picture would be held at once.
    num_rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        band = image.crop((0, top, image.width, bottom))
        rgb[top:bottom] = np.asarray(_band_to_rgb(band))
    return rgb


def _band_to_rgb(band: Image.Image) -> Image.Image:
    if band.mode in _DEEP_GREY_MODES or band.mode == "I":
        grey = np.asarray(band).astype(np.float64) / 257
        band = Image.fromarray(np.clip(grey.round(), 0, 255).astype(np.uint8))
    if band.mode in _ALPHA_MODES or "transparency" in band.info:
        band = band.convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        band = Image.alpha_composite(white, band)
    return band.convert("RGB")


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    # torchcodec puts the function and the C++ source line in front of the reason.
    return re.sub(r"^\w+, \S+:\d+, ", "", lines[0])
