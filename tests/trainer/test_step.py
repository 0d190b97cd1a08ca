import gc

import pytest
import torch

from cache_builder.formats import TokenCache
from tests.trainer.caches import tiny_config
from tests.trainer.test_train import assert_equal_weights, losses
from trainer import checkpoint as checkpoints
from trainer import train
from trainer.data import BatchOrder, CachedViews
from trainer.distributed import Ranks
from trainer.session import rare_collections
from trainer.step import Stepper

CPU = torch.device("cpu")


def make_stepper(cache_path, **sections):
    with TokenCache.open(cache_path) as cache:
        return Stepper(tiny_config(**sections), cache.manifest, cache.codebook, Ranks(), CPU)


@pytest.fixture(scope="module")
def batches(tiny_cache):
    """The first four batches of eight."""
    with TokenCache.open(tiny_cache) as cache:
        order = BatchOrder([shard.num_samples for shard in cache.manifest.shards], 8, seed=0)
    dataset = CachedViews(tiny_cache, image_size=16)
    read = [dataset.read(order.picks(step)) for step in range(4)]
    dataset.close()
    return read


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


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own, of the compiler
def test_compiled_blocks_have_the_names_and_losses_of_the_others(tiny_cache, batches):
    plain = make_stepper(tiny_cache, model={"depth": 1})
    model = {"depth": 1, "activation_checkpointing": True}
    compiled = make_stepper(tiny_cache, model=model, run={"compile": "on"})
    assert list(compiled.objective.state_dict()) == list(plain.objective.state_dict())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step, batch in enumerate(batches[:2]):
        first, second = plain.take(step, batch), compiled.take(step, batch)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_a_step_whose_gradient_is_not_finite_changes_nothing(tiny_cache, batches):
    stepper = make_stepper(tiny_cache, optim={"ema": 0.5})
    stepper.take(0, batches[0])
    before = copied(stepper.state())
    weight = stepper.objective.head.weight
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    found = stepper.take(1, batches[1])
    handle.remove()
    assert found["loss"].isfinite()
    assert not found["gradient_norm"].isfinite()
    after = stepper.state()
    assert_equal_weights(after.model, before.model)
    for index, moments in before.optimizer["state"].items():
        assert_equal_weights(after.optimizer["state"][index], moments)
    stepper.take(1, batches[1])
    assert not torch.equal(stepper.objective.head.weight, before.model["head.weight"])
    assert after.optimizer["state"][0]["step"] == 2


def copied(state):
    def copy(tree):
        if isinstance(tree, dict):
            return {key: copy(value) for key, value in tree.items()}
        return tree.clone() if isinstance(tree, torch.Tensor) else tree

    return type(state)(*map(copy, state))


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
    assert_equal_weights(averaged.build_vit().state_dict(), averaged.average)
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
