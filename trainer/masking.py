"""Which patches are masked: a pure function of the grid, a count and a random generator.

The count is exact, so that every sample of a batch has as many masked patches as the next and the
shapes of a step never change.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.draws import SampleGenerator

_NUM_TRIES = 10
# 16 of the 196 patches of BEiT's grid. As a share, it means the same on any grid.
_MIN_BLOCK_SHARE = 16 / 196
_LOG_ASPECT = math.log(0.3)
_NUM_DRAWN = 64


def block_mask(grid: tuple[int, int], num_masked: int, generator: torch.Generator) -> Tensor:
    """Draw a block-wise mask.

    Block-wise masking, BEiT (arXiv:2106.08254), Alg. 1, in the manner of BEiT v2's code: blocks of
    an area uniform between 16/196 of the grid and what is still missing, the aspect ratio
    log-uniform in [0.3, 1/0.3], lower than the grid is high and narrower than it is wide. A block
    counts if it adds at least one patch and not too many. When ten tries in a row do not,
    uniformly drawn single patches make up the count.

    The mask is one Python integer with a bit per patch while it grows: about 40 us per mask of a
    14 x 14 grid, on one core of a Xeon server.

    Args:
        grid: Rows and columns of patches.
        num_masked: How many patches to mask.
        generator: A CPU generator.

    Returns:
        bool (rows, cols), exactly `num_masked` of it True.

    Raises:
        ValueError: The grid is empty or has fewer than `num_masked` patches.
    """
    _check(grid, num_masked)
    uniform = _uniform(generator)
    masked = 0
    while (missing := num_masked - masked.bit_count()) > 0:
        block = _find_block(grid, masked, missing, uniform)
        if block == 0:
            break
        masked |= block
    masked |= _draw_single_patches(grid, masked, missing, uniform)
    return _to_tensor(masked, grid)


def random_masks(grid: tuple[int, int], num_masked: int, generator: SampleGenerator) -> Tensor:
    """Draw patches uniformly without replacement, as MAE (arXiv:2111.06377) does.

    Returns:
        bool (B, rows, cols) on the generator's device, exactly `num_masked` of every mask True.

    Raises:
        ValueError: The grid is empty or has fewer than `num_masked` patches.
    """
    _check(grid, num_masked)
    rows, cols = grid
    return (generator.permutations(rows * cols) < num_masked).reshape(-1, rows, cols)


def _check(grid: tuple[int, int], num_masked: int) -> None:
    rows, cols = grid
    if rows < 1 or cols < 1:
        raise ValueError(f"a grid has at least one patch, not {rows} x {cols}")
    if not 0 <= num_masked <= rows * cols:
        raise ValueError(f"cannot mask {num_masked} of {rows} x {cols} patches")


def _uniform(generator: torch.Generator) -> Iterator[float]:
    # One call per number would take most of the time of a mask.
    while True:
        yield from torch.rand(_NUM_DRAWN, generator=generator, dtype=torch.float64).tolist()


def _find_block(grid: tuple[int, int], masked: int, most_new: int, uniform: Iterator[float]) -> int:
    """Return a block that masks 1 to `most_new` more patches, or 0 after ten tries."""
    rows, cols = grid
    least_area = _MIN_BLOCK_SHARE * rows * cols
    for _ in range(_NUM_TRIES):
        area = least_area + (most_new - least_area) * next(uniform)
        aspect = math.exp(_LOG_ASPECT * (1 - 2 * next(uniform)))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        # A grid of one row or column has no room for a block that is lower or narrower.
        if not (0 < height < max(rows, 2) and 0 < width < max(cols, 2)):
            continue
        top = int(next(uniform) * (rows - height + 1))
        left = int(next(uniform) * (cols - width + 1))
        row = ((1 << width) - 1) << (top * cols + left)
        block = 0
        for i in range(height):
            block |= row << (i * cols)
        if 0 < (block & ~masked).bit_count() <= most_new:
            return block
    return 0


def _draw_single_patches(
    grid: tuple[int, int], masked: int, count: int, uniform: Iterator[float]
) -> int:
    free = [i for i in range(grid[0] * grid[1]) if not masked >> i & 1] if count else []
    patches = 0
    for _ in range(count):
        at = int(next(uniform) * len(free))
        patches |= 1 << free[at]
        free[at] = free[-1]
        free.pop()
    return patches


def _to_tensor(masked: int, grid: tuple[int, int]) -> Tensor:
    num_patches = grid[0] * grid[1]
    packed = np.frombuffer(masked.to_bytes(-(-num_patches // 8), "little"), np.uint8)
    bits = np.unpackbits(packed, count=num_patches, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_).reshape(grid))
