import pytest
import torch

from cache_builder.errors import ConfigError
from tests.trainer.methods import VOCAB, drawn_batch, draws, make_objective, paint


@pytest.fixture
def make(tiny_cache):
    def make(masked_tokens, **settings):
        return make_objective(
            tiny_cache, "beit", masked_tokens=masked_tokens, mask_kind="block", **settings
        )

    return make


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_masked_patch_shows_changes_no_logit(make, masked_tokens):
    objective = make(masked_tokens).eval()
    images, _ = drawn_batch(3)
    masks = objective.masks.draw(draws(3))
    logits = objective.predict(images, masks)
    again = objective.predict(paint(images, masks.hidden, 0.9), masks)
    assert torch.equal(logits, again)
    assert logits.shape == (3, 8, VOCAB)
    hidden = [mask.nonzero().flatten().tolist() for mask in masks.hidden]
    assert masks.masked_at.tolist() == hidden


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_visible_patch_shows_does(make, masked_tokens):
    objective = make(masked_tokens).eval()
    images, _ = drawn_batch(1)
    masks = objective.masks.draw(draws(1))
    logits = objective.predict(images, masks)
    again = objective.predict(paint(images, ~masks.hidden, 0.9), masks)
    assert not torch.allclose(logits, again)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_only_targets_of_masked_patches_count(make, masked_tokens):
    objective = make(masked_tokens).eval()
    images, targets = drawn_batch(2)
    ids, hidden = targets.token_ids, objective.masks.draw(draws(2)).hidden

    def loss(token_ids):
        return objective(images, targets._replace(token_ids=token_ids), draws(2))["loss"]

    assert torch.equal(loss(ids), loss(torch.where(hidden, ids, (ids + 1) % VOCAB)))
    assert not torch.equal(loss(ids), loss(torch.where(hidden, (ids + 1) % VOCAB, ids)))


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_the_loss_is_the_mean_cross_entropy_of_masked_patches(make, masked_tokens):
    objective = make(masked_tokens).eval()
    images, targets = drawn_batch(2)
    result = objective(images, targets, draws(2))
    masks = objective.masks.draw(draws(2))
    logits = objective.predict(images, masks)
    log_p = logits.log_softmax(-1)
    wanted = targets.token_ids
    picked = [
        (log_p[b, i, wanted[b, patch]], logits[b, i].argmax() == wanted[b, patch])
        for b in range(2)
        for i, patch in enumerate(masks.masked_at[b].tolist())
    ]
    expected = -torch.stack([p for p, _ in picked]).mean()
    assert torch.allclose(result["loss"], expected)
    assert float(result["accuracy"]) == pytest.approx(sum(bool(r) for _, r in picked) / len(picked))


def test_the_decoder_knows_where_a_masked_patch_is(make):
    objective = make("drop").eval()
    images, _ = drawn_batch(1)
    logits = objective.predict(torch.zeros_like(images), objective.masks.draw(draws(1)))
    assert len(torch.unique(logits[0].detach(), dim=0)) == objective.masks.num_masked


@pytest.mark.parametrize("mask_ratio", [0.01, 0.99])
def test_a_ratio_that_masks_nothing_or_everything_is_refused(make, mask_ratio):
    with pytest.raises(ConfigError, match=r"mask_ratio .* masks \d+ of the 16 patches"):
        make("keep", mask_ratio=mask_ratio)
