"""Pictures of tokens: token maps, reconstructions, centroids and curves."""

import base64
import colorsys
import html
import io
import math
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
_MAX_CURVE_POINTS = 400
_GREY = 128
_JPEG_QUALITY = 85
_SVG_SIDE = 640  # of the longer side of an image, in units of the drawing
_STROKE = 4
_TAG = 34  # height of a box's number
_VIEW_COLOURS = (
    "#ffd43b", "#4dd4ff", "#ff8fa3", "#8ce99a", "#d0a8ff", "#ffa94d", "#63e6be", "#f3f0e6",
)  # fmt: skip


def view_pixels(cache: TokenCache, sample: CachedSample, view: int) -> Pixels:
    """Return one view of a cached image, as the trainer sees it."""
    spec = cache.manifest.view_spec
    top, left, height, width, hflip = sample.views[view].tolist()
    box = View(top, left, height, width, bool(hflip))
    pixels = apply_view(decode(sample.image or b""), box, spec.size, spec.interpolation)
    return channels_last(pixels)


def token_map(token_ids: NDArray[np.uint16], size: int) -> Pixels:
    """Return ids (rows, cols) as a picture, every id a colour of its own."""
    palette = np.array([_colour(int(i)) for i in token_ids.ravel()], np.uint8)
    return _scale(palette.reshape(*token_ids.shape, 3), size)


def reconstruction(tokenizer: PatchTokenizer, token_ids: NDArray[np.uint16]) -> Pixels:
    """Return the picture that the ids of one view stand for: centroids side by side."""
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    return channels_last(tokenizer.decode(ids)[0])


def blended(picture: Pixels, over: Pixels) -> Pixels:
    """Return the mean of two pictures of one size."""
    mean: Pixels = ((picture.astype(np.uint16) + over) // 2).astype(np.uint8)
    return mean


def patch_in_its_place(picture: Pixels, row: int, col: int, patch_size: int) -> Pixels:
    """Return a patch, framed in white, with the patches around it.

    The cut is three patches wide; at the border of the picture, or in a smaller one, it is what
    there is, filled up with grey.
    """
    p = patch_size
    padded = np.pad(picture, ((p, p), (p, p), (0, 0)), constant_values=_GREY)
    cut: Pixels = padded[row * p : (row + 3) * p, col * p : (col + 3) * p].copy()
    for distance, shade in ((2, 0), (1, 255)):  # black around white shows on any ground
        low, high = max(p - distance, 0), min(2 * p - 1 + distance, 3 * p - 1)
        cut[[low, high], low : high + 1] = shade
        cut[low : high + 1, [low, high]] = shade
    return cut


def centroid_sheet(tokenizer: PatchTokenizer, order: Sequence[int], columns: int) -> Pixels:
    """Return the given centroids of the first stage as a sheet, row by row."""
    p = tokenizer.pixel_rule.patch_size
    centroids = tokenizer.codebook.centroids[0][list(order)].clip(0, 255).astype(np.uint8)
    tiles = centroids.reshape(-1, 3, p, p).transpose(0, 2, 3, 1)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (p + 1), columns * (p + 1), 3), _GREY, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (p + 1), index % columns * (p + 1)
        sheet[top : top + p, left : left + p] = tile
    return sheet


def jpeg(pixels: Pixels, max_side: int | None = None) -> str:
    """Return a photograph as a data URI, no side longer than `max_side` pixels.

    A tenth of a PNG's size; for looking at, not for measuring.
    """
    image = Image.fromarray(pixels)
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def boxes(
    views: NDArray[np.int32],  # (V, 5): top, left, height, width, hflip
    image_size: tuple[int, int],
    picture: str | None,
    label: str,
    first_view: int = 0,
) -> str:
    """Return an image with its views as numbered boxes, SVG; mirrored views are dashed.

    Args:
        views: Of the image.
        image_size: Height and width that the boxes refer to.
        picture: The image as a data URI, of any resolution; None draws an empty frame.
        label: What to say to those who do not see it.
        first_view: Index of the first of `views`.
    """
    height, width = image_size
    scale = _SVG_SIDE / max(height, width)
    across, down = width * scale, height * scale
    ground = (
        f'<image href="{picture}" width="{across:.1f}" height="{down:.1f}"/>'
        if picture
        else f'<rect class="blank" width="{across:.1f}" height="{down:.1f}"/>'
    )
    frames, tags = [], []
    for number, (top, left, h, w, hflip) in enumerate(views.tolist(), first_view):
        colour, dash = view_colour(number), ' stroke-dasharray="14 8"' if hflip else ""
        x, y, wide, high = (value * scale for value in (left, top, w, h))
        inset = _STROKE / 2
        shape = (
            f'x="{x + inset:.1f}" y="{y + inset:.1f}" width="{max(wide - _STROKE, 1):.1f}" '
            f'height="{max(high - _STROKE, 1):.1f}" fill="none"'
        )
        # Each view has its number in another corner: crops often share one.
        text = f"{number}\u21c4" if hflip else str(number)
        tag = _TAG * (1.7 if hflip else 1) * (0.7 + 0.3 * len(str(number)))
        tag_x = x if number % 2 == 0 else x + wide - tag
        tag_y = y if number % 4 < 2 else y + high - _TAG
        frames.append(
            f'<rect {shape} stroke="#000" stroke-opacity=".55" stroke-width="{_STROKE + 3}"/>'
            f'<rect {shape} stroke="{colour}" stroke-width="{_STROKE}"{dash}/>'
        )
        tags.append(
            f'<rect x="{tag_x:.1f}" y="{tag_y:.1f}" width="{tag:.1f}" height="{_TAG}" '
            f'fill="{colour}"/><text x="{tag_x + tag / 2:.1f}" y="{tag_y + _TAG * 0.76:.1f}" '
            f'text-anchor="middle" fill="#000" font-size="{_TAG * 0.75:.0f}">{text}</text>'
        )
    return (
        f'<svg class="boxes" viewBox="0 0 {across:.1f} {down:.1f}" preserveAspectRatio="xMinYMin" '
        f'role="img" aria-label="{html.escape(label)}">{ground}{"".join(frames + tags)}</svg>'
    )


