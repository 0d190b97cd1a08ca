"""One connection of a client, who may be slow, rude or gone: nothing is waited for without an end.

uvicorn's protocol on httptools leaves open what this one bounds, by the limits of the service:

    header_timeout_s    the head of a request, from the first byte or from the connection on
    body_timeout_s      the rest of a body that nobody reads, because the answer is out already; one
                        that is read has the same time in `intake`
    send_timeout_s      a client that takes nothing of its answer; ten times that for the whole
    max_header_bytes    the head, a line between chunks, the trailer
    max_connections     the one that has been idle longest makes room; when all are at work, the new
                        one is told so
    max_batch_body_bytes    of a body that nobody reads
    32                  requests that wait for the answers to those before them

What is refused of a head is in `heads.py`. Fields of a trailer are read over, and a body is read
even where the request asks for another protocol.

What is no HTTP is answered by a problem like every other refusal, after the answers to what came
before it. A service that leaves gives connections without a request half a second, because one may
be on its way.
"""

import asyncio
import functools
import http
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokenizers_svc.corked import Corked
from tokenizers_svc.exchange import HANG_UP, HangUp
from tokenizers_svc.heads import (
    MAX_FIELDS,
    check_head,
    check_length,
    length_of,
    no_http,
    too_long,
    too_many_connections,
    too_many_fields,
)
from tokenizers_svc.limits import Limits
from tokenizers_svc.middleware import new_request_id
from tokenizers_svc.problems import ProblemError, problem_response

_MAX_SEND_TIMES: Final = 10
_MAX_AHEAD: Final = 32
_LEAVING_S: Final = 0.5
_PIECE_BYTES: Final = 262_144

Idle = dict["BoundedProtocol", None]  # in the order in which they became so


