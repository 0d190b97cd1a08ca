"""Workers that a build waits for make Ray's autoscaler add nodes, and idle nodes leave again."""

import json
import os
import subprocess
import sys

import pytest

from tests import factories
from tests.autoscaling import ADDED, configuration
from tests.clusters import descendants, kill_all, new_cluster, wait_until
from tests.places import ROOT
from tests.servers import free_port

pytestmark = [pytest.mark.hosts, pytest.mark.ray, pytest.mark.timeout(600)]
NUM_UNITS = 8
IDLE_S = 6  # after which a node leaves


class ScalingCluster:
    """A head node without CPUs, and Ray's autoscaler, which may add two nodes of one CPU."""

    def __init__(self, folder):
        import ray

        # The autoscaler must be told of the head's port before the head is there.
        port = free_port()
        address = f"{ray.util.get_node_ip_address()}:{port}"
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(configuration(address, folder, IDLE_S)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))  # where the autoscaler finds its provider
            patch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
            self._cluster = new_cluster(
                num_cpus=0, gcs_server_port=port, autoscaling_config=str(config),
                include_dashboard=False,
            )  # fmt: skip
        self.address = self._cluster.address

    def added_nodes(self):
        """Return the ids of the nodes that have been added, and of those the ones still alive."""
        nodes = {
            node["NodeID"]: node["Alive"]
            for node in self._cluster.global_state.node_table()
            if node["NodeID"].startswith(ADDED)
        }
        return set(nodes), {node for node, is_alive in nodes.items() if is_alive}

    def processes(self):
        """Return every process of the cluster; those of added nodes are below the autoscaler."""
        infos = [info for some in self._cluster.head_node.all_processes.values() for info in some]
        return [pid for info in infos for pid in (info.process.pid, *descendants(info.process.pid))]

    def shutdown(self):
        """End all processes; Ray's helpers take their time after the end of their raylets."""
        running = self.processes()
        self._cluster.shutdown()
        kill_all(running)


@pytest.fixture
def cluster(tmp_path):
    cluster = ScalingCluster(tmp_path)
    yield cluster
    cluster.shutdown()


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
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400,
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
