"""A pool of actors: which of them has which unit, and what becomes of units whose actor dies.

Only an actor that has said that it is ready gets units, so the pool grows while the cluster does
and nothing waits for a node that has not come yet. An actor that dies is replaced; its units are
done again elsewhere.

Tries are counted for each unit. The units that a dead actor had are tried again alone, so that
only the one that kills its actors is charged with their deaths. A unit that has used its tries up
ends the job, after all the others are done.

Where Ray kills an actor because its node is short of memory, another one in its place would be
killed too: the pool gets smaller by one, down to one, and the units come back after the others.
"""

import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from cache_builder.errors import WorkerLostError
from cache_builder.ray_actor import Answer, Finished, Message
from cache_builder.ray_cluster import Cluster, Meters, node_name

logger = logging.getLogger(__name__)

_U = TypeVar("_U")
_R = TypeVar("_R")


_MAX_TRIES = 4  # of one unit, and of starting an actor in one place of the pool
_LAST_ANSWER_S = 10.0  # for what a dead actor had still sent
_SECONDS_BETWEEN_WARNINGS = 60.0
_MAX_NAMED = 5
_ADVICE_ON_MEMORY = (
    "The node ran out of memory: run the same command again with fewer --workers or more "
    "--cpus-per-worker, so that fewer share a node, or on nodes with more memory."
)


class _Task(Generic[_U]):
    """A unit and how often it has been tried."""

    def __init__(self, unit: _U) -> None:
        self.unit = unit
        self.num_deaths = 0  # of actors that had this unit alone
        self.is_suspect = False  # an actor died that had it


