"""One connection of a client, who may be slow, rude or gone: nothing is waited for without an end.

uvicorn's protocol on h11 leaves open what this one bounds, by the limits of the service:

    header_timeout_s    the head of a request, from the first byte or from the connection on
    body_timeout_s      the rest of a body that nobody reads, because the answer is out already; one
                        that is read has the same time in `intake`
    send_timeout_s      a client that takes nothing of its answer; ten times that for the whole
    max_header_bytes    the head, a line between chunks, the trailer
    max_connections     the one that has been idle longest makes room; when all are at work, the new
                        one is told so

What is no HTTP is answered by a problem like every other refusal. A service that leaves gives
connections without a request half a second, because one may be on its way.
"""

import asyncio
import functools
import http
import sys
import uuid
from collections.abc import Callable
from typing import Any, Final

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError, problem_response

_MAX_SEND_TIMES: Final = 10
_LEAVING_S: Final = 0.5

Idle = dict["BoundedProtocol", None]  # in the order in which they became so


class BoundedProtocol(H11Protocol):
    """A connection whose every state ends."""

    def __init__(self, *args: Any, limits: Limits, idle: Idle, **kwargs: Any) -> None:
        """Begin; uvicorn does.

        Args:
            args: uvicorn's own.
            limits: Those of the service.
            idle: The connections without a request, shared by all of a server.
            kwargs: uvicorn's own.
        """
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._idle = idle
        self._is_leaving = False
        self._reading: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection, or refuse it when all others are at work."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                self._refuse("too-many-connections", limit=self._limits.max_connections)
                return
            oldest.abort()
        self._idle[self] = None
        self._read_within(self._limits.header_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._idle.pop(self, None)
        self._stop_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; the time for a head runs until it is complete."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._has_request()
        elif not self.transport.is_closing():
            self._idle.setdefault(self)
            if self._reading is None:
                self._read_within(self._limits.header_timeout_s, self._head_is_late)

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the end of a body that nobody wants."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_sending()
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._idle[self] = None
            if self.conn.trailing_data[0]:  # the next head has begun
                self._read_within(self._limits.header_timeout_s, self._head_is_late)
        elif self.conn.our_state is h11.DONE:
            self._read_within(self._limits.body_timeout_s, self.abort)

    def pause_writing(self) -> None:
        """Note that the client does not keep up."""
        super().pause_writing()
        self._watch_sending()

    def shutdown(self) -> None:
        """Leave: finish the request that is here, or that is on its way."""
        self._is_leaving = True
        if self._is_at_work():
            self.cycle.keep_alive = False
        else:
            self.loop.call_later(_LEAVING_S, self._close_if_idle)

    def abort(self) -> None:
        """End at once."""
        self._idle.pop(self, None)
        self._stop_timers()
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or more of it than is read; called while the error is handled."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse("header-too-large", limit=self._limits.max_header_bytes)
        else:
            self._refuse("bad-request")

    def _is_at_work(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _has_request(self) -> None:
        self._idle.pop(self, None)
        if self._is_leaving and self._is_at_work():
            self.cycle.keep_alive = False
        is_unwanted = self.conn.our_state is h11.DONE  # its body is being thrown away
        if self._reading is not None and not is_unwanted:
            self._reading.cancel()
            self._reading = None

    def _close_if_idle(self) -> None:
        if not self._is_at_work():
            self.transport.close()
            self._watch_sending()

    def _head_is_late(self) -> None:
        if self.conn.trailing_data == (b"", False):  # not a byte of it
            self.transport.close()
            return
        self._refuse("header-timeout", limit=self._limits.header_timeout_s)

    def _refuse(self, code: str, *, limit: float | None = None) -> None:
        """Answer without a request and close; a client that is in an answer already is cut off."""
        self._idle.pop(self, None)
        if self._is_at_work():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.abort()
            return
        problem = ProblemError(code, _DETAILS[code], limit=limit)
        request_id = uuid.uuid4().hex
        answer = problem_response(problem, request_id)
        status = http.HTTPStatus(problem.status)
        headers = [*answer.raw_headers, (b"x-request-id", request_id.encode())]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        line = f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
        self.transport.write(line + head + b"connection: close\r\n\r\n" + bytes(answer.body))
        self.conn.send_failed()
        self.transport.close()
        self._watch_sending()

    def _read_within(self, seconds: float, action: Callable[[], None]) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading = self.loop.call_later(seconds, action)

    def _watch_sending(self) -> None:
        if self._sending is None:
            self._watch_again(self.transport.get_write_buffer_size(), 1)

    def _watch_again(self, num_bytes: int, times: int) -> None:
        self._sending = self.loop.call_later(
            self._limits.send_timeout_s, self._check_sending, num_bytes, times
        )

    def _check_sending(self, num_bytes_before: int, times: int) -> None:
        self._sending = None
        num_bytes = self.transport.get_write_buffer_size()
        if not num_bytes:
            return
        # A long answer is refilled while it is sent, so that only a full buffer shows no progress.
        if num_bytes == num_bytes_before or times >= _MAX_SEND_TIMES:
            self.abort()
        else:
            self._watch_again(num_bytes, times + 1)

    def _stop_timers(self) -> None:
        for timer in (self._reading, self._sending):
            if timer is not None:
                timer.cancel()
        self._reading = self._sending = None


_DETAILS: Final = {
    "bad-request": "This is no HTTP/1.1 request.",
    "header-too-large": "The head of the request is too long.",
    "header-timeout": "The head of the request did not arrive in time.",
    "too-many-connections": "Every connection of the service is at work. Ask again later.",
}


def bounded_config(app: Any, limits: Limits, **options: Any) -> Config:
    """Return uvicorn's configuration of a server whose connections are bounded."""
    return Config(
        app,
        # httptools, the default, takes heads of any length, and one of 200 MB holds up the event
        # loop for a minute. h11 costs 0.1 ms more per request.
        http=functools.partial(BoundedProtocol, limits=limits, idle={}),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        **options,
    )
