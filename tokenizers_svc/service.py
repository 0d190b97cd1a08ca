"""One tokenizer at work: who is let in, where pictures are decoded, whether the service is ready.

    admit -> read the body -> decode in a pool of threads -> queue -> one run for many -> answer

A picture takes a place before its body is read and keeps it until it is answered or its client
has gone, so a refusal costs nothing and the memory behind the door is bounded. Decoding is most of
the work of the service itself; it happens neither in the event loop, where it would hold up
everyone, nor in the batch, where it would hold up the device.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from cache_builder.formats.codebook import Codebook
from cache_builder.formats.views import View
from tokenizers_svc.batcher import Batcher, Crew, Tokenizer, WorkerStoppedError
from tokenizers_svc.intake import make_view
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.schemas import ModelInfo, TokenizeAnswer

_MAX_RETRY_AFTER_S = 60


class Timings(NamedTuple):
    """Where one picture spent its time, seconds; waiting for a decode thread is `decode_s`."""

    decode_s: float
    queue_s: float
    infer_s: float


class TokenizeService:
    """A tokenizer with a door, a decoder and a queue."""

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        codebook: Codebook,
        *,
        model: str,
        limits: Limits,
        num_torch_threads: int | None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            load: Makes the tokenizer, in the worker thread.
            codebook: That of the tokenizer.
            model: Its name in answers.
            limits: Resolved for this machine.
            num_torch_threads: For the worker thread; None leaves torch as it is.
        """
        self.codebook = codebook
        self.model = model
        self.limits = limits
        self.is_draining = False
        self.num_admitted = 0
        self.batcher = Batcher(
            load,
            max_batch=limits.max_batch,
            linger_s=limits.linger_s,
            crew=Crew(torch_threads=num_torch_threads),
        )
        self._decoders = ThreadPoolExecutor(
            limits.decode_threads,
            thread_name_prefix="decode",
            # The pool is the parallelism; threads of torch within its threads fight for cores.
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    @property
    def failure(self) -> BaseException | None:
        """What ended the tokenizer for good, if anything did."""
        return self.batcher.failure

    @property
    def is_worker_alive(self) -> bool:
        """Whether the tokenizer's thread runs."""
        return self.batcher.is_alive

    def start(self) -> None:
        """Begin loading the tokenizer; returns at once."""
        self.batcher.start()

    async def close(self) -> None:
        """Answer what was let in, then end the threads."""
        self.is_draining = True
        await self.batcher.close()
        await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)

    def why_not_ready(self) -> str | None:
        """Return why no new clients should be sent here, None when they should."""
        if self.is_draining:
            return "The service is shutting down."
        return self._why_not_serving()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place for one picture.

        Raises:
            ProblemError: 429, every place is taken; 503, there is no tokenizer at work.
        """
        reason = self._why_not_serving()
        if reason is not None:
            raise not_ready(reason)
        if self.num_admitted >= self.limits.max_queue:
            seconds = min(_MAX_RETRY_AFTER_S, max(1, math.ceil(self.batcher.expected_wait_s)))
            raise ProblemError(
                "overloaded",
                f"The service has its {self.limits.max_queue} pictures. "
                f"Ask again after {seconds} s.",
                limit=self.limits.max_queue,
                headers={"Retry-After": str(seconds)},
            )
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1

    async def tokenize(self, body: bytes, view: View | None) -> tuple[TokenizeAnswer, Timings]:
        """Return the token ids of one view of the picture in `body`.

        Args:
            body: An encoded image.
            view: A box in the upright picture; None is the largest centred square.

        Raises:
            ProblemError: 413, 415 or 422 for the picture, 503 when the tokenizer has gone.
            TokenizerFailedError: The tokenizer cannot take this picture.
        """
        started = time.perf_counter()
        rule, max_pixels = self.codebook.pixel_rule, self.limits.max_pixels
        loop = asyncio.get_running_loop()
        decoding = loop.run_in_executor(self._decoders, make_view, body, view, rule, max_pixels)
        del body  # what waits in the queue is the resized view alone
        pixels = await decoding
        decode_s = time.perf_counter() - started
        try:
            tokens = await self.batcher.encode(pixels)
        except WorkerStoppedError:
            raise not_ready("The tokenizer has stopped.") from None
        answer = TokenizeAnswer(
            model=self.model,
            fingerprint=self.codebook.fingerprint,
            shape=self._shape(),
            token_ids=tokens.ids,
        )
        return answer, Timings(decode_s, tokens.queue_s, tokens.infer_s)

    def describe(self) -> ModelInfo:
        """Return what a client may want to know before it asks."""
        rule = self.codebook.pixel_rule
        return ModelInfo(
            id=self.model,
            fingerprint=self.codebook.fingerprint,
            vocab_size=self.codebook.vocab_size,
            num_stages=self.codebook.num_stages,
            grid=rule.grid,
            image_size=rule.size,
            patch_size=rule.patch_size,
            interpolation=rule.interpolation,
            metric=self.codebook.metric,
            extractor=self.codebook.extractor.id,
            limits=self.limits,
        )

    def _shape(self) -> list[int]:
        stages = self.codebook.num_stages
        return [*self.codebook.pixel_rule.grid, *([stages] if stages > 1 else [])]

    def _why_not_serving(self) -> str | None:
        if self.batcher.failure is not None:
            return "The tokenizer has stopped; the log says why. The service has to be restarted."
        if not self.batcher.is_ready:
            return "The tokenizer is being loaded."
        if self.batcher.running_s > self.limits.request_deadline_s:
            return "The tokenizer has been busy with one batch for longer than a request may take."
        return None


def not_ready(reason: str) -> ProblemError:
    """Return the refusal of a service that cannot serve now."""
    return ProblemError("not-ready", reason, headers={"Retry-After": "1"})
