"""Dynamic batching: pictures of many requests share one run of the tokenizer.

A batch is what waits when the tokenizer becomes free; waiting for it to fill would cost every lone
request that time. Only when the batch before held more than one picture may it linger, because
the clients just answered are then about to ask again.

The threads are the parallelism:

    a GPU    two lanes, one batch on the device at a time: the other lane copies the next batch
             together meanwhile. Threads of their own decode files.
    a CPU    one lane per core, with one torch thread each. They also decode, between batches:
             decoders beside them would only take turns with them on the same cores.

No file is decoded in the event loop, and none inside a batch: one that is damaged fails alone. A
picture whose client has gone or whose deadline has passed is dropped wherever it waits. What
becomes of a batch that fails is in `encoding.py`, who takes what when in `pending.py`.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cache_builder.formats.payloads import SoftSpec
from tokenizers_svc.batch_reports import BatcherStats, BatchReport, Books
from tokenizers_svc.encoding import (
    Found,
    Outcome,
    SoftIds,
    Tokenizer,
    TokenizerFailedError,
    encode_batch,
    run_blank,
)
from tokenizers_svc.pending import Crew, Item, Job, Lane, Pending

__all__ = [
    "BatchReport", "Batcher", "BatcherStats", "Crew", "DeadlinePassedError", "SoftIds", "TokenIds",
    "Tokenizer", "TokenizerFailedError", "WorkerStoppedError",
]  # fmt: skip

logger = logging.getLogger(__name__)

T = TypeVar("T")

_JOIN_S = 2.0


class TokenIds(NamedTuple):
    """The ids of one picture, and what they cost."""

    ids: list[int]  # flat, row-major
    soft: SoftIds | None  # if it was asked for
    decode_s: float  # 0 for a picture that came decoded
    queue_s: float  # waiting for a decoder and for the tokenizer
    infer_s: float  # of the whole batch
    batch_size: int


class WorkerStoppedError(Exception):
    """The worker has died or was closed, and answers nothing any more."""


class DeadlinePassedError(Exception):
    """The picture was dropped because its deadline passed while it waited."""


class Batcher:
    """Queues of pictures and the threads that empty them."""

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        *,
        max_batch: int,
        linger_s: float = 0.0,
        crew: Crew = Crew(),  # noqa: B008 - it is frozen
        name: str = "tokenizer",
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            load: Called once, in the first lane.
            max_batch: Most pictures in one run of the tokenizer.
            linger_s: How long a batch that is not full waits after one of more than one, seconds.
            crew: The threads.
            name: Of the threads, for a person with a debugger.
            on_batch: Called in a lane after every batch; it has to be quick and not to raise.
        """
        self._load = load
        self._crew = crew
        self._on_batch = on_batch
        self._pending = Pending(crew, max_batch=max_batch, linger_s=linger_s)
        self._lanes = [Lane() for _ in range(crew.num_lanes)]
        self._books = Books()
        self._tokenizer: Tokenizer | None = None
        self._has_loaded = threading.Event()  # or has failed to
        self._failure: BaseException | None = None
        self._threads = [
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
        """Whether a thread of this batcher runs."""
        return any(thread.is_alive() for thread in (*self._threads, *self._decoders))

    @property
    def failure(self) -> BaseException | None:
        """What killed a worker, if anything did; the others end with it."""
        return self._failure

    @property
    def running_s(self) -> float:
        """How long the oldest batch on the device has been running, seconds; 0 without one."""
        now = time.perf_counter()
        since = [lane.running_since for lane in self._lanes]
        return max((now - start for start in since if start is not None), default=0.0)

    @property
    def num_waiting(self) -> int:
        """Pictures that no thread has taken yet."""
        return self._pending.num_waiting

    @property
    def expected_wait_s(self) -> float:
        """How long the pictures that are here now will take, seconds, judging by the last ones."""
        ahead = self.num_waiting + sum(len(lane.items) for lane in self._lanes)
        return self._work_s(len(self._pending.undecoded), ahead)

    @property
    def seconds_per_picture(self) -> float:
        """What one more picture adds, decoding included, judging by the last ones."""
        max_batch = self._pending.max_batch
        return self._work_s(max_batch, max_batch) / max_batch

    def stats(self) -> BatcherStats:
        """Return what the batcher is doing."""
        now, books = time.perf_counter(), self._books
        last = books.last_batch_at
        return BatcherStats(
            num_undecoded=len(self._pending.undecoded),
            num_views=len(self._pending.views),
            num_running=sum(len(lane.items) for lane in self._lanes),
            num_batches=books.num_batches,
            num_pictures=books.num_pictures,
            num_late=books.num_late,
            busy_s=tuple(lane.busy_until(now) for lane in self._lanes),
            num_lanes_alive=sum(thread.is_alive() for thread in self._threads),
            max_batch=self._pending.max_batch,
            seconds_since_batch=None if last is None else now - last,
        )

    def start(self) -> None:
        """Begin loading; answers are delivered in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        for thread in (*self._threads, *self._decoders):
            thread.start()

    async def encode(
        self, pixels: Tensor, soft: SoftSpec | None = None, *, deadline: float = math.inf
    ) -> TokenIds:
        """Return the token ids of one resized view (3, S, S) uint8, and soft ones if asked for.

        Cancelling takes the picture out of the queue.

        Args:
            pixels: Of the tokenizer's size.
            soft: How soft targets are made.
            deadline: When to drop the picture if it still waits, on the clock of
                `time.perf_counter()`.

        Raises:
            DeadlinePassedError: It was dropped.
            TokenizerFailedError: The tokenizer cannot take this picture.
            WorkerStoppedError: There is no worker any more.
        """
        answer: TokenIds = await self._answer(
            Item(self._loop.create_future(), deadline, pixels=pixels, soft=soft)
        )
        return answer

    async def tokenize(
        self,
        cut: Callable[[], Tensor],
        soft: SoftSpec | None = None,
        *,
        deadline: float = math.inf,
    ) -> TokenIds:
        """Return the token ids of the view (3, S, S) uint8 that `cut` returns.

        Args:
            cut: Called in a thread; it decodes. What it raises is raised here.
            soft: How soft targets are made.
            deadline: As for `encode`.

        Raises:
            DeadlinePassedError: The picture was dropped.
            TokenizerFailedError: The tokenizer cannot take this picture.
            WorkerStoppedError: There is no worker any more.
        """
        answer: TokenIds = await self._answer(
            Item(self._loop.create_future(), deadline, cut=cut, soft=soft)
        )
        return answer

    async def call(self, work: Callable[[Any], T]) -> T:
        """Return `work(tokenizer)`, called in a lane between two batches.

        What it raises is raised here.

        Raises:
            WorkerStoppedError: There is no worker any more.
        """
        answer: T = await self._answer(Job(self._loop.create_future(), work))
        return answer

    async def close(self) -> None:
        """Answer what waits, then end the threads; what they cannot answer in 2 s fails."""
        self._pending.close()
        await asyncio.to_thread(self._join)
        self._fail_all()

    async def _answer(self, thing: Item | Job) -> Any:
        with self._pending.lock:
            if self._failure is not None or self._pending.is_closing:
                raise WorkerStoppedError
            self._pending.add(thing)
        try:
            return await thing.future
        except asyncio.CancelledError:
            self._pending.discard(thing)
            raise

    def _work_s(self, num_undecoded: int, num_pictures: int) -> float:
        """Return how long so many files and runs take, seconds, judging by the last ones."""
        crew = self._crew
        encode_s = self._books.pace.predict(num_pictures, self._pending.max_batch) / crew.num_turns
        decode_s = num_undecoded * self._books.decode_s / (crew.num_decoders or crew.num_lanes)
        # Decoders work beside the lanes; lanes that decode do one after the other.
        return max(encode_s, decode_s) if crew.num_decoders else encode_s + decode_s

    def _join(self) -> None:
        end = time.perf_counter() + _JOIN_S
        for thread in (*self._threads, *self._decoders):
            thread.join(max(0.0, end - time.perf_counter()))

    def _run_lane(self, lane: Lane) -> None:
        try:
            if self._crew.torch_threads is not None:
                torch.set_num_threads(self._crew.torch_threads)
            tokenizer = self._loaded(lane)
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
        if self._failure is not None:  # since then nobody else looks after it
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
            self._failure = self._failure or failure
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
