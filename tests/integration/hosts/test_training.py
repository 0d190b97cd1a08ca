"""Two hosts train by torchrun from a cache on object storage, and one of them is killed."""

import json

import pytest
import torch

from cache_builder.stores import open_store
from tests.integration import builds
from tests.integration.hosts import storage
from tests.integration.hosts.network import network
from tests.trainer.caches import make_cache
from trainer import checkpoint as checkpoints
from trainer import train
from trainer.config import load_config

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("hosts_are_possible"),
]

CACHE = f"{storage.BUCKET}/cache"
RECIPE = """
data = { batch_size = 8, micro_batch_size = 4 }
model = { name = "vit_tiny_patch16_224", embed_dim = 32, depth = 2, num_heads = 2 }
objective = { method = "beit", mask_ratio = 0.5, mask_kind = "random" }
optim = { lr = 2e-3, warmup_steps = 2 }
run = { steps = 60, precision = "fp32", device = "cpu", log_every = 1, checkpoint_every = 20 }
"""
KILLED_AFTER = 30  # steps


class Group:
    """A run on hosts that share nothing but the network; each has a disk of its own."""

    def __init__(self, hosts, folder, recipe):
        self.hosts = hosts
        self._folder = folder
        self._recipe = recipe
        self._out = folder / "run"  # the same path on every host
        for host in hosts:
            host.give_environment({"GLOO_SOCKET_IFNAME": "eth0"})
            host.give_place(self._out, folder / host.name)
        self.disks = [folder / host.name for host in hosts]

    def start(self):
        first = self.hosts[0]
        self.processes = []
        for rank, host in enumerate(self.hosts):
            torchrun = ["-m", "torch.distributed.run", "--nnodes", len(self.hosts)]
            torchrun += ["--node-rank", rank, "--nproc-per-node", 1]
            torchrun += ["--master-addr", first.name, "--master-port", 29500]
            words = ["-m", "cache_builder", "train", self._recipe, "--out", self._out]
            words += ["--cache", CACHE, "--set", "data.num_workers=1"]
            self.processes.append(host.start_python([*torchrun, *words], self._log(host)))

    def wait(self):
        return [process.wait(builds.TIMEOUT_S) for process in self.processes]

    def told(self):
        return "\n".join(self._log(host).read_text() for host in self.hosts)

    def _log(self, host):
        return self._folder / f"{host.name}.log"


def test_two_hosts_train_from_object_storage_as_one_and_go_on_after_one_was_killed(
    tmp_path, monkeypatch
):
    cache = make_cache(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    with network("storage", "one", "two") as (disk, *hosts):
        storage.start(disk, hosts, tmp_path, monkeypatch)
        store = open_store(CACHE)
        for name, data in builds.contents(cache).items():
            store.publish(name, data)
        alone = tmp_path / "alone"
        train.run(load_config(recipe), CACHE, alone)

        group = Group(hosts, tmp_path, recipe)
        written, other = group.disks
        group.start()
        builds.wait_for(
            lambda: len(losses(written)) >= KILLED_AFTER or group.processes[0].poll() is not None
        )
        hosts[1].kill()
        assert group.wait()[0] == 1, group.told()
        before = losses(written)
        assert KILLED_AFTER <= len(before) < len(losses(alone))
        told, _, _ = group.told().partition("failed (exitcode: 1)")  # what torchrun says of it
        assert "patchcache train: Another of the 2 processes of this run is gone" in told
        assert "Traceback" not in told

        group.start()
        assert group.wait() == [0, 0], group.told()
        assert "resuming from" in group.told()
        assert not list(other.rglob("*.pt"))  # it was sent what it went on from
    after = losses(written)
    assert {step: after[step] for step in before} == before
    assert after == pytest.approx(losses(alone), rel=1e-5)
    torch.testing.assert_close(ends(written), ends(alone), rtol=1e-4, atol=1e-5)


def ends(out):
    """Return the weights at the end of a run."""
    return checkpoints.load(out).model


def losses(out):
    """Return the losses of whole lines of a log, by step."""
    path = out / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}
