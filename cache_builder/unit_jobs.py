"""Where `verify` works on its units: few in this process, many on Ray."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from cache_builder.ray_actor import UnitWorker
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units

FEW_CHECKS = 16  # are done before a Ray has started
FEW_BUILDS = 2

_U = TypeVar("_U")
_R = TypeVar("_R")


def run_units(
    make_worker: Callable[[], UnitWorker[_U, _R]],
    units: Sequence[_U],
    cluster: ClusterOptions,
    few: int,
) -> Iterator[_R]:
    """Yield the result of every unit, in the order in which they are done.

    Args:
        make_worker: Makes what does the work; it and the units can be pickled.
        units: What is to be done.
        cluster: Where, if they are more than a few; one worker of this machine is this process.
        few: So many are done here.

    Raises:
        PatchCacheError: What a worker raised.
    """
    if not units:
        return
    if len(units) <= few or (cluster.num_workers == 1 and cluster.address is None):
        cluster = cluster._replace(num_workers=0)
    with contextlib.closing(map_units(make_worker, units, cluster, job="verify")) as finished:
        for result, _, _ in finished:
            yield result
