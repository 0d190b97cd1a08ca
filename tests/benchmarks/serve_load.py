"""A client that costs little: closed loops and open loops over HTTP/1.1, in a process of its own.

It shares the cores with the service that it measures, so it speaks just enough HTTP: requests are
joined beforehand, and of an answer it reads the status, the length and the size of the batch.

    python -m tests.benchmarks.serve_load '{"port": 8000, "files": [...], "seconds": 8, ...}'
"""

import asyncio
import json
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    import uvloop
except ImportError:
    uvloop = None

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_BATCH = re.compile(rb"\r\nx-batch-size: *([0-9]+)", re.IGNORECASE)
_FORM = (
    b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    b"Content-Type: image/jpeg\r\n\r\n",
    b"\r\n--frontier--\r\n",
)


class Connection(asyncio.Protocol):
    """One connection that is kept; one request at a time."""

    def __init__(self) -> None:
        """Wait for a connection."""
        self._received = b""
        self._answered: Callable[[int, int], None] | None = None

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail: nothing here closes connections before the end."""
        if self._answered is not None:
            self._answered(0, 0)

    def send(self, request: bytes, answered: Callable[[int, int], None]) -> None:
        """Send a request; `answered` gets the status and the size of the batch."""
        self._received, self._answered = b"", answered
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Collect an answer."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._received[:end]
        length = _LENGTH.search(head)
        if length is not None:
            is_whole = len(self._received) >= end + 4 + int(length[1])
        else:
            is_whole = self._received.endswith(b"\r\n0\r\n\r\n")  # of a body in chunks
        if not is_whole:
            return
        batch = _BATCH.search(head)
        answered, self._answered = self._answered, None
        assert answered is not None
        answered(int(self._received[9:12]), int(batch[1]) if batch else 0)


class Load:
    """What is sent, and what came of it."""

    def __init__(
        self, port: int, files: list[str], path: str, warm_up_s: float, *, as_form: bool
    ) -> None:
        """Join the requests; a form has the file as its field `file`."""
        self._port = port
        kind = "multipart/form-data; boundary=frontier" if as_form else "image/jpeg"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        bodies = [Path(file).read_bytes() for file in files]
        if as_form:
            bodies = [_FORM[0] + body + _FORM[1] for body in bodies]
        self._requests = [
            f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies
        ]
        self._next = 0
        self._warm_up_s = warm_up_s
        self._latencies: list[tuple[float, float, int, int]] = []  # ended, seconds, status, batch

    async def closed(self, concurrency: int, seconds: float) -> None:
        """Keep `concurrency` requests under way."""
        connections = [await self._connect() for _ in range(concurrency)]
        self._start = time.perf_counter()
        end = self._start + self._warm_up_s + seconds
        left = concurrency
        finished = asyncio.get_running_loop().create_future()

        def go_on(connection: Connection) -> None:
            nonlocal left
            if time.perf_counter() < end:
                self._send(connection, time.perf_counter(), lambda: go_on(connection))
                return
            left -= 1
            if not left:
                finished.set_result(None)

        for connection in connections:
            go_on(connection)
        await finished

    async def open(self, rate: float, seconds: float) -> None:
        """Send as a Poisson process does, whatever is answered."""
        free = deque([await self._connect() for _ in range(8)])
        loop = asyncio.get_running_loop()
        rng = random.Random(0)
        self._start = due = time.perf_counter()
        end = self._start + self._warm_up_s + seconds
        pending = 0
        while due < end:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            connection = free.popleft() if free else await self._connect()
            pending += 1

            def answered(connection: Connection = connection) -> None:
                nonlocal pending
                pending -= 1
                free.append(connection)

            self._send(connection, due, answered)
        last = loop.time() + 30
        while pending and loop.time() < last:
            await asyncio.sleep(0.01)

    def report(self) -> dict[str, Any]:
        """Return what came of it, of the answers after the warm-up."""
        start = self._start + self._warm_up_s
        last = max(found[0] for found in self._latencies)
        kept = [found for found in self._latencies if found[0] >= start]
        good = [found for found in kept if found[2] == 200]
        seconds = [found[1] for found in good] or [float("nan")]
        batches = [found[3] for found in good if found[3]]
        return {
            "images_per_s": len(good) / (last - start),
            "p50_ms": 1000 * float(np.percentile(seconds, 50)),
            "p99_ms": 1000 * float(np.percentile(seconds, 99)),
            "num_good": len(good),
            "num_refused": sum(found[2] in (429, 503) for found in kept),
            "num_failed": sum(found[2] not in (200, 429, 503) for found in kept),
            # Pictures are asked, and a batch of n is then met n times.
            "batch": len(batches) / sum(1 / size for size in batches) if batches else 0.0,
            "num_sent": len(self._latencies),
            "cpu_s": time.process_time(),
        }

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        return connection

    def _send(self, connection: Connection, due: float, done: Callable[[], None]) -> None:
        def answered(status: int, batch: int) -> None:
            now = time.perf_counter()
            self._latencies.append((now, now - due, status, batch))
            done()

        request = self._requests[self._next % len(self._requests)]
        self._next += 1
        connection.send(request, answered)


def main() -> None:
    """Run what the argument says and print the report as JSON."""
    options = json.loads(sys.argv[1])
    load = Load(
        options["port"],
        options["files"],
        options["path"],
        options["warm_up_s"],
        as_form=options["as_form"],
    )
    before = time.process_time()
    if "rate" in options:
        work = load.open(options["rate"], options["seconds"])
    else:
        work = load.closed(options["concurrency"], options["seconds"])
    run = asyncio.run if uvloop is None else uvloop.run
    run(work)
    report = load.report()
    report["cpu_s"] -= before
    print(json.dumps(report))


if __name__ == "__main__":
    main()
