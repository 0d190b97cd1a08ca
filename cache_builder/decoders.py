"""Threads that decode and crop while a worker's main thread waits for the tokenizer."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from cache_builder.prefetch import map_ahead

_S = TypeVar("_S")
_T = TypeVar("_T")

_NUM_AHEAD = 16  # images, as many as a tokenizer takes at a time


class Decoders:
    """The threads of one worker, for all units that it has at hand."""

    def __init__(self, num_threads: int) -> None:
        """Start none yet."""
        # The threads are the parallelism; threads of torch within them would fight for cores.
        set_up = partial(torch.set_num_threads, 1)
        self._executor = ThreadPoolExecutor(num_threads, "decode", set_up)
        self._depth = _NUM_AHEAD + 2 * num_threads

    def map(self, function: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
        """Yield `function(item)` in order, a batch and a little more of them made ahead."""
        return map_ahead(function, items, self._depth, executor=self._executor)
