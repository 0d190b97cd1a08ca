"""Drivers of a Ray cluster as processes of their own."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.places import ROOT

DRIVER = Path(__file__).with_name("ray_driver.py")


class Job:
    """`ray_driver` as a process, and what it has said so far."""

    def __init__(self, address, **settings):
        self.process = subprocess.Popen(
            [sys.executable, DRIVER, address, json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.finished, self.err = [], []
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self._take)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err.append)),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream, take):
        with stream:
            for line in stream:
                take(line)

    def _take(self, line):
        self.finished.append(json.loads(line))

    def wait_until(self, condition, timeout_s=120):
        started_s = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.err
            assert time.monotonic() - started_s < timeout_s, (self.finished, self.err)
            time.sleep(0.05)

    def end(self, timeout_s=120):
        """Wait for the end; return the exit status and what was said on stderr."""
        status = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join()
        return status, "".join(self.err)

    @property
    def nodes(self):
        return {line["node"] for line in self.finished}

    @property
    def units(self):
        return sorted(line["unit"] for line in self.finished)


def patchcache(*words, environment=None):
    command = [sys.executable, "-m", "cache_builder.cli", *map(str, words)]
    return subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
