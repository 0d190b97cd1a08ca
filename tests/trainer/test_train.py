"""The loop learns, resumes to the bit and refuses what does not go together."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    FormatVersionError,
    NotFiniteError,
    TokenizerMismatchError,
)
from cache_builder.stores import open_store
from tests import factories
from tests.clusters import descendants, wait_for_end
from tests.trainer.caches import make_cache, tiny_config
from tests.trainer.logs import losses
from trainer import checkpoint as checkpoints
from trainer import train
from trainer.model import uses_bf16

TRAIN = """
import sys
from pathlib import Path
from tests.trainer.caches import tiny_config
from trainer import train
import torch
torch.set_num_threads(1)
cache, out = map(Path, sys.argv[1:])
train.run(tiny_config(run={"checkpoint_every": 3}, **{MANNER}), cache, out)
"""

# Everything that has a state of its own, or draws at random.
MANNER = {
    "data": {"micro_batch_size": 2, "color_jitter": 0.4},
    "model": {"drop_path": 0.3},
    "optim": {"ema": 0.9, "layer_decay": 0.8},
}
TRAIN = TRAIN.replace("{MANNER}", repr(MANNER))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("trained"))


def weights(path):
    return checkpoints.load(path).model


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_learns_what_visible_patches_tell_of_masked_ones(tmp_path):
    # Every picture is one plain colour, so a visible patch names the token of every masked one.
    plain = {
        f"{i:03d}.png": factories.encode(factories.draw_patches(np.full((4, 4), i % 6)))
        for i in range(48)
    }
    images = factories.write_folder(tmp_path / "images", plain)
    codebook = factories.write_codebook(tmp_path / "codebook.safetensors")
    factories.build_cache(images=str(images), codebook=codebook, out=tmp_path / "cache")
    config = tiny_config(run={"steps": 80}, data={"batch_size": 16})
    summary = train.run(config, tmp_path / "cache", tmp_path / "run")
    assert summary.finished
    assert summary.first_loss == pytest.approx(math.log(len(factories.COLOURS)), rel=0.1)
    assert summary.final_loss < 0.6


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_a_killed_run_repeats_the_losses_of_an_undisturbed_one_to_the_bit(tmp_path, layout):
    cache = make_cache(tmp_path, layout=layout)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = tiny_config(run={"checkpoint_every": 3}, **MANNER)
    train.run(config, cache, whole)
    argv = [sys.executable, "-c", TRAIN, str(cache), str(killed)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # noqa: PTH109
    process = subprocess.Popen(argv, env=environment)
    while checkpoints.latest(killed) is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.run(config, cache, killed)
    assert losses(killed) == losses(whole)
    assert_equal_weights(weights(killed), weights(whole))
    ends = [checkpoints.load(out).average for out in (killed, whole)]
    assert_equal_weights(*ends)


def test_stopping_and_going_on_changes_nothing_wherever_it_happens(cache, tmp_path):
    config = tiny_config(**MANNER)
    train.run(config, cache, tmp_path / "whole")
    for stop_after in (1, 4, 7):
        train.run(config, cache, tmp_path / "parts", stop_after=stop_after)
    train.run(config, cache, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_equal_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_another_number_of_workers_goes_on_with_the_very_next_batch(cache, tmp_path):
    train.run(tiny_config(), cache, tmp_path / "whole")
    train.run(tiny_config(data={"num_workers": 2}), cache, tmp_path / "parts", stop_after=5)
    train.run(tiny_config(), cache, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_cache_on_object_storage_trains_as_the_same_one_on_a_disk(cache, bucket, tmp_path):
    there = open_store(f"{bucket}/cache")
    for path in cache.rglob("*"):
        if path.is_file():
            there.publish(path.relative_to(cache).as_posix(), path.read_bytes())
    train.run(tiny_config(), cache, tmp_path / "disk", stop_after=4)
    train.run(tiny_config(), f"{bucket}/cache", tmp_path / "store", stop_after=4)
    assert losses(tmp_path / "store") == losses(tmp_path / "disk")


def test_sigterm_finishes_the_step_and_writes_a_checkpoint(cache, tmp_path):
    argv = [sys.executable, "-c", TRAIN.replace("{", '{"steps": 100_000, ', 1), str(cache)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # noqa: PTH109
    process = subprocess.Popen([*argv, str(tmp_path)], env=environment)
    while checkpoints.latest(tmp_path) is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=30) == 0
    newest = checkpoints.latest(tmp_path)
    assert checkpoints.load(newest).header.progress.step == max(losses(tmp_path))


def test_a_killed_run_leaves_no_worker_behind(cache, tmp_path):
    program = TRAIN.replace("{", '{"steps": 100_000, ', 1)
    program = program.replace("'color_jitter'", "'num_workers': 1, 'color_jitter'")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # noqa: PTH109
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(cache), str(tmp_path)], env=environment
    )
    while checkpoints.latest(tmp_path) is None:
        assert process.poll() is None
        time.sleep(0.01)
    below = descendants(process.pid)
    assert len(below) >= 2  # the fork server and the worker
    process.kill()
    process.wait()
    wait_for_end(below, timeout_s=30)


def test_a_finished_run_has_nothing_to_do(cache, tmp_path):
    first = train.run(tiny_config(), cache, tmp_path)
    again = train.run(tiny_config(), cache, tmp_path)
    assert again.steps == first.steps
    assert again.checkpoint == first.checkpoint
    assert len(losses(tmp_path)) == 12


def test_tokens_of_another_tokenizer_are_refused_by_both_names(cache, tmp_path):
    out = tmp_path / "run"
    train.run(tiny_config(), cache, out, stop_after=2)
    images = factories.write_folder(tmp_path / "images", factories.patch_images(24))
    other = factories.write_codebook(tmp_path / "c.safetensors", colours=factories.COLOURS[::-1])
    factories.build_cache(
        images=str(images), codebook=other, out=tmp_path / "other", num_views=2, unit_size=10
    )
    names = [
        checkpoints.CacheManifest.load(path).fingerprint for path in (cache, tmp_path / "other")
    ]
    with pytest.raises(TokenizerMismatchError, match=f"{names[0]}.*{names[1]}"):
        train.run(tiny_config(), tmp_path / "other", out)


def test_changed_settings_are_refused_with_the_difference(cache, tmp_path):
    train.run(tiny_config(), cache, tmp_path, stop_after=2)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.002, is 0.001"):
        train.run(tiny_config(optim={"lr": 1e-3}), cache, tmp_path)


def test_a_longer_run_may_go_on_from_a_shorter_one(cache, tmp_path):
    train.run(tiny_config(), cache, tmp_path)
    assert train.run(tiny_config(run={"steps": 15}), cache, tmp_path).steps == 15


def test_a_loss_that_is_no_number_names_the_samples_and_leaves_no_checkpoint(cache, tmp_path):
    config = tiny_config(optim={"lr": 1e30, "clip_norm": None, "warmup_steps": 0})
    with pytest.raises(
        NotFiniteError, match=r"Step \d+: loss nan.*[ab]/\d{3}.*8 samples.*optim.lr"
    ):
        train.run(config, cache, tmp_path)
    assert checkpoints.latest(tmp_path) is None


def test_only_the_newest_checkpoints_are_kept(cache, tmp_path):
    train.run(tiny_config(run={"checkpoint_every": 2, "keep_checkpoints": 3}), cache, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000008.pt", "step_00000010.pt", "step_00000012.pt"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(cache, tmp_path, caplog):
    config = tiny_config(run={"checkpoint_every": 4, "keep_checkpoints": 2})
    newest = train.run(config, cache, tmp_path).checkpoint
    undisturbed = losses(tmp_path), weights(newest)
    factories.flip_byte(newest)
    assert train.run(config, cache, tmp_path).steps == 12
    assert re.search(
        rf"{newest.name} is damaged.* member .*from step_00000008.pt instead", caplog.text
    )
    assert losses(tmp_path) == undisturbed[0]
    assert_equal_weights(weights(newest), undisturbed[1])


def test_a_damaged_checkpoint_of_a_later_step_does_not_outlive_the_next_one(cache, tmp_path):
    config = tiny_config(run={"checkpoint_every": 3, "keep_checkpoints": 1})
    train.run(config, cache, tmp_path, stop_after=3)
    later = tmp_path / "checkpoints" / "step_00000007.pt"
    later.write_bytes(b"PK")
    train.run(config, cache, tmp_path, stop_after=6)
    names = sorted(path.name for path in later.parent.iterdir())
    assert names == ["step_00000006.pt"]


def test_a_run_without_a_good_checkpoint_says_how_to_begin_again(cache, tmp_path):
    newest = train.run(tiny_config(), cache, tmp_path).checkpoint
    factories.flip_byte(newest)
    with pytest.raises(ArtifactError, match=rf"{newest.name}.*No good checkpoint.*begin again"):
        train.run(tiny_config(run={"steps": 20}), cache, tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no zip", b"hello"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, data):
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged or not a checkpoint"):
        checkpoints.load(path)


def test_a_checkpoint_of_a_later_version_says_upgrade(cache, tmp_path):
    path = train.run(tiny_config(), cache, tmp_path, stop_after=1).checkpoint
    content = torch.load(path, weights_only=True)
    content["header"] = content["header"].replace('"format_version":1', '"format_version":2')
    torch.save(content, path)
    with pytest.raises(FormatVersionError, match=r"format version 2.*Upgrade"):
        checkpoints.load(path)


def test_a_cache_of_another_grid_does_not_fit_the_image_size(cache, tmp_path):
    with pytest.raises(ConfigError, match=r"18 x 18 pixels cannot be cut into 4 x 4"):
        train.run(tiny_config(data={"image_size": 18}), cache, tmp_path)


def test_auto_precision_is_bf16_only_where_the_device_computes_in_it():
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(n) for n in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    assert uses_bf16("auto", torch.device("cpu")) == bool(native)
    assert uses_bf16("bf16", torch.device("cpu"))
    assert not uses_bf16("fp32", torch.device("cpu"))


def test_bf16_trains_too(cache, tmp_path):
    summary = train.run(tiny_config(run={"precision": "bf16", "steps": 4}), cache, tmp_path)
    assert math.isfinite(summary.final_loss)
