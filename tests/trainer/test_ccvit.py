"""CCViT: corrupted pictures, targets and losses are those of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cache_builder.errors import ConfigError
from cache_builder.formats import TokenCache
from cache_builder.imaging import patchify
from tests import factories
from tests.trainer.caches import tiny_config
from tests.trainer.methods import (
    NUM_PATCHES,
    PATCH,
    VOCAB,
    drawn_batch,
    draws,
    make_objective,
    paint,
    read_batch,
)
from trainer.data import CachedViews, Pick, view_index
from trainer.model import build_objective
from trainer.objectives import ccvit
from trainer.objectives.interface import Normalise

VECTORS = Path(__file__).parents[1] / "vectors"
COLOURS = torch.from_numpy(factories.COLOURS) / 255
WAYS = ["keep", "drop"]


def uniform(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def official():
    recorded = np.load(VECTORS / "ccvit_step.npz")
    assert recorded["seeds"].tolist() == [13, 14, 15, 16, 17]
    return {name: recorded[name] for name in recorded.files}


@pytest.fixture
def make(tiny_cache):
    def make(**settings):
        return make_objective(
            tiny_cache, "ccvit", **({"mask_kind": "random", "replace_ratio": 0.25} | settings)
        ).eval()

    return make


@pytest.fixture(scope="module")
def feature_cache(tmp_path_factory):
    """A cache whose centroids are features of a small model."""
    root = tmp_path_factory.mktemp("features")
    codebook = root / "codebook.safetensors"
    factories.feature_codebook().save(codebook)
    images = factories.write_folder(root / "images", factories.photo_images(4))
    factories.build_cache(images=str(images), codebook=codebook, out=root / "cache", num_views=1)
    return root / "cache"


def predicted_targets(official):
    """Return what the official step predicts: ids (1, 190) and pixels (1, 190, 768)."""
    predicted = torch.from_numpy(official["masked"] | official["replaced"]).bool()
    pixels = ccvit.pixel_targets(uniform(14, 2, 3, 224, 224), 16)
    codes = torch.from_numpy(official["codes"].astype(np.int64))
    return codes[predicted][None], pixels[predicted][None]


def test_corrupted_pictures_are_those_of_the_official_code(official):
    masked, replaced = (torch.from_numpy(official[k]).bool() for k in ("masked", "replaced"))
    codes = torch.from_numpy(official["codes"].astype(np.int64))
    images, centroids = uniform(14, 2, 3, 224, 224), uniform(13, int(official["K"]), 768)
    shown = ccvit.corrupt(images, codes, centroids, masked, replaced)
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ours = patchify(normalise(shown), 16)[0]
    near = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(ours[official["x_patch_rows"]], official["x_patches"], **near)
    row = int(official["replaced_row"])
    assert replaced[0, row]
    np.testing.assert_allclose(ours[row], official["replaced_patch"], **near)
    assert torch.equal(patchify(shown, 16)[replaced], centroids[codes[replaced]])
    assert torch.equal(patchify(shown, 16)[~replaced], patchify(images, 16)[~replaced])


def test_targets_are_those_of_the_official_code(official):
    token_ids, pixels = predicted_targets(official)
    np.testing.assert_array_equal(token_ids[0], official["label1"])
    np.testing.assert_allclose(pixels[0, :8], official["label2_first8"], rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_the_official_code(official):
    result = ccvit.joint_loss(
        normal(16, 1, 190, int(official["K"])),
        normal(17, 1, 190, 768),
        *predicted_targets(official),
    )
    names = {"loss": "loss", "cross_entropy": "ce", "pixel_error": "mse"}
    for ours, theirs in names.items():
        assert float(result[ours]) == pytest.approx(float(official[theirs]), rel=1e-5)


def test_a_patch_is_standardised_over_all_its_values():
    patches = patchify(uniform(0, 2, 3, 8, 8), 4)
    for patch, target in zip(
        patches.flatten(0, 1), ccvit.pixel_targets(uniform(0, 2, 3, 8, 8), 4).flatten(0, 1),
        strict=True,
    ):  # fmt: skip
        values = patch.double().numpy()
        expected = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
        np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)


def test_a_patch_of_one_colour_has_targets_of_zero():
    assert torch.equal(
        ccvit.pixel_targets(torch.full((1, 3, 4, 4), 0.25), 4), torch.zeros(1, 1, 48)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_replaced_patches_show_their_centroids_and_masked_ones_stay(dtype):
    images, _ = drawn_batch(1)
    token_ids = torch.arange(NUM_PATCHES)[None] % VOCAB
    centroids = COLOURS.repeat_interleave(PATCH**2, 1)
    if dtype == torch.uint8:
        centroids = (centroids * 255).round().byte()
    masked, replaced = torch.zeros(2, 1, NUM_PATCHES, dtype=torch.bool)
    masked[0, :5] = replaced[0, 4:8] = True
    shown = patchify(ccvit.corrupt(images, token_ids, centroids, masked, replaced), PATCH)[0]
    for patch in range(NUM_PATCHES):
        if 5 <= patch < 8:
            colour = COLOURS[token_ids[0, patch]].repeat_interleave(PATCH**2)
            assert torch.equal(shown[patch], colour)
        else:
            assert torch.equal(shown[patch], patchify(images, PATCH)[0, patch])


def test_centroids_of_a_cache_are_the_patches_that_were_tokenised(make, tiny_cache):
    objective = make()
    with TokenCache.open(tiny_cache) as cache:
        keys, num_views = cache.shard(0).keys[:4], cache.manifest.view_spec.num_views
    # The first view is the whole picture, drawn in the colours of the centroids.
    picks = [
        Pick(-view_index(key, 0, num_views) % num_views, 0, row) for row, key in enumerate(keys)
    ]
    dataset = CachedViews(tiny_cache, image_size=objective.image_size)
    targets = dataset.read(picks).targets(torch.device("cpu"))
    dataset.close()
    every = torch.ones_like(targets.token_ids, dtype=torch.bool)
    images = torch.zeros_like(targets.clean)
    shown = ccvit.corrupt(images, targets.token_ids, objective.centroids, ~every, every)
    assert torch.equal(shown, targets.clean)


def test_as_many_patches_are_replaced_as_asked_for_and_none_of_them_is_masked(make):
    objective = make()
    masks, replaced, at = objective.draw(draws(200))
    assert masks.hidden.sum(1).unique().tolist() == [8]
    assert replaced.sum(1).unique().tolist() == [4]
    assert not (masks.hidden & replaced).any()
    for row, hidden, chosen in zip(at, masks.hidden, replaced, strict=True):
        assert row.tolist() == (hidden | chosen).nonzero().flatten().tolist()
    assert replaced.float().mean(0).min() > 0.1


def test_published_shares_are_published_counts_on_a_grid_of_14():
    config = ccvit.Config()
    assert round(config.mask_ratio * 196) == 75
    assert round(config.replace_ratio * 196) == 20


@pytest.mark.parametrize("masked_tokens", WAYS)
def test_the_network_does_not_see_what_is_masked_or_replaced(make, masked_tokens):
    objective = make(masked_tokens=masked_tokens)
    images, targets = drawn_batch(3)
    corruption = objective.draw(draws(3))
    unseen = corruption.masks.hidden | corruption.replaced

    def outputs(pictures):
        shown = objective.corrupted(pictures, targets.token_ids, corruption)
        return objective.predict(shown, corruption)

    before = outputs(images)
    for one, other in zip(before, outputs(paint(images, unseen, 0.9)), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(before, outputs(paint(images, ~unseen, 0.9)), strict=True):
        assert not torch.allclose(one, other)
    assert before[0].shape == (3, 12, VOCAB)
    assert before[1].shape == (3, 12, 3 * PATCH**2)


@pytest.mark.parametrize("masked_tokens", WAYS)
def test_the_network_sees_which_centroid_replaces_a_patch(make, masked_tokens):
    objective = make(masked_tokens=masked_tokens)
    images, targets = drawn_batch(1)
    corruption = objective.draw(draws(1))

    def outputs(chosen):
        token_ids = torch.where(chosen, (targets.token_ids + 1) % VOCAB, targets.token_ids)
        return objective.predict(objective.corrupted(images, token_ids, corruption), corruption)

    nothing = torch.zeros_like(corruption.replaced)
    for one, other in zip(outputs(nothing), outputs(~corruption.replaced), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(outputs(nothing), outputs(corruption.replaced), strict=True):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("masked_tokens", WAYS)
def test_loss_and_metrics_are_those_of_predicted_patches(make, masked_tokens):
    objective = make(masked_tokens=masked_tokens)
    images, targets = drawn_batch(2)
    result = objective(images, targets, draws(2))
    corruption = objective.draw(draws(2))
    shown = objective.corrupted(images, targets.token_ids, corruption)
    logits, regressed = objective.predict(shown, corruption)
    wanted = ccvit.pixel_targets(images, PATCH)
    entropies, errors, hits = [], [], []
    for b in range(2):
        for i, patch in enumerate(corruption.predicted_at[b].tolist()):
            token_id = targets.token_ids[b, patch]
            entropies.append(-logits[b, i].log_softmax(-1)[token_id])
            errors.append((regressed[b, i] - wanted[b, patch]).square().mean())
            hits.append(float(logits[b, i].argmax() == token_id))
    entropy, error = torch.stack(entropies).mean(), torch.stack(errors).mean()
    torch.testing.assert_close(result["loss"], entropy + error)
    torch.testing.assert_close(result["cross_entropy"], entropy.detach())
    torch.testing.assert_close(result["pixel_error"], error.detach())
    assert float(result["accuracy"]) == pytest.approx(sum(hits) / len(hits))


def test_pixels_to_regress_are_those_before_the_colour_jitter(make):
    objective = make()
    images, targets = drawn_batch(2)
    jittered = (images * 0.5).contiguous()
    assert not torch.equal(
        objective(jittered, targets, draws(2))["pixel_error"],
        objective(jittered, targets._replace(clean=jittered), draws(2))["pixel_error"],
    )
    # Patches are standardised, so half as bright would be the same but for the small constant.
    torch.testing.assert_close(
        ccvit.pixel_targets(images, PATCH), ccvit.pixel_targets(jittered, PATCH), rtol=0, atol=1e-3
    )


def test_pixels_come_from_the_class_token_and_early_patches_and_ids_from_all_blocks(make):
    objective = make(model={"depth": 4}, early_layers=2)
    images, targets = drawn_batch(2)
    corruption = objective.draw(draws(2))
    shown = objective.corrupted(images, targets.token_ids, corruption)
    vit, masks = objective.vit, corruption.masks
    patches = vit.patch_embed(objective.normalise(shown))
    patches = torch.where(masks.hidden[..., None], objective.hiding.mask_token, patches)
    states = [vit._pos_embed(patches)]
    for block in vit.blocks:
        states.append(block(states[-1]))
    pixels = torch.cat([states[4][:, :1], states[2][:, 1:]], dim=1)
    for block in objective.pixel_blocks.blocks.blocks:
        pixels = block(pixels)
    rows = objective.pixel_blocks.norm(pixels[:, 1:])
    at = corruption.predicted_at
    logits, regressed = objective.predict(shown, corruption)
    torch.testing.assert_close(logits, objective.head(ccvit.take(vit.norm(states[4])[:, 1:], at)))
    torch.testing.assert_close(regressed, objective.pixel_head(ccvit.take(rows, at)))


@pytest.mark.parametrize(("depth", "layer"), [(2, 1), (3, 1), (4, 1), (12, 9), (24, 21)])
def test_the_early_block_is_the_published_one(make, depth, layer):
    assert make(model={"depth": depth}).early_layers == layer


def test_dropped_patches_do_not_enter_the_encoder(make):
    objective = make(masked_tokens="drop")
    images, targets = drawn_batch(2)
    seen = []
    objective.vit.blocks[0].register_forward_hook(lambda *call: seen.append(call[2].shape))
    objective(images, targets, draws(2))
    assert seen == [(2, 1 + 8, 32)]


def test_a_preview_shows_the_replaced_patches(make):
    objective = make()
    images, targets = drawn_batch(2)
    preview = objective.preview(images, targets, draws(2))
    corruption = objective.draw(draws(2))
    shown = objective.corrupted(images, targets.token_ids, corruption)
    assert torch.equal(preview.shown, shown)
    assert torch.equal(preview.predicted, corruption.masks.hidden | corruption.replaced)
    assert torch.equal(preview.hidden, corruption.masks.hidden)


def test_a_cache_whose_centroids_are_no_pixels_is_refused(feature_cache):
    with pytest.raises(ConfigError, match=r"timm:resnet10t .*not pixels.* --features pixel"):
        make_objective(feature_cache, "ccvit")


def test_without_replaced_patches_any_cache_will_do(feature_cache):
    objective = make_objective(feature_cache, "ccvit", replace_ratio=0)
    images, targets = read_batch(feature_cache, objective)
    assert torch.isfinite(objective(images, targets, draws())["loss"])


def test_a_vit_with_patches_of_another_size_is_refused(tiny_cache):
    config = tiny_config(objective={"method": "ccvit"}, data={"image_size": 32})
    with (
        TokenCache.open(tiny_cache) as cache,
        pytest.raises(ConfigError, match=r"centroids of 4 x 4 pixels.* patches of 8 x 8"),
    ):
        build_objective(config, cache.manifest, cache.codebook)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replace_ratio": 0.6}, "replace_ratio 0.6 replaces 10 of 16 patches, but 8 are masked"),
        ({"replace_ratio": 0.01}, "replace_ratio 0.01 replaces none of the 16 patches"),
        ({"early_layers": 2}, "Block 2 is no early block of a ViT of 2"),
        ({"model": {"depth": 1}}, "Block 1 is no early block of a ViT of 1"),
        ({"model": {"name": "vit_base_patch16_siglip_gap_224"}}, "has none. Pick a model.name"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
