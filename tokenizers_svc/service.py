"""The models at work: who is let in, where pictures are decoded, whether the service is ready.

    admit -> read the body -> queue -> decode in a thread -> queue -> one run for many -> answer

A picture takes a place before its body is read and keeps it until it is answered or its client
has gone, so a refusal costs nothing and the memory behind the door is bounded. Decoding is most of
the work of the service itself; it happens neither in the event loop, where it would hold up
everyone, nor in the batch, where it would hold up the device.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from starlette.requests import Request
from torch import Tensor

from cache_builder.formats.payloads import SoftSpec
from cache_builder.formats.views import View
from tokenizers_svc.admission import Door, Place
from tokenizers_svc.decoding import make_view
from tokenizers_svc.encoding import SoftIds
from tokenizers_svc.exchange import deadline_passed
from tokenizers_svc.health import ServiceState, Watchdog, state_of
from tokenizers_svc.intake import Upload
from tokenizers_svc.kept import KeptAnswers
from tokenizers_svc.limits import Limits
from tokenizers_svc.metrics import Metrics
from tokenizers_svc.pixel_budget import PixelBudget
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.registry import Registry, Served, failures
from tokenizers_svc.reloading import Reloader
from tokenizers_svc.tokens import ImageFacts, Key, Outcome, Picture, SoftTokens, Timings, Tokens
from tokenizers_svc.workers import DeadlinePassedError, WorkerStoppedError

# Below this, hashing in the event loop costs less than a thread that does it.
_HASHED_INLINE_BYTES = 500_000

T = TypeVar("T")


class TokenizeService:
    """Models with a door, a decoder and answers that are kept."""

    def __init__(self, registry: Registry, metrics: Metrics) -> None:
        """Prepare; `start` begins. The registry's limits are resolved for this machine."""
        self.registry = registry
        self.metrics = metrics
        self._watchdog = Watchdog()
        self.limits: Limits = registry.limits
        self.reloader = Reloader(registry)
        self.kept = KeptAnswers(self.limits.kept_bytes)
        self.pixels = PixelBudget(self.limits.max_decoding_pixels)
        self.is_draining = False
        self.door = Door(self.limits, self._seconds_per_picture)
        self._threads = ThreadPoolExecutor(
            self.limits.decode_threads,
            thread_name_prefix="helper",
            # The pool is the parallelism; threads of torch within its threads fight for cores.
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    @property
    def failure(self) -> BaseException | None:
        """What ended a tokenizer for good, if anything did."""
        return next(failures(list(self.registry)), None)

    @property
    def is_worker_alive(self) -> bool:
        """Whether the thread of any tokenizer runs."""
        return any(served.batcher.is_alive for served in self.registry)

    def start(self) -> None:
        """Begin loading the tokenizers; returns at once."""
        self.registry.start()

    async def close(self) -> None:
        """Answer what was let in, then end the threads."""
        self.is_draining = True
        await self.reloader.close()
        await self.registry.close()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def complaint(self) -> str | None:
        """Return how a model is stuck, None when none is. To be asked every few seconds."""
        return self._watchdog.complaint(state_of(served) for served in self.registry)

    def state(self) -> ServiceState:
        """Return how the service is now."""
        return ServiceState(
            is_ready=self.why_not_ready() is None,
            num_admitted=self.door.num_pictures,
            kept_bytes=self.kept.num_bytes,
            kept_entries=len(self.kept),
            num_hits=self.kept.num_hits,
            num_misses=self.kept.num_misses,
            models=tuple(state_of(served) for served in self.registry),
        )

    def why_not_ready(self) -> str | None:
        """Return why no new clients should be sent here, None when they should."""
        if self.is_draining:
            return "The service is shutting down."
        complaint = self.complaint()
        if complaint is not None:
            return complaint
        reasons = (self._why_not_serving(served) for served in self.registry)
        return next((reason for reason in reasons if reason is not None), None)

    def admit(self, served: Served, upload: Upload) -> Place:
        """Return a place for one picture and for a body; the body may tell of more pictures.

        The model is kept from being closed by a reload until the place is given back.

        Raises:
            ProblemError: 429, there is no room; 503, there is no tokenizer at work.
        """
        reason = self._why_not_serving(served)
        if reason is not None:
            raise not_ready(reason)
        place = self.door.admit(num_bytes=upload.length or 0, on_leaving=served.release)
        served.hold()
        upload.place = place
        return place

    async def tokenize(self, served: Served, picture: Picture, soft: SoftSpec | None) -> Outcome:
        """Return the token ids of one view of a picture.

        Raises:
            ProblemError: 413, 415 or 422 for the picture, 503 when the tokenizer has gone.
            TokenizerFailedError: The tokenizer cannot take this picture.
        """
        if not self.limits.kept_bytes:  # then equal pictures are tokenised each
            return await self._tokenize(served, picture, soft)
        digest = await self._sha256(picture.data)
        key = Key(digest, served.fingerprint, picture.view, soft)
        return await self.kept.get(key, lambda: self._tokenize(served, picture, soft))

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Return what `work` gives in a thread, where it holds up neither loop nor batch."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def _tokenize(self, served: Served, picture: Picture, soft: SoftSpec | None) -> Outcome:
        rule, max_pixels = served.codebook.pixel_rule, self.limits.max_pixels
        facts: list[tuple[View, ImageFacts]] = []

        def cut() -> Tensor:
            made = make_view(picture.data, picture.view, rule, max_pixels, self.pixels)
            facts.append((made.view, made.image))
            return made.pixels

        try:
            # A request with less time is cancelled; without the last of them, so is this work.
            until = time.perf_counter() + self.limits.request_deadline_s
            found = await served.batcher.tokenize(cut, soft, deadline=until)
        except WorkerStoppedError:
            raise not_ready("The tokenizer has stopped.") from None
        except DeadlinePassedError:
            raise deadline_passed(self.limits.request_deadline_s) from None
        self.metrics.note_ids(served.name, served.codebook, found.ids)
        tokens = Tokens(found.ids.tobytes(), *facts[0], _soft_tokens(found.soft, soft))
        timings = Timings(found.decode_s, found.queue_s, found.infer_s, found.batch_size)
        return Outcome(tokens, timings)

    async def _sha256(self, data: bytes) -> str:
        if len(data) <= _HASHED_INLINE_BYTES:
            return hashlib.sha256(data).hexdigest()
        return await self.in_thread(lambda: hashlib.sha256(data).hexdigest())

    def _seconds_per_picture(self) -> float:
        """Return what a picture costs the slowest of the models."""
        return max(served.batcher.seconds_per_picture for served in self.registry)

    def _why_not_serving(self, served: Served) -> str | None:
        batcher = served.batcher
        if batcher.failure is not None:
            return "The tokenizer has stopped; the log says why. The service has to be restarted."
        if not batcher.is_ready:
            return "The tokenizer is being loaded."
        if batcher.running_s > self.limits.request_deadline_s:
            return "The tokenizer has been busy with one batch for longer than a request may take."
        return None


def begin(request: Request, model: str | None) -> tuple[TokenizeService, Served]:
    """Return the service and the model that a request names; its answer and record name it too.

    Raises:
        ProblemError: 404, there is no such model.
    """
    service: TokenizeService = request.app.state.service
    served = service.registry.get(model)
    request.state.fingerprint = served.fingerprint
    request.state.record.model = served.name
    return service, served


def not_ready(reason: str) -> ProblemError:
    """Return the refusal of a service that cannot serve now."""
    return ProblemError("not-ready", reason, headers={"Retry-After": "1"})


def _soft_tokens(found: SoftIds | None, soft: SoftSpec | None) -> SoftTokens | None:
    if found is None or soft is None:
        return None
    return SoftTokens(soft.top_k, found.ids.tobytes(), found.probabilities.tobytes())
