"""Beyond Masking: what becomes of a picture, and to which patches its token ids then belong."""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from cache_builder.errors import ConfigError
from tests import factories
from tests.trainer.caches import make_cache
from tests.trainer.methods import VOCAB, draws, make_objective, paint, read_batch
from trainer.degrading import Degrader, blur, decolorise, distort, tile
from trainer.objectives.beyond_pixels import patchify, pixel_loss, standardised_patches, unpatchify

DEGRADATIONS = ["zoomed_in", "zoomed_out", "distorted", "blurred", "decolorised"]


@pytest.fixture
def make(tiny_cache):
    def make(degradation="zoomed_in", mask_ratio=0.0, **settings):
        if degradation == "zoomed_in":
            settings.setdefault("zoom", 2.0)
        return make_objective(
            tiny_cache, "beyond", degradation=degradation, mask_ratio=mask_ratio, **settings
        )

    return make


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "wide"), [(224, 288), (32, 42), (16, 20)])
def test_the_loader_delivers_a_wide_picture_whose_middle_is_shown_untouched(size, wide):
    degrader = Degrader("zoomed_in", size, 4)
    assert degrader.clean_size == wide
    images = noise(2, 3, wide, wide)
    margin = (wide - size) // 2
    shown = degrader(images, draws(2)).images
    assert torch.equal(shown, images[:, :, margin : wide - margin, margin : wide - margin])


def test_a_hundred_of_196_cells_of_a_zoomed_picture_are_shown():
    seen_at = Degrader("zoomed_in", 224, 14).seen_at(torch.tensor([[-32, -32]])).reshape(14, 14)
    assert (seen_at >= 0).nonzero().aminmax(dim=0).min.tolist() == [2, 2]
    assert int((seen_at >= 0).sum()) == 100
    # Cell (2, 2) has its centre at 51.4 of 288 pixels, 19.4 of the 224 that are shown.
    assert int(seen_at[2, 2]) == 14 + 1


def test_token_ids_of_a_zoomed_picture_belong_to_the_whole_of_it(tmp_path):
    cache = make_cache(tmp_path, views=1)
    objective = make_objective(cache, "beyond", zoom=2.0)
    images, targets = read_batch(cache, objective)
    assert images.shape == (4, 3, 32, 32)
    cells = patchify(images, 8).unflatten(-1, (64, 3)).mean(2)
    colours = torch.from_numpy(factories.COLOURS) / 255
    assert torch.equal(torch.cdist(cells, colours).argmin(-1), targets.token_ids)


def test_around_a_zoomed_out_picture_is_its_mirror_image():
    images = noise(3, 3, 10, 10)
    offset = torch.tensor([[0, 4], [3, 1], [4, 0]])
    canvases = tile(images, 14, offset)
    for image, canvas, (top, left) in zip(images, canvases, offset.tolist(), strict=True):
        pads = ((0, 0), (top, 4 - top), (left, 4 - left))
        assert np.array_equal(canvas, np.pad(image, pads, mode="symmetric"))


def test_a_zoomed_out_picture_lies_anywhere_on_its_canvas_another_place_per_sample():
    degraded = Degrader("zoomed_out", 224, 14)(noise(1, 3, 160, 160).expand(512, -1, -1, -1),
                                               draws(512))  # fmt: skip
    assert degraded.offset.min() == 0
    assert degraded.offset.max() == 63
    assert len(torch.unique(degraded.offset, dim=0)) > 400
    corner = degraded.offset[0] + torch.tensor([160 / 28, 160 / 28])
    at = (corner // 16).long()
    assert int(degraded.seen_at[0, 0]) == int(at[0] * 14 + at[1])
    assert degraded.seen_at.min() >= 0


def test_a_distorted_picture_is_read_nearer_to_a_point_drawn_per_sample():
    ramp = torch.linspace(-1, 1, 9)
    x, y = ramp.expand(9, 9), ramp[:, None].expand(9, 9)
    images = torch.stack([x, y, torch.ones(9, 9)]).expand(4, -1, -1, -1)
    generator = draws(4)
    points = generator.uniform(1, 1, 2, low=-1, high=1)[:, 0, 0]
    magnitudes = generator.uniform(1, 1, 1, low=0.15, high=0.25).flatten()
    found = distort(images, draws(4))
    for picture, (cx, cy), magnitude in zip(found, points, magnitudes, strict=True):
        distance = ((cx - x) ** 2 + (cy - y) ** 2).sqrt()
        torch.testing.assert_close(picture[0], x + (cx - x) * distance * magnitude)
        torch.testing.assert_close(picture[1], y + (cy - y) * distance * magnitude)
    # Nothing is read from outside, where there are zeros.
    torch.testing.assert_close(found[:, 2], torch.ones(4, 9, 9))


def test_every_picture_is_blurred_by_a_kernel_of_its_own():
    images = noise(3, 3, 12, 12)
    kernels = draws(3).normal(1, 7, 7, mean=1 / 49, std=0.02)
    found = blur(images, draws(3))
    for image, kernel, blurred in zip(images, kernels, found, strict=True):
        expected = torch.cat([conv2d(image[c][None], kernel[None], padding=3) for c in range(3)])
        torch.testing.assert_close(blurred, expected)
    assert not torch.allclose(kernels[0], kernels[1])


def test_colours_are_weighed_into_one_channel_three_times():
    images = noise(64, 3, 4, 4)
    weights = draws(64).uniform(3, 1, 1, high=0.667)
    found = decolorise(images, draws(64))
    torch.testing.assert_close(found[:, 0], (images * weights).sum(1))
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])
    assert 0.6 < weights.max() < 0.667


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_a_sample_is_degraded_the_same_in_any_batch(degradation):
    degrader = Degrader(degradation, 16, 4)
    images = noise(4, 3, degrader.clean_size, degrader.clean_size)
    whole, part = degrader(images, draws(4)), degrader(images[2:], draws(2, first=2))
    torch.testing.assert_close(part.images, whole.images[2:])
    assert torch.equal(part.seen_at, whole.seen_at[2:])