class _Place(Generic[_U]):
    """A place of the pool: an actor, and the next one when that dies."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.ready = actor.prepare.remote()
        self.is_ready = False
        self.num_failed_starts = 0
        self.in_flight: dict[Any, _Task[_U]] = {}

    @property
    def has_suspect(self) -> bool:
        """Whether it works on a unit that must be alone."""
        return any(task.is_suspect for task in self.in_flight.values())


class ActorPool(Generic[_U, _R]):
    """Actors, and the units that they have or that wait for one."""

    def __init__(
        self,
        cluster: Cluster,
        start: Callable[[], Any],
        job: str,
        describe: Callable[[_U], str],
        units_per_actor: int,
    ) -> None:
        self._cluster = cluster
        self._units_per_actor = units_per_actor
        self._start = start
        self._describe = describe
        self._places: list[_Place[_U]] = []
        self._waiting: dict[Any, _Place[_U]] = {}  # everything that an answer is waited for
        self._tasks: deque[_Task[_U]] = deque()
        self._remaining: Iterator[_U] = iter(())
        self._fatal: list[tuple[_U, str]] = []  # units that used up their tries, and why
        self._ran_out_of_memory = False  # one of those
        self._told: set[str] = set()
        self._warned_s = time.monotonic()
        self._meters = Meters(job, node_name())

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """Let the actors go; kill them where the work is broken off."""
        for place in self._places if error else ():
            self._kill(place)
        self._places.clear()
        self._waiting.clear()

    def run(
        self, first: list[_U], remaining: Iterator[_U], num_workers: int
    ) -> Iterator[Finished[_R]]:
        """Yield results until every unit is done or has used up its tries."""
        self._remaining = remaining
        self._tasks.extend(map(_Task, first))
        self._look_ahead(num_workers)
        for _ in range(min(num_workers, len(self._tasks))):
            self._add_place()
        while self._waiting:
            finished: list[Finished[_R]] = []
            for reference in self._cluster.wait(list(self._waiting)):
                place = self._waiting.pop(reference)
                if reference == place.ready:
                    self._started(place, reference)
                else:
                    finished += self._answered(place, reference)
            self._hand_out(num_workers)
            self._warn_if_nothing_starts()
            yield from finished
        if self._fatal:
            raise WorkerLostError(self._fatal_message())

    def _look_ahead(self, count: int) -> None:
        self._tasks.extend(map(_Task, islice(self._remaining, max(0, count - len(self._tasks)))))

    def _add_place(self, num_failed_starts: int = 0) -> None:
        place: _Place[_U] = _Place(self._start())
        place.num_failed_starts = num_failed_starts
        self._places.append(place)
        self._waiting[place.ready] = place

    def _hand_out(self, num_workers: int) -> None:
        """Give units to actors that are ready: one to each before any gets a second."""
        for depth in range(self._units_per_actor):
            for place in self._places:
                if not place.is_ready or len(place.in_flight) != depth:
                    continue
                self._look_ahead(num_workers)
                num_without = sum(not other.in_flight for other in self._places) if depth else 0
                if len(self._tasks) <= num_without:
                    break
                if depth and (self._tasks[0].is_suspect or place.has_suspect):
                    continue
                task = self._tasks.popleft()
                reference = place.actor.run.remote(task.unit)
                place.in_flight[reference] = task
                self._waiting[reference] = place
        if not self._tasks:
            # What is not needed any more leaves its CPUs and GPUs to others, and a worker that is
            # still pending does not make the cluster grow.
            for place in [place for place in self._places if not place.in_flight]:
                self._drop(place)

    def _started(self, place: _Place[_U], reference: Any) -> None:
        try:
            messages = self._cluster.fetch(reference)
        except Exception as exc:
            if not self._cluster.is_loss(exc):
                raise
            self._failed_start(place, exc)
            return
        place.is_ready = True
        place.num_failed_starts = 0
        # A thousand workers that load the same model have the same to say.
        self._log(message for message in messages if message.text not in self._told)
        self._told.update(message.text for message in messages)
        self._show_size()

    def _failed_start(self, place: _Place[_U], exc: Exception) -> None:
        self._drop(place)
        num_failed = place.num_failed_starts + 1
        out_of_memory = self._cluster.is_out_of_memory(exc)
        if num_failed < _MAX_TRIES and not (out_of_memory and self._places):
            self._add_place(num_failed)
        elif not self._places:
            raise WorkerLostError(
                f"Ray workers die before they can take work, {num_failed} times in a row: "
                f"{_reason(exc)} "
                + (
                    _ADVICE_ON_MEMORY
                    if out_of_memory
                    else "Their logs are in Ray's dashboard and in its logs folder on the node; "
                    "run the same command again when that is mended."
                )
            ) from exc
        else:
            logger.warning(
                "a worker does not start and is left out; %d remain: %s",
                len(self._places), _reason(exc),
            )  # fmt: skip

    def _answered(self, place: _Place[_U], reference: Any) -> list[Finished[_R]]:
        try:
            answer: Answer[_R] = self._cluster.fetch(reference)
        except Exception as exc:
            if not self._cluster.is_loss(exc):
                raise
            return self._lost(place, exc)
        del place.in_flight[reference]
        return [self._finished(answer)]

    def _finished(self, answer: Answer[_R]) -> Finished[_R]:
        self._log(answer.messages)
        return answer.finished

    def _lost(self, place: _Place[_U], exc: Exception) -> list[Finished[_R]]:
        """Put the units of a dead actor back, and another actor in its place."""
        in_flight = place.in_flight.copy()
        self._kill(place)  # if it is only out of reach, it would go on beside its successor
        self._drop(place)
        finished, unfinished = [], []
        for reference, task in in_flight.items():
            try:
                finished.append(self._finished(self._cluster.fetch(reference, _LAST_ANSWER_S)))
            except Exception as error:
                if not self._cluster.is_loss(error):
                    raise
                unfinished.append(task)
        names = [self._describe(task.unit) for task in unfinished]
        out_of_memory = self._cluster.is_out_of_memory(exc)
        if len(unfinished) == 1:
            task = unfinished[0]
            task.num_deaths += 1
            if task.num_deaths >= _MAX_TRIES:
                self._fatal.append((task.unit, _reason(exc)))
                self._ran_out_of_memory |= out_of_memory
                unfinished.clear()
            again = f"try {task.num_deaths} of {_MAX_TRIES}"
        else:
            again = "each is done again alone"
        if out_of_memory and self._places:
            again += f", later; {len(self._places)} workers remain"
        logger.warning("a worker was lost at %s; %s: %s", " or ".join(names), again, _reason(exc))
        for task in unfinished:
            task.is_suspect = True
        if out_of_memory:
            self._tasks.extend(unfinished)
        else:
            self._tasks.extendleft(reversed(unfinished))
        self._look_ahead(1)
        if self._tasks and not (out_of_memory and self._places):
            self._add_place()
        return finished

    def _drop(self, place: _Place[_U]) -> None:
        """Forget an actor; one that nobody knows ends when it has nothing left to do."""
        self._places.remove(place)
        for reference in (place.ready, *place.in_flight):
            self._waiting.pop(reference, None)
        self._show_size()

    def _kill(self, place: _Place[_U]) -> None:
        # The cluster may be gone, and the actor with it.
        with contextlib.suppress(self._cluster.ray.exceptions.RayError, RuntimeError):
            self._cluster.ray.kill(place.actor)

    def _show_size(self) -> None:
        self._meters.set_gauge("workers", sum(place.is_ready for place in self._places))

    def _log(self, messages: Iterable[Message]) -> None:
        for message in messages:
            logging.getLogger(message.logger).log(message.level, "%s", message.text)

    def _warn_if_nothing_starts(self) -> None:
        now_s = time.monotonic()
        if any(place.is_ready for place in self._places):
            self._warned_s = now_s
        elif self._places and now_s - self._warned_s > _SECONDS_BETWEEN_WARNINGS:
            self._warned_s = now_s
            logger.warning(
                "waiting for the cluster: %d workers find no place on %s. Other jobs may have "
                "taken it, or the autoscaler is still adding nodes; fewer --cpus-per-worker or "
                "--gpus-per-worker need less.",
                len(self._places), self._cluster.describe_resources(),
            )  # fmt: skip

    def _fatal_message(self) -> str:
        named = "; ".join(
            f"{self._describe(unit)} ({reason.removesuffix('.')})"
            for unit, reason in self._fatal[:_MAX_NAMED]
        )
        more = f" and {len(self._fatal) - _MAX_NAMED} more" if len(self._fatal) > _MAX_NAMED else ""
        advice = (
            _ADVICE_ON_MEMORY
            if self._ran_out_of_memory
            else "If memory ran out, run the same command again with fewer --workers; if a library "
            "crashed at one of its images, take that image away and build anew."
        )
        return (
            f"Killed its worker {_MAX_TRIES} times and was given up: {named}{more}. Everything "
            f"else is done and kept. {advice}"
        )


def _reason(exc: Exception) -> str:
    """Return the first sentence of what Ray says about a loss."""
    text = " ".join(str(exc).split())
    found = re.search(r"The actor is dead because .*|The actor died because of .*", text)
    sentence, _, _ = (found[0] if found else text).partition(". ")
    return (sentence.strip() or type(exc).__name__).removesuffix(".") + "."
