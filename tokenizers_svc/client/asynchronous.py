"""The client for an event loop; what it does is described at `TokenizerClient`."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Self

import httpx
from numpy.typing import ArrayLike, NDArray

from tokenizers_svc.client import batches, steps
from tokenizers_svc.client.answers import Item, ModelInfo, Reconstruction, Tokens
from tokenizers_svc.client.batches import OnError, Plan, Progress, Source
from tokenizers_svc.client.images import Picture, image_bytes
from tokenizers_svc.client.retries import Pause, Retries, Steps, T
from tokenizers_svc.client.steps import Box


class AsyncTokenizerClient:
    """A service at a URL. Close it, or use `async with`."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        model: str | None = None,
        retries: Retries | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Prepare, as `TokenizerClient` does; nothing is sent yet."""
        self._http = httpx.AsyncClient(**steps.connection(url, key, timeout_s))
        self._model = model
        self._retries = retries or Retries()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the client."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def tokenize(
        self,
        image: Picture,
        view: Box | None = None,
        *,
        model: str | None = None,
        soft_top_k: int | None = None,
        soft_temperature: float | None = None,
        expect_fingerprint: str | None = None,
    ) -> Tokens:
        """Return the tokens of one view of a picture."""
        body = await asyncio.to_thread(image_bytes, image)
        return await self._run(
            steps.tokenize(
                body,
                view,
                model or self._model,
                self._retries,
                soft_top_k=soft_top_k,
                soft_temperature=soft_temperature,
                expect_fingerprint=expect_fingerprint,
            )
        )

    async def tokenize_many(
        self,
        images: Iterable[Picture],
        *,
        views: Iterable[Box | None] | None = None,
        model: str | None = None,
        batch_size: int | None = None,
        concurrency: int = 4,
        ordered: bool = True,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        expect_fingerprint: str | None = None,
    ) -> AsyncGenerator[Item]:
        """Yield the tokens of many pictures; `images` is gone through in the event loop."""
        plan = await self._run(
            batches.plan(
                model or self._model, batch_size, concurrency, expect_fingerprint, self._retries
            )
        )
        delivery = batches.delivery(plan, images, on_error, progress)
        groups = batches.groups(images, views, plan.batch_size)
        async with contextlib.aclosing(
            self._answers(groups, plan, concurrency, ordered=ordered)
        ) as found:
            async for items in found:
                for item in items:
                    yield delivery.check(item)

    async def tokens_of(
        self, sha256: str, view: Box | None = None, *, model: str | None = None
    ) -> Tokens | None:
        """Return what the service answered before for the file with this SHA-256, if it knows."""
        return await self._run(steps.tokens_of(sha256, view, model or self._model, self._retries))

    async def detokenize(
        self, token_ids: ArrayLike | Tokens, *, model: str | None = None
    ) -> NDArray[Any]:
        """Return the picture (S, S, 3) uint8 of token ids, or (B, S, S, 3) of a batch of them."""
        return await self._run(steps.detokenize(token_ids, model or self._model, self._retries))

    async def reconstruct(
        self, image: Picture, view: Box | None = None, *, model: str | None = None
    ) -> Reconstruction:
        """Return a picture as its token ids describe it."""
        body = await asyncio.to_thread(image_bytes, image)
        return await self._run(steps.reconstruct(body, view, model or self._model, self._retries))

    async def models(self) -> list[ModelInfo]:
        """Return the tokenizers of the service, its default first."""
        return await self._run(steps.list_models(self._retries))

    async def codebook(self, *, model: str | None = None) -> NDArray[Any]:
        """Return the centroids of a tokenizer, (M, K, D)."""
        return await self._run(steps.codebook(model or self._model, self._retries))

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as the service is ready."""
        await self._run(steps.wait_ready(timeout_s))

    async def _answers(
        self, groups: Iterable[list[Source]], plan: Plan, concurrency: int, *, ordered: bool
    ) -> AsyncGenerator[list[Item]]:
        waiting: deque[asyncio.Task[list[Item]]] = deque()
        places = asyncio.Semaphore(concurrency)

        async def work(group: list[Source]) -> list[Item]:
            async with places:
                loaded = await asyncio.to_thread(batches.load, group)
                return await self._run(batches.tokenize_group(loaded, plan, self._retries))

        try:
            for group in groups:
                waiting.append(asyncio.create_task(work(group)))
                async for items in _finished(waiting, 2 * concurrency - 1, ordered=ordered):
                    yield items
            async for items in _finished(waiting, 0, ordered=ordered):
                yield items
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _run(self, work: Steps[T]) -> T:
        """Do what the steps say, in the event loop."""
        try:
            step = next(work)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = work.send(None)
                    continue
                try:
                    answer = await self._http.request(**steps.request(step))
                except httpx.RequestError as exc:
                    step = work.throw(exc)
                else:
                    step = work.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result


async def _finished(
    waiting: deque[asyncio.Task[list[Item]]], most: int, *, ordered: bool
) -> AsyncGenerator[list[Item]]:
    """Yield what is there, and wait while more than `most` are not."""
    while waiting:
        candidates = [waiting[0]] if ordered else list(waiting)
        timeout_s = None if len(waiting) > most else 0
        done, _ = await asyncio.wait(
            candidates, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            return
        for task in done:
            waiting.remove(task)
            yield task.result()
