"""A picture of what a run does now: what it sees, what it shall predict, and what it predicts.

One row per sample: the input, what the encoder was given of it, the map of its target token ids and
that of the predicted ones. Ids of a pixel codebook are drawn as their centroids, patches of pixels.
Centroids of features have no look: they get a colour by their first three principal components, so
that near centroids have near colours. Ids without centroids get a colour each. Where a sample has
several ids per patch, the first is drawn.
"""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from cache_builder import files
from cache_builder.formats import Codebook
from cache_builder.imaging import unpatchify
from trainer.objectives.interface import Preview

Pixels = NDArray[np.uint8]  # (H, W, 3)

FOLDER: Final = "pictures"
NUM_SAMPLES: Final = 8

_COLUMNS: Final = ("input", "given to the encoder", "target tokens", "predicted tokens")
_SMALLEST_TILE = 168  # pixels; titles need as much
_GAP, _BAR, _LINE = 8, 30, 20
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 110)
_HATCH, _HATCH_PERIOD = (0.62, 0.72), 10  # shades of the stripes on what is hidden; pixels
_FADED = 0.25  # share that is left of tokens that were not predicted
_POWER_STEPS = 30
_TAIL = 0.01  # share of centroids that may be cut off at either end of the scale of colours


class TokenColours:
    """Draws token ids as pictures.

    Attributes:
        tiles: (K, 3, p, p) float32 in [0, 1], what stands for each id.
    """

    def __init__(self, codebook: Codebook, grid: tuple[int, int]) -> None:
        """Take the codebook of a cache, and its grid."""
        centroids = codebook.centroids[0]
        self._grid = grid
        if codebook.has_pixel_centroids:
            p = codebook.pixel_rule.patch_size
            self.tiles = torch.from_numpy(centroids.astype(np.float32) / 255).view(-1, 3, p, p)
        elif not codebook.has_centroids:
            self.tiles = torch.from_numpy(_colours_by_chance(len(centroids)))[:, :, None, None]
        else:
            self.tiles = torch.from_numpy(component_colours(centroids))[:, :, None, None]

    def draw(self, token_ids: Tensor) -> Tensor:
        """Return (B, N) or (B, N, M) ids as pictures, (B, 3, rows * p, cols * p) in [0, 1]."""
        first = token_ids if token_ids.ndim == 2 else token_ids[..., 0]
        return unpatchify(self.tiles[first].flatten(2), self._grid, self.tiles.shape[-1])


def _colours_by_chance(vocab_size: int) -> NDArray[np.float32]:
    """Return a colour per id, (K, 3) in [0, 1], the same ones every time."""
    return np.random.default_rng(0).random((vocab_size, 3), np.float32)


def component_colours(centroids: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return a colour per centroid: (K, D) to (K, 3) in [0, 1].

    The channels are the first three principal components, each stretched over its range without
    the outermost centroids. The components come from orthogonal iteration with a fixed start, so
    that the same codebook has the same colours every time.
    """
    points = centroids.astype(np.float32)
    points = points - points.mean(0)
    axes = np.random.default_rng(0).normal(size=(points.shape[1], 3)).astype(np.float32)
    for _ in range(_POWER_STEPS):
        axes, _ = np.linalg.qr(points.T @ (points @ axes))
    found = points @ axes
    low, high = np.quantile(found, [_TAIL, 1 - _TAIL], axis=0)
    # Fewer than three dimensions, or centroids that are all alike, leave a channel in the middle.
    span = np.where(high - low > 1e-6 * np.abs(points).max(initial=1e-6), high - low, np.inf)
    stretched = np.where(np.isinf(span), 0.5, (found - low) / span)
    colours: NDArray[np.float32] = (0.1 + 0.8 * stretched.clip(0, 1)).astype(np.float32)
    return colours if colours.shape[1] == 3 else np.repeat(colours[:, :1], 3, 1)


def draw_preview(
    images: Tensor,  # (B, 3, S, S) in [0, 1]
    token_ids: Tensor,  # (B, N), or (B, N, M) in stages
    preview: Preview,
    colours: TokenColours,
    grid: tuple[int, int],
    title: str,
) -> Pixels:
    """Return the picture of some samples, one row each, under a title."""
    images, token_ids = images.float().cpu(), token_ids.cpu()
    preview = Preview(*(part.cpu() for part in preview))
    first = token_ids if token_ids.ndim == 2 else token_ids[..., 0]
    size = images.shape[-1] * -(-_SMALLEST_TILE // images.shape[-1])

    hidden = _to_grid(preview.hidden, grid)
    shown = _enlarge(preview.shown.float(), size)
    # A plain grey would be taken for a part of a grey picture.
    shown = torch.where(_enlarge(hidden, size) > 0.5, _stripes(size), shown)
    is_predicted = preview.predicted
    ids = torch.where(is_predicted, preview.token_ids, first)
    guessed = _enlarge(colours.draw(ids), size)
    faded = _FADED * guessed + (1 - _FADED) * 0.9
    guessed = torch.where(_enlarge(_to_grid(is_predicted, grid), size) > 0.5, guessed, faded)
    columns = (_enlarge(images, size), shown, _enlarge(colours.draw(first), size), guessed)
    hits = ((preview.token_ids == first) & is_predicted).sum(1).tolist()
    notes: list[tuple[str, ...]] = [
        (
            "",
            f"{hid} of {first.shape[1]} patches hidden",
            "",
            f"{right} of {asked} right",
        )
        for hid, right, asked in zip(
            preview.hidden.sum(1).tolist(), hits, is_predicted.sum(1).tolist(), strict=True
        )
    ]
    return _sheet(columns, notes, size, title)


def write_png(out_dir: Path, step: int, pixels: Pixels) -> Path:
    """Write a picture to `OUT/pictures/step_NNNNNNNN.png`."""
    path = out_dir / FOLDER / f"step_{step:08d}.png"
    with files.publishing(path) as file:
        Image.fromarray(pixels).save(file, "PNG")
    return path


def _sheet(
    columns: tuple[Tensor, ...], notes: list[tuple[str, ...]], size: int, title: str
) -> Pixels:
    num_rows, row_height = len(notes), size + _LINE + _GAP
    width = _GAP + len(columns) * (size + _GAP)
    image = Image.new("RGB", (width, 2 * _BAR + num_rows * row_height), _PAPER)
    draw = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    draw.text((_GAP, 7), title, _INK, large)
    for column, (name, pictures) in enumerate(zip(_COLUMNS, columns, strict=True)):
        left = _GAP + column * (size + _GAP)
        draw.text((left, _BAR + 8), name, _INK, small)
        for row, picture in enumerate(pictures):
            top = 2 * _BAR + row * row_height
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            image.paste(Image.fromarray(pixels), (left, top))
            draw.text((left, top + size + 3), notes[row][column], _FAINT, small)
    return np.asarray(image)


def _stripes(size: int) -> Tensor:
    """Return diagonal stripes, (size, size)."""
    diagonal = torch.arange(size)[:, None] + torch.arange(size)
    return torch.tensor(_HATCH)[diagonal // (_HATCH_PERIOD // 2) % 2]


def _to_grid(flags: Tensor, grid: tuple[int, int]) -> Tensor:
    return flags.float().view(len(flags), 1, *grid)


def _enlarge(pictures: Tensor, size: int) -> Tensor:
    return interpolate(pictures, (size, size), mode="nearest")
