"""Servers that tests read and write: a web server with moods, and Google Cloud Storage."""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape


def free_port() -> int:
    """Return a port of this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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


class GoogleStorage:
    """A bucket of Google Cloud Storage in memory, as far as its XML API is used for caches.

    Objects have a generation, which writing may depend on. Large ones are written in parts.
    """

    def __init__(self, bucket):
        self.bucket = bucket
        self.objects = {}  # name: (generation, content)
        self.parts = {}  # of objects that are not whole yet
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _google_handler(self))
        self._server.generation = 1000
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def _google_handler(storage):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            bucket, name, query = self._place()
            if bucket != storage.bucket:
                self._answer(404)
            elif not name:
                self._answer(200, _listing(storage, query))
            elif name not in storage.objects:
                self._answer(404)
            else:
                generation, data = storage.objects[name]
                headers = _tags(generation)
                if wanted := self.headers.get("Range"):
                    start, stop = map(int, wanted.removeprefix("bytes=").split("-"))
                    headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
                    self._answer(206, data[start : stop + 1], headers)
                else:
                    self._answer(200, data, headers)

        def do_HEAD(self):
            self.do_GET()

        def do_PUT(self):
            bucket, name, query = self._place()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if "partNumber" in query:
                storage.parts[name][int(query["partNumber"][0])] = data
                self._answer(200, b"", {"ETag": "part"})
                return
            with storage.lock:
                there, _ = storage.objects.get(name, (0, b""))
                wanted = self.headers.get("x-goog-if-generation-match")
                if bucket != storage.bucket:
                    self._answer(404)
                elif wanted is not None and int(wanted) != there:
                    self._answer(412)
                else:
                    self.server.generation += 1
                    storage.objects[name] = self.server.generation, data
                    self._answer(200, b"", _tags(self.server.generation))

        def do_POST(self):
            _, name, query = self._place()
            self.rfile.read(int(self.headers["Content-Length"]))
            if "uploadId" not in query:
                storage.parts[name] = {}
                self._answer(
                    200,
                    b"<InitiateMultipartUploadResult><UploadId>1</UploadId>"
                    b"</InitiateMultipartUploadResult>",
                )
                return
            parts = storage.parts.pop(name)
            with storage.lock:
                self.server.generation += 1
                content = b"".join(parts[number] for number in sorted(parts))
                storage.objects[name] = self.server.generation, content
            self._answer(
                200,
                b"<CompleteMultipartUploadResult><ETag>whole</ETag>"
                b"</CompleteMultipartUploadResult>",
                _tags(self.server.generation),
            )

        def do_DELETE(self):
            _, name, _ = self._place()
            there = storage.objects.pop(name, None)
            self._answer(404 if there is None else 204)

        def _place(self):
            path, _, query = self.path.partition("?")
            bucket, _, name = unquote(path).lstrip("/").partition("/")
            return bucket, name, parse_qs(query)

        def _answer(self, status, data=b"", headers=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    return Handler


_LAST_MODIFIED = "Sat, 21 Nov 2026 12:00:00 GMT"


def _tags(generation):
    return {
        "ETag": f'"tag{generation}"',
        "x-goog-generation": str(generation),
        "Last-Modified": _LAST_MODIFIED,
    }


def _listing(storage, query):
    """Return what `list-type=2` answers, two names at a time."""
    (prefix,), (after,) = query.get("prefix", [""]), query.get("start-after", [""])
    (token,) = query.get("continuation-token", [""])
    names = [n for n in sorted(storage.objects) if n.startswith(prefix) and n > max(after, token)]
    contents = "".join(
        f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>t{generation}</ETag>"
        f"<LastModified>2026-11-21T12:00:00.000Z</LastModified></Contents>"
        for name in names[:2]
        for generation, data in [storage.objects[name]]
    )
    more = ""
    if len(names) > 2:
        more = f"<NextContinuationToken>{escape(names[1])}</NextContinuationToken>"
    return f"<ListBucketResult>{contents}{more}</ListBucketResult>".encode()
