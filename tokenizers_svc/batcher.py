"""Dynamic batching: pictures of many requests share one run of the tokenizer.

A batch is made of what waits when the tokenizer becomes free; waiting for it to fill would cost
every lone request that time. Only when the batch before held more than one picture may it linger,
because the clients just answered are then about to ask again.

This is the side of the event loop: it puts pictures into the queues (`pending.py`), waits for what
the threads (`workers.py`) answer, and says how long that will take. It decodes nothing itself. A
picture whose client has gone or whose deadline has passed is dropped wherever it waits.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from cache_builder.formats.payloads import SoftSpec
from tokenizers_svc.batch_reports import BatcherStats, BatchReport, Books
from tokenizers_svc.encoding import Tokenizer
from tokenizers_svc.pending import Crew, Item, Job, Pending
from tokenizers_svc.workers import TokenIds, Workers, WorkerStoppedError

T = TypeVar("T")


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
        self._crew = crew
        self._books = Books()
        self._pending = Pending(crew, max_batch=max_batch, linger_s=linger_s)
        self._workers = Workers(
            load, self._pending, self._books, crew=crew, name=name, on_batch=on_batch
        )

    @property
    def is_ready(self) -> bool:
        """Whether the tokenizer has been loaded and has run."""
        return self._workers.is_ready

    @property
    def is_alive(self) -> bool:
        """Whether a thread of this batcher runs."""
        return self._workers.is_alive

    @property
    def failure(self) -> BaseException | None:
        """What killed a worker, if anything did; the others end with it."""
        return self._workers.failure

    @property
    def running_s(self) -> float:
        """How long the oldest batch on the device has been running, seconds; 0 without one."""
        return self._workers.running_s

    @property
    def num_waiting(self) -> int:
        """Pictures that no thread has taken yet."""
        return self._pending.num_waiting

    @property
    def seconds_per_picture(self) -> float:
        """What one more picture adds, decoding included, judging by the last ones."""
        crew, max_batch = self._crew, self._pending.max_batch
        encode_s = self._books.pace.predict(max_batch, max_batch) / max_batch / crew.num_turns
        decode_s = self._books.decode_s / (crew.num_decoders or crew.num_lanes)
        # Decoders work beside the lanes; lanes that decode do one after the other.
        return max(encode_s, decode_s) if crew.num_decoders else encode_s + decode_s

    def stats(self) -> BatcherStats:
        """Return what the batcher is doing."""
        now, books = time.perf_counter(), self._books
        return BatcherStats(
            num_undecoded=len(self._pending.undecoded),
            num_views=len(self._pending.views),
            num_running=self._workers.num_running,
            num_batches=books.num_batches,
            num_late=books.num_late,
            busy_s=self._workers.busy_s(now),
            num_lanes_alive=self._workers.num_lanes_alive,
            max_batch=self._pending.max_batch,
        )

    def start(self) -> None:
        """Begin loading; answers are delivered in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._workers.start(self._loop)

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
        await asyncio.to_thread(self._workers.end)

    async def _answer(self, thing: Item | Job) -> Any:
        with self._pending.lock:
            if self._pending.is_closing:
                raise WorkerStoppedError
            self._pending.add(thing)
        try:
            return await thing.future
        except asyncio.CancelledError:
            if self._pending.discard(thing) and isinstance(thing, Item):
                self._books.note_late(1)
            raise
