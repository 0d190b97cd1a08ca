"""What each process of the tests' torchrun does: `python rank.py CACHE OUT SCENARIO`."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cache_builder.errors import ConfigError, NotFiniteError
from cache_builder.formats import TokenCache
from tests.trainer.caches import tiny_config
from tests.trainer.methods import SETTINGS
from trainer import step, train
from trainer.data import CachedViews, Pick
from trainer.distributed import Ranks

# Micro-batches of two: stochastic depth is drawn for each by its place in the batch.
MANNER = {
    "data": {"micro_batch_size": 2, "color_jitter": 0.3},
    "model": {"drop_path": 0.3},
    "optim": {"ema": 0.9},
}


def several(cache, out):
    """Run what can be run one after the other in one group of processes."""
    dist.init_process_group("gloo")
    train.run(tiny_config(**MANNER), cache, out / "replicated")
    sharded = {
        **MANNER,
        "model": {**MANNER["model"], "activation_checkpointing": True},
        "run": {"sharding": "fsdp"},
    }
    train.run(tiny_config(**sharded), cache, out / "sharded", stop_after=5)
    interrupted(cache, out / "terminated", signal.SIGTERM)
    for sharding in ("none", "fsdp"):
        found = [two_steps(cache, case, run={"sharding": sharding}) for case in SETTINGS]
        (out / f"methods_{sharding}.json").write_text(json.dumps(found))
    told = {"two disks": on_two_disks(cache, out)}
    for name, expected, settings in (
        ("uneven", ConfigError, {"data": {"batch_size": 9}}),
        ("micro", ConfigError, {"data": {"micro_batch_size": 8}}),
        ("poisoned", NotFiniteError, {}),
    ):
        if name == "poisoned":
            poison_the_second_rank(step.build_objective)
        try:
            train.run(tiny_config(**settings), cache, out / name)
        except expected as exc:
            told[name] = str(exc)
    (out / f"told_{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def on_two_disks(cache, out):
    """Go on with a run that only the first rank has, and try to with one that only another has."""
    has, has_not = out / "replicated", out / "another_disk"
    config, is_first = tiny_config(**MANNER), dist.get_rank() == 0
    steps = train.run(config, cache, has if is_first else has_not).steps
    try:
        train.run(config, cache, has_not if is_first else has)
    except ConfigError as exc:
        return steps, has_not.exists(), str(exc)


def two_steps(cache_path, case, **sections):
    """Return losses and gradient norms of a method's first two steps, over all ranks."""
    method, settings = case
    config = tiny_config(objective={"method": method, **settings}, **sections)
    ranks = Ranks()
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
    with TokenCache.open(cache_path) as cache:
        cpu = torch.device("cpu")
        stepper = step.Stepper(config, cache.manifest, cache.codebook, ranks, cpu)
    dataset = CachedViews(cache_path, image_size=16, payloads=stepper.objective.payloads)
    share = stepper.share
    first = ranks.rank * share
    batch = dataset.read([Pick(0, 0, row) for row in range(first, first + share)])
    dataset.close()
    values = []
    for at in range(2):
        found = stepper.take(at, batch)
        values += [ranks.sum(found["loss"]).item(), found["gradient_norm"].item()]
    return values


def poison_the_second_rank(build):
    """Make the loss of rank 1 not a number at step 3."""
    calls = []

    def poison(module, arguments, result):
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 3:
            return {**result, "loss": result["loss"] * float("nan")}
        return result

    def build_poisoned(*arguments):
        objective = build(*arguments)
        objective.register_forward_hook(poison)
        return objective

    step.build_objective = build_poisoned


def interrupted(cache, out, number):
    """Train; rank 1 sends itself a signal before step 8, the first time that it gets there."""
    take, sent = step.Stepper.take, out / "sent"

    def take_and_signal(self, at, batch):
        if dist.get_rank() == 1 and at == 7 and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), number)
        return take(self, at, batch)

    step.Stepper.take = take_and_signal
    train.run(tiny_config(**MANNER, run={"checkpoint_every": 3}), cache, out)
    step.Stepper.take = take


if __name__ == "__main__":
    cache, out = map(Path, sys.argv[1:3])
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    if sys.argv[3] == "several":
        several(cache, out)
    else:
        interrupted(cache, out, signal.SIGKILL)
