"""Dynamic batching: pictures of many requests share one run of the tokenizer.

One thread owns the tokenizer: it loads it, warms it up and runs it. It takes whatever waits as
soon as it is free; waiting for a batch to fill would cost every lone request that time. Only when
the batch before held more than one picture does it linger, because the clients just answered are
then about to ask again.

An exception in a batch is nobody's fault until its pictures have been tried one by one; only those
that fail alone fail their callers. When all of them do, a blank picture tells whether the tokenizer
still works. If not, the thread ends: a device that answers everything with an error must not look
ready.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cache_builder.formats.codebook import Codebook

logger = logging.getLogger(__name__)

_JOIN_S = 2.0
_SMOOTHING = 0.2


class Tokenizer(Protocol):
    """What the service needs of a `PatchTokenizer`."""

    @property
    def codebook(self) -> Codebook:
        """What the token ids mean."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Return ids (B, rows, cols[, M]) of resized views (B, 3, S, S) uint8."""


class TokenIds(NamedTuple):
    """The ids of one picture, and what they cost."""

    ids: list[int]  # flat, row-major
    queue_s: float
    infer_s: float


class TokenizerFailedError(Exception):
    """The tokenizer raised for this picture alone; the cause says what."""


class WorkerStoppedError(Exception):
    """The worker has died or was closed, and answers nothing any more."""


@dataclass(eq=False, slots=True)
class _Item:
    pixels: Tensor
    future: asyncio.Future[TokenIds]
    waiting_since: float = field(default_factory=time.perf_counter)


