"""`patchcache serve --ray` as a process, and a crowd that asks it."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.clusters import descendants
from tests.servers import free_port
from tests.tokenizers_svc.support import ROOT, expected_ids, jpeg, make_client, post, wait_until

KEY = "a-key-of-the-environment"
START_S = 200  # Ray starts five processes of Python, one after the other


class RayService:
    """The command, its log and its replicas."""

    def __init__(self, codebook, log, *words, port=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        words = ["--codebook", codebook, "--port", self.port, "--limit", "drain_s=0.5", *words]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cache_builder", "serve", "--ray", *map(str, words)],
                cwd=ROOT, stdout=file, stderr=file,
                env=os.environ | {"PATCHCACHE_SERVE_KEYS": f"{KEY} alice"},
            )  # fmt: skip

    def wait_until_it_serves(self):
        wait_until(
            lambda: self.process.poll() is not None or "try: curl" in self.log.read_text(), START_S
        )
        assert self.process.poll() is None, self.log.read_text()

    def client(self, url=None):
        """Return a client that has the key."""
        client = make_client(url or self.url)
        client.headers["Authorization"] = f"Bearer {KEY}"
        return client

    def end(self):
        self.process.terminate()
        self.process.wait(60)


def replicas_below(pid):
    """Return the processes of replicas that a process has started, or others for it."""
    return {child for child in descendants(pid) if _command(child).startswith("ray::ServeReplica")}


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""  # it has just ended


class Crowd:
    """Clients that ask again and again, each on one connection; notes every outcome."""

    def __init__(self, service, num_clients=3, *, obey=False):
        self.outcomes = []
        self._stop = threading.Event()
        self._obey = obey  # leave, when told that nobody serves here
        self._service, self._pool = service, ThreadPoolExecutor(num_clients)
        self._asking = [self._pool.submit(self._ask, seed) for seed in range(num_clients)]

    def _ask(self, seed):
        with self._service.client() as client:
            number = 0
            while not self._stop.wait(0.05):  # a replica that starts needs the cores too
                body = jpeg(seed=1000 * seed + number)  # a new one: nothing is kept of it
                number += 1
                try:
                    answer = post(client, body)
                except httpx.ConnectError:
                    self.outcomes.append("refused")
                    return
                is_right = answer.status_code == 200 and answer.json()["token_ids"] == expected_ids(
                    body
                )
                self.outcomes.append("right" if is_right else answer)
                if self._obey and answer.status_code == 503:
                    return

    def leave(self):
        self._stop.set()
        for asking in self._asking:
            asking.result()
        self._pool.shutdown()
