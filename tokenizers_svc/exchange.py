"""One request and its answer: how long it may take, and whether the client is still there."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tokenizers_svc.observation import CLIENT_CLOSED_REQUEST
from tokenizers_svc.problems import ProblemError

T = TypeVar("T")


def time_allowed(request: Request, most_s: float) -> float:
    """Return how long the answer may take, seconds: what X-Request-Timeout says, at most `most_s`.

    Raises:
        ProblemError: 400, the header is not a positive number.
    """
    text = request.headers.get("x-request-timeout")
    if text is None:
        return most_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ProblemError("bad-request", "X-Request-Timeout is a positive number of seconds.")
    return min(seconds, most_s)


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Give up what runs inside after so many seconds.

    Raises:
        ProblemError: 504.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise deadline_passed(seconds) from None


def deadline_passed(seconds: float) -> ProblemError:
    """Return the refusal of a request that took too long."""
    return ProblemError(
        "deadline",
        f"There was no answer within {seconds:g} s; the work was dropped. Ask again later.",
        limit=seconds,
    )


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client hangs up.

    The body must have been read.

    Raises:
        ClientDisconnect: The client hung up.
    """
    scope = asyncio.timeout(None)

    def give_up(_: asyncio.Task[None]) -> None:
        scope.reschedule(0)

    leaving = asyncio.create_task(_disconnection(request))
    try:
        async with scope:
            leaving.add_done_callback(give_up)
            return await work
    except TimeoutError:
        if not scope.expired():
            raise
        raise ClientDisconnect from None
    finally:
        leaving.remove_done_callback(give_up)
        leaving.cancel()


async def answer_nobody(request: Request, error: Exception) -> Response:
    """Answer a client that has gone."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _disconnection(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
