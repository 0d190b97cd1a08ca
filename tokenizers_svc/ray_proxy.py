"""What Ray's proxy says by itself, in the form of our problems.

The proxy stands before the replicas and answers alone when all of them are full, when none is
there, and when the one that had a request has died. It takes this module into its own process,
which therefore imports little.
"""

from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenizers_svc.middleware import new_request_id
from tokenizers_svc.problems import ProblemError, problem_response

_NOBODY: Final = ("not-ready", "No replica serves here now: the service starts or has stopped.")
_PROXY_PROBLEMS: Final = {
    404: _NOBODY,
    408: ("deadline", "No replica answered in time."),
    429: ("overloaded", "All replicas are full. Ask again."),
    503: _NOBODY,
}
_DIED: Final = ("not-ready", "The replica that had this request has died. Ask again.")


class ProxyProblems:
    """ASGI middleware of Ray's proxy: what it says by itself becomes a problem of ours."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the proxy."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        has_started = is_replaced = False

        async def replace(message: Message) -> None:
            nonlocal has_started, is_replaced
            if message["type"] == "http.response.start":
                has_started = True
                is_replaced = is_of_the_proxy(message)
                if is_replaced:
                    answer = _problem(*_PROXY_PROBLEMS[message["status"]], message["headers"])
                    await answer(scope, receive, send)
                else:
                    _say_request_id_once(message)
            if not is_replaced:
                await send(message)

        await self._app(scope, receive, replace)
        if not has_started:
            # Ray answers nothing; to ask again is safe, because equal pictures get equal ids.
            await _problem(*_DIED, ())(scope, receive, send)


def is_of_the_proxy(start: Message) -> bool:
    """Whether an answer comes from the proxy; those of replicas carry our headers."""
    headers = Headers(raw=start["headers"])
    return start["status"] in _PROXY_PROBLEMS and "x-content-type-options" not in headers


def _say_request_id_once(start: Message) -> None:
    """Drop the request id of the proxy where the replica has said it."""
    ids = [pair for pair in start["headers"] if bytes(pair[0]).lower() == b"x-request-id"]
    for pair in ids[1:]:
        start["headers"].remove(pair)


def proxy_middleware() -> list[Middleware]:
    """Return what Ray puts around its proxy; named in the environment of the cluster."""
    return [Middleware(ProxyProblems)]


def _problem(code: str, detail: str, headers: Iterable[tuple[bytes, bytes]]) -> Response:
    """Return a problem with the request id that the proxy gave."""
    known = Headers(raw=list(headers))
    error = ProblemError(code, detail, headers={"Retry-After": known.get("retry-after", "1")})
    request_id = known.get("x-request-id") or new_request_id()
    response = problem_response(error, request_id)
    response.headers["X-Request-Id"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    if code == "not-ready":
        response.headers["Connection"] = "close"  # another node may have a replica
    return response
