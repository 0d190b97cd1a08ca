"""MaPeT: who sees whom follows from the ranks, as in the official code."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from cache_builder.errors import ConfigError
from tests.trainer.methods import NUM_PATCHES, VOCAB, drawn_batch, draws, make_objective, paint
from trainer.objectives import mapet

VECTORS = Path(__file__).parents[1] / "vectors"
OPTIONS = [{}, {"predict_ratio": 0.3}, {"masked_tokens": "drop"}, {"model": {"layer_scale": 0.5}}]


@pytest.fixture
def make(tiny_cache):
    def make(**settings):
        settings = {"mask_ratio": 0.75, "mask_kind": "random"} | settings
        objective = make_objective(tiny_cache, "mapet", **settings).eval()
        # As far from its initialisation as a trained one: there, attention is almost uniform.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return objective

    return make


def ranks_of(objective, order):
    """Return the rank of every position, (B, N), from an order of prediction."""
    num_prefix = objective.vit.num_prefix_tokens
    visited = torch.cat([order.visible_at, order.masked_at], dim=1)
    ranks = torch.zeros(len(visited), num_prefix + NUM_PATCHES, dtype=torch.int64)
    ranks[:, :num_prefix] = torch.arange(num_prefix)
    later = torch.arange(NUM_PATCHES).expand_as(visited) + num_prefix
    return ranks.scatter(1, visited + num_prefix, later)


def two_streams(objective, images, ranks, least):
    """The definition: two streams, masks of every picture, logits (B, P, K) in raster order."""
    vit = objective.vit
    patches = vit.patch_embed(objective.normalise(images))
    content, places = vit._pos_embed(patches), vit._pos_embed(torch.zeros_like(patches))
    at = [(row >= least).nonzero().flatten() for row in ranks]
    predicted = torch.stack([place[each] for place, each in zip(places, at, strict=True)])
    query = objective.positional_token + predicted
    keys = torch.cat([content, query], dim=1)
    query_mask, content_mask = mapet.visibility(ranks, least)
    for block in vit.blocks:

        def step(rows, mask, block=block, keys=keys):
            def heads(x, part):
                weight, bias = (p.chunk(3)[part] for p in (block.attn.qkv.weight,
                                                           block.attn.qkv.bias))  # fmt: skip
                x = block.norm1(x) @ weight.T + bias
                return x.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)

            scores = heads(rows, 0) @ heads(keys, 1).mT / block.attn.head_dim**0.5
            weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
            attended = (weights @ heads(keys, 2)).transpose(1, 2).flatten(2)
            rows = rows + block.ls1(block.attn.proj(attended))
            return rows + block.ls2(block.mlp(block.norm2(rows)))

        query, keys = step(query, query_mask), step(keys, content_mask)
    return objective.head(vit.norm(query)), torch.stack(at) - vit.num_prefix_tokens


def test_masks_are_those_of_the_official_code():
    recorded = np.load(VECTORS / "mapet_masks.npz")
    for case in range(int(recorded["n_cases"])):
        order = torch.from_numpy(recorded[f"perm_{case}"].astype(np.int64)) - 1
        ranks = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        least = int(recorded[f"least_{case}"])
        np.testing.assert_array_equal(ranks >= least, recorded[f"pred_{case}"])
        for ours, name in zip(mapet.visibility(ranks[None], least), "qc", strict=True):
            num_rows, num_columns = recorded[f"{name}shape_{case}"]
            theirs = np.unpackbits(recorded[f"{name}_{case}"], axis=1, count=num_columns)
            assert ours.dtype == torch.bool
            assert ours.shape == (1, num_rows, num_columns)
            np.testing.assert_array_equal(ours[0], theirs.astype(bool))


def test_masks_of_a_batch_are_those_of_its_pictures():
    ranks = torch.cat([torch.zeros(5, 1, dtype=torch.int64), draws(5).permutations(9) + 1], dim=1)
    together = mapet.visibility(ranks, 4)
    alone = [mapet.visibility(row[None], 4) for row in ranks]
    for batch, singles in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(batch, torch.cat(singles))


def test_every_row_sees_every_position_once_as_content_or_as_position():
    ranks = torch.cat([torch.zeros(3, 1, dtype=torch.int64), draws(3).permutations(9) + 1], dim=1)
    for mask in mapet.visibility(ranks, 4):
        seen = mask[:, :, :10].int()
        for b, row in enumerate(ranks):
            seen[b, :, row >= 4] += mask[b, :, 10:].int()
        assert (seen == 1).all()


@pytest.mark.parametrize(
    ("ranks", "least", "message"),
    [
        (torch.arange(4), 1, r"ranks must be \(B, N\), not \(4,\)"),
        (torch.arange(4)[None], 0, r"least must lie in 1 \.\. 4, not 0"),
        (torch.arange(4)[None], 5, r"least must lie in 1 \.\. 4, not 5"),
    ],
)
def test_ranks_and_contexts_that_make_no_sense_are_refused(ranks, least, message):
    with pytest.raises(ValueError, match=message):
        mapet.visibility(ranks, least)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "model",
    [{}, {"layer_scale": 0.5}, {"name": "vit_small_patch14_reg4_dinov2"}, {"depth": 4}],
    ids=["plain", "layer scale", "registers", "depth 4"],
)
def test_sorted_tokens_and_one_mask_give_the_logits_of_two_streams(make, model, fused):
    objective = make(model=model)
    for block in objective.vit.blocks:
        block.attn.fused_attn = fused
    images, _ = drawn_batch(3)
    order = objective.draw_order(draws(3))
    ours = objective.predict(images, order).detach()
    least = objective.vit.num_prefix_tokens + NUM_PATCHES - 12
    theirs, at = two_streams(objective, images, ranks_of(objective, order), least)
    by_raster = order.masked_at.argsort(1)
    assert torch.equal(order.masked_at.gather(1, by_raster), at)
    assert ours.std() > 0.1
    near = {"rtol": 1e-4, "atol": 1e-5 * float(ours.abs().max())}
    torch.testing.assert_close(mapet.take(ours, by_raster), theirs.detach(), **near)


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_predicting_fewer_patches_leaves_the_logits_of_the_first_ones(make, masked_tokens):
    every = make(masked_tokens=masked_tokens)
    first = make(masked_tokens=masked_tokens, predict_ratio=0.3)
    images, _ = drawn_batch(2)
    order = every.draw_order(draws(2))
    assert len(first.sees) < len(every.sees)
    torch.testing.assert_close(
        first.predict(images, order), every.predict(images, order)[:, :5], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_what_is_visited_last_changes_no_logit(make, settings):
    objective = make(**settings)
    images, _ = drawn_batch(3)
    order = objective.draw_order(draws(3))
    last = torch.zeros_like(order.hidden).scatter(1, order.masked_at[:, -1:], True)
    logits = objective.predict(images, order)
    assert torch.equal(logits, objective.predict(paint(images, last, 0.9), order))


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_a_patch_changes_the_logits_of_those_after_it_and_of_no_other(make, settings):
    objective = make(**settings)
    images, _ = drawn_batch(1)
    order = objective.draw_order(draws(1))
    logits = objective.predict(images, order)
    for place in range(objective.num_predicted):
        one = torch.zeros_like(order.hidden).scatter(1, order.masked_at[:, place, None], True)
        again = objective.predict(paint(images, one, 0.9), order)
        same = (again == logits).all(-1)[0].tolist()
        assert same == [at <= place for at in range(objective.num_predicted)]


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_a_patch_of_the_context_changes_every_logit(make, settings):
    objective = make(**settings)
    images, _ = drawn_batch(1)
    order = objective.draw_order(draws(1))
    seen = torch.zeros_like(order.hidden).scatter(1, order.visible_at[:, :1], True)
    changed = objective.predict(paint(images, seen, 0.9), order)
    assert (changed != objective.predict(images, order)).any(-1).all()


def test_the_encoder_is_not_given_what_is_dropped(make):
    objective = make(masked_tokens="drop")
    images, _ = drawn_batch(2)
    order = objective.draw_order(draws(2))
    encoded = []
    objective.vit.norm.register_forward_hook(lambda *call: encoded.append(call[2]))
    objective.predict(images, order)
    objective.predict(paint(images, order.hidden, 0.9), order)
    assert encoded[0].shape == (2, 1 + 4, 32)
    assert torch.equal(*encoded)


def test_the_content_stream_is_a_plain_vit_of_timm(make):
    objective = make(model={"layer_scale": 0.5})
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2,
        num_classes=0, init_values=0.5,
    )  # fmt: skip
    plain.load_state_dict(objective.vit.state_dict(), strict=True)
    images, _ = drawn_batch(2)
    images = objective.normalise(images)
    tokens = objective.vit._pos_embed(objective.vit.patch_embed(images))
    # Nothing is masked where everything is context.
    _, sees = mapet.visibility(torch.arange(17)[None], 17)
    content = objective.vit.norm(mapet.run_blocks(objective.vit.blocks, tokens, sees[0]))
    torch.testing.assert_close(content, plain.eval().forward_features(images))


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_the_loss_is_the_mean_cross_entropy_of_predicted_patches(make, settings):
    objective = make(**settings)
    images, targets = drawn_batch(2)
    result = objective(images, targets, draws(2))
    order = objective.draw_order(draws(2))
    logits = objective.predict(images, order)
    assert logits.shape == (2, 5 if "predict_ratio" in settings else 12, VOCAB)
    log_p = logits.log_softmax(-1)
    losses, hits = [], []
    for b in range(2):
        for place in range(objective.num_predicted):
            wanted = targets.token_ids[b, order.masked_at[b, place]]
            losses.append(-log_p[b, place, wanted])
            hits.append(logits[b, place].argmax() == wanted)
    torch.testing.assert_close(result["loss"], torch.stack(losses).mean())
    assert float(result["accuracy"]) == pytest.approx(float(torch.stack(hits).float().mean()))


def test_orders_differ_between_pictures_and_reach_every_patch_first(make):
    objective = make()
    order = objective.draw_order(draws(400))
    assert set(order.masked_at[:, 0].tolist()) == set(range(NUM_PATCHES))
    rows = torch.cat([order.visible_at, order.masked_at], dim=1)
    assert torch.equal(rows.sort(1).values, torch.arange(NUM_PATCHES).expand(400, -1))
    # Not sorted: a masked patch comes before its right neighbour as often as after it.
    rising = (order.masked_at.diff(dim=1) > 0).float().mean()
    assert 0.45 < float(rising) < 0.55


def test_a_preview_shows_the_context_and_what_was_predicted(make):
    objective = make(predict_ratio=0.3)
    images, targets = drawn_batch(2)
    preview = objective.preview(images, targets, draws(2))
    assert preview.hidden.sum(1).tolist() == [12, 12]
    assert preview.predicted.sum(1).tolist() == [5, 5]
    assert not (preview.predicted & ~preview.hidden).any()
    assert torch.equal(preview.token_ids[~preview.predicted], targets.token_ids[~preview.predicted])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict_ratio": 0.75}, "predict_ratio 0.75 is not below mask_ratio 0.75; leave it out"),
        ({"predict_ratio": 0.01}, "predict_ratio 0.01 predicts none of the 16 patches"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 masks 16 of the 16 patches"),
        ({"decoder_dim": 16}, "decoder_dim belongs to masked_tokens = 'drop'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