def test_what_is_not_shown_of_a_zoomed_picture_makes_a_fifth_of_the_loss(make, tiny_cache):
    objective = make()
    images, targets = read_batch(tiny_cache, objective)
    degraded, masks = objective._draw(images, draws())
    ring = degraded.seen_at < 0
    assert ring.sum(1).tolist() == [12] * 4
    weights = objective.weights(degraded, masks)
    torch.testing.assert_close(weights, torch.where(ring, 0.2 / 12, 0.8 / 4))
    log_p = objective.predict(degraded.images, masks).log_softmax(-1)
    nats = -log_p.gather(2, targets.token_ids[..., None])[..., 0]
    result = objective(images, targets, draws())
    expected = 0.8 * nats[~ring].mean() + 0.2 * nats[ring].mean()
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["cross_entropy"], nats.mean())


def test_with_masks_shown_cells_count_where_their_patch_is_masked(make):
    objective = make(mask_ratio=0.25)
    degraded, masks = objective._draw(noise(16, 3, 32, 32), draws(16))
    weights = objective.weights(degraded, masks)
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    shown, num_counted = [5, 6, 9, 10], set()
    assert (degraded.seen_at >= 0).nonzero()[:, 1].tolist() == shown * 16
    for cells, hidden, found in zip(degraded.seen_at[:, shown], masks.hidden, weights, strict=True):
        is_hidden = hidden[cells]
        # Where no shown cell is masked, all of them count.
        counted = is_hidden if is_hidden.any() else ~is_hidden
        torch.testing.assert_close(found[shown], counted * 0.8 / counted.sum())
        num_counted.add((int(counted.sum()), bool(is_hidden.any())))
    assert {(4, False), (1, True), (2, True)} <= num_counted


@pytest.mark.parametrize("degradation", DEGRADATIONS[1:])
def test_all_patches_count_without_masks_or_when_asked_and_masked_ones_else(
    make, tiny_cache, degradation
):
    def counted(**settings):
        objective = make(degradation, **settings)
        degraded, masks = objective._draw(*read_batch(tiny_cache, objective)[:1], draws())
        return objective.weights(degraded, masks) > 0, masks.hidden.gather(1, degraded.seen_at)

    assert counted()[0].all()
    assert counted(mask_ratio=0.5, predict_all=True)[0].all()
    weighed, hidden = counted(mask_ratio=0.5)
    assert torch.equal(weighed, hidden)
    assert 0 < int(hidden.sum()) < hidden.numel()


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_masked_patch_shows_changes_no_prediction(make, masked_tokens):
    objective = make("blurred", 0.5, masked_tokens=masked_tokens).eval()
    images = noise(3, 3, 16, 16)
    masks = objective.masks.draw(draws(3))
    logits = objective.predict(images, masks)
    assert logits.shape == (3, 16, VOCAB)
    assert torch.equal(logits, objective.predict(paint(images, masks.hidden, 0.9), masks))
    shown = paint(images, ~masks.hidden, 0.9)
    assert not torch.allclose(logits, objective.predict(shown, masks))


def test_without_masks_there_is_no_mask_token_to_train(make):
    def names(**settings):
        return {name for name, _ in make(**settings).named_parameters()}

    assert names(mask_ratio=0.5) - names() == {"hiding.mask_token"}


def test_a_preview_shows_what_the_encoder_is_given(make, tiny_cache):
    objective = make("decolorised").eval()
    images, targets = read_batch(tiny_cache, objective)
    preview = objective.preview(images, targets, draws())
    given = objective.degrader(objective.normalise(images), draws()).images
    inside = ((preview.shown > 0) & (preview.shown < 1)).float()
    assert inside.mean() > 0.2
    torch.testing.assert_close(objective.normalise(preview.shown) * inside, given * inside)
    assert not preview.hidden.any()
    assert torch.equal(
        preview.token_ids, objective.predict(given, objective.masks.draw(draws())).argmax(-1)
    )


