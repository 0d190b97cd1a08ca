"""Weights begin as large as their width asks for, positions as sines."""

import pytest
import torch

from cache_builder.errors import ConfigError
from tests.trainer.caches import tiny_config
from tests.trainer.methods import make_objective
from trainer import checkpoint as checkpoints
from trainer import evaluate, train
from trainer.backbones import freshly_initialised, load_backbone
from trainer.export import export
from trainer.initialise import sine_positions

DROP = {"masked_tokens": "drop", "decoder_dim": 8}


def test_weights_are_as_large_as_their_width_asks_for(tiny_cache):
    narrow, wide = (
        make_objective(tiny_cache, "beit", model={"init": "mae", "embed_dim": dim}).vit
        for dim in (32, 128)
    )
    # Uniform in +- sqrt(6 / (in + out)).
    for vit, dim in ((narrow, 32), (wide, 128)):
        bound = (6 / (5 * dim)) ** 0.5
        assert 0.95 * bound < float(vit.blocks[0].mlp.fc1.weight.detach().abs().max()) <= bound
        assert not vit.blocks[0].mlp.fc1.bias.any()


def test_positions_of_encoder_and_decoder_start_as_sines_with_nothing_for_the_class_token(
    tiny_cache,
):
    objective = make_objective(tiny_cache, "beit", model={"init": "mae"}, **DROP)
    encoder, decoder = objective.vit.pos_embed[0], objective.hiding.decoder.pos_embed[0]
    assert not encoder[0].any()
    assert torch.equal(encoder[1:], sine_positions((4, 4), 32))
    assert torch.equal(decoder, sine_positions((4, 4), 8))
    assert encoder.requires_grad


def test_sines_of_near_patches_are_alike_and_no_two_are_the_same():
    positions = sine_positions((3, 5), 16)
    alike = positions @ positions.T
    assert positions.shape == (15, 16)
    assert len(positions.unique(dim=0)) == 15
    assert bool((alike[0, 1] > alike[0, 2:5]).all())  # in a row
    assert bool(alike[0, 5] > alike[0, 10])  # in a column


def test_a_width_that_sines_do_not_fill_is_refused(tiny_cache):
    with pytest.raises(ConfigError, match=r"multiples of four.*30 is none.*model.init to 'beit'"):
        make_objective(tiny_cache, "beit", model={"init": "mae", "embed_dim": 30, "num_heads": 3})


def test_what_a_probe_compares_with_is_initialised_as_the_run_was(tiny_cache, tmp_path):
    config = tiny_config(model={"init": "mae"}, run={"steps": 4})
    train.run(config, tiny_cache, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "vit.safetensors")
    assert checkpoints.load(tmp_path / "run").header.vit_spec.init == "mae"
    for model in (tmp_path / "run", tmp_path / "vit.safetensors"):
        vit = freshly_initialised(load_backbone(model), seed=0)
        assert torch.equal(vit.pos_embed[0, 1:], sine_positions((4, 4), 32))
    assert evaluate.probe(tmp_path / "run", k=3).num_classes == 2
