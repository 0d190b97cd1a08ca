"""Several processes have the losses of one, and agree when something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_builder.errors import ConfigError
from tests.trainer.caches import tiny_config
from tests.trainer.logs import losses
from tests.trainer.methods import SETTINGS
from tests.trainer.rank import MANNER, two_steps
from trainer import checkpoint as checkpoints
from trainer import train
from trainer.data import BatchOrder
from trainer.distributed import split_batch

pytestmark = pytest.mark.cluster


def torchrun(cache, out, scenario, *options):
    """Start two processes on one machine, and return how they ended."""
    out.mkdir(exist_ok=True)
    script = Path(__file__).with_name("rank.py")
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*argv, *options, str(script), str(cache), str(out), scenario],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_close(first, second):
    """Assert that two runs have the same losses but for rounding, and end at the same weights."""
    assert losses(first).keys() == losses(second).keys()
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)
    ends = [checkpoints.load(checkpoints.latest(out)) for out in (first, second)]
    for part in ("model", "average"):
        one, other = (getattr(end, part) for end in ends)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tiny_cache, tmp_path_factory):
    """A run of one process, which accumulates four micro-batches."""
    out = tmp_path_factory.mktemp("alone")
    train.run(tiny_config(**MANNER), tiny_cache, out)
    return out


@pytest.fixture(scope="module")
def two(tiny_cache, tmp_path_factory):
    """What two processes did, one run after the other."""
    out = tmp_path_factory.mktemp("two")
    ended = torchrun(tiny_cache, out, "several")
    assert ended.returncode == 0, ended.stderr
    return out


def test_two_processes_have_the_losses_of_one(alone, two):
    assert_close(alone, two / "replicated")


def test_a_sharded_run_goes_on_in_one_process_that_holds_everything(alone, two, tiny_cache):
    assert len(losses(two / "sharded")) == 5
    train.run(tiny_config(**MANNER), tiny_cache, two / "sharded")
    assert_close(alone, two / "sharded")


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_every_method_has_the_losses_and_gradients_of_one_process(two, tiny_cache, sharding):
    found = json.loads((two / f"methods_{sharding}.json").read_text())
    for case, values in zip(SETTINGS, found, strict=True):
        assert values == pytest.approx(two_steps(tiny_cache, case), rel=1e-4), case


def test_a_loss_that_is_no_number_names_the_samples_of_its_rank_on_every_rank(two):
    told = [json.loads((two / f"told_{rank}.json").read_text())["poisoned"] for rank in (0, 1)]
    assert told[0] == told[1]
    assert "Step 3: loss nan" in told[0]
    assert "(4 samples)" in told[0]
    assert checkpoints.latest(two / "poisoned") is None


def test_ranks_without_a_disk_in_common_go_on_from_the_first_ones_checkpoint_or_refuse(two):
    for rank in (0, 1):
        told = json.loads((two / f"told_{rank}.json").read_text())
        steps, is_written_elsewhere, refusal = told["two disks"]
        assert steps == 12
        assert not is_written_elsewhere
        assert re.search(
            r"step_00000012\.pt, and \S+, where .* Start \S+ with --node-rank 0", refusal
        )


def test_a_batch_that_does_not_divide_among_processes_is_refused(two):
    told = json.loads((two / "told_1.json").read_text())
    assert "9 images cannot be cut into 2 equal parts" in told["uneven"]
    assert "has 4 images of a batch, no multiple of data.micro_batch_size 8" in told["micro"]


def test_a_process_that_is_killed_is_started_again_and_changes_nothing(alone, tiny_cache, tmp_path):
    ended = torchrun(tiny_cache, tmp_path, "killed", "--max-restarts", "1")
    assert ended.returncode == 0, ended.stderr
    assert "resuming from" in ended.stderr
    assert_close(alone, tmp_path)


def test_sigterm_to_one_process_stops_all_after_the_same_step(alone, two, tiny_cache):
    out = two / "terminated"
    assert max(losses(out)) == 8
    assert checkpoints.load(out).header.progress.step == 8
    train.run(tiny_config(**MANNER), tiny_cache, out)
    assert_close(alone, out)


def test_the_parts_of_all_ranks_are_the_whole_batch():
    sizes = [10, 0, 13]
    whole = BatchOrder(sizes, 6, seed=3)
    for num_ranks in (1, 2, 3, 6):
        share = 6 // num_ranks
        parts = [
            BatchOrder(sizes, 6, seed=3, first=rank * share, count=share)
            for rank in range(num_ranks)
        ]
        for step in range(7):
            read = [pick for part in parts for pick in part.picks(step)]
            assert read == whole.picks(step)


@pytest.mark.parametrize(
    ("sizes", "expected"), [((8, None, 2), (4, 4)), ((8, 2, 2), (4, 2)), ((9, 3, 1), (9, 3))]
)
def test_a_batch_is_cut_into_parts_and_those_into_micro_batches(sizes, expected):
    assert split_batch(*sizes) == expected


def test_a_micro_batch_larger_than_a_part_is_refused():
    with pytest.raises(ConfigError, match=r"Set that to a divisor of 2"):
        split_batch(8, 4, 4)
