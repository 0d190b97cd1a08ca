"""The scripts for Slurm with the real `torchrun` and `ray` on two nodes, both of them this machine.

Slurm's own commands are the small programs of `tests.deploy.slurm`.
"""

import json
import signal

import pytest

from tests import factories
from tests.deploy.slurm import started_jobs
from tests.trainer.caches import make_cache

pytestmark = pytest.mark.hosts

RECIPE = """
[data]
batch_size = 8
[model]
name = "vit_tiny_patch16_224"
embed_dim = 32
depth = 2
num_heads = 2
[objective]
mask_ratio = 0.5
mask_kind = "random"
[optim]
lr = 0.002
warmup_steps = 1
[run]
steps = 2
precision = "fp32"
device = "cpu"
log_every = 1
"""


@pytest.fixture
def start(tmp_path):
    with started_jobs(lambda number: tmp_path / f"job{number}") as start:
        yield start


def steps_of(run):
    log = run / "log.jsonl"
    return (
        [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
    )


def test_two_nodes_train_stop_in_time_and_go_on(start, tmp_path):
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    command = ("train.sbatch", recipe, "--cache", make_cache(tmp_path), "--out", run)
    nodes = {"PROCESSES_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    job = start(*command, **nodes)
    assert job.process.wait(250) == 0, job.output
    assert steps_of(run) == [1, 2]

    longer = tmp_path / "longer"
    command = (*command[:-1], longer, "--set", "run.steps=1000000")
    job = start(*command, **nodes)
    job.wait_until(lambda: steps_of(longer), 250)
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(250) != 0
    assert "the run is saved" in job.output
    assert job.requeued.exists()
    num_done = steps_of(longer)[-1]
    assert list((longer / "checkpoints").glob(f"*{num_done:08}*"))

    job = start(*command, SLURM_RESTART_COUNT="1", **nodes)
    job.wait_until(lambda: steps_of(longer)[-1] > num_done, 250)
    assert "resuming from" in job.output


def test_two_nodes_build_what_one_process_builds(start, tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(12))
    job = start(
        "build.sbatch", "--images", images, "--codebook", codebook_path, "--out",
        tmp_path / "cache", "--unit-size", 3, "--workers", 2, "--device", "cpu",
    )  # fmt: skip
    assert job.process.wait(250) == 0, job.output
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=tmp_path / "alone", unit_size=3
    )
    for part in ("shards", "units"):
        expected = factories.contents(tmp_path / "alone" / part)
        assert factories.contents(tmp_path / "cache" / part) == expected
