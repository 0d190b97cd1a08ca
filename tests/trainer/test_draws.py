"""Random numbers belong to a sample, however its batch is cut."""

import pytest
import torch

from trainer.draws import SampleGenerator


def generator(count=64, seed=0, step=0, first=0):
    return SampleGenerator(seed, step, first=first, count=count, device="cpu")


def test_a_sample_draws_the_same_numbers_however_the_batch_is_cut():
    whole, left, right = generator(6), generator(2), generator(4, first=2)
    for draw in (
        lambda g: g.uniform(3, 2, low=-1, high=2),
        lambda g: g.permutations(7),
        lambda g: g.normal(5),
        lambda g: g.integers(2, 9, 4),
        lambda g: torch.tensor([other.initial_seed() for other in g.generators()]),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(left), draw(right)]))
    assert whole.shared.initial_seed() == right.shared.initial_seed()


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"first": 64}])
def test_another_seed_step_or_sample_draws_other_numbers(change):
    assert not (generator().uniform(4) == generator(**change).uniform(4)).any()


def test_numbers_of_one_sample_do_not_repeat():
    numbers = generator(1)
    drawn = torch.cat([numbers.uniform(1000), numbers.uniform(1000)], dim=1)
    assert len(drawn.unique()) > 1990


def test_uniform_numbers_fill_their_range_evenly():
    drawn = generator(1000).uniform(200, low=2, high=4)
    assert 2 <= drawn.min() < 2.001
    assert 3.999 < drawn.max() < 4
    shares = torch.histc(drawn, bins=10) / drawn.numel()
    assert (shares - 0.1).abs().max() < 0.005


def test_normal_numbers_have_mean_and_standard_deviation():
    drawn = generator(1000).normal(200, mean=3, std=0.5)
    assert float(drawn.mean()) == pytest.approx(3, abs=0.01)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.01)
    assert bool(torch.isfinite(drawn).all())


def test_the_smallest_and_the_largest_draw_make_finite_normal_numbers(monkeypatch):
    numbers = generator(2)
    ends = torch.tensor([[0.0], [1 - 2.0**-24]])
    monkeypatch.setattr(numbers, "uniform", lambda *shape: ends.clone())
    low, high = numbers.normal(1).flatten().tolist()
    assert -6 < low < -5
    assert 5 < high < 6


def test_integers_stay_below_the_end_and_reach_both_ends():
    assert set(generator(200).integers(3, 6, 5).flatten().tolist()) == {3, 4, 5}


def test_permutations_put_every_place_anywhere():
    drawn = generator(2000).permutations(5)
    assert torch.equal(drawn.sort(1).values, torch.arange(5).expand(2000, -1))
    shares = torch.stack([(drawn == i).float().mean(0) for i in range(5)])
    assert (shares - 0.2).abs().max() < 0.04
