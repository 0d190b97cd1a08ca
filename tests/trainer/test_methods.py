"""What holds for every method."""

import pytest
import torch

from tests.trainer.methods import (
    GRID,
    NUM_PATCHES,
    SETTINGS,
    VOCAB,
    draws,
    make_objective,
    read_batch,
)


@pytest.fixture(params=SETTINGS, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def objective(tiny_cache, request):
    method, settings = request.param
    return make_objective(tiny_cache, method, **settings)


def test_every_parameter_gets_a_gradient(objective, tiny_cache):
    objective(*read_batch(tiny_cache, objective), draws())["loss"].backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None]
    assert without == []


def test_metrics_are_numbers_without_a_gradient(objective, tiny_cache):
    result = objective(*read_batch(tiny_cache, objective), draws())
    assert all(value.ndim == 0 and bool(torch.isfinite(value)) for value in result.values())
    assert [name for name, value in result.items() if value.requires_grad] == ["loss"]


def test_a_batch_in_two_parts_has_the_loss_of_the_whole(objective, tiny_cache):
    images, targets = read_batch(tiny_cache, objective)

    def loss(first, last):
        part = (None if field is None else field[first:last] for field in targets)
        generator = draws(last - first, first=first)
        return objective(images[first:last], type(targets)(*part), generator)["loss"]

    torch.testing.assert_close((loss(0, 2) + loss(2, 4)) / 2, loss(0, 4))


def test_a_step_draws_the_same_again_and_another_step_does_not(objective, tiny_cache):
    images, targets = read_batch(tiny_cache, objective)
    first, again, other = (
        objective(images, targets, draws(step=step))["loss"] for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_preview_shows_pictures_masks_and_token_ids(objective, tiny_cache):
    images, targets = read_batch(tiny_cache, objective)
    with torch.no_grad():
        preview = objective.eval().preview(images, targets, draws())
    assert preview.shown.shape[:2] == (4, 3)
    assert 0 <= preview.shown.min() <= preview.shown.max() <= 1
    assert preview.hidden.shape == preview.predicted.shape == (4, NUM_PATCHES)
    assert GRID[0] * GRID[1] == NUM_PATCHES
    ids = preview.token_ids[preview.predicted]
    # Methods that predict pixels alone have no ids to show.
    if len(ids) or "cross_entropy" in objective(images, targets, draws()):
        assert 0 <= ids.min() <= ids.max() < VOCAB
