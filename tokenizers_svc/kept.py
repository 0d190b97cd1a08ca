"""Answers that are kept, and pictures that are asked for by several clients at once.

A tokenizer gives the same picture the same ids, so an answer may be used again. The key holds the
SHA-256 of the whole file, the fingerprint of the tokenizer and the view; nothing less tells two
pictures apart. What has not been used for the longest time goes first.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from tokenizers_svc.tokens import Key, Outcome, Tokens

_OVERHEAD_BYTES = 900  # of the objects of one entry, measured


@dataclass(eq=False, slots=True)
class _Flight:
    task: asyncio.Task[Outcome]
    num_waiting: int = 0


class KeptAnswers:
    """Answers of the last pictures, as many as fit into so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Keep none yet."""
        self._max_bytes = max_bytes
        self._known: OrderedDict[Key, Tokens] = OrderedDict()
        self._flights: dict[Key, _Flight] = {}
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    def __len__(self) -> int:
        """Return the number of answers that are kept."""
        return len(self._known)

    def find(self, key: Key) -> Tokens | None:
        """Return the answer of a key if it is kept."""
        tokens = self._known.get(key)
        if tokens is not None:
            self._known.move_to_end(key)
        return tokens

    async def get(self, key: Key, make: Callable[[], Coroutine[Any, Any, Outcome]]) -> Outcome:
        """Return the outcome of a key: kept, or that of the `make` that is running, or a new one.

        Cancelling leaves the others who wait alone; the last one who leaves ends the work.
        """
        tokens = self.find(key)
        if tokens is not None:
            self.num_hits += 1
            return Outcome(tokens, None)
        self.num_misses += 1
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.ensure_future(self._fly(key, make())))
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and not flight.task.done():
                flight.task.cancel()
                # Who asks from now on must not join a flight that has been called off.
                self._forget_flight(key, flight.task)

    async def _fly(self, key: Key, work: Awaitable[Outcome]) -> Outcome:
        task = asyncio.current_task()
        try:
            outcome = await work
        finally:
            self._forget_flight(key, task)
        self._keep(key, outcome.tokens)
        return outcome

    def _forget_flight(self, key: Key, task: asyncio.Task[Any] | None) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]

    def _keep(self, key: Key, tokens: Tokens) -> None:
        num_bytes = _size(tokens)
        if num_bytes > self._max_bytes or key in self._known:
            return
        self._known[key] = tokens
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._known.popitem(last=False)
            self.num_bytes -= _size(oldest)


def _size(tokens: Tokens) -> int:
    soft = tokens.soft
    num_soft_bytes = len(soft.ids) + len(soft.probabilities) if soft else 0
    return _OVERHEAD_BYTES + len(tokens.ids) + num_soft_bytes