def test_pixel_targets_are_standardised_channel_by_channel():
    images = noise(2, 3, 8, 8)
    found = standardised_patches(images, 4).unflatten(-1, (4, 4, 3))
    block = images[1, 2, 0:4, 4:8]  # patch 1, channel 2
    expected = (block - block.mean()) / (block.std() + 1e-6)
    torch.testing.assert_close(found[1, 1, :, :, 2], expected)
    assert torch.equal(unpatchify(patchify(images, 4), 8), images)


@pytest.mark.parametrize("degradation", ["distorted", "blurred", "decolorised"])
def test_pixels_are_compared_where_patches_count(degradation):
    degrader = Degrader(degradation, 16, 4)
    clean, predicted = noise(2, 3, 16, 16), noise(2, 16, 48, seed=1)
    degraded = degrader(clean, draws(2))
    counted = noise(2, 16, seed=2) < 0.4
    loss = pixel_loss(predicted, clean, counted, degraded, degrader, 0.2)
    wanted = standardised_patches(clean, 4)
    for sample in range(2):
        errors = (predicted - wanted)[sample, counted[sample]].square()
        torch.testing.assert_close(loss[sample], errors.mean())


def test_pixels_of_a_zoomed_picture_are_compared_at_its_full_size():
    degrader = Degrader("zoomed_in", 16, 4, zoom=2.0)
    clean, predicted = noise(1, 3, 32, 32), noise(1, 16, 48, seed=1)
    counted = noise(1, 16, seed=2) < 0.4
    degraded = degrader(clean, draws(1))
    loss = pixel_loss(predicted, clean, counted, degraded, degrader, 0.2)

    def twice(images):
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)

    whole = twice(unpatchify(predicted, 16))
    middle = clean[..., 8:24, 8:24]
    inner = patchify(whole[..., 8:24, 8:24], 4) - standardised_patches(middle, 4)
    half = (clean[..., ::2, :] + clean[..., 1::2, :]) / 2
    half = (half[..., ::2] + half[..., 1::2]) / 2
    errors = whole - twice(unpatchify(standardised_patches(half, 4), 16))
    strips = [errors[..., :8, :], errors[..., 24:, :], errors[..., :8], errors[..., 24:]]
    expected = 0.8 * inner[counted].square().mean() + 0.2 * sum(s.square().mean() for s in strips)
    torch.testing.assert_close(loss, expected[None])


def test_pixels_of_a_zoomed_out_picture_are_compared_on_the_canvas():
    degrader = Degrader("zoomed_out", 28, 7)
    clean = noise(1, 3, 20, 20)
    degraded = degrader(clean, draws(1))
    wanted = standardised_patches(torch.nn.functional.interpolate(clean, size=28, mode="area"), 4)
    every = torch.ones(1, 49, dtype=torch.bool)
    assert float(pixel_loss(wanted, clean, every, degraded, degrader, 0.2)) == 0
    # One patch, predicted wrongly, shows on the canvas where it lies.
    wrong = wanted.clone()
    wrong[0, 24] += 1
    at = int(degraded.seen_at[0, 24])
    only = torch.zeros(1, 49, dtype=torch.bool)
    only[0, at] = True
    assert float(pixel_loss(wrong, clean, only, degraded, degrader, 0.2)) > 0.1


def test_a_grid_too_coarse_to_have_anything_around_the_middle_is_refused(tiny_cache):
    with pytest.raises(ConfigError, match=r"16 of the 16 patches .* Change objective.zoom"):
        make_objective(tiny_cache, "beyond")


def test_a_zoom_of_less_than_a_pixel_leaves_none_to_predict_and_is_refused(tiny_cache):
    with pytest.raises(
        ConfigError, match=r"zoom 1.01, no pixel around the \d+ x \d+ that are shown .* Raise"
    ):
        make_objective(tiny_cache, "beyond", targets="pixels", zoom=1.01)


def test_a_cache_of_several_ids_per_patch_has_pixels_to_predict_but_no_id(residual_cache):
    with pytest.raises(ConfigError, match=r"2 token ids per patch; method 'beyond' predicts one"):
        make_objective(residual_cache, "beyond", zoom=2.0)
    objective = make_objective(residual_cache, "beyond", targets="pixels")
    result = objective(*read_batch(residual_cache, objective), draws())
    assert list(result) == ["loss"]
    assert result["loss"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degradation": "blurred", "zoom": 1.5}, "zoom belongs to degradation = 'zoomed_in'"),
        ({"degradation": "blurred", "ring_weight": 0.5}, "ring_weight belongs to"),
        ({"mask_ratio": 0.0, "predict_all": True}, "say something about masks"),
        ({"mask_ratio": 0.0, "mask_kind": "block"}, "say something about masks"),
        ({"mask_ratio": 0.01, "zoom": 2.0}, "masks 0 of the 16 patches"),
    ],
)
def test_settings_that_do_nothing_are_refused(tiny_cache, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(tiny_cache, "beyond", **settings)
