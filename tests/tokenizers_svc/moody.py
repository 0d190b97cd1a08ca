"""A real server that does what no client hopes for."""

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from cache_builder.formats.sample import npy_bytes

FINGERPRINT = "f" * 64
CUT = "cut"  # the connection ends in the middle of the answer
RUBBISH = "rubbish"  # what comes is not HTTP


def ok(fields, **headers):
    return 200, {"Content-Type": "application/json", **headers}, json.dumps(fields).encode()


def problem(status, code, **headers):
    fields = {"type": f"urn:patchcache:problem:{code}", "title": "?", "status": status,
              "detail": f"It is {code}.", "code": code, "limit": 7}  # fmt: skip
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers["Content-Type"] = "application/problem+json"
    return status, headers, json.dumps(fields).encode()


def tokens(first=0, fingerprint=FINGERPRINT, **fields):
    return {"model": "m", "fingerprint": fingerprint, "shape": [2, 2], "dtype": "uint16",
            "token_ids": [first, first + 1, first + 2, first + 3]} | fields  # fmt: skip


def models(fingerprint=FINGERPRINT, **limits):
    limits = {"max_items": 64, "max_queue": 64, "of a later version": 1} | limits
    model = {"id": "m", "fingerprint": fingerprint, "vocab_size": 16, "num_stages": 1,
             "grid": [2, 2], "image_size": 4, "patch_size": 2, "extractor": "pixel",
             "limits": limits}  # fmt: skip
    return {"models": [model]}


def npy(array, **headers):
    return 200, {"Content-Type": "application/x-npy", **headers}, npy_bytes(np.asarray(array))


class MoodyServer:
    """Answers with the next of `script`, and for ever with the last; an answer may be a function.

    `/v1/models` is answered from `models`, which is not part of the script.
    """

    def __init__(self, *script, models=None):
        self.script = list(script)
        self.models = ok(models or globals()["models"]())
        self.requests = []  # (method, path with query, headers, body)
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.handle_error = lambda *connection: None  # clients hang up as they like
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        with self.lock:
            self.requests.append(request)
            if request[1] == "/v1/models":
                return self.models
            answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return answer(request) if callable(answer) else answer


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = server.answer((self.command, self.path, dict(self.headers), body))
            if answer == RUBBISH:
                self.wfile.write(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
            if isinstance(answer, str):
                if answer == CUT:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b"{")
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, body = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def do_POST(self):
            self.do_GET()

        def log_message(self, *args):
            pass

    return Handler


@contextlib.contextmanager
def nobody():
    """The URL of a port at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
