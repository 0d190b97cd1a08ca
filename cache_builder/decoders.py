"""Threads that decode and crop while the threads of a worker's units wait for the tokenizer.

The unit that came first is served first: the next one is decoded in the time that the first leaves.
Served by turns, the two would end together, and the threads would have nothing to do while both
write and publish.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from queue import PriorityQueue
from typing import Any, TypeVar

import torch

from cache_builder.prefetch import map_ahead

_S = TypeVar("_S")
_T = TypeVar("_T")


class Decoders:
    """The threads of one worker, for all units that it has at hand."""

    def __init__(self, num_threads: int) -> None:
        """Start none yet."""
        # The threads are the parallelism; threads of torch within them would fight for cores.
        set_up = partial(torch.set_num_threads, 1)
        self._threads = ThreadPoolExecutor(num_threads, "decode", set_up)
        self._num_threads = num_threads
        self._waiting: PriorityQueue[tuple[int, int, Future[Any], Callable[[], Any]]]
        self._waiting = PriorityQueue()
        self._numbers = itertools.count()

    def map(
        self, function: Callable[[_S], _T], items: Iterable[_S], num_ahead: int
    ) -> Iterator[_T]:
        """Yield `function(item)` in order; who calls first is served first.

        Args:
            function: Called in the threads.
            items: Gone through in this thread.
            num_ahead: How many are made ahead, beyond one for each thread.
        """
        executor = _Ranked(self, next(self._numbers))
        return map_ahead(function, items, self._num_threads + num_ahead, executor=executor)

    def submit(self, rank: int, function: Callable[[], _T]) -> "Future[_T]":
        """Have `function` called after everything of a lower rank that waits now."""
        future: Future[_T] = Future()
        self._waiting.put((rank, next(self._numbers), future, function))
        self._threads.submit(self._serve)
        return future

    def _serve(self) -> None:
        _, _, future, function = self._waiting.get_nowait()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as exc:  # noqa: BLE001  it is raised where the result is wanted
            future.set_exception(exc)


class _Ranked(Executor):
    """The threads, as one caller of `map` sees them."""

    def __init__(self, decoders: Decoders, rank: int) -> None:
        self._decoders = decoders
        self._rank = rank

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        return self._decoders.submit(self._rank, partial(fn, *args, **kwargs))
