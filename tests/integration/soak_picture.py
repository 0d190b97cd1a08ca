"""A soak as a picture: memory by name over time, and below it how much was done."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.integration.soak_memory import Memory

_SIZE = (1200, 760)
_LEFT, _RIGHT, _TOP, _GAP, _BOTTOM = 90, 260, 50, 60, 50
_COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f",
    "#e377c2", "#bcbd22",
)  # fmt: skip
_GRID = "#dddddd"
_NUM_LINES = 4

Series = dict[str, Sequence[tuple[float, float]]]


def draw(memory: Memory, path: Path, *, title: str) -> None:
    """Draw both charts into a PNG."""
    picture = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    pen.text((_LEFT, 12), f"Build, serve and train at once: {title}", "black", font)
    sizes: Series = {
        name: [(when, size / 1e6) for when, size in samples]
        for name, samples in memory.totals().items()
    }
    names = sorted({name for _, done in memory.done for name in done})
    ends = {name: max((done.get(name, 0) for _, done in memory.done), default=0) for name in names}
    work: Series = {
        f"{name}: {ends[name]:,}": [
            (when, 100 * done.get(name, 0) / max(1, ends[name])) for when, done in memory.done
        ]
        for name in names
    }
    height = (_SIZE[1] - _TOP - _GAP - _BOTTOM) // 2
    _chart(pen, font, (_TOP, _TOP + height), "MB", sizes)
    _chart(pen, font, (_TOP + height + _GAP, _TOP + 2 * height + _GAP), "% done", work)
    picture.save(path)


def _chart(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    rows: tuple[int, int],
    unit: str,
    series: Series,
) -> None:
    top, bottom = rows
    left, right = _LEFT, _SIZE[0] - _RIGHT
    points = [point for line in series.values() for point in line] or [(1.0, 1.0)]
    end = max(when for when, _ in points) or 1.0
    most = max(value for _, value in points) or 1.0
    for number in range(_NUM_LINES + 1):
        share = number / _NUM_LINES
        y, x = bottom - share * (bottom - top), left + share * (right - left)
        pen.line([(left, y), (right, y)], _GRID)
        pen.text((10, y - 8), f"{share * most:,.0f} {unit}", "black", font)
        pen.text((x - 10, bottom + 6), f"{share * end / 60:.1f} min", "black", font)
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [
            (left + when / end * (right - left), bottom - value / most * (bottom - top))
            for when, value in line
        ]
        if len(places) > 1:
            pen.line(places, colour, 2)
        pen.text((right + 12, top + 20 * number), name, colour, font)
