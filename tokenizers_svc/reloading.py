"""Taking a model's codebook anew while the old one serves.

The file is read, its tokenizer loaded and warmed up beside the old one; then the name points to the
new one at once, and the old one goes when the last request that holds it has been answered. Until
the new one has run, nothing changes; what fails leaves the old one where it is.
"""

import asyncio
import logging
import time
from typing import NamedTuple

from cache_builder.errors import PatchCacheError
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.registry import Registry, Served
from tokenizers_svc.workers import WorkerStoppedError

logger = logging.getLogger(__name__)


class Reloaded(NamedTuple):
    """A model that has taken the place of another."""

    old: Served
    fresh: Served
    seconds: float


class Reloader:
    """Reloads the models of a registry, each one at a time."""

    def __init__(self, registry: Registry) -> None:
        """Reload nothing yet."""
        self._registry = registry
        self._busy: set[str] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    async def reload(self, name: str) -> Reloaded:
        """Load the codebook of a model from its file again; returns when the new one answers.

        Raises:
            ProblemError: 404, there is no such model; 422, it could not be loaded, with the reason.
        """
        old = self._registry.get(name)
        if old.source.path is None:
            raise _failed("The model was not loaded from a file.")
        if name in self._busy:
            raise _failed("The model is being loaded already.")
        self._busy.add(name)
        started = time.perf_counter()
        try:
            fresh = await self._load(name, old.source.path)
        finally:
            self._busy.discard(name)
        self._registry.replace(fresh)
        seconds = time.perf_counter() - started
        logger.info("model %s is %s now, after %.1f s", name, fresh.fingerprint[:12], seconds)
        leaving = asyncio.create_task(_retire(old))
        self._leaving.add(leaving)  # the event loop itself would forget it
        leaving.add_done_callback(self._leaving.discard)
        return Reloaded(old, fresh, seconds)

    async def close(self) -> None:
        """Wait for the models that are leaving."""
        await asyncio.gather(*self._leaving)

    async def _load(self, name: str, path: str) -> Served:
        try:
            source = await asyncio.to_thread(self._registry.open, path)
        except PatchCacheError as exc:
            raise _failed(str(exc)) from exc
        fresh = self._registry.prepare(name, source)
        fresh.batcher.start()
        try:
            await fresh.batcher.call(_nothing)  # it is done when the tokenizer is warm
        except WorkerStoppedError:
            failure = fresh.batcher.failure
            is_ours = isinstance(failure, PatchCacheError)
            raise _failed(str(failure) if is_ours else "The log of the service says why.") from None
        return fresh


async def _retire(served: Served) -> None:
    await served.unused()
    await served.batcher.close()


def _nothing(_tokenizer: object) -> None:
    pass


def _failed(reason: str) -> ProblemError:
    return ProblemError("reload-failed", reason)