class BoundedProtocol(HttpToolsProtocol):
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
        self._unanswered: deque[RequestResponseCycle] = deque()  # the first one is at work
        self._refusal: ProblemError | None = None  # if there is one, nothing more is read
        self._part: Literal["none", "head", "body"] = "none"  # of a request, that arrives now
        self._num_loose_bytes = 0  # since the last head, line or piece of a body ended
        self._has_content = False  # a byte of this body has arrived
        self._has_length = False  # the head says how long this body is
        self._num_unwanted_bytes = 0  # of a body that nobody reads
        self._num_unparsed_bytes = 0  # of a body that the parser passes over

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection, or refuse it when all others are at work."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                self._refuse(too_many_connections(self._limits.max_connections))
                return
            oldest.abort()
        self._idle[self] = None
        self._read_within(self._limits.header_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._idle.pop(self, None)
        self._stop_timers()
        self._unset_keepalive_if_required()
        self._hang_up()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; the time for a head runs until it is complete."""
        if self._refusal is not None or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._num_loose_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            if isinstance(cause, httptools.HttpParserInvalidURLError):
                self._refuse(no_http())
            elif isinstance(cause, ProblemError):
                self._refuse(cause)
            else:
                raise
        except httptools.HttpParserError:
            self._refuse(no_http())
        else:
            if self._num_loose_bytes > self._limits.max_header_bytes:
                self._refuse(too_long(self._limits.max_header_bytes))
            else:
                self._note_idleness()

    # What the parser says.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._part = "head"
        self._has_content = False
        self._num_unwanted_bytes = 0
        super().on_message_begin()
        cast(Any, self.scope).setdefault("extensions", {})[HANG_UP] = HangUp()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a field of a head; those of a trailer come too late to be obeyed."""
        if self._part == "body":
            return
        if len(self.headers) == MAX_FIELDS:
            raise too_many_fields()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let a request be answered, at once or after those before it."""
        if self._num_loose_bytes > self._limits.max_header_bytes:  # more than the head, maybe
            check_length(self.url, self.headers, self._limits.max_header_bytes)
        if len(self.pipeline) == _MAX_AHEAD:
            raise no_http(f"At most {_MAX_AHEAD} requests wait on one connection.")
        check_head(self.parser.get_http_version(), self.url, self.headers)
        self._has_length = any(name == b"content-length" for name, _ in self.headers)
        if self.parser.should_upgrade():
            self._num_unparsed_bytes = length_of(self.headers)
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, Corked(self.transport))
        # uvicorn reads no further while requests wait, and would not see that the client has gone.
        self.flow.resume_reading()
        self._unanswered.append(self.cycle)
        self._part = "body"
        self._num_loose_bytes = 0
        self._stop_reading_timer()
        if self._is_leaving:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Count the bytes of the next line from here."""
        self._num_loose_bytes = 0

    def on_chunk_complete(self) -> None:
        """Count the bytes of the next line from here."""
        self._num_loose_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Pass a piece of a body on, or count it if nobody wants it.

        A picture comes in two or three pieces. Whoever waits for it is woken once, by the last one,
        where its length was counted when it was let in; pieces of other bodies are to be counted as
        they come.
        """
        self._num_loose_bytes = 0
        self._has_content = True
        if self.cycle.response_complete:
            self._num_unwanted_bytes += len(body)
            if self._num_unwanted_bytes > self._limits.max_batch_body_bytes:
                self.abort()
        elif self._has_length and len(self.cycle.body) + len(body) < _PIECE_BYTES:
            self.cycle.body += body
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, unless its body is still to come."""
        if self._num_unparsed_bytes:
            return
        self._part = "none"
        self._num_loose_bytes = 0
        self._stop_reading_timer()
        super().on_message_complete()

    # What the server and the application say.

    def on_response_complete(self) -> None:
        """Go on to the next request, to the refusal of it, or to the end of an unwanted body."""
        cast(Corked, self._unanswered.popleft().transport).flush()
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_sending()
        if self.transport.is_closing() or self._unanswered:
            return
        if self._refusal is not None:
            self._say(self._refusal)
        elif self._part != "body":
            self._note_idleness()
        elif self.expect_100_continue and not self._has_content:
            self.transport.close()  # what comes next may be that body, or another request
        else:
            self._read_within(self._limits.body_timeout_s, self.abort)

    def pause_writing(self) -> None:
        """Note that the client does not keep up."""
        super().pause_writing()
        self._watch_sending()

    def shutdown(self) -> None:
        """Leave: finish the request that is here, or that is on its way."""
        self._is_leaving = True
        if self._unanswered:
            self._unanswered[-1].keep_alive = False
        else:
            self.loop.call_later(_LEAVING_S, self._close_if_idle)

    def abort(self) -> None:
        """End at once."""
        self._idle.pop(self, None)
        self._stop_timers()
        self.transport.abort()

    def _parse(self, data: bytes) -> None:
        """Feed the parser, but for bodies that it takes for another protocol.

        It stops after a head with `Connection: upgrade`. No upgrade is offered here, so the request
        is served like any other.
        """
        while data:
            if self._num_unparsed_bytes:
                body, data = data[: self._num_unparsed_bytes], data[self._num_unparsed_bytes :]
                self._num_unparsed_bytes -= len(body)
                self.on_body(body)
                if self._num_unparsed_bytes:
                    return
                self.on_message_complete()
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            else:
                return

    def _note_idleness(self) -> None:
        """Know whether this connection may make room, and watch the time of a head."""
        if self._unanswered or self._part == "body":
            self._idle.pop(self, None)
            return
        self._idle.setdefault(self)
        if self._reading is not None:
            return
        if self._part == "head" or self._num_loose_bytes:
            self._read_within(self._limits.header_timeout_s, self._head_is_late)
        elif self.timeout_keep_alive_task is None:  # the rest of an unwanted body has passed
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _head_is_late(self) -> None:
        if self._part == "none" and not self._num_loose_bytes:
            self.transport.close()
            return
        limit = self._limits.header_timeout_s
        self._refuse(
            ProblemError(
                "header-timeout", "The head of the request did not arrive in time.", limit=limit
            )
        )

    def _close_if_idle(self) -> None:
        if not self._unanswered:
            self.transport.close()
            self._watch_sending()

    def _refuse(self, problem: ProblemError) -> None:
        """Refuse what arrives now, after the answers to what came before, and close.

        A client that breaks off its body in the middle of the answer is cut off.
        """
        self._refusal = problem
        self._idle.pop(self, None)
        if self._part == "body":
            if self.cycle.response_started:
                self.abort()
                return
            if len(self._unanswered) > 1:
                self._unanswered.pop()
                self.pipeline.popleft()
            else:
                self._hang_up()
        if not self._unanswered:
            self._say(problem)

    def _hang_up(self) -> None:
        """Tell the application that nobody waits for its answers."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
            cast(Any, cycle.scope)["extensions"][HANG_UP].tell()
        self._unanswered.clear()

    def _say(self, problem: ProblemError) -> None:
        request_id = new_request_id()
        answer = problem_response(problem, request_id)
        status = http.HTTPStatus(problem.status)
        headers = [*answer.raw_headers, (b"x-request-id", request_id.encode())]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        line = f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
        self.transport.write(line + head + b"connection: close\r\n\r\n" + bytes(answer.body))
        self.transport.close()
        self._watch_sending()

    def _read_within(self, seconds: float, action: Callable[[], None]) -> None:
        self._stop_reading_timer()
        self._reading = self.loop.call_later(seconds, action)

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

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
        self._stop_reading_timer()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


def bounded_config(app: Any, limits: Limits, **options: Any) -> Config:
    """Return uvicorn's configuration of a server whose connections are bounded."""
    return Config(
        app,
        http=functools.partial(BoundedProtocol, limits=limits, idle={}),  # type: ignore[arg-type]
        timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody here asks who the client is, or by which scheme it came
        **options,
    )
