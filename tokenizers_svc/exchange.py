"""One request and its answer: how long either may take, and whether the client is still there.

A server may offer to call when a client hangs up, under `HANG_UP` among the extensions of the scope
(`connections.py` does). Behind one that does not, a task waits for the message that says so.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tokenizers_svc.limits import Limits
from tokenizers_svc.observation import CLIENT_CLOSED_REQUEST
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.request_fields import field_of

T = TypeVar("T")

HANG_UP: Final = "patchcache.hang_up"


class HangUp:
    """Whether the client of a request has gone; the server's side calls `tell`."""

    __slots__ = ("_listener", "has_happened")

    def __init__(self) -> None:
        """Begin with a client that is there."""
        self.has_happened = False
        self._listener: Callable[[], None] | None = None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have `listener` called when it happens, or at once; None is nobody."""
        self._listener = listener
        if listener is not None and self.has_happened:
            listener()

    def tell(self) -> None:
        """Say that the client has gone."""
        self.has_happened = True
        if self._listener is not None:
            self._listener()


def time_allowed(request: Request, most_s: float) -> float:
    """Return how long the answer may take, seconds: what X-Request-Timeout says, at most `most_s`.

    Raises:
        ProblemError: 400, the header is not a positive number.
    """
    text = field_of(request.scope, b"x-request-timeout")
    if text is None:
        return most_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ProblemError("bad-request", "X-Request-Timeout is a positive number of seconds.")
    return min(seconds, most_s)


class Exchange:
    """The time of one request, by one timer: first it is read, then there is work.

        async with Exchange(request, limits) as exchange:
            picture = await exchange.read(read_picture(...))
            outcome = await exchange.work(service.tokenize(...))

    What takes too long is cancelled, and so is the work for a client that has gone.
    """

    def __init__(self, request: Request, limits: Limits) -> None:
        """Look at how long the client wants to wait.

        Raises:
            ProblemError: 400, its X-Request-Timeout is no time.
        """
        self._request = request
        self._allowed_s = time_allowed(request, limits.request_deadline_s)
        self._body_s = limits.body_timeout_s
        self._is_reading = True
        self._has_client = True
        self.read_s = 0.0  # how long the request took to read, seconds

    async def __aenter__(self) -> Self:
        now = asyncio.get_running_loop().time()
        self._until = now + self._allowed_s
        self._scope = asyncio.timeout_at(min(self._until, now + self._body_s))
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """End the time.

        Raises:
            ProblemError: 408, the body did not arrive in time; 504, the answer did not.
            ClientDisconnect: The client hung up.
        """
        try:
            await self._scope.__aexit__(kind, exc, tb)
        except TimeoutError:
            raise self._reason() from None

    async def read(self, reading: Coroutine[Any, Any, T]) -> T:
        """Return what `reading` makes of the body, which has its own time to arrive."""
        started = time.perf_counter()
        read = await reading
        self.read_s = time.perf_counter() - started
        self._is_reading = False
        if self._body_s < self._allowed_s:
            self._end_at(self._until)
        return read

    async def work(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which is cancelled when the client hangs up.

        The body has been read.
        """
        hang_up: HangUp | None = self._request.scope.get("extensions", {}).get(HANG_UP)
        if hang_up is None:
            return await self._work_beside_a_task(work)
        hang_up.listen(self._give_up)
        try:
            return await work
        finally:
            hang_up.listen(None)

    async def _work_beside_a_task(self, work: Coroutine[Any, Any, T]) -> T:
        leaving = asyncio.create_task(_disconnection(self._request))
        leaving.add_done_callback(self._give_up)
        try:
            return await work
        finally:
            leaving.remove_done_callback(self._give_up)
            leaving.cancel()

    def _give_up(self, _: object = None) -> None:
        self._has_client = False
        self._end_at(0)

    def _end_at(self, when: float) -> None:
        if not self._scope.expired():
            self._scope.reschedule(when)

    def _reason(self) -> ProblemError | ClientDisconnect:
        if not self._has_client:
            return ClientDisconnect()
        if self._is_reading and self._body_s < self._allowed_s:
            return body_is_late(self._body_s)
        return deadline_passed(self._allowed_s)


def body_is_late(seconds: float) -> ProblemError:
    """Return the refusal of a body that took too long."""
    return ProblemError(
        "body-timeout",
        f"The body has to arrive within {seconds:g} s, and did not.",
        limit=seconds,
        headers={"Connection": "close"},
    )


def deadline_passed(seconds: float) -> ProblemError:
    """Return the refusal of a request that took too long."""
    return ProblemError(
        "deadline",
        f"There was no answer within {seconds:g} s; the work was dropped. Ask again later.",
        limit=seconds,
    )


async def answer_nobody(request: Request, error: Exception) -> Response:
    """Answer a client that has gone."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _disconnection(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
