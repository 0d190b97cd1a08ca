"""Five ways to spoil a picture that leave its token ids valid: the tasks of Beyond Masking.

Beyond Masking (arXiv:2203.14313) has a network restore what was zoomed, distorted, blurred or
decolorised, in the manner of its code; every number here is drawn per sample, where that code draws
one place and one set of colour weights per batch. All work on normalised pictures, as there.

Grids: N cells of the clean picture have token ids, and N patches of side p make up what the encoder
is given. They are the same squares except when a picture is zoomed; `Degraded.seen_at` says which
patch shows a cell.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample

from trainer.draws import SampleGenerator

Degradation = Literal["zoomed_in", "zoomed_out", "distorted", "blurred", "decolorised"]

ZOOM_IN = 9 / 7  # 288 over 224 pixels
_CONTENT_SHARE = 5 / 7  # 160 of 224 pixels
_LEAST_MAGNITUDE, _MOST_MAGNITUDE = 0.15, 0.25
_KERNEL = 7
_KERNEL_STD = 0.02
_MOST_COLOUR_WEIGHT = 0.667


class Degraded(NamedTuple):
    """What an encoder is given of clean pictures."""

    images: Tensor  # (B, 3, S, S)
    seen_at: Tensor  # (B, N) int64, the patch that shows the centre of a cell; -1: none does
    offset: Tensor  # (B, 2) int64, row and column of the clean picture's corner in `images`


class Degrader:
    """Degrades pictures for an encoder.

    Attributes:
        kind: What is done to them.
        clean_size: Side of the pictures that it takes, pixels.
        size: S, side of those that it returns.
    """

    def __init__(self, kind: Degradation, size: int, num_cells: int, zoom: float = ZOOM_IN) -> None:
        """Say what to do.

        Args:
            kind: What is done to the pictures.
            size: S, side of the encoder's input, pixels.
            num_cells: Rows, and columns, of the grid.
            zoom: Side of the whole picture over the part that is shown, of `zoomed_in`.
        """
        self.kind = kind
        self.size = size
        self.clean_size = size
        if kind == "zoomed_in":
            # As much on either side, so that the part in the middle is cut without resizing.
            self.clean_size = size + 2 * round(size * (zoom - 1) / 2)
        elif kind == "zoomed_out":
            self.clean_size = round(size * _CONTENT_SHARE)
        self._num_cells = num_cells

    def __call__(self, images: Tensor, generator: SampleGenerator) -> Degraded:
        """Take (B, 3, clean size, clean size)."""
        batch = len(images)
        offset = torch.zeros(batch, 2, dtype=torch.int64, device=images.device)
        match self.kind:
            case "zoomed_in":
                offset = offset - (self.clean_size - self.size) // 2
                images = centre(images, self.size)
            case "zoomed_out":
                offset = generator.integers(0, self.size - self.clean_size, 2)
                images = tile(images, self.size, offset)
            case "distorted":
                images = distort(images, generator)
            case "blurred":
                images = blur(images, generator)
            case "decolorised":
                images = decolorise(images, generator)
        return Degraded(images, self.seen_at(offset), offset)

    def seen_at(self, offset: Tensor) -> Tensor:
        """Return which patch shows a cell whose picture lies at `offset`, (B, N); -1 for none.

        Distorting moves what a cell shows, some of it far; the cell counts as seen in its own
        square.
        """
        count = self._num_cells
        centres = (torch.arange(count, device=offset.device) + 0.5) * (self.clean_size / count)
        patch = self.size / count
        at = torch.floor((centres + offset[..., None]) / patch).long()  # (B, 2, cells)
        is_shown = (at >= 0) & (at < count)
        rows, cols = at[:, 0, :, None], at[:, 1, None, :]
        both = is_shown[:, 0, :, None] & is_shown[:, 1, None, :]
        return torch.where(both, rows * count + cols, -1).flatten(1)


def centre(images: Tensor, size: int) -> Tensor:
    """Return the middle of pictures, (B, C, size, size)."""
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]


def tile(images: Tensor, size: int, offset: Tensor) -> Tensor:
    """Lay pictures on canvases and fill these up with their mirror images.

    Args:
        images: (B, C, H, H).
        size: Side of the canvas.
        offset: (B, 2) int64, row and column of each picture's corner on the canvas.

    Returns:
        (B, C, size, size).
    """
    side = images.shape[-1]
    at = torch.arange(size, device=images.device) - offset[..., None]  # (B, 2, size)
    at = at.remainder(2 * side)
    at = torch.where(at < side, at, 2 * side - 1 - at)
    channels = images.shape[1]
    rows = at[:, 0, None, :, None].expand(-1, channels, -1, side)
    cols = at[:, 1, None, None, :].expand(-1, channels, size, -1)
    return images.gather(2, rows).gather(3, cols)


def distort(images: Tensor, generator: SampleGenerator) -> Tensor:
    """Pull every pixel towards a point, the more the further away it is.

    A pixel at p, in [-1, 1]^2, is read at p + (c - p) |c - p| m, with c uniform in [-1, 1]^2 and m
    in [0.15, 0.25], bilinearly. That stays inside of the picture.
    """
    steps = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)  # (S, S, 2), x before y
    to_point = generator.uniform(1, 1, 2, low=-1, high=1) - grid
    magnitude = generator.uniform(1, 1, 1, low=_LEAST_MAGNITUDE, high=_MOST_MAGNITUDE)
    grid = grid + to_point * to_point.norm(dim=-1, keepdim=True) * magnitude
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def blur(images: Tensor, generator: SampleGenerator) -> Tensor:
    """Convolve every picture with a kernel of its own, 7 x 7 weights of N(1/49, 0.02^2).

    The same kernel for the three channels, zeros around the picture. That is what the paper
    describes; its code makes a picture of seven channels of it and does not run.
    """
    kernels = generator.normal(1, _KERNEL, _KERNEL, mean=1 / _KERNEL**2, std=_KERNEL_STD)
    # Samples as the channels of one depthwise convolution, colours as its batch.
    turned = images.transpose(0, 1)
    blurred = conv2d(turned, kernels, padding=_KERNEL // 2, groups=len(images))
    return blurred.transpose(0, 1)


def decolorise(images: Tensor, generator: SampleGenerator) -> Tensor:
    """Weigh the channels into one, each by a weight uniform in [0, 0.667], and repeat it thrice.

    The code of the paper gives its encoder one channel; three keep the ViT a plain one.
    """
    weights = generator.uniform(3, 1, 1, high=_MOST_COLOUR_WEIGHT)
    return (images * weights).sum(1, keepdim=True).expand_as(images)
