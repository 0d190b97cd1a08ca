"""A worker in a process of its own on the cluster, and what it sends back.

What the worker logs, from warnings on, is kept and travels with its answers, because Ray shows the
driver nothing of it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cache_builder.ray_cluster import Meters, node_name, use_one_thread

_UnitT = TypeVar("_UnitT", contravariant=True)
_ResultT = TypeVar("_ResultT", covariant=True)
_R = TypeVar("_R")


_LOGGER = "cache_builder"


class UnitWorker(Protocol[_UnitT, _ResultT]):
    """What an actor does with a unit."""

    def run(self, unit: _UnitT) -> _ResultT:
        """Do one unit of work; doing it twice is the same as doing it once."""


class Finished(NamedTuple, Generic[_R]):
    """A unit that is done."""

    result: _R
    node: str  # where: a host name and the start of Ray's id of the node
    seconds: float  # how long it took there


class Message(NamedTuple):
    """Something that a worker logged."""

    logger: str
    level: int
    text: str


class Answer(NamedTuple, Generic[_R]):
    """What an actor sends back for a unit."""

    finished: Finished[_R]
    messages: list[Message]


class KeptMessages(logging.Handler):
    """Keeps what is logged until it is taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[Message] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._messages.append(Message(record.name, record.levelno, record.getMessage()))

    def take(self) -> list[Message]:
        """Return the messages since the last call."""
        assert self.lock
        with self.lock:  # `emit` is called with it
            taken, self._messages = self._messages, []
        return taken


class UnitActor:
    """A worker in a process of its own."""

    def __init__(
        self,
        make_worker: Callable[[], UnitWorker[Any, Any]],
        job: str,
        count: Callable[[Any], Mapping[str, float]],
    ) -> None:
        self._make_worker = make_worker
        self._count = count
        self._node = node_name()
        self._meters = Meters(job, self._node)
        self._counting = threading.Lock()
        self._kept = KeptMessages()
        logging.getLogger(_LOGGER).addHandler(self._kept)
        # And into the log of this process, which Ray's dashboard shows.
        logging.getLogger(_LOGGER).addHandler(logging.StreamHandler())

    def prepare(self) -> list[Message]:
        """Make the worker; return what was logged meanwhile.

        Not done in `__init__`: what that raises reaches the driver as the death of the actor, its
        class lost.
        """
        use_one_thread()  # a worker that has several cores to itself may set another number
        self._worker = self._make_worker()
        return self._kept.take()

    def run(self, unit: Any) -> Answer[Any]:
        """Do one unit of work."""
        started_s = time.monotonic()
        result = self._worker.run(unit)
        seconds = time.monotonic() - started_s
        with self._counting:
            self._meters.unit_done(seconds, self._count(result))
        return Answer(Finished(result, self._node, seconds), self._kept.take())
