"""Tokens of a real encoder say more of what is on a photograph than tokens of its pixels."""

import pytest

from tests import semantics

K = 64


@pytest.mark.slow
def test_tokens_of_an_encoder_score_clearly_above_tokens_of_pixels(
    photos, mobilenet_weights, tmp_path
):
    halves = semantics.link_halves(photos, tmp_path)
    out = tmp_path / "codebook.safetensors"
    pixels = semantics.measure(semantics.pixel_options(), halves, K, out)
    encoder = semantics.measure(semantics.mobilenet_options(mobilenet_weights), halves, K, out)
    assert pixels.num_tokens == encoder.num_tokens > 24_000

    def gain(scores, name):
        value, shuffled = getattr(scores, name)
        return value - shuffled

    # Measured: .162 and .039 nats, .055 and .014, .074 and -.002, .356 and .042.
    for name, factor in (
        ("mutual_information", 2),
        ("normalised", 2),
        ("purity", 3),
        ("mean_recall", 3),
    ):
        assert gain(encoder, name) > factor * max(gain(pixels, name), 0), name
    assert gain(encoder, "purity") > 0.04
    # Measured: .58 and .18 of the photographs, .37 of which are of the largest class.
    assert encoder.accuracy[0] > 0.45 > 0.3 > pixels.accuracy[0]
    # Lower is better: .26 below shuffled labels, and .09.
    assert gain(encoder, "tcas_reconstructed") < 2 * gain(pixels, "tcas_reconstructed") < 0


def test_every_photograph_is_in_one_class_at_most():
    names = [name for members in semantics.CLASSES.values() for name in members]
    assert len(names) == len(set(names)) == 249
