"""Running units of work on Ray, each exactly once as far as the caller can see.

Work is given to a pool of actors (`ray_pool`), each of which prepares itself once (loads a model,
say) and then takes unit after unit (`ray_actor`). A unit may be done twice, where an actor dies, so
it must be idempotent. Images never pass through Ray's object store.
"""

import logging
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from cache_builder.errors import ConfigError
from cache_builder.ray_actor import Finished, UnitActor, UnitWorker
from cache_builder.ray_cluster import ClusterOptions, connect
from cache_builder.ray_pool import ActorPool

logger = logging.getLogger(__name__)

_U = TypeVar("_U")
_R = TypeVar("_R")

_UNITS_IN_FLIGHT = 2  # per actor that works on one, so that none waits for the driver


def _no_counts(result: object) -> Mapping[str, float]:
    return {}


def _plain_name(unit: object) -> str:
    return f"unit {unit}"


def map_units(
    make_worker: Callable[[], UnitWorker[_U, _R]],
    units: Iterable[_U],
    options: ClusterOptions,
    *,
    job: str = "job",
    describe: Callable[[_U], str] = _plain_name,
    count: Callable[[_R], Mapping[str, float]] = _no_counts,
    at_once: int = 1,
) -> Generator[Finished[_R], None, None]:
    """Yield the result of every unit, in the order in which they are done.

    What a worker logs, from warnings on, is logged here once more.

    Args:
        make_worker: Called once in every actor; it and the units are pickled.
        units: Not consumed much faster than the work is done.
        options: Where the work runs.
        job: Name of the job among the metrics of the cluster.
        describe: Names a unit in messages, and says where to look.
        count: Called in the actor: what a result adds to the metrics of the cluster.
        at_once: Units that an actor works on at the same time, each in a thread. In this process
            (no workers) it is one.

    Raises:
        PatchCacheError: What a worker raised.
        ConfigError: The cluster cannot be reached.
        WorkerLostError: A unit killed every worker that took it, no worker lives long enough to
            take one, or the head node is gone.
    """
    if options.num_workers == 0:
        yield from _here(make_worker, units)
        return
    remaining = iter(units)
    first = list(islice(remaining, 1))
    if not first:
        return
    with connect(options) as cluster:
        num_places = cluster.num_places(options)
        num_workers = options.num_workers or max(1, num_places)
        num_cpus = options.cpus_per_worker
        if options.address in {None, "local"}:
            # No node will be added to this machine: what does not fit would wait for ever.
            num_cpus = cluster.cpus_for_each(num_workers, num_cpus)
            if not cluster.num_places(options._replace(cpus_per_worker=num_cpus)):
                raise ConfigError(
                    f"--gpus-per-worker {options.gpus_per_worker:g} finds no place: Ray sees "
                    f"{cluster.describe_resources()}."
                )
        elif not num_places:
            logger.warning(
                "no node has room for a worker of %g CPUs and %g GPUs: the cluster has %s. "
                "Waiting for one that joins; fewer --cpus-per-worker or --gpus-per-worker need "
                "less.",
                options.cpus_per_worker, options.gpus_per_worker, cluster.describe_resources(),
            )  # fmt: skip
        actor_class = cluster.ray.remote(UnitActor).options(
            num_cpus=num_cpus,
            num_gpus=options.gpus_per_worker,
            max_restarts=0,
            max_concurrency=at_once,
        )
        pool: ActorPool[_U, _R] = ActorPool(
            cluster,
            lambda: actor_class.remote(make_worker, job, count),
            job,
            describe,
            _UNITS_IN_FLIGHT + at_once - 1,
        )
        with pool:
            yield from pool.run(first, remaining, num_workers)


def _here(
    make_worker: Callable[[], UnitWorker[_U, _R]], units: Iterable[_U]
) -> Iterator[Finished[_R]]:
    """Do the units in this process, one after another."""
    worker, node = make_worker(), socket.gethostname()
    for unit in units:
        started_s = time.monotonic()
        result = worker.run(unit)
        yield Finished(result, node, time.monotonic() - started_s)
