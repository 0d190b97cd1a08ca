"""The client for code that waits."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, Self

import httpx
from numpy.typing import ArrayLike, NDArray

from tokenizers_svc.client import batches, steps
from tokenizers_svc.client.answers import Item, ModelInfo, Reconstruction, Tokens
from tokenizers_svc.client.batches import OnError, Plan, Progress, Source
from tokenizers_svc.client.images import Picture, image_bytes
from tokenizers_svc.client.retries import Pause, Retries, Steps, T
from tokenizers_svc.client.steps import Box


class TokenizerClient:
    """A service at a URL. It may be used by several threads; close it, or use `with`."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        model: str | None = None,
        retries: Retries | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: Of the service: http://127.0.0.1:8000
            key: API key, if the service asks for one.
            model: Which tokenizer to ask where a call names none; None is the service's default.
            retries: How long to ask again what may pass by itself; None is 60 s.
            timeout_s: For one try to connect, to send and to answer, each.

        Raises:
            ConfigError: An argument cannot be what it should be.
        """
        self._http = httpx.Client(**steps.connection(url, key, timeout_s))
        self._model = model
        self._retries = retries or Retries()
        self._never = threading.Event()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def tokenize(
        self,
        image: Picture,
        view: Box | None = None,
        *,
        model: str | None = None,
        soft_top_k: int | None = None,
        soft_temperature: float | None = None,
        expect_fingerprint: str | None = None,
    ) -> Tokens:
        """Return the tokens of one view of a picture.

        Args:
            image: A path, the bytes of a file, an image of Pillow, or (H, W, 3) uint8 RGB.
            view: (top, left, height, width[, hflip]) in the upright picture; None is the largest
                centred square.
            model: Which tokenizer.
            soft_top_k: Also the so many nearest centroids of every patch and their probabilities.
            soft_temperature: Of the probabilities; None is the service's.
            expect_fingerprint: Of the tokenizer that the tokens have to be of.

        Raises:
            ProblemError: The service refuses; `code` says why.
            ServiceUnavailableError: It is away or busy for longer than the retries last.
            BadAnswerError: What answers is not the service.
            TokenizerMismatchError: The tokens are of another tokenizer than expected.
            ImageError: The file cannot be read.
            ConfigError: An argument is wrong.
        """
        return self._run(
            steps.tokenize(
                image_bytes(image),
                view,
                model or self._model,
                self._retries,
                soft_top_k=soft_top_k,
                soft_temperature=soft_temperature,
                expect_fingerprint=expect_fingerprint,
            )
        )

    def tokenize_many(
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
    ) -> Generator[Item]:
        """Yield the tokens of many pictures, several requests at a time.

        At most two batches per connection are held, sent or not, and `images` is read no further.

        Args:
            images: As for `tokenize`; a generator is fine.
            views: One for every picture.
            model: Which tokenizer.
            batch_size: Pictures of one request, as far as the service takes so many; None is a
                number at which this client alone does not overload it.
            concurrency: Requests at a time.
            ordered: False yields what is there first; `index` says which picture it is.
            on_error: `raise` at the first picture without tokens; `return` goes on, and the item
                has the reason. What is wrong with the service is raised either way.
            progress: Called with the number of pictures done and, if `images` has a length, of all.
            expect_fingerprint: Of the tokenizer; None is the one that the service has at first.

        Raises:
            TokenizerMismatchError: The service has another tokenizer, or changes it meanwhile.
            PatchCacheError: As for `tokenize`.
        """
        plan = self._run(
            batches.plan(
                model or self._model, batch_size, concurrency, expect_fingerprint, self._retries
            )
        )
        delivery = batches.delivery(plan, images, on_error, progress)
        groups = batches.groups(images, views, plan.batch_size)
        for items in self._answers(groups, plan, concurrency, ordered=ordered):
            yield from map(delivery.check, items)

    def tokens_of(
        self, sha256: str, view: Box | None = None, *, model: str | None = None
    ) -> Tokens | None:
        """Return what the service answered before for the file with this SHA-256, if it knows."""
        return self._run(steps.tokens_of(sha256, view, model or self._model, self._retries))

    def detokenize(
        self, token_ids: ArrayLike | Tokens, *, model: str | None = None
    ) -> NDArray[Any]:
        """Return the picture (S, S, 3) uint8 of token ids, or (B, S, S, 3) of a batch of them."""
        return self._run(steps.detokenize(token_ids, model or self._model, self._retries))

    def reconstruct(
        self, image: Picture, view: Box | None = None, *, model: str | None = None
    ) -> Reconstruction:
        """Return a picture as its token ids describe it."""
        body = image_bytes(image)
        return self._run(steps.reconstruct(body, view, model or self._model, self._retries))

    def models(self) -> list[ModelInfo]:
        """Return the tokenizers of the service, its default first."""
        return self._run(steps.list_models(self._retries))

    def codebook(self, *, model: str | None = None) -> NDArray[Any]:
        """Return the centroids of a tokenizer, (M, K, D)."""
        return self._run(steps.codebook(model or self._model, self._retries))

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as the service is ready.

        Raises:
            ServiceUnavailableError: It is not within `timeout_s`.
        """
        self._run(steps.wait_ready(timeout_s))

    def _answers(
        self, groups: Iterable[list[Source]], plan: Plan, concurrency: int, *, ordered: bool
    ) -> Iterator[list[Item]]:
        waiting: deque[Future[list[Item]]] = deque()
        stopped = threading.Event()

        def work(group: list[Source]) -> list[Item]:
            loaded = batches.load(group)
            return self._run(batches.tokenize_group(loaded, plan, self._retries), stopped)

        pool = ThreadPoolExecutor(concurrency, "tokenize")
        try:
            for group in groups:
                waiting.append(pool.submit(work, group))
                yield from _finished(waiting, 2 * concurrency - 1, ordered=ordered)
            yield from _finished(waiting, 0, ordered=ordered)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Steps[T], stopped: threading.Event | None = None) -> T:
        """Do what the steps say, in this thread.

        Raises:
            CancelledError: `stopped` is set while nothing is on its way.
        """
        stopped = stopped or self._never
        try:
            step = next(work)
            while True:
                if isinstance(step, Pause):
                    if stopped.wait(step.seconds):
                        raise CancelledError
                    step = work.send(None)
                    continue
                try:
                    answer = self._http.request(**steps.request(step))
                except httpx.RequestError as exc:
                    step = work.throw(exc)
                else:
                    step = work.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result


def _finished(
    waiting: deque[Future[list[Item]]], most: int, *, ordered: bool
) -> Iterator[list[Item]]:
    """Yield what is there, and wait while more than `most` are not."""
    while waiting:
        candidates = [waiting[0]] if ordered else list(waiting)
        timeout_s = None if len(waiting) > most else 0
        done = wait(candidates, timeout_s, FIRST_COMPLETED).done
        if not done:
            return
        for future in done:
            waiting.remove(future)
            yield future.result()
