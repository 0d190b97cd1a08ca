"""Workers that a build waits for make Ray's autoscaler add nodes, and idle nodes leave again."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_builder.ray_cluster import start_patiently
from tests import factories

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
ADDED = "f" * 51  # how the ids of nodes begin that the provider adds; a number follows
NUM_UNITS = 8


class ScalingCluster:
    """A head node without CPUs, and a provider whose nodes of one CPU are raylets."""

    def __init__(self, folder):
        from ray._raylet import GcsClient

        with pytest.MonkeyPatch.context() as patch:
            # As on other machines, nothing of ours is there before a job brings it along.
            patch.delenv("PYTHONPATH", raising=False)
            patch.setenv("RAY_FAKE_CLUSTER", "1")
            patch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
            self._cluster = start_patiently(lambda: start_head(folder), lambda: None)
        self.address = self._cluster.address
        self._gcs = GcsClient(address=self.address)

    def added_nodes(self):
        """Return the ids of the nodes that the autoscaler has added, and those still alive."""
        nodes = self._gcs.get_all_node_info().values()
        added = {node.node_id.hex(): node.state == 0 for node in nodes}
        added = {name: alive for name, alive in added.items() if name.startswith(ADDED)}
        return set(added), {name for name, alive in added.items() if alive}

    def shutdown(self):
        self._cluster.shutdown()


def start_head(folder):
    """Start the head at a port that the autoscaler can be told of before it is there."""
    import ray
    from ray.cluster_utils import Cluster

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = folder / f"autoscaler-{port}.json"
    config.write_text(json.dumps(autoscaler_config(f"{ray.util.get_node_ip_address()}:{port}")))
    cluster = Cluster()
    cluster.add_node(
        num_cpus=0, gcs_server_port=port, autoscaling_config=str(config), include_dashboard=False
    )
    return cluster


def autoscaler_config(address):
    """Return the settings of a cluster that grows to two nodes beside the head."""
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 0.25,
        "upscaling_speed": 1,
        "provider": {
            # Ray knows it as `fake_multinode`, and then looks for a file that its wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes have the same address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {
                "resources": {"CPU": 1, "object_store_memory": 150 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        # How a machine is set up: here there is nothing to do, but Ray asks for the keys.
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{
            name: []
            for name in (
                "initialization_commands",
                "setup_commands",
                "head_setup_commands",
                "worker_setup_commands",
                "head_start_ray_commands",
                "worker_start_ray_commands",
                "cluster_synced_files",
                "rsync_exclude",
                "rsync_filter",
            )
        },
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def cluster(tmp_path):
    cluster = ScalingCluster(tmp_path)
    yield cluster
    cluster.shutdown()


def wait_until(condition, timeout_s=120):
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s
        time.sleep(0.2)


def test_a_build_makes_the_cluster_grow_and_its_bytes_are_those_of_one_process(
    tmp_path, codebook_path, cluster
):
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(2 * NUM_UNITS))
    assert cluster.added_nodes() == (set(), set())
    done = subprocess.run(
        [
            sys.executable, "-m", "cache_builder.cli", "build", "--images", images,
            "--codebook", codebook_path, "--out", tmp_path / "cache", "--unit-size", "2",
            "--device", "cpu", "--ray-address", cluster.address, "--workers", "2",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The head has no CPU: every unit was done on a node that came because of it.
    assert "no node has room for a worker of 1 CPUs and 0 GPUs" in done.stderr
    assert cluster.added_nodes()[0]
    factories.build_cache(
        images=str(images), codebook=codebook_path, unit_size=2, out=tmp_path / "alone"
    )
    for part in ("shards", "units"):
        expected = factories.contents(tmp_path / "alone" / part)
        assert len(expected) == NUM_UNITS
        assert factories.contents(tmp_path / "cache" / part) == expected
    wait_until(lambda: not cluster.added_nodes()[1])
