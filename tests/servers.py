"""Servers that tests read images from: a web server with moods, and S3's protocol."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """A web server of files in memory.

    It answers 503 to the first `num_busy` requests, breaks off the answers to the next
    `num_broken` in their middle, and knows ranges unless told otherwise. While `answers` is
    cleared it answers nothing.
    """

    def __init__(self, files, *, num_busy=0, num_broken=0, has_ranges=True):
        self.files = files
        self.num_busy = num_busy
        self.num_broken = num_broken
        self.has_ranges = has_ranges
        self.requests = []  # (path, Range)
        self.answers = threading.Event()
        self.answers.set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def mood(self, path, wanted):
        with self._lock:
            self.requests.append((path, wanted))
            if self.num_busy:
                self.num_busy -= 1
                return "busy"
            if self.num_broken:
                self.num_broken -= 1
                return "broken"
            return "well"

    def close(self):
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.split("?")[0].lstrip("/")
            wanted = self.headers.get("Range")
            server.answers.wait()
            mood = server.mood(path, wanted)
            if mood == "busy":
                self._answer(503, b"busy")
            elif path in ("forbidden.jpg", "forbidden.tar"):
                self._answer(403, b"no")
            elif path not in server.files:
                self._answer(404, b"nothing here")
            elif wanted and server.has_ranges:
                data = server.files[path]
                start, stop = wanted.removeprefix("bytes=").split("-")
                stop = min(int(stop) + 1, len(data))
                where = f"bytes {start}-{stop - 1}/{len(data)}"
                self._answer(206, data[int(start) : stop], mood, {"Content-Range": where})
            else:
                self._answer(200, server.files[path], mood)

        def _answer(self, status, data, mood="well", headers=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if mood == "broken":
                data = data[: len(data) // 2]
                self.close_connection = True
            with contextlib.suppress(ConnectionError):  # the client may have seen enough
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    return Handler
