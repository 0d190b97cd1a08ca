"""Press a service hard and print what came of it; for long runs by hand.

python -m tests.integration.stress_service --images 10000 --minutes 10

Three parts, against a process of its own whose tokenizer takes a fixed time for each picture:
damaged pictures of every format; mixed requests at twice the capacity; SIGTERM under load. Fails
if an answer is a 5xx other than 503 and 504, if an answer is lost, if memory grows, or if those let
in wait too long. The load that was reached, in times of the capacity, stands behind its name.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from tests.mutants import mutants
from tests.tokenizers_svc.support import jpeg, process, wait_ready

SECONDS_PER_PICTURE = 0.03  # so long that one client can send twice what the service does
MAX_WAIT_S = 5.0
MAX_OPEN = 400  # requests at one moment
GROWTH = 1.1  # of memory, beside
GROWTH_BYTES = 64_000_000
PAGE_BYTES = 4096
SERVER = """
import logging, time
logging.getLogger().setLevel("INFO")
from tests.tokenizers_svc.support import WatchedTokenizer
from tokenizers_svc.app import create_app
from tokenizers_svc.serve import run_app
class Paced(WatchedTokenizer):
    def encode(self, pixels):
        time.sleep(float(sys.argv[1]) * len(pixels))
        return self.inner.encode(pixels)
