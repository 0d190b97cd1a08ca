import pytest
import timm
import torch

from cache_builder.errors import ConfigError
from trainer.objectives.beit import MaskedTokens

GRID, VOCAB = (4, 4), 11


def make(masked_tokens, mask_ratio=0.5, **settings):
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0, embed_dim=32, depth=2,
        num_heads=2,
    )  # fmt: skip
    return MaskedTokens(
        vit, GRID, vocab_size=VOCAB, mask_ratio=mask_ratio, mask_kind="block",
        masked_tokens=masked_tokens, **settings,
    )  # fmt: skip


def masks_of(objective, batch_size, seed=0):
    return objective.draw_masks(batch_size, torch.Generator().manual_seed(seed))


def paint(images, masks, colour):
    """Give every masked patch (4 x 4 pixels) a colour."""
    painted = images.clone()
    for image, mask in zip(painted, masks, strict=True):
        for patch in mask.nonzero().flatten().tolist():
            row, col = divmod(patch, GRID[1])
            image[:, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = colour
    return painted


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_masked_patch_shows_changes_no_logit(masked_tokens):
    objective = make(masked_tokens).eval()
    images = torch.randn(3, 3, 16, 16)
    masks = masks_of(objective, 3)
    logits, masked_at = objective.predict(images, masks)
    again, _ = objective.predict(paint(images, masks, 7.0), masks)
    assert torch.equal(logits, again)
    assert logits.shape == (3, 8, VOCAB)
    assert [row.tolist() for row in masked_at] == [m.nonzero().flatten().tolist() for m in masks]


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_visible_patch_shows_does(masked_tokens):
    objective = make(masked_tokens).eval()
    images = torch.randn(1, 3, 16, 16)
    masks = masks_of(objective, 1)
    logits, _ = objective.predict(images, masks)
    again, _ = objective.predict(paint(images, ~masks, 7.0), masks)
    assert not torch.allclose(logits, again)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_only_targets_of_masked_patches_count(masked_tokens):
    objective = make(masked_tokens).eval()
    images = torch.randn(2, 3, 16, 16)
    token_ids = torch.randint(0, VOCAB, (2, 16))
    masks = masks_of(objective, 2, seed=4)

    def loss(ids):
        return objective(images, ids, torch.Generator().manual_seed(4))["loss"]

    others = torch.where(masks, token_ids, (token_ids + 1) % VOCAB)
    hidden = torch.where(masks, (token_ids + 1) % VOCAB, token_ids)
    assert torch.equal(loss(token_ids), loss(others))
    assert not torch.equal(loss(token_ids), loss(hidden))


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_the_loss_is_the_mean_cross_entropy_of_masked_patches(masked_tokens):
    objective = make(masked_tokens).eval()
    images = torch.randn(2, 3, 16, 16)
    token_ids = torch.randint(0, VOCAB, (2, 16))
    result = objective(images, token_ids, torch.Generator().manual_seed(9))
    masks = masks_of(objective, 2, seed=9)
    logits, masked_at = objective.predict(images, masks)
    log_p = logits.log_softmax(-1)
    picked = [
        (log_p[b, i, token_ids[b, patch]], logits[b, i].argmax() == token_ids[b, patch])
        for b in range(2)
        for i, patch in enumerate(masked_at[b].tolist())
    ]
    expected = -torch.stack([p for p, _ in picked]).mean()
    assert torch.allclose(result["loss"], expected)
    assert float(result["accuracy"]) == pytest.approx(sum(bool(r) for _, r in picked) / len(picked))


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_every_parameter_gets_a_gradient(masked_tokens):
    objective = make(masked_tokens)
    token_ids = torch.randint(0, VOCAB, (2, 16))
    objective(torch.randn(2, 3, 16, 16), token_ids, torch.Generator())["loss"].backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None]
    assert without == []


def test_the_decoder_knows_where_a_masked_patch_is():
    objective = make("drop").eval()
    logits, _ = objective.predict(torch.zeros(1, 3, 16, 16), masks_of(objective, 1))
    assert len(torch.unique(logits[0].detach(), dim=0)) == objective.num_masked


@pytest.mark.parametrize("mask_ratio", [0.01, 0.99])
def test_a_ratio_that_masks_nothing_or_everything_is_refused(mask_ratio):
    with pytest.raises(ConfigError, match=r"mask_ratio .* masks \d+ of the 16 patches"):
        make("keep", mask_ratio=mask_ratio)
