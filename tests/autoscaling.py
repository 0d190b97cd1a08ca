"""Nodes for Ray's own autoscaler that are processes of this machine.

The autoscaler asks a provider for machines. Ray's own for tests starts a node within 30 seconds or
fails; this one starts it as a process of its own (`raylet.py`) and returns at once, as a cloud
does. A node that does not come up is gone from the list, and the autoscaler asks for another one.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

HEAD, SMALL = "head", "small"  # types of nodes
ADDED = "f" * 51  # how the ids of nodes begin that the provider adds; a number follows
UNUSED = {
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{
        name: []
        for name in (
            "initialization_commands", "setup_commands", "head_setup_commands",
            "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
            "cluster_synced_files", "rsync_exclude", "rsync_filter",
        )
    },
    "file_mounts_sync_continuously": False,
}  # fmt: skip
"""How a machine is set up: here there is nothing to do, but Ray asks for the keys."""


class Raylets(NodeProvider):
    """The provider; it lives in the process of the autoscaler, and its nodes end with that."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock = threading.Lock()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tags = {HEAD: _tags(HEAD, NODE_KIND_HEAD)}

    def non_terminated_nodes(self, tag_filters):
        with self._lock:
            nodes = [HEAD, *(node for node in self._processes if self.is_running(node))]
        return [node for node in nodes if tag_filters.items() <= self._tags[node].items()]

    def is_running(self, node_id):
        return not self.is_terminated(node_id)

    def is_terminated(self, node_id):
        return node_id != HEAD and self._processes[node_id].poll() is not None

    def node_tags(self, node_id):
        return self._tags[node_id]

    def set_node_tags(self, node_id, tags):
        self._tags[node_id] = self._tags[node_id] | tags

    def internal_ip(self, node_id):
        return node_id  # as `use_node_id_as_ip` wants it: all nodes have the same address

    def external_ip(self, node_id):
        return node_id

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        for _ in range(count):
            with self._lock:
                node_id = f"{ADDED}{len(self._processes) + 1:05d}"
                self._tags[node_id] = tags | _tags(SMALL, NODE_KIND_WORKER)
                self._processes[node_id] = self._start(node_id, resources["CPU"])

    def terminate_node(self, node_id):
        self._processes[node_id].kill()
        self._processes[node_id].wait()

    def _start(self, node_id: str, num_cpus: int) -> "subprocess.Popen[bytes]":
        address = self.provider_config["gcs_address"]
        settings = {"node_id": node_id, "gcs_address": address, "num_cpus": num_cpus}
        # As on other machines, nothing of ours is there before a job brings it along.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        log = Path(self.provider_config["log_folder"]) / f"{node_id.lstrip('f')}.log"
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, Path(__file__).with_name("raylet.py"), json.dumps(settings)],
                env=environment, cwd="/", stdin=subprocess.PIPE, stdout=file, stderr=file,
            )  # fmt: skip


def configuration(gcs_address: str, log_folder: Path, idle_s: float) -> dict[str, Any]:
    """Return what Ray is told about a cluster that grows to two nodes beside the head."""
    small = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1,
        "provider": {
            "type": "external",
            "module": f"{Raylets.__module__}.{Raylets.__name__}",
            "gcs_address": gcs_address,
            "log_folder": str(log_folder),
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "worker_liveness_check": False,  # it takes a node that is slow to start for lost
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            SMALL: small,
        },
        "head_node_type": HEAD,
        **UNUSED,
    }


def _tags(node_type: str, kind: str) -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: kind,
        TAG_RAY_USER_NODE_TYPE: node_type,
        TAG_RAY_NODE_NAME: node_type,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