run_app(create_app(Paced()), port=0)
"""


@dataclass
class Part:
    """What happened in one part of the run."""

    name: str
    statuses: Counter = field(default_factory=Counter)
    seconds: list = field(default_factory=list)  # of answers with 200
    memory: list = field(default_factory=list)  # bytes, in time
    lost: list = field(default_factory=list)

    def failures(self):
        worse = [status for status in self.statuses if status >= 500 and status not in (503, 504)]
        failures = [f"{self.statuses[status]} answers were {status}" for status in worse]
        if self.lost:
            failures.append(f"{len(self.lost)} answers were lost, such as {self.lost[0]!r}")
        if len(self.memory) > 8:
            early, late = max(self.memory[: len(self.memory) // 4]), self.memory[-1]
            if late > GROWTH * early + GROWTH_BYTES:
                failures.append(f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
        if self.seconds and self.p99() > MAX_WAIT_S:
            failures.append(f"one in a hundred of those let in waited {self.p99():.1f} s")
        return failures

    def p99(self):
        return float(np.percentile(self.seconds, 99))

    def row(self):
        statuses = " ".join(f"{status}:{count}" for status, count in sorted(self.statuses.items()))
        p50, p99 = np.percentile(self.seconds, [50, 99]) if self.seconds else (0, 0)
        start, end, peak = (
            (self.memory[0], self.memory[-1], max(self.memory)) if self.memory else (0, 0, 0)
        )
        return (
            f"{self.name:<10} {1000 * p50:>7.0f} {1000 * p99:>7.0f} {start / 1e6:>7.0f} "
            f"{end / 1e6:>7.0f} {peak / 1e6:>7.0f} {len(self.lost):>5}  {statuses}"
        )


async def send(client, part, method, path, **options):
    started = time.perf_counter()
    try:
        answer = await client.request(method, path, **options)
    except httpx.TransportError as exc:
        part.lost.append(f"{method} {path}: {exc!r}")
        return
    part.statuses[answer.status_code] += 1
    if answer.status_code == 200 and path.startswith("/v1/tokenize"):
        part.seconds.append(time.perf_counter() - started)


async def watch_memory(pid, part, pause_s):
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        part.memory.append(pages * PAGE_BYTES)
        await asyncio.sleep(pause_s)


@contextlib.asynccontextmanager
async def watched(pid, part, pause_s):
    watching = asyncio.create_task(watch_memory(pid, part, pause_s))
    try:
        yield
    finally:
        watching.cancel()


def make_client(url):
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False, limits=limits)


async def send_mutants(url, pid, num_images, seed):
    part = Part("damaged")
    files = mutants(num_images, seed)

    async def work(client):
        for body in files:
            await send(client, part, "POST", "/v1/tokenize", content=body)

    async with make_client(url) as client, watched(pid, part, 0.2):
        await asyncio.gather(*(work(client) for _ in range(8)))
    return part


class Mix:
    """Requests of all kinds, none twice, so that no answer is a kept one."""

    def __init__(self, client, url, part, seed):
        self.client, self.part = client, part
        self.host, self.port = httpx.URL(url).host, httpx.URL(url).port
        self.rng = random.Random(seed)
        self.photos = [jpeg((500, 375), seed=i) for i in range(4)]
        self.mutants = mutants(10**9, seed + 1)
        self.numbers = itertools.count()

    def photo(self):
        # Bytes behind the end of a JPEG change its digest, not its pixels.
        return self.rng.choice(self.photos) + next(self.numbers).to_bytes(8, "big")

    async def one(self):
        kind = self.rng.choices(KINDS, WEIGHTS)[0]
        if kind == "picture":
            await send(self.client, self.part, "POST", "/v1/tokenize", content=self.photo())
        elif kind == "batch":
            files = [("files", self.photo()) for _ in range(4)]
            await send(self.client, self.part, "POST", "/v1/tokenize/batch", files=files)
        elif kind == "mutant":
            body = next(self.mutants)
            await send(self.client, self.part, "POST", "/v1/tokenize", content=body)
        elif kind == "ids":
            body = {"token_ids": [self.rng.randrange(16) for _ in range(16)]}
            await send(self.client, self.part, "POST", "/v1/detokenize", json=body)
        elif kind == "probe":
            path = self.rng.choice(("/healthz", "/readyz", "/v1/models", "/metrics"))
            await send(self.client, self.part, "GET", path)
        else:
            await self.hang_up(kind)

    async def hang_up(self, kind):
        """Leave in the middle of the head, of the body, or while the answer is made."""
        body = self.photo()
        head = b"POST /v1/tokenize HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body)
        sent = {"leave in head": head[:40], "leave in body": head + body[:9000]}.get(
            kind, head + body
        )
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(self.rng.random())
            writer.transport.abort()


KINDS = (
    "picture", "batch", "mutant", "ids", "probe", "leave in head", "leave in body", "leave later",
)  # fmt: skip
WEIGHTS = (70, 5, 5, 5, 6, 3, 3, 3)


async def press(url, pid, minutes, seed):
    """Send at twice the capacity, whatever comes back."""
    part = Part("load")
    pictures_per_request = (70 + 4 * 5) / sum(WEIGHTS)
    pause_s = SECONDS_PER_PICTURE * pictures_per_request / 2
    async with make_client(url) as client, watched(pid, part, 1.0):
        mix = Mix(client, url, part, seed)
        started = time.perf_counter()
        tasks = set()
        for number in itertools.count():
            now = time.perf_counter()
            if now - started > 60 * minutes:
                break
            await asyncio.sleep(max(0.0, started + number * pause_s - now))
            if len(tasks) >= MAX_OPEN:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(mix.one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        part.name += f" x{2 * pause_s * number / (now - started):.1f}"
        await asyncio.gather(*tasks)
    return part


async def stop_under_load(url, running):
    """Send SIGTERM; whoever has got a connection must get an answer."""
    part = Part("stopped")
    is_over = asyncio.Event()

    async def work(number):
        body = jpeg((500, 375), seed=number)
        for again in itertools.count():
            if is_over.is_set():
                return
            async with make_client(url) as client:
                try:
                    content = body + bytes([number]) + again.to_bytes(8, "big")
                    answer = await client.post("/v1/tokenize", content=content)
                except httpx.ConnectError:
                    return  # nobody listens any more
                except httpx.TransportError as exc:
                    part.lost.append(repr(exc))
                    return
                part.statuses[answer.status_code] += 1

    tasks = [asyncio.create_task(work(number)) for number in range(16)]
    await asyncio.sleep(1)
    running.send_signal(signal.SIGTERM)
    await asyncio.wait(tasks, timeout=60)
    is_over.set()
    code = await asyncio.to_thread(running.wait, 60)
    if code != 0:
        part.lost.append(f"the process ended with {code}")
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="damaged pictures")
    parser.add_argument("--minutes", type=float, default=1, help="at twice the capacity")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with process(SERVER, SECONDS_PER_PICTURE) as (running, client, _):
        wait_ready(client)
        url, pid = str(client.base_url), running.pid
        client.close()
        print(
            f"{'part':<10} {'p50 ms':>7} {'p99 ms':>7} {'MB':>7} {'end':>7} {'peak':>7} "
            f"{'lost':>5}  statuses"
        )
        parts = []
        for run in (
            send_mutants(url, pid, options.images, options.seed),
            press(url, pid, options.minutes, options.seed),
            stop_under_load(url, running),
        ):
            parts.append(asyncio.run(run))
            print(parts[-1].row(), flush=True)
    failures = [f"{part.name}: {failure}" for part in parts for failure in part.failures()]
    print("\n".join(failures) or "nothing was lost, nothing failed, memory is bounded")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
