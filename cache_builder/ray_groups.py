"""Objects that hold a share of some work, each in a Ray actor of its own."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cache_builder.errors import ConfigError, WorkerLostError
from cache_builder.ray_cluster import Cluster, ClusterOptions, connect, use_one_thread

logger = logging.getLogger(__name__)

_SMALL_BYTES = 100_000  # what is sent with a call rather than put into the object store


class ActorGroup:
    """Objects in processes of their own that are all asked at once and keep what they know.

    Where `ray_jobs.map_units` is for work that may be done anywhere and twice, these hold state:
    when one dies, its state is lost, and so is what they do together.
    """

    def __init__(self, cluster: Cluster, actors: list[Any]) -> None:
        self._cluster = cluster
        self._actors = actors

    def __len__(self) -> int:
        return len(self._actors)

    def call(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every object, with arguments of its own; return the answers in order.

        Arguments that are the same object for all are sent once.

        Raises:
            PatchCacheError: What an object raised.
            WorkerLostError: A process died, or the head node is gone.
        """
        large = {id(arg): arg for args in arguments for arg in args if _is_large(arg)}
        stored = {key: self._cluster.ray.put(arg) for key, arg in large.items()}
        pending = [
            actor.call.remote(method, *(stored.get(id(arg), arg) for arg in args))
            for actor, args in zip(self._actors, arguments, strict=True)
        ]
        return [self._answer(reference) for reference in pending]

    def call_one(self, number: int, method: str, *args: Any) -> Any:
        """Call a method of one object."""
        return self._answer(self._actors[number].call.remote(method, *args))

    def _answer(self, reference: Any) -> Any:
        while not self._cluster.wait([reference]):
            pass
        try:
            return self._cluster.fetch(reference)
        except Exception as exc:
            if not self._cluster.is_loss(exc):
                raise
            raise WorkerLostError(
                "A Ray actor that held a share of the work died (out of memory, or its node was "
                "lost). Run the same command again; more workers hold less each."
            ) from exc


@contextlib.contextmanager
def actor_group(
    makers: Sequence[Callable[[], Any]], options: ClusterOptions
) -> Iterator[ActorGroup]:
    """Make an object in an actor of its own for every maker.

    Args:
        makers: Pickled, and called in the actors.
        options: Where they run; its number of workers is not looked at.

    Raises:
        ConfigError: The cluster cannot be reached, or this machine has too few GPUs.
    """
    with connect(options) as cluster:
        # All of them are needed at once, so they must all find a place.
        num_cpus = cluster.cpus_for_each(len(makers), options.cpus_per_worker)
        num_places = cluster.num_places(options._replace(cpus_per_worker=num_cpus))
        if num_places < len(makers):
            message = (
                f"{len(makers)} workers of {options.gpus_per_worker:g} GPUs each are needed at "
                f"once, and {num_places} find a place: Ray sees {cluster.describe_resources()}. "
                "Fewer --fit-workers or --gpus-per-worker need less."
            )
            if options.address in {None, "local"}:
                raise ConfigError(message)
            logger.warning("%s Waiting for nodes that join.", message)
        actor_class = cluster.ray.remote(_Member).options(
            num_cpus=num_cpus, num_gpus=options.gpus_per_worker
        )
        actors = [actor_class.remote(make) for make in makers]
        try:
            yield ActorGroup(cluster, actors)
        finally:
            for actor in actors:
                cluster.ray.kill(actor)


class _Member:
    """An object in a process of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        use_one_thread()
        self._object = make()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._object, method)(*args)


def _is_large(value: Any) -> bool:
    """Say whether a value is worth a place in the object store."""
    return bool(getattr(value, "nbytes", 0) > _SMALL_BYTES)
