"""DMJD: two masks that overlap as little as they can."""

import pytest
import torch

from cache_builder.errors import ConfigError
from tests.trainer.methods import VOCAB, drawn_batch, draws, make_objective, paint
from trainer.objectives.dmjd import Config, DisjointSampler, both
from trainer.objectives.hiding import encode


@pytest.fixture
def make(tiny_cache):
    def make(masked_tokens="keep", **settings):
        settings = {"mask_ratio": 0.6, **settings}
        return make_objective(tiny_cache, "dmjd", masked_tokens=masked_tokens, **settings).eval()

    return make


def sampler(grid=(14, 14), **settings):
    return DisjointSampler(grid, Config(**settings))


@pytest.mark.parametrize(
    ("kind", "ratio", "num_masked", "overlap"),
    [
        ("random", 0.6, 118, 40),
        ("random", 0.75, 147, 98),
        ("random", 0.4, 79, 0),
        ("block", 0.6, 120, 44),
    ],
)
def test_both_views_mask_as_many_patches_as_the_official_code(kind, ratio, num_masked, overlap):
    first, second = sampler(mask_kind=kind, mask_ratio=ratio).draw(draws(5))
    assert (first.hidden.sum(1) == num_masked).all()
    assert (second.hidden.sum(1) == num_masked).all()
    assert ((first.hidden & second.hidden).sum(1) == overlap).all()
    union = min(196, 2 * num_masked)
    assert ((first.hidden | second.hidden).sum(1) == union).all()
    assert second.masked_at.tolist() == [m.nonzero().flatten().tolist() for m in second.hidden]


def test_patches_are_masked_equally_often_and_those_masked_twice_too():
    first, second = sampler((4, 4), mask_ratio=0.6, mask_kind="random").draw(draws(4000))
    for masks, share in (
        (first.hidden, 10 / 16),
        (second.hidden, 10 / 16),
        (first.hidden & second.hidden, 4 / 16),
    ):
        assert (masks.float().mean(0) - share).abs().max() < 0.04


def test_block_masks_are_whole_squares():
    first, second = sampler((6, 4), mask_kind="block").draw(draws(8))
    for masks in (first, second):
        squares = masks.hidden.reshape(8, 3, 2, 2, 2).transpose(2, 3).flatten(3)
        assert torch.equal(squares.all(-1), squares.any(-1))


def test_a_share_that_is_a_whole_number_is_not_rounded_up():
    assert sampler((4, 5), mask_kind="random", mask_ratio=0.55).num_masked == 11


def test_a_grid_that_squares_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match=r"do not fill a grid of 7 x 7.*'random'"):
        sampler((7, 7), mask_kind="block")


@pytest.mark.parametrize(("kind", "ratio"), [("block", 0.8), ("random", 0.95)])
def test_a_ratio_that_masks_everything_is_refused(kind, ratio):
    with pytest.raises(ConfigError, match=r"masks 16 of the 16 patches .* Lower it"):
        sampler((4, 4), mask_kind=kind, mask_ratio=ratio)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_a_view_does_not_see_what_it_masks(make, masked_tokens):
    objective = make(masked_tokens)
    images, _ = drawn_batch(3)
    first, second = objective.masks.draw(draws(3))
    masks = both(first, second)
    before = objective.predict(images, masks)
    for view, hidden in ((slice(0, 3), first.hidden), (slice(3, 6), second.hidden)):
        after = objective.predict(paint(images, hidden, 0.9), masks)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[view], new[view])
            assert not torch.allclose(old, new)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_the_loss_is_the_mean_over_both_views_of_masked_and_weighted_visible_patches(
    make, masked_tokens
):
    objective = make(masked_tokens, visible_weight=0.5)
    images, targets = drawn_batch(2)
    result = objective(images, targets, draws(2))
    vit, hiding = objective.vit, objective.hiding
    masked, visible = [], []
    for masks in objective.masks.draw(draws(2)):
        patches = vit.patch_embed(objective.normalise(images))
        rows = hiding(vit, patches, masks)
        encoded = encode(vit, hiding.tokens(vit, patches, masks))[:, 1:]
        for b, hidden in enumerate(masks.hidden):
            seen = encoded[b] if masked_tokens == "drop" else encoded[b, ~hidden]
            for logits, patches_of, losses in (
                (objective.head(rows[b, hidden]), hidden, masked),
                (objective.visible_head(seen), ~hidden, visible),
            ):
                log_p = logits.log_softmax(-1)
                ids = targets.token_ids[b, patches_of]
                losses += [-log_p[i, id_] for i, id_ in enumerate(ids.tolist())]
    expected = torch.stack(masked).mean() + 0.5 * torch.stack(visible).mean()
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["cross_entropy"], torch.stack(masked).mean().detach())


def test_targets_of_patches_masked_in_any_view_count(make):
    objective = make(visible_weight=0)
    images, targets = drawn_batch(1)
    loss = objective(images, targets, draws(1))["loss"]
    for patch in range(16):  # together the views mask all of them
        token_ids = targets.token_ids.clone()
        token_ids[0, patch] = (token_ids[0, patch] + 1) % VOCAB
        changed = objective(images, targets._replace(token_ids=token_ids), draws(1))["loss"]
        assert not torch.equal(loss, changed)


def test_without_weight_there_is_no_visible_branch(make):
    objective = make(visible_weight=0)
    assert objective.visible_head is None
    assert "visible_cross_entropy" not in objective(*drawn_batch(2), draws(2))
