"""An HTTP proxy that can fail as networks and servers do, for tests of object storage."""

import http.client
import random
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

FAILURES = ("busy", "refuse", "lose", "cut")
"""503; the connection closed before the request is served, or after it; half of the answer."""


class Proxy:
    """Passes requests on to a server and fails some of them.

    `choose` is asked for every request, by method and path, whether it is to fail, and how.
    """

    def __init__(self, server: str) -> None:
        self._server = urlsplit(server).netloc
        self._choose: Callable[[str, str], str | None] = lambda method, path: None
        self._lock = threading.Lock()
        self.failed: list[tuple[str, str, str]] = []  # how, method, path
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *args: object) -> None:
                """Say nothing: clients are killed in the middle of requests here."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @contextmanager
    def failing(self, choose: Callable[[str, str], str | None]):
        """Fail as `choose` says while the block runs; yields the list of failures."""
        self.failed = []
        self._choose = choose
        try:
            yield self.failed
        finally:
            self._choose = lambda method, path: None

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            failure = self._choose(request.command, request.path)
            if failure:
                self.failed.append((failure, request.command, request.path))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if failure == "busy":
            self._answer(request, 503, {"Content-Type": "application/xml"}, BUSY)
            return
        if failure == "refuse":
            request.close_connection = True
            return
        upstream = http.client.HTTPConnection(self._server, timeout=30)
        try:
            upstream.request(request.command, request.path, body, dict(request.headers))
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        if failure == "lose":
            request.close_connection = True
            return
        self._answer(request, answer.status, dict(answer.getheaders()), data, failure == "cut")

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        data: bytes,
        cut: bool = False,
    ) -> None:
        request.send_response_only(status)
        length = headers.get("Content-Length", "0") if request.command == "HEAD" else len(data)
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in {"content-length", "transfer-encoding", "connection"}
        }
        for name, value in {**kept, "Content-Length": str(length)}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            request.close_connection = True


def at_random(seed: int, share: float) -> Callable[[str, str], str | None]:
    """Let a share of all requests fail, each in a way of its own."""
    rng = random.Random(seed)
    return lambda method, path: rng.choice(FAILURES) if rng.random() < share else None
