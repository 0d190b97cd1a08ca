"""Masks hide as many patches as they should, and follow from the generator alone."""

import pytest
import torch

from trainer.draws import SampleGenerator
from trainer.masking import block_mask, random_masks

GRIDS = [(14, 14), (8, 8), (4, 4), (1, 7), (7, 1), (1, 1), (3, 11)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mask(grid, num_masked, numbers):
    drawn = SampleGenerator(numbers.initial_seed(), 0, count=1, device="cpu")
    return random_masks(grid, num_masked, drawn)[0]


@pytest.mark.parametrize("draw", [block_mask, random_mask])
@pytest.mark.parametrize("grid", GRIDS)
def test_masks_hide_exactly_as_many_patches_as_asked_for(draw, grid):
    for num_masked in {0, 1, grid[0] * grid[1] // 2, grid[0] * grid[1]}:
        mask = draw(grid, num_masked, generator(num_masked))
        assert mask.shape == grid
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == num_masked


@pytest.mark.parametrize("draw", [block_mask, random_mask])
def test_masks_follow_from_the_generator_alone(draw):
    first = draw((14, 14), 75, generator(3))
    assert torch.equal(first, draw((14, 14), 75, generator(3)))
    assert not torch.equal(first, draw((14, 14), 75, generator(4)))


def test_block_masks_hang_together_and_random_masks_do_not():
    def num_borders(mask):
        return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())

    blocks = sum(num_borders(block_mask((14, 14), 75, generator(i))) for i in range(50))
    singles = sum(num_borders(random_mask((14, 14), 75, generator(i))) for i in range(50))
    assert blocks < singles / 2


def test_block_masks_reach_every_cell_and_prefer_the_centre():
    share = (
        torch.stack([block_mask((14, 14), 75, generator(i)) for i in range(600)]).float().mean(0)
    )
    assert share.min() > 0
    assert share[6:8, 6:8].mean() > 2 * share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()


@pytest.mark.parametrize("num_masked", [-1, 17])
def test_a_count_that_the_grid_cannot_hold_is_refused(num_masked):
    with pytest.raises(ValueError, match=rf"cannot mask {num_masked} of 4 x 4"):
        block_mask((4, 4), num_masked, generator())
