"""Clusters of several raylets on one machine, as on several machines."""

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
