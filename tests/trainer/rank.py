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
from tests.trainer.caches import tiny_config
from trainer import step, train

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
    told = {}
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


def interrupted(cache, out, number, at_step):
    """Train; rank 1 sends itself a signal after a step, the first time it is started."""
    settings = {**MANNER, "run": {"checkpoint_every": 3, "steps": 12}}
    take = step.Stepper.take

    def take_and_signal(self, at, batch):
        if os.environ["RANK"] == "1" and at == at_step and not (out / "signalled").exists():
            (out / "signalled").touch()
            os.kill(os.getpid(), number)
        return take(self, at, batch)

    step.Stepper.take = take_and_signal
    train.run(tiny_config(**settings), cache, out)


if __name__ == "__main__":
    cache, out = map(Path, sys.argv[1:3])
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    match sys.argv[3]:
        case "several":
            several(cache, out)
        case "killed":
            interrupted(cache, out, signal.SIGKILL, 7)
        case "terminated":
            interrupted(cache, out, signal.SIGTERM, 7)
