"""What every answer carries, whatever it says.

A request id, taken from the client when it is harmless, so that a log line can be found from
either side; the tokenizer's fingerprint; and, while the service drains, `Connection: close`, so
that clients have moved to new connections before this process stops to accept any. An exception
that nobody handled is logged here with the request id and answered by a 500 that says nothing.
"""

import logging
import random
import re
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenizers_svc.problems import internal_problem, problem_response
from tokenizers_svc.request_fields import field_of

logger = logging.getLogger(__name__)

_HARMLESS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


class CommonHeaders:
    """Pure ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, *, fingerprint: Callable[[], str], is_draining: Callable[[], bool]
    ) -> None:
        """Wrap `app`; `fingerprint` is that of requests whose route names no other."""
        self._app = app
        self._fingerprint = fingerprint
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                fingerprint = state.get("fingerprint") or self._fingerprint()
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-tokenizer-fingerprint", fingerprint.encode()),
                    _NO_SNIFFING,
                ]
                if self._is_draining():
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("request %s failed", request_id)
            if has_started:
                raise
            await problem_response(internal_problem(), request_id)(
                scope, receive, send_with_headers
            )


def _request_id(scope: Scope) -> str:
    offered = field_of(scope, b"x-request-id", "")
    return offered if _HARMLESS_ID.fullmatch(offered) else new_request_id()


def new_request_id() -> str:
    """Return what tells a request apart from others: no secret, and nothing asked of the kernel."""
    return f"{random.getrandbits(128):032x}"
