"""Pictures of every format, damaged at random: bits flipped, cut off, spliced with one another."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

SEEDS = {
    "JPEG": [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}],
    "PNG": [{}, {"interlace": 1}],
    "WEBP": [{}, {"lossless": True}],
    "GIF": [{}],
    "BMP": [{}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "zstd"}],
}
_MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P", "1", "I;16")}


def originals() -> list[bytes]:
    """Return small undamaged pictures of every format and mode."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(72), np.arange(56))
    pixels = np.stack([3 * x, 4 * y, 2 * (x + y)], -1) + rng.integers(0, 9, (56, 72, 3))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    files = []
    for image_format, variants in SEEDS.items():
        for mode in _MODES.get(image_format, ("RGB", "L")):
            for options in variants:
                buffer = io.BytesIO()
                picture.convert("L" if mode == "I;16" else mode).convert(mode).save(
                    buffer, image_format, **options
                )
                files.append(buffer.getvalue())
    return files


def mutants(num_files: int, seed: int = 0) -> Iterator[bytes]:
    """Yield so many damaged files, the same for the same seed."""
    rng = np.random.default_rng(seed)
    files = originals()
    for _ in range(num_files):
        data = files[rng.integers(len(files))]
        for _ in range(rng.integers(1, 4)):
            data = damage(data, rng, files)
        yield data


def damage(data: bytes, rng: np.random.Generator, files: Sequence[bytes]) -> bytes:
    """Return bytes with one damage; `files` are those that they may be spliced with."""
    return bytes(_DAMAGES[rng.integers(len(_DAMAGES))](bytearray(data), rng, files))


def _flip_bits(data, rng, files):
    for _ in range(rng.integers(1, 12)):
        if data:
            # Half of the flips hit the head, where sizes and tables are.
            most = min(len(data), 64) if rng.random() < 0.5 else len(data)
            data[rng.integers(most)] ^= 1 << int(rng.integers(8))
    return data


def _set_bytes(data, rng, files):
    for _ in range(rng.integers(1, 6)):
        if data:
            data[rng.integers(len(data))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
    return data


def _cut(data, rng, files):
    return data[: rng.integers(len(data) + 1)]


def _remove(data, rng, files):
    start = rng.integers(len(data) + 1)
    return data[:start] + data[start + rng.integers(1, 40) :]


def _repeat(data, rng, files):
    start = rng.integers(len(data) + 1)
    part = data[start : start + rng.integers(1, 200)]
    return data[:start] + part * int(rng.integers(2, 50)) + data[start:]


def _splice(data, rng, files):
    other = files[rng.integers(len(files))]
    return data[: rng.integers(len(data) + 1)] + other[rng.integers(len(other) + 1) :]


_DAMAGES = (_flip_bits, _flip_bits, _set_bytes, _cut, _remove, _repeat, _splice)
