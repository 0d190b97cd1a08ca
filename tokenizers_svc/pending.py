"""What waits for the tokenizer, and who takes what when.

Two kinds of threads come here for work. Lanes run the tokenizer. Decoders make views out of files;
where there are none, as on a CPU, the lanes do that too.

    file -> [undecoded] -> a decoder or a lane -> [views] -> a lane gathers a batch -> its turn

A lane takes what is there as soon as it is free. Of several lanes that run at once, each takes half
its share, because everyone in a batch waits for the last of it; once half a batch waits for each of
them, one and a half times its share, because large batches are faster through a backlog. A lane
that has a batch and no turn, because the device is busy with that of another lane, keeps adding to
it until it is full or the turn comes: the next batch is copied together while this one runs, and
nothing is bound to it earlier than needed. One lane at a time gathers.

Lanes that decode make views as long as there are fewer than the next batch takes.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cache_builder.formats.payloads import SoftSpec


class Crew(NamedTuple):
    """The threads of one tokenizer."""

    num_lanes: int = 1  # threads that run it
    num_turns: int = 1  # of them that may run it at once
    num_decoders: int = 0  # threads that decode; 0: the lanes do
    torch_threads: int | None = None  # of one torch operation; None leaves torch as it is
    have_cores: bool = False  # a core for each lane, if there are as many (`cores.py`)

    @classmethod
    def for_device(cls, device: torch.device, *, num_lanes: int, num_decoders: int) -> "Crew":
        """Return the threads for a tokenizer that runs on `device`.

        On a CPU they are `num_lanes` that also decode, on a GPU `num_decoders` beside two lanes
        that take turns. All that a lane computes beside a GPU are copies of views: a second thread
        would spin after each of them for longer than it takes.
        """
        if device.type == "cpu":
            return cls(num_lanes, num_turns=num_lanes, torch_threads=1, have_cores=True)
        return cls(num_lanes=2, num_turns=1, num_decoders=num_decoders, torch_threads=1)


@dataclass(eq=False, slots=True)
class Item:
    """One picture on its way; a file that is not decoded yet has a `cut` and no `pixels`."""

    future: asyncio.Future[Any]
    deadline: float  # of time.perf_counter()
    pixels: Tensor | None = None  # (3, S, S) uint8
    cut: Callable[[], Tensor] | None = None  # decodes; returns the pixels
    soft: SoftSpec | None = None
    since: float = field(default_factory=time.perf_counter)
    decode_s: float = 0.0

    @property
    def is_late(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.done() or time.perf_counter() > self.deadline


@dataclass(eq=False, slots=True)
class Job:
    """Something to do with the tokenizer that shares no batch."""

    future: asyncio.Future[Any]
    work: Callable[[Any], Any]


@dataclass(eq=False, slots=True)
class Lane:
    """What one thread that runs the tokenizer has in hand."""

    items: list[Item] = field(default_factory=list)
    staging: Tensor | None = None  # (max_batch, 3, S, S) uint8
    num_staged: int = 0
    running_since: float | None = None
    busy_s: float = 0.0  # in finished runs

    def stage(self) -> None:
        """Copy the views that are new in the batch to where the tokenizer reads them."""
        assert self.staging is not None
        for number in range(self.num_staged, len(self.items)):
            pixels = self.items[number].pixels
            assert pixels is not None
            self.staging[number].copy_(pixels)
        self.num_staged = len(self.items)

    def keep(self, items: list[Item]) -> None:
        """Leave out of the batch whatever is not among `items`."""
        if len(items) < len(self.items):
            self.items = items
            self.num_staged = 0
            self.stage()

    def batch(self) -> Tensor:
        """Return the views of the batch, (B, 3, S, S) uint8."""
        assert self.staging is not None
        return self.staging[: self.num_staged]

    @contextlib.contextmanager
    def running(self) -> Iterator[float]:
        """Count the time within as busy; gives when it began."""
        started = self.running_since = time.perf_counter()
        try:
            yield started
        finally:
            self.running_since = None
            self.busy_s += time.perf_counter() - started

    def busy_until(self, now: float) -> float:
        """Return how long this lane has been busy in all, seconds."""
        since = self.running_since
        return self.busy_s + (0.0 if since is None else now - since)

    def allocate(self, max_batch: int, size: int, device: torch.device) -> None:
        """Make room for a batch; the copy to a GPU is fastest from pinned memory."""
        pinned = device.type == "cuda" and torch.cuda.is_available()
        self.staging = torch.empty(max_batch, 3, size, size, dtype=torch.uint8, pin_memory=pinned)


class _LastFirst:
    """Threads that wait; the last one to fall asleep is woken first, while its caches are warm."""

    def __init__(self, lock: threading.Lock) -> None:
        """Begin with nobody; every method is called with `lock` held."""
        self._lock = lock
        self._asleep: list[threading.Condition] = []

    def wait(self) -> None:
        """Let go of the lock until this thread is woken."""
        bed = threading.Condition(self._lock)
        self._asleep.append(bed)
        bed.wait()

    def notify(self) -> None:
        """Wake one, if there is one."""
        if self._asleep:
            self._asleep.pop().notify()

    def notify_all(self) -> None:
        """Wake everyone."""
        while self._asleep:
            self.notify()


class Pending:
    """The queues in front of the lanes."""

    def __init__(self, crew: Crew, *, max_batch: int, linger_s: float) -> None:
        """Start empty.

        Args:
            crew: Who comes for work.
            max_batch: Most pictures in a batch; may be lowered later.
            linger_s: How long a batch that is not full waits after one of more than one, seconds.
        """
        self.max_batch = max_batch
        self.is_closing = False
        self.views: deque[Item] = deque()
        self.undecoded: deque[Item] = deque()
        self.jobs: deque[Job] = deque()
        self.lock = threading.Lock()
        self.num_decoding = 0
        self._linger_s = linger_s
        self._free_turns = crew.num_turns
        self._has_decoders = crew.num_decoders > 0
        self._num_turns = crew.num_turns
        self._is_gathering = False
        self._has_company = False  # whether the last batch held more than one
        self._decoders = threading.Condition(self.lock)
        self._idle = _LastFirst(self.lock)  # lanes without work
        self._gatherer = threading.Condition(self.lock)

    @property
    def num_waiting(self) -> int:
        """Pictures that no lane or decoder has taken."""
        return len(self.views) + len(self.undecoded)

    def add(self, thing: Item | Job) -> None:
        """Append, and wake a thread for it; the lock is held."""
        if isinstance(thing, Job):
            self.jobs.append(thing)
            self._idle.notify()
        elif thing.pixels is None:
            self.undecoded.append(thing)
            (self._decoders if self._has_decoders else self._idle).notify()
        else:
            self.views.append(thing)
            (self._gatherer if self._is_gathering else self._idle).notify()

    def discard(self, thing: Item | Job) -> bool:
        """Take out what nobody wants any more; tell whether it still waited."""
        with self.lock:
            queues: tuple[deque[Any], ...] = (self.undecoded, self.views, self.jobs)
            for queue in queues:
                if thing in queue:
                    queue.remove(thing)
                    return True
        return False

    def close(self) -> None:
        """Let the threads end when nothing is left."""
        with self.lock:
            self.is_closing = True
            self.wake_all()

    def wake_all(self) -> None:
        """Let every thread look again; the lock is held."""
        for threads in (self._decoders, self._idle, self._gatherer):
            threads.notify_all()

    def take_everything(self) -> list[Item | Job]:
        """Empty the queues; the lock is held."""
        everything: list[Item | Job] = [*self.jobs, *self.undecoded, *self.views]
        for queue in (self.jobs, self.undecoded, self.views):
            queue.clear()
        return everything

    def next_for_decoder(self) -> Item | None:
        """Wait for a file; None when there will be no more."""
        with self.lock:
            self._decoders.wait_for(lambda: self.undecoded or self.is_closing)
            return self._take_undecoded() if self.undecoded else None

    def next_for_lane(self) -> Job | Item | Literal["batch"] | None:
        """Wait for work: a job, a file to decode, or that views are there; None at the end.

        A lane that is told `batch` has to call `gather`.
        """
        with self.lock:
            while True:
                if self.jobs:
                    job = self.jobs.popleft()
                    self._pass_on()
                    return job
                if self._should_decode():
                    item = self._take_undecoded()
                    self._pass_on()
                    return item
                if self.views and not self._is_gathering:
                    self._is_gathering = True
                    return "batch"
                if self.is_closing and not (self.num_waiting or self.num_decoding):
                    return None
                self._idle.wait()

    def put_back(self, item: Item) -> None:
        """Return a file that was taken to be decoded; one without pixels is dropped."""
        with self.lock:
            self.num_decoding -= 1
            if item.pixels is not None:
                if self._has_decoders or self._is_gathering:
                    self.add(item)
                else:  # this lane looks for work now, and wakes others if there is more
                    self.views.append(item)
            if self.is_closing:
                self.wake_all()

    def gather(self, lane: Lane) -> None:
        """Fill the lane's batch until it may run; it then has a turn, to be returned."""
        linger_until: float | None = None
        try:
            while True:
                with self.lock:
                    self._add_views(lane)
                    if lane.num_staged == len(lane.items) and self._free_turns:
                        now = time.perf_counter()
                        linger_until = linger_until or now + self._linger_s
                        if self._is_enough(lane) or now >= linger_until:
                            self._free_turns -= 1
                            self._has_company = len(lane.items) > 1
                            return
                        self._gatherer.wait(linger_until - now)
                    elif lane.num_staged == len(lane.items):
                        self._gatherer.wait()
                lane.stage()
        finally:
            with self.lock:
                self._is_gathering = False
                self._pass_on()

    def return_turn(self, lane: Lane) -> None:
        """Let the next batch run."""
        with self.lock:
            lane.items = []
            lane.num_staged = 0
            self._free_turns += 1
            self._gatherer.notify()

    def _add_views(self, lane: Lane) -> None:
        """Move to the lane's batch its share of what waits."""
        share = self._share(len(lane.items) + self.num_waiting)
        while self.views and len(lane.items) < share:
            lane.items.append(self.views.popleft())

    def _is_enough(self, lane: Lane) -> bool:
        if self.views:  # it has its share; whoever gathers next may begin with the rest
            return True
        return not self._has_company or len(lane.items) >= self.max_batch or self.is_closing

    def _should_decode(self) -> bool:
        if self._has_decoders or not self.undecoded:
            return False
        return len(self.views) < self._share(self.num_waiting)

    def _share(self, num_pictures: int) -> int:
        """Return how many of the pictures that wait one batch takes."""
        num_turns = self._num_turns
        if num_turns == 1:
            return min(self.max_batch, num_pictures)
        if 2 * num_pictures >= num_turns * self.max_batch:
            # By the time the others are free, those who are answered now will have asked again.
            return min(self.max_batch, math.ceil(1.5 * num_pictures / num_turns))
        # A batch saves a CPU little. Half a share leaves to the other lanes what they can begin
        # before this one would be done with it.
        return math.ceil(num_pictures / num_turns / 2)

    def _take_undecoded(self) -> Item:
        self.num_decoding += 1
        return self.undecoded.popleft()

    def _pass_on(self) -> None:
        """Wake another lane when there is work left that this one does not take."""
        if self.jobs or self.views or (self.undecoded and not self._has_decoders):
            self._idle.notify()
