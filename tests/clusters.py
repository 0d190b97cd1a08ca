"""Clusters of several raylets on one machine, as on several machines, and their processes."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cache_builder.ray_cluster import start_patiently


def new_cluster(**head: Any) -> Any:
    """Start the head node of a cluster, which gets more nodes by `add_node`."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    add_node(cluster, **head)
    return cluster


def add_node(cluster: Any, **settings: Any) -> Any:
    """Add a node, and be patient with it: the machine may be busy."""
    return start_patiently(lambda: cluster.add_node(**settings), lambda: None)


def children(pid: int) -> list[int]:
    """Return the processes that one has started, in whichever thread, as Linux lists them."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [int(child) for child in listed.read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def kill_all(pids: Iterable[int]) -> None:
    """End processes as nothing else does; those that have ended already are passed over."""
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for_end(pids)


def wait_for_end(pids: Iterable[int], timeout_s: float = 60) -> None:
    """Wait until none of these processes runs."""
    pids, started_s = list(pids), time.monotonic()
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() - started_s < timeout_s, left
        time.sleep(0.1)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait until something is so."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, f"not so after {timeout_s:g} s"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Say whether a process runs; one that has ended may wait for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
