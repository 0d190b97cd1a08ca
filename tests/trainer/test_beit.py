"""BEiT: masked patches are predicted from the visible ones, and nothing else counts."""

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


AGGREGATION = {"aggregation_blocks": 2, "aggregation_layer": 1}


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_the_second_prediction_does_not_see_what_is_masked(make, masked_tokens):
    objective = make(masked_tokens, **AGGREGATION).eval()
    images, _ = drawn_batch(2)
    masks = objective.masks.draw(draws(2))
    _, before = objective.predictions(images, masks)
    _, same = objective.predictions(paint(images, masks.hidden, 0.9), masks)
    _, other = objective.predictions(paint(images, ~masks.hidden, 0.9), masks)
    assert before.shape == (2, 8, VOCAB)
    assert torch.equal(before, same)
    assert not torch.allclose(before, other)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_the_second_prediction_is_made_of_the_last_class_token_and_early_patches(
    make, masked_tokens
):
    objective = make(masked_tokens, model={"depth": 3}, **AGGREGATION).eval()
    images, _ = drawn_batch(2)
    masks = objective.masks.draw(draws(2))
    vit, hiding = objective.vit, objective.hiding
    patches = vit.patch_embed(objective.normalise(images))
    if masked_tokens == "keep":
        for sample, at in enumerate(masks.masked_at):
            patches[sample, at] = hiding.mask_token[0, 0]
    tokens = vit._pos_embed(patches)
    if masked_tokens == "drop":
        rows = [torch.cat([each[:1], each[1:][~hidden]])
                for each, hidden in zip(tokens, masks.hidden, strict=True)]  # fmt: skip
        tokens = torch.stack(rows)
    early = vit.blocks[0](tokens)
    last = vit.blocks[2](vit.blocks[1](early))
    mixed = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in objective.aggregation.blocks:
        mixed = block(mixed)
    every = vit.norm(mixed)
    every = (
        every[:, 1:] if masked_tokens == "keep" else hiding.decoder(every, hiding.mask_token, masks)
    )
    expected = torch.stack(
        [objective.head(rows[hidden]) for rows, hidden in zip(every, masks.hidden, strict=True)]
    )
    torch.testing.assert_close(objective.predictions(images, masks)[1], expected)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_the_losses_of_both_predictions_are_added(make, masked_tokens):
    objective = make(masked_tokens, **AGGREGATION).eval()
    images, targets = drawn_batch(2)
    result = objective(images, targets, draws(2))
    masks = objective.masks.draw(draws(2))
    wanted = targets.token_ids.gather(1, masks.masked_at)
    losses = [
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        for logits in objective.predictions(images, masks)
    ]
    torch.testing.assert_close(result["loss"], losses[0] + losses[1])
    torch.testing.assert_close(result["cross_entropy"], losses[0].detach())
    torch.testing.assert_close(result["aggregation_cross_entropy"], losses[1].detach())


def test_the_extra_blocks_begin_as_in_the_code_of_beit_v2(make):
    objective = make("keep", model={"depth": 3, "layer_scale": 0.1}, **AGGREGATION)
    for number, block in enumerate(objective.aggregation.blocks, start=2):
        default = (3 * 32) ** -0.5  # of torch's linear layers with 32 inputs
        assert float(block.attn.qkv.weight.detach().std()) == pytest.approx(default, rel=0.1)
        scaled = default / (2 * number) ** 0.5
        assert float(block.attn.proj.weight.detach().std()) == pytest.approx(scaled, rel=0.1)
        assert (block.ls1.gamma == 0.1).all()
    assert not torch.equal(block.attn.qkv.weight, objective.vit.blocks[2].attn.qkv.weight)


def test_aggregation_needs_a_class_token(make):
    with pytest.raises(ConfigError, match=r"needs a class token, and this ViT has none"):
        make("keep", model={"name": "vit_base_patch16_siglip_gap_224"}, **AGGREGATION)


def test_aggregation_needs_a_block_before_the_last(make):
    with pytest.raises(ConfigError, match=r"layer 2 is not an early block .* Set it to 1 \.\. 1"):
        make("keep", aggregation_blocks=2, aggregation_layer=2)


@pytest.mark.parametrize("key", sorted(AGGREGATION))
def test_aggregation_blocks_and_layer_go_together(make, key):
    with pytest.raises(ConfigError, match=r"go together; set both"):
        make("keep", **{key: 1})
