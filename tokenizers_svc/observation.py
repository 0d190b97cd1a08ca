"""What is noted about one request, and who hears of it when it has ended.

One middleware around everything opens a record; the code that serves the request adds what it
knows; metrics, the access log and tracing are observers that read the record once, at the end. So
a request pays for one layer, whatever is switched on, and no handler knows who listens. They hear
of what ended in the last twentieth of a second in one go, while what they need is in the caches of
the core, from where the lanes push it out as soon as they run.

A record holds sizes, names and times, and nothing that a client wrote: no body, no header, no
query, not even the path, only the template of the route that took it.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenizers_svc.problems import MEDIA_TYPE
from tokenizers_svc.request_fields import field_of

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST: Final = 499
UNMATCHED: Final = "unmatched"
QUIET_ROUTES: Final = frozenset({"/healthz", "/readyz", "/metrics"})  # neither logged nor traced
_TOLD_AFTER_S: Final = 0.05
StageName = Literal["read", "decode", "queue", "infer"]


class Stage(NamedTuple):
    """A part of the work for one picture."""

    name: StageName
    ended: float  # time.perf_counter()
    seconds: float


@dataclass(slots=True)
class RequestRecord:
    """One request; times are those of `time.perf_counter`."""

    method: str
    traceparent: str | None = None
    tracestate: str | None = None
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    request_id: str = ""
    route: str = UNMATCHED
    status: int = CLIENT_CLOSED_REQUEST
    model: str | None = None
    num_images: int = 0  # answered with token ids or a picture
    received_bytes: int = 0
    sent_bytes: int = 0
    stages: list[Stage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # codes: of the request, or of its items

    @property
    def seconds(self) -> float:
        """From the first byte to the last."""
        return self.ended - self.started

    def add_stage(self, name: StageName, seconds: float, *, ended: float) -> None:
        """Note a stage of one picture."""
        self.stages.append(Stage(name, ended, seconds))

    def longest_stages(self) -> dict[StageName, float]:
        """Return the longest time of each stage, seconds: where a request of many waited."""
        longest: dict[StageName, float] = {}
        for stage in self.stages:
            longest[stage.name] = max(stage.seconds, longest.get(stage.name, 0.0))
        return longest


Observer = Callable[[RequestRecord], None]


class Audience:
    """Who hears of requests, some time after they have ended."""

    def __init__(self, *observers: Observer) -> None:
        """Begin with these; they are called in the event loop and must not wait."""
        self._observers = list(observers)
        self._ended: list[RequestRecord] = []

    def add(self, observer: Observer) -> None:
        """Let one more hear of every request that ends from now on."""
        self.tell()
        self._observers.append(observer)

    def note(self, record: RequestRecord) -> None:
        """Tell of a request within a twentieth of a second."""
        if not self._ended:
            asyncio.get_running_loop().call_later(_TOLD_AFTER_S, self.tell)
        self._ended.append(record)

    def tell(self) -> None:
        """Tell everybody of every request that has ended."""
        ended, self._ended = self._ended, []
        for observer in self._observers:
            for record in ended:
                try:
                    observer(record)
                except Exception:
                    logger.exception("an observer of requests failed")


class Observation:
    """Pure ASGI middleware: a record for every HTTP request, as `request.state.record`."""

    def __init__(self, app: ASGIApp, *, audience: Audience) -> None:
        """Wrap `app`; `audience` hears of every request."""
        self._app = app
        self._audience = audience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            scope["method"] if scope["method"] in _METHODS else "other",
            field_of(scope, b"traceparent"),
            field_of(scope, b"tracestate"),
        )
        scope.setdefault("state", {})["record"] = record

        async def counted_receive() -> Message:
            message = await receive()
            record.received_bytes += len(message.get("body", b""))
            return message

        is_problem = False

        async def counted_send(message: Message) -> None:
            nonlocal is_problem
            if message["type"] == "http.response.start":
                record.status = message["status"]
                is_problem = (b"content-type", _PROBLEM) in message["headers"]
            else:
                record.sent_bytes += len(message.get("body", b""))
                if is_problem:
                    record.problems.append(json.loads(message["body"])["code"])
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            record.ended = time.perf_counter()
            record.request_id = scope["state"].get("request_id", "")
            record.route = getattr(scope.get("route"), "path", UNMATCHED)
            self._audience.note(record)


_PROBLEM: Final = MEDIA_TYPE.encode()
_METHODS: Final = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
