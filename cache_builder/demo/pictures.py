"""Pictures of tokens: token maps, reconstructions, centroids and curves."""

import base64
import colorsys
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache_builder.formats.cache import TokenCache
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.views import View
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers import PatchTokenizer

Pixels = NDArray[np.uint8]  # (H, W, 3)

_GOLDEN_RATIO = 0.618034


def view_pixels(cache: TokenCache, sample: CachedSample, view: int) -> Pixels:
    """Return one view of a cached image, as the trainer sees it."""
    spec = cache.manifest.view_spec
    top, left, height, width, hflip = sample.views[view].tolist()
    box = View(top, left, height, width, bool(hflip))
    pixels = apply_view(decode(sample.image or b""), box, spec.size, spec.interpolation)
    return _channels_last(pixels)


def token_map(token_ids: NDArray[np.uint16], size: int) -> Pixels:
    """Return ids (rows, cols) as a picture, every id a colour of its own."""
    palette = np.array([_colour(int(i)) for i in token_ids.ravel()], np.uint8)
    return _scale(palette.reshape(*token_ids.shape, 3), size)


def reconstruction(tokenizer: PatchTokenizer, token_ids: NDArray[np.uint16]) -> Pixels:
    """Return the picture that the ids of one view stand for: centroids side by side."""
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    return _channels_last(tokenizer.decode(ids)[0])


def centroid_sheet(tokenizer: PatchTokenizer, order: Sequence[int], columns: int) -> Pixels:
    """Return the given centroids as a sheet, row by row."""
    p = tokenizer.pixel_rule.patch_size
    centroids = tokenizer.codebook.centroids[0][list(order)]
    tiles = centroids.reshape(-1, 3, p, p).transpose(0, 2, 3, 1)
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (p + 1), columns * (p + 1), 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (p + 1), index % columns * (p + 1)
        sheet[top : top + p, left : left + p] = tile
    return sheet


def png(pixels: Pixels, scale: int = 1) -> str:
    """Return a picture as a data URI, enlarged without smoothing."""
    image = Image.fromarray(pixels)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """Return a line chart as SVG."""
    width, height, margin = 640, 260, 46
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    span_x, span_y = max(max(xs) - min(xs), 1e-9), max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            margin + (x - min(xs)) / span_x * (width - margin - 12),
            12 + (high - y) / span_y * (height - margin - 12),
        )

    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
    ticks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * span_y
        _, py = place(xs[0], value)
        ticks.append(
            f'<line x1="{margin}" x2="{width - 12}" y1="{py:.1f}" y2="{py:.1f}" class="grid"/>'
            f'<text x="{margin - 6}" y="{py + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
        position = min(xs) + share * span_x
        px, _ = place(position, low)
        ticks.append(
            f'<text x="{px:.1f}" y="{height - margin + 18}" text-anchor="middle">'
            f"{position:,.0f}</text>"
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{y_label} by {x_label}">'
        f'{"".join(ticks)}<polyline points="{path}" class="line"/>'
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">{x_label}</text>'
        f'<text x="{width - 12}" y="24" text-anchor="end">{y_label}</text></svg>'
    )


def bars(values: Sequence[float], label: str) -> str:
    """Return values as thin bars, SVG."""
    width, height = 640, 120
    top = max(values) or 1
    step = width / len(values)
    drawn = "".join(
        f'<rect x="{i * step:.2f}" y="{height - v / top * height:.2f}" '
        f'width="{max(step * 0.9, 0.5):.2f}" height="{v / top * height:.2f}"/>'
        for i, v in enumerate(values)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" class="bars">'
        f"{drawn}</svg>"
    )


def _colour(token_id: int) -> tuple[int, int, int]:
    hue = token_id * _GOLDEN_RATIO % 1
    value = 0.55 + 0.4 * (token_id * 0.381966 % 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.62, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _channels_last(pixels: Tensor) -> Pixels:
    image: Pixels = pixels.permute(1, 2, 0).numpy()
    return image


def _scale(pixels: Pixels, size: int) -> Pixels:
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(image)