def view_colour(number: int) -> str:
    """Return the colour of a view's box, light enough for black text."""
    return _VIEW_COLOURS[number % len(_VIEW_COLOURS)]


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
    xs, ys = [x for x, _ in points], [y for _, y in points]
    shares = (0, 0.25, 0.5, 0.75, 1)
    return _chart(
        points,
        [(x, f"{x:,.0f}") for x in (min(xs) + share * (max(xs) - min(xs)) for share in shares)],
        [(y, f"{y:.2f}") for y in (min(ys) + share * (max(ys) - min(ys)) for share in shares)],
        (x_label, y_label),
    )


def usage_curve(
    counts: NDArray[np.int64], labels: tuple[str, str] = ("rank of the id", "tokens")
) -> str:
    """Return counts (K,), most frequent first, as a chart with a logarithmic axis, SVG.

    A dashed line marks the even share. What occurs nowhere lies on the axis, at half a token.

    Args:
        counts: Of tokens per id, say.
        labels: Of the two axes.
    """
    ordered = np.sort(counts)[::-1]
    ranks = np.unique(np.linspace(0, len(ordered) - 1, _MAX_CURVE_POINTS).round().astype(int))
    points = [(rank + 1.0, math.log10(max(float(ordered[rank]), 0.5))) for rank in ranks]
    points = points if len(points) > 1 else [*points, (2.0, points[0][1])]
    powers = range(math.ceil(math.log10(max(float(ordered[0]), 1))) + 1)
    last = points[-1][0]
    return _chart(
        points,
        [(1.0, "1"), *((x, f"{x:,.0f}") for x in (round(last * s / 4) for s in (1, 2, 3, 4)))],
        [(math.log10(0.5), "0"), *((float(power), f"{10**power:,}") for power in powers)],
        labels,
        level=math.log10(max(float(ordered.mean()), 0.5)),
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


def _chart(
    points: Sequence[tuple[float, float]],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    labels: tuple[str, str],  # of x and y
    level: float | None = None,  # y of a dashed line
) -> str:
    width, height, margin = 640, 260, 46
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [y for y, _ in y_ticks]
    low, high = min(ys), max(ys)
    span_x, span_y = max(max(xs) - min(xs), 1e-9), max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            margin + (x - min(xs)) / span_x * (width - margin - 24),
            12 + (high - y) / span_y * (height - margin - 12),
        )

    def across(y: float, kind: str) -> str:
        _, py = place(xs[0], y)
        return f'<line x1="{margin}" x2="{width - 24}" y1="{py:.1f}" y2="{py:.1f}" class="{kind}"/>'

    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
    drawn = []
    for y, text in y_ticks:
        _, py = place(xs[0], y)
        drawn.append(
            f'{across(y, "grid")}<text x="{margin - 6}" y="{py + 4:.1f}" '
            f'text-anchor="end">{text}</text>'
        )
    for x, text in x_ticks:
        px, _ = place(x, low)
        drawn.append(
            f'<text x="{px:.1f}" y="{height - margin + 18}" text-anchor="middle">{text}</text>'
        )
    if level is not None:
        drawn.append(across(level, "level"))
    x_label, y_label = labels
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{y_label} by {x_label}">'
        f'{"".join(drawn)}<polyline points="{path}" class="line"/>'
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">{x_label}</text>'
        f'<text x="{width - 24}" y="24" text-anchor="end">{y_label}</text></svg>'
    )


def _colour(token_id: int) -> tuple[int, int, int]:
    hue = token_id * _GOLDEN_RATIO % 1
    value = 0.55 + 0.4 * (token_id * 0.381966 % 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.62, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def channels_last(pixels: Tensor) -> Pixels:
    """Return (3, H, W) as an array (H, W, 3)."""
    image: Pixels = pixels.permute(1, 2, 0).cpu().numpy()
    return image


def _scale(pixels: Pixels, size: int) -> Pixels:
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(image)
