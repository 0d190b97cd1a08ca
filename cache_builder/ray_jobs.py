"""Running units of work on Ray: the only `import ray` of this package.

By default a cluster of this machine's cores is started and stopped again; with an address, the
job joins a running cluster. Work is given to a pool of actors, each of which prepares itself once
(loads a model, say) and then takes unit after unit. Ray restarts a dead actor and repeats its
unit, so a unit must be idempotent; images never pass through Ray's object store.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from cache_builder.errors import (
    ConfigError,
    MissingDependencyError,
    PatchCacheError,
    WorkerLostError,
)

logger = logging.getLogger(__name__)

_UnitT = TypeVar("_UnitT", contravariant=True)
_ResultT = TypeVar("_ResultT", covariant=True)
_U = TypeVar("_U")
_R = TypeVar("_R")

_UNITS_IN_FLIGHT = 2  # per actor, so that none waits for the driver
_MAX_TRIES = 4  # of one unit, when actors keep dying
_SMALL_BYTES = 100_000  # what is sent with a call rather than put into the object store


class UnitWorker(Protocol[_UnitT, _ResultT]):
    """What an actor does with a unit."""

    def run(self, unit: _UnitT) -> _ResultT:
        """Do one unit of work; doing it twice is the same as doing it once."""


class ClusterOptions(NamedTuple):
    """Where the work runs."""

    address: str | None = None  # None: a cluster of this machine alone, for this job alone
    num_workers: int | None = None  # None: one per CPU of the cluster; 0: here, without Ray
    gpus_per_worker: float = 0


def map_units(
    make_worker: Callable[[], UnitWorker[_U, _R]], units: Iterable[_U], options: ClusterOptions
) -> Iterator[_R]:
    """Yield the result of every unit, in the order in which they are done.

    Args:
        make_worker: Called once in every actor that gets a unit; it and the units are pickled.
        units: Not consumed faster than the work is done.
        options: Where the work runs.

    Raises:
        PatchCacheError: What a worker raised.
        ConfigError: The cluster cannot be reached.
    """
    if options.num_workers == 0:
        worker = make_worker()
        yield from map(worker.run, units)
        return
    with _cluster(options.address) as ray:
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        num_workers = options.num_workers or num_cpus
        actor_class = ray.remote(_Actor).options(
            num_cpus=_cpus_of_each(ray, num_workers),
            num_gpus=options.gpus_per_worker,
            max_restarts=_MAX_TRIES - 1,
            max_task_retries=_MAX_TRIES - 1,
        )
        actors = [actor_class.remote(make_worker) for _ in range(num_workers)]
        remaining = iter(units)
        waiting: dict[Any, Any] = {}

        def submit(actor: Any) -> None:
            for unit in islice(remaining, 1):
                waiting[actor.run.remote(unit)] = actor

        for _ in range(_UNITS_IN_FLIGHT):
            for actor in actors:
                submit(actor)
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            actor = waiting.pop(done[0])
            result = _get(ray, done[0])
            submit(actor)
            yield result


class ActorGroup:
    """Objects in processes of their own that are all asked at once and keep what they know.

    Where `map_units` is for work that may be done anywhere and twice, these hold state: when one
    dies, its state is lost, and so is what they do together.
    """

    def __init__(self, ray: Any, actors: list[Any]) -> None:
        self._ray = ray
        self._actors = actors

    def __len__(self) -> int:
        return len(self._actors)

    def call(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every object, with arguments of its own; return the answers in order.

        Arguments that are the same object for all are sent once.

        Raises:
            PatchCacheError: What an object raised.
            WorkerLostError: A process died.
        """
        large = {id(arg): arg for args in arguments for arg in args if _is_large(arg)}
        stored = {key: self._ray.put(arg) for key, arg in large.items()}
        pending = [
            actor.call.remote(method, *(stored.get(id(arg), arg) for arg in args))
            for actor, args in zip(self._actors, arguments, strict=True)
        ]
        return [self._answer(reference) for reference in pending]

    def call_one(self, number: int, method: str, *args: Any) -> Any:
        """Call a method of one object."""
        return self._answer(self._actors[number].call.remote(method, *args))

    def _answer(self, reference: Any) -> Any:
        try:
            return _get(self._ray, reference)
        except self._ray.exceptions.RayActorError as exc:
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
        ConfigError: The cluster cannot be reached.
    """
    with _cluster(options.address) as ray:
        actor_class = ray.remote(_Member).options(
            num_cpus=_cpus_of_each(ray, len(makers)), num_gpus=options.gpus_per_worker
        )
        actors = [actor_class.remote(make) for make in makers]
        try:
            yield ActorGroup(ray, actors)
        finally:
            for actor in actors:
                ray.kill(actor)


class _Member:
    """An object in a process of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        import torch

        torch.set_num_threads(1)
        self._object = make()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._object, method)(*args)


def _is_large(value: Any) -> bool:
    """Say whether a value is worth a place in the object store."""
    return bool(getattr(value, "nbytes", 0) > _SMALL_BYTES)


def _cpus_of_each(ray: Any, num_workers: int) -> float:
    """Return the CPUs that an actor asks for, so that all of them find a place."""
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    return min(1, num_cpus / num_workers)


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, make_worker: Callable[[], UnitWorker[Any, Any]]) -> None:
        import torch

        # Several actors share the cores; intra-op threads would only fight over them.
        torch.set_num_threads(1)
        self._make_worker = make_worker

    @cached_property
    def _worker(self) -> UnitWorker[Any, Any]:
        # Made by the first unit: what `__init__` raises reaches the driver as the death of the
        # actor, its class lost.
        return self._make_worker()

    def run(self, unit: Any) -> Any:
        return self._worker.run(unit)


def _get(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as exc:
        # What a user can mend is worth more without Ray's wrapper and its remote traceback.
        if isinstance(exc.cause, PatchCacheError | OSError | MemoryError):
            raise exc.cause from None
        raise


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Connect to a cluster, or start one and stop it afterwards."""
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR}
    if address is None:
        # `local` starts a new cluster even where RAY_ADDRESS names another one.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
    else:
        package = Path(__file__).parent
        options |= {"address": address, "runtime_env": {"py_modules": [str(package)]}}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as exc:
        raise ConfigError(
            f"No Ray cluster answers at {address or 'this machine'}: {_first_line(exc)} "
            "Is it running? A cluster that asks for a token (Ray's default for `ray start`) needs "
            "RAY_AUTH_MODE=token here; on one of its nodes `--ray-address auto` does without."
        ) from exc
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError(
            "This command needs 'ray', which is not installed. Run: pip install 'patchcache[build]'"
        ) from exc
    return ray
