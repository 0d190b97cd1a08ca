"""A step is the same on every device, but for rounding, and the host never waits for it."""

import contextlib
import json
import warnings

import torch

from tests.trainer.caches import make_cache, tiny_config
from tests.trainer.methods import (
    SETTINGS,
    make_objective,
    make_stepper,
    read_batches,
    read_first,
)
from trainer import train
from trainer.draws import SampleGenerator
from trainer.step import step_inputs

# Convolutions of a GPU round their inputs to TF32, ten bits, by default.
CLOSE = {"rtol": 2e-2, "atol": 2e-3}


@contextlib.contextmanager
def never_waiting(device):
    """Fail where the host waits for a GPU; a CPU is not watched."""
    if torch.device(device).type == "cpu":
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(batch, device):
    """Return the batch as the loop's reader hands it on."""
    if torch.device(device).type == "cpu":
        return batch
    fields = batch._asdict().items()
    tensors = {name: value.pin_memory() for name, value in fields if torch.is_tensor(value)}
    return batch._replace(**tensors)


def changed_by_steps(stepper):
    """Return the tensors that a step changes."""
    model, optimizer, average = stepper.state()
    return {"model": model, "moments": optimizer["state"], "average": average}


def copied(tree):
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return tree.clone() if torch.is_tensor(tree) else tree


def losses(out_dir):
    return [json.loads(line)["loss"] for line in (out_dir / "log.jsonl").read_text().splitlines()]


def test_draws_have_the_same_bits_on_every_device(device):
    here, there = (SampleGenerator(7, 3, first=5, count=64, device=d) for d in ("cpu", device))
    for draw in (
        lambda g: g.uniform(3, 5, low=-1, high=2),
        lambda g: g.integers(-3, 9, 11),
        lambda g: g.permutations(196),
    ):
        assert torch.equal(draw(there).cpu(), draw(here))
    torch.testing.assert_close(there.normal(1000).cpu(), here.normal(1000), rtol=1e-6, atol=1e-6)


def test_every_method_has_the_loss_and_gradients_of_a_cpu(device, tmp_path):
    cache_path = make_cache(tmp_path, soft_top_k=3, soft_temperature=1.0)
    for method, settings in SETTINGS:
        found = []
        for where in ("cpu", device):
            objective = make_objective(cache_path, method, **settings).to(where)
            batch = read_first(cache_path, objective)
            inputs = step_inputs(batch, tiny_config(), 0, torch.device(where))
            loss = objective(*inputs)["loss"]
            loss.backward()
            gradients = [p.grad for p in objective.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            found.append(torch.stack([loss.detach(), norm]).cpu())
        torch.testing.assert_close(
            found[1], found[0], **CLOSE, msg=lambda text, m=method, s=settings: f"{m} {s}: {text}"
        )


def test_a_preview_comes_from_every_device(device, tmp_path):
    cache_path = make_cache(tmp_path)
    objective = make_objective(cache_path, "beit").to(device).eval()
    batch = read_first(cache_path, objective)
    with torch.no_grad():
        preview = objective.preview(*step_inputs(batch, tiny_config(), 0, torch.device(device)))
    assert preview.predicted.sum() == 4 * 8
    assert preview.token_ids.device.type == torch.device(device).type


def test_the_host_waits_for_no_step(device, tmp_path):
    cache_path = make_cache(tmp_path, soft_top_k=3, soft_temperature=1.0)
    for method, settings in SETTINGS:
        stepper = make_stepper(
            cache_path, device, data={"batch_size": 4, "color_jitter": 0.4},
            objective={"method": method, **settings}, optim={"ema": 0.9, "clip_norm": 1.0},
            run={"compile": "off", "precision": "auto"},
        )  # fmt: skip
        stepper.objective.train()
        batch = pinned(read_first(cache_path, stepper.objective), device)
        stepper.take(0, batch)  # what is made once may be waited for
        with never_waiting(device):
            found = stepper.take(1, batch)
        assert all(value.isfinite() for value in found.values()), (method, settings, found)


def test_steps_in_full_precision_follow_those_of_a_cpu(device, tmp_path):
    cache_path = make_cache(tmp_path)
    run = {"compile": "off", "precision": "fp32"}
    here, there = (make_stepper(cache_path, where, run=run) for where in ("cpu", device))
    for step, batch in enumerate(read_batches(cache_path, 6)):
        expected, found = (stepper.take(step, batch) for stepper in (here, there))
        for name in ("loss", "gradient_norm"):
            torch.testing.assert_close(found[name].cpu(), expected[name], rtol=5e-2, atol=5e-3)


def test_a_step_whose_gradient_is_not_finite_changes_nothing(device, tmp_path):
    cache_path = make_cache(tmp_path)
    stepper = make_stepper(cache_path, device, optim={"ema": 0.5}, run={"compile": "off"})
    first, second = read_batches(cache_path, 2)
    stepper.take(0, first)
    before = copied(changed_by_steps(stepper))
    weight = stepper.objective.head.weight
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    found = stepper.take(1, second)
    handle.remove()
    assert found["loss"].isfinite()
    assert not found["gradient_norm"].isfinite()
    torch.testing.assert_close(changed_by_steps(stepper), before, rtol=0, atol=0)
    stepper.take(1, second)
    after = stepper.state()
    assert not torch.equal(after.model["head.weight"], before["model"]["head.weight"])
    assert after.optimizer["state"][0]["step"] == 2


def test_a_run_that_was_left_goes_on_as_if_it_had_not_been(device, tmp_path):
    cache_path = make_cache(tmp_path)
    # As anyone would start it: a worker, pinned memory, the precision that suits the device.
    config = tiny_config(
        data={"num_workers": 1}, run={"device": device, "precision": "auto", "compile": "off"}
    )
    train.run(config, cache_path, tmp_path / "whole")
    train.run(config, cache_path, tmp_path / "parts", stop_after=5)
    assert train.run(config, cache_path, tmp_path / "parts").finished
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == len(parts) == 12
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), **CLOSE)
    assert whole[-1] < whole[0]


def test_compiled_blocks_have_the_names_and_losses_of_the_others(device, tmp_path):
    cache_path = make_cache(tmp_path)
    model = {"depth": 1, "activation_checkpointing": True}
    plain, compiled = (
        make_stepper(cache_path, device, model=model, run={"compile": mode})
        for mode in ("off", "on")
    )
    assert list(compiled.objective.state_dict()) == list(plain.objective.state_dict())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # torch's own, of the compiler
        for step, batch in enumerate(read_batches(cache_path, 2)):
            first, second = plain.take(step, batch), compiled.take(step, batch)
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
