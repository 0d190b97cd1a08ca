"""What a step does to weights, moments and the average.

What must hold on a GPU as well is in tests/devices/test_training.py.
"""

import gc

import pytest
import torch

from tests.trainer.caches import tiny_config
from tests.trainer.logs import losses
from tests.trainer.methods import make_stepper, read_batches
from tests.trainer.test_train import assert_equal_weights
from trainer import checkpoint as checkpoints
from trainer import train
from trainer.session import rare_collections


@pytest.fixture(scope="module")
def batches(tiny_cache):
    return read_batches(tiny_cache, 4)


def test_micro_batches_add_up_to_the_batch(tiny_cache, batches):
    whole = make_stepper(tiny_cache)
    parts = make_stepper(tiny_cache, data={"micro_batch_size": 2})
    for step, batch in enumerate(batches):
        first, second = whole.take(step, batch), parts.take(step, batch)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_recomputed_blocks_change_no_bit_and_no_name(tiny_cache, tmp_path):
    model = {"drop_path": 0.3}
    train.run(tiny_config(model=model), tiny_cache, tmp_path / "kept")
    recomputing = tiny_config(model={**model, "activation_checkpointing": True})
    train.run(recomputing, tiny_cache, tmp_path / "recomputed")
    assert losses(tmp_path / "recomputed") == losses(tmp_path / "kept")
    ends = [checkpoints.load(tmp_path / name).model for name in ("recomputed", "kept")]
    assert_equal_weights(*ends)


def test_recomputed_blocks_keep_their_input_alone(tiny_cache, batches):
    def num_kept(**model):
        kept = []
        stepper = make_stepper(tiny_cache, model=model)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            stepper.take(0, batches[0])
        return len(kept)

    assert num_kept(activation_checkpointing=True) < num_kept() / 2


def test_the_average_is_that_of_all_weights_so_far(tiny_cache, batches):
    decay = 0.75
    stepper = make_stepper(tiny_cache, optim={"ema": decay})
    expected = {name: tensor.clone() for name, tensor in stepper.objective.vit.state_dict().items()}
    for step, batch in enumerate(batches):
        stepper.take(step, batch)
        for name, tensor in stepper.objective.vit.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    torch.testing.assert_close(stepper.state().average, expected)


def test_the_vit_of_a_checkpoint_is_its_average_where_there_is_one(tiny_cache, tmp_path):
    for name, optim in (("plain", {}), ("averaged", {"ema": 0.9})):
        train.run(tiny_config(optim=optim), tiny_cache, tmp_path / name, stop_after=3)
    plain, averaged = (checkpoints.load(tmp_path / name) for name in ("plain", "averaged"))
    assert_equal_weights(plain.model, averaged.model)
    assert plain.average is None
    assert_equal_weights(averaged.vit_state, averaged.average)
    weight = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(averaged.vit_state[weight], averaged.model[f"vit.{weight}"])


def test_the_collector_is_left_as_it_was_found():
    frozen = gc.get_freeze_count()
    with rare_collections() as step_done:
        step_done(1)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > frozen
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
