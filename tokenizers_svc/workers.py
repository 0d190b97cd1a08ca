"""The threads of one tokenizer: what a lane does with a batch, and a decoder with a file.

The threads are the parallelism:

    a GPU    two lanes, one batch on the device at a time: the other lane copies the next batch
             together meanwhile. Threads of their own decode files.
    a CPU    one lane per core, with one torch thread each. They also decode, between batches:
             decoders beside them would only take turns with them on the same cores.

No file is decoded inside a batch: one that is damaged fails alone. A picture whose client has gone
or whose deadline has passed is dropped by the thread that takes it. What becomes of a batch that
fails is in `encoding.py`, who takes what when in `pending.py`. A thread that dies ends the others.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizers_svc.batch_reports import BatchReport, Books
from tokenizers_svc.cores import settle_lane
from tokenizers_svc.encoding import Found, Outcome, SoftIds, Tokenizer, encode_batch, run_blank
from tokenizers_svc.pending import Crew, Item, Job, Lane, Pending

logger = logging.getLogger(__name__)

_JOIN_S = 2.0


class TokenIds(NamedTuple):
    """The ids of one picture, and what they cost."""

    ids: NDArray[np.uint16]  # flat, row-major, little-endian
    soft: SoftIds | None  # if it was asked for
    decode_s: float  # 0 for a picture that came decoded
    queue_s: float  # waiting for a decoder and for the tokenizer
    infer_s: float  # of the whole batch
    batch_size: int


class WorkerStoppedError(Exception):
    """The worker has died or was closed, and answers nothing any more."""


class DeadlinePassedError(Exception):
    """The picture was dropped because its deadline passed while it waited."""


class Workers:
    """Lanes and decoders that empty the queues; answers are set in the event loop."""

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        pending: Pending,
        books: Books,
        *,
        crew: Crew,
        name: str,
        on_batch: Callable[[BatchReport], None] | None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            load: Called once, in the first lane.
            pending: Where the work comes from.
            books: Where it is counted.
            crew: How many threads.
            name: Of the threads, for a person with a debugger.
            on_batch: Called in a lane after every batch; it has to be quick and not to raise.
        """
        self._lanes = [Lane() for _ in range(crew.num_lanes)]
        self.failure: BaseException | None = None  # what killed a thread; the others end with it
        self._load = load
        self._pending = pending
        self._books = books
        self._crew = crew
        self._on_batch = on_batch
        self._tokenizer: Tokenizer | None = None
        self._has_loaded = threading.Event()  # or has failed to
        self._lane_threads = [
            threading.Thread(target=self._run_lane, args=(lane,), name=f"{name}-{i}", daemon=True)
            for i, lane in enumerate(self._lanes)
        ]
        self._decoders = [
            threading.Thread(target=self._run_decoder, name=f"{name}-decode-{i}", daemon=True)
            for i in range(crew.num_decoders)
        ]

    @property
    def is_ready(self) -> bool:
        """Whether the tokenizer has been loaded and has run."""
        return self._tokenizer is not None

    @property
    def is_alive(self) -> bool:
        """Whether any thread runs."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def num_lanes_alive(self) -> int:
        """Lanes whose thread runs."""
        return sum(thread.is_alive() for thread in self._lane_threads)

    @property
    def running_s(self) -> float:
        """How long the oldest batch on the device has been running, seconds; 0 without one."""
        now = time.perf_counter()
        since = [lane.running_since for lane in self._lanes]
        return max((now - start for start in since if start is not None), default=0.0)

    @property
    def num_running(self) -> int:
        """Pictures in the batches of all lanes."""
        return sum(len(lane.items) for lane in self._lanes)

    def busy_s(self, now: float) -> tuple[float, ...]:
        """Return how long every lane has been busy in all, seconds."""
        return tuple(lane.busy_until(now) for lane in self._lanes)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin loading; answers are set in `loop`."""
        self._loop = loop
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let the threads answer what waits in queues that close; what takes over 2 s fails."""
        end = time.perf_counter() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.perf_counter()))
        self._fail_all()

    @property
    def _threads(self) -> list[threading.Thread]:
        return [*self._lane_threads, *self._decoders]

    def _run_lane(self, lane: Lane) -> None:
        try:
            if self._crew.torch_threads is not None:
                torch.set_num_threads(self._crew.torch_threads)
            tokenizer = self._loaded(lane)
            if self._crew.have_cores:
                settle_lane(self._lanes.index(lane), len(self._lanes))
            while tokenizer and (task := self._pending.next_for_lane()) is not None:
                if task == "batch":
                    self._pending.gather(lane)
                    self._tokenize(tokenizer, lane)
                elif isinstance(task, Job):
                    self._do(tokenizer, task, lane)
                else:
                    self._decode(task)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the batcher is dead of it
            self._die(exc)

    def _run_decoder(self) -> None:
        try:
            # The threads are the parallelism; threads of torch within them would fight for cores.
            torch.set_num_threads(1)
            while (item := self._pending.next_for_decoder()) is not None:
                self._decode(item)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the batcher is dead of it
            self._die(exc)

    def _loaded(self, lane: Lane) -> Tokenizer | None:
        """Return the tokenizer; None when another lane has failed to load it."""
        if lane is self._lanes[0]:
            started = time.perf_counter()
            try:
                tokenizer = self._load()
                self._warm_up(tokenizer)
                self._tokenizer = tokenizer
            finally:
                self._has_loaded.set()
            logger.info("the tokenizer is ready after %.1f s", time.perf_counter() - started)
        self._has_loaded.wait()
        if self._tokenizer is not None:
            size = self._tokenizer.codebook.pixel_rule.size
            lane.allocate(self._pending.max_batch, size, self._tokenizer.device)
        return self._tokenizer

    def _warm_up(self, tokenizer: Tokenizer) -> None:
        """Run the smallest and the largest batch, so that no client pays for the first of each."""
        for num_views in (1, self._pending.max_batch):
            started = time.perf_counter()
            run_blank(tokenizer, num_views)
        self._books.pace.learn(self._pending.max_batch, time.perf_counter() - started)

    def _decode(self, item: Item) -> None:
        """Turn a file into a view, or its request's answer into what is wrong with it."""
        started = time.perf_counter()
        error: Exception | None = None
        try:
            if item.is_late:
                self._books.note_late(1)
                error = DeadlinePassedError()
            else:
                assert item.cut is not None
                item.pixels = item.cut()
        except Exception as exc:  # noqa: BLE001 - whatever it is, its one caller gets it
            error = exc
        item.cut = None  # it holds the file; what waits from here on is the view alone
        item.decode_s = time.perf_counter() - started
        self._books.note_decode(item.decode_s)
        if error is not None:
            self._deliver([item], [error])
        self._pending.put_back(item)
        if self.failure is not None:  # since then nobody else looks after it
            self._fail_all()

    def _do(self, tokenizer: Tokenizer, job: Job, lane: Lane) -> None:
        if job.future.done():
            return
        answer: Any
        with lane.running():
            try:
                answer = job.work(tokenizer)
            except Exception as exc:  # noqa: BLE001 - whatever it is, its one caller gets it
                answer = exc
        self._deliver([job], [answer])

    def _tokenize(self, tokenizer: Tokenizer, lane: Lane) -> None:
        """Run the batch of a lane that has a turn; returns the turn."""
        late = [item for item in lane.items if item.is_late]
        if late:
            lane.keep([item for item in lane.items if item not in late])
            self._books.note_late(len(late))
            self._deliver(late, [DeadlinePassedError() for _ in late])
        items = lane.items
        if not items:
            self._pending.return_turn(lane)
            return
        with lane.running() as started:
            encoded = encode_batch(tokenizer, lane.batch(), [item.soft for item in items])
        ended = time.perf_counter()
        self._pending.return_turn(lane)
        if encoded.largest < len(items):
            self._pending.max_batch = min(self._pending.max_batch, encoded.largest)
        self._answer_batch(items, encoded.outcomes, started, ended)

    def _answer_batch(
        self, items: list[Item], outcomes: Sequence[Outcome], started: float, ended: float
    ) -> None:
        queue_s = [started - item.since - item.decode_s for item in items]
        infer_s = ended - started
        answers = [
            TokenIds(*outcome, item.decode_s, waited, infer_s, len(items))
            if isinstance(outcome, Found)
            else outcome
            for item, waited, outcome in zip(items, queue_s, outcomes, strict=True)
        ]
        self._deliver(items, answers)
        self._books.note_batch(len(items), infer_s)
        if self._on_batch is not None:
            self._on_batch(BatchReport(len(items), infer_s, queue_s))

    def _deliver(self, things: Sequence[Item | Job], answers: Sequence[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, things, answers)

    def _die(self, failure: BaseException) -> None:
        logger.error("the tokenizer's worker has died", exc_info=failure)
        with self._pending.lock:
            self.failure = self.failure or failure
            self._pending.is_closing = True
            self._pending.wake_all()
        self._fail_all()

    def _fail_all(self) -> None:
        """Fail everything that is here."""
        with self._pending.lock:
            things = self._pending.take_everything()
        for lane in self._lanes:
            things += lane.items
        self._deliver(things, [WorkerStoppedError() for _ in things])


def _settle(things: Sequence[Item | Job], answers: Sequence[Any]) -> None:
    for thing, answer in zip(things, answers, strict=True):
        if thing.future.done():  # the client hung up while the batch ran
            continue
        if isinstance(answer, Exception):
            thing.future.set_exception(answer)
        else:
            thing.future.set_result(answer)