class Batcher:
    """A queue of pictures and the thread that empties it."""

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        *,
        max_batch: int,
        linger_s: float,
        num_threads: int | None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            load: Called once, in the worker thread.
            max_batch: Most pictures in one run of the tokenizer.
            linger_s: How long a batch that is not full waits after one of more than one, seconds.
            num_threads: Threads of one torch operation; None leaves torch as it is.
        """
        self._load = load
        self._max_batch = max_batch
        self._linger_s = linger_s
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._running: list[_Item] = []
        self._running_since: float | None = None
        self._seconds_per_item = 0.0
        self._is_ready = False
        self._is_closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tokenizer", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether the tokenizer has been loaded and has run."""
        return self._is_ready

    @property
    def is_alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What killed the worker, if anything did."""
        return self._failure

    @property
    def running_s(self) -> float:
        """How long the batch on the device has been running, seconds; 0 when there is none."""
        since = self._running_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def num_waiting(self) -> int:
        """Pictures that no batch has taken yet."""
        return len(self._waiting)

    @property
    def expected_wait_s(self) -> float:
        """How long the pictures that are here now will take, seconds, judging by the last ones."""
        return (self.num_waiting + len(self._running)) * self._seconds_per_item

    def start(self) -> None:
        """Begin loading; answers are delivered in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def encode(self, pixels: Tensor) -> TokenIds:
        """Return the token ids of one resized view (3, S, S) uint8.

        Cancelling takes the picture out of the queue.

        Raises:
            TokenizerFailedError: The tokenizer cannot take this picture.
            WorkerStoppedError: There is no worker any more.
        """
        item = _Item(pixels, self._loop.create_future())
        with self._changed:
            if self._failure is not None or self._is_closing:
                raise WorkerStoppedError
            self._waiting.append(item)
            self._changed.notify()
        try:
            return await item.future
        except asyncio.CancelledError:
            with self._changed, contextlib.suppress(ValueError):  # it may be running already
                self._waiting.remove(item)
            raise

    async def close(self) -> None:
        """Answer what waits, then end the thread; what it cannot answer in 2 s fails."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_S)
        with self._changed:
            self._fail_all()

    def _run(self) -> None:
        try:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)
            started = time.perf_counter()
            tokenizer = self._load()
            self._warm_up(tokenizer)
            self._is_ready = True
            logger.info("the tokenizer is ready after %.1f s", time.perf_counter() - started)
            while (batch := self._next_batch()) is not None:
                self._tokenize(tokenizer, batch)
        except BaseException as exc:
            logger.exception("the tokenizer's worker has died")
            with self._changed:
                self._failure = exc
                self._fail_all()

    def _warm_up(self, tokenizer: Tokenizer) -> None:
        """Run the smallest and the largest batch, so that no client pays for the first of each."""
        for num_views in (1, self._max_batch):
            _encode(tokenizer, [_blank(tokenizer)] * num_views)

    def _next_batch(self) -> list[_Item] | None:
        """Wait for pictures; None when there will be no more."""
        has_company = len(self._running) > 1
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if has_company:
                self._changed.wait_for(
                    lambda: len(self._waiting) >= self._max_batch or self._is_closing,
                    self._linger_s,
                )
            if not self._waiting and self._is_closing:
                return None
            while self._waiting and len(self._running) < self._max_batch:
                item = self._waiting.popleft()
                if not item.future.done():  # done: the client hung up a moment ago
                    self._running.append(item)
            return self._running

    def _tokenize(self, tokenizer: Tokenizer, batch: list[_Item]) -> None:
        if not batch:
            return
        started = self._running_since = time.perf_counter()
        outcomes = self._encode_each(tokenizer, [item.pixels for item in batch])
        infer_s = time.perf_counter() - started
        self._running_since = None
        self._seconds_per_item += _SMOOTHING * (infer_s / len(batch) - self._seconds_per_item)
        answers = [
            TokenIds(outcome, started - item.waiting_since, infer_s)
            if isinstance(outcome, list)
            else outcome
            for item, outcome in zip(batch, outcomes, strict=True)
        ]
        self._deliver(batch, answers)

    def _encode_each(
        self, tokenizer: Tokenizer, pixels: list[Tensor]
    ) -> Sequence[list[int] | TokenizerFailedError]:
        try:
            return _encode(tokenizer, pixels)
        except Exception:
            logger.warning(
                "a batch of %d failed; its pictures are tried one by one",
                len(pixels),
                exc_info=True,
            )
        outcomes = [_encode_alone(tokenizer, view) for view in pixels]
        if all(isinstance(outcome, TokenizerFailedError) for outcome in outcomes):
            _encode(tokenizer, [_blank(tokenizer)])
        return outcomes

    def _deliver(self, items: Sequence[_Item], answers: Sequence[TokenIds | Exception]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, items, answers)

    def _fail_all(self) -> None:
        """Fail every picture that is here; the lock is held."""
        items = [*self._running, *self._waiting]
        self._running = []
        self._waiting.clear()
        self._deliver(items, [WorkerStoppedError() for _ in items])


def _encode(tokenizer: Tokenizer, pixels: list[Tensor]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer.encode(torch.stack(pixels)).flatten(1).tolist()
    if len(ids) != len(pixels):
        raise RuntimeError(f"{len(pixels)} views gave {len(ids)} grids of token ids")
    return ids


def _encode_alone(tokenizer: Tokenizer, view: Tensor) -> list[int] | TokenizerFailedError:
    try:
        return _encode(tokenizer, [view])[0]
    except Exception as exc:  # noqa: BLE001 - whatever it is, one caller gets it
        failure = TokenizerFailedError()
        failure.__cause__ = exc
        return failure


def _blank(tokenizer: Tokenizer) -> Tensor:
    size = tokenizer.codebook.pixel_rule.size
    return torch.full((3, size, size), 128, dtype=torch.uint8)


def _settle(items: Sequence[_Item], answers: Sequence[TokenIds | Exception]) -> None:
    for item, answer in zip(items, answers, strict=True):
        if item.future.done():  # the client hung up while the batch ran
            continue
        if isinstance(answer, Exception):
            item.future.set_exception(answer)
        else:
            item.future.set_result(answer)
