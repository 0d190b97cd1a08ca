"""One node of a Ray cluster as a process: it ends with its raylet, or when its stdin does.

    python tests/raylet.py '{"node_id": "ff...", "gcs_address": "10.0.0.1:6379", "num_cpus": 1}'

Ray takes a node for lost that has not joined after 30 seconds, which no setting changes, but leaves
its raylet running: this process goes on waiting. Whoever starts it holds the other end of stdin, so
that it ends, however little of the node has started, even with one that is killed.
"""

import json
import os
import sys
import threading

from ray._private.node import Node
from ray._private.parameter import RayParams


def main() -> int:
    settings = json.loads(sys.argv[1])
    threading.Thread(target=end_with_stdin, daemon=True).start()
    raylet = start_raylet(**settings)
    return raylet.wait()


def end_with_stdin():
    sys.stdin.buffer.read()
    os._exit(0)  # the kernel ends the raylet with its parent


def start_raylet(*, node_id, gcs_address, num_cpus):
    """Start a node and return the process of its raylet, which may have yet to join."""
    parameters = RayParams(
        gcs_address=gcs_address,
        redis_address=gcs_address,
        num_cpus=num_cpus,
        object_store_memory=150 << 20,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        dashboard_agent_listen_port=0,
        include_log_monitor=False,
        env_vars={"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id},
    )
    node = Node.__new__(Node)
    try:
        node.__init__(parameters, head=False, shutdown_at_exit=False, spawn_reaper=True)
    except Exception as exc:
        if "timed out during startup" not in str(exc):
            raise
        sys.stderr.write(f"{exc} It is waited for.\n")
    return node.all_processes["raylet"][0].process


if __name__ == "__main__":
    sys.exit(main())
