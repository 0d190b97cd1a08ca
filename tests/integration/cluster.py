"""A cluster of several raylets, a build on it, and what can happen to both."""

import contextlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cache_builder.stores import open_store
from tests.clusters import add_node, new_cluster
from tests.integration import builds

KINDS = ("driver", "worker", "raylet", "interrupt")
"""SIGKILL of the driver or of a worker, a raylet that is gone without a word, Ctrl-C."""

_MAX_RUNS = 12  # of one command, before something is wrong


class Raylets:
    """Raylets of one CPU each, as on several machines."""

    def __init__(self, count: int = 3) -> None:
        # A lost raylet is noticed within two seconds, not within fifteen.
        notice = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        self._cluster = new_cluster(num_cpus=1, include_dashboard=False, _system_config=notice)
        for _ in range(count - 1):
            add_node(self._cluster, num_cpus=1)
        self.address = self._cluster.address

    def stop(self) -> None:
        self._cluster.shutdown()

    def replace_one(self, rng: random.Random) -> None:
        """Lose a raylet, but not the head's, and get another one."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
        self._cluster.remove_node(rng.choice(nodes), allow_graceful=False)
        add_node(self._cluster, wait=False, num_cpus=1)

    def workers(self) -> list[int]:
        """Return the processes of actors; others that are starting where there is none."""
        found: dict[int, str] = {}
        for node in self._cluster.list_all_nodes():
            for raylet in node.all_processes.get("raylet", []):
                found |= builds.children(raylet.process.pid)
        actors = [pid for pid, command in found.items() if command.startswith("ray::UnitActor")]
        idle = [pid for pid, command in found.items() if "default_worker.py" in command]
        return sorted(actors or idle)


class Moment(NamedTuple):
    """Something happens, some time after a build has come this far."""

    progress: int  # see `progress_of`
    delay_s: float
    kind: str


def draw_moments(rng: random.Random, kinds: Iterable[str]) -> list[Moment]:
    """Draw when each of these happens, and their order."""
    kinds = list(kinds)
    rng.shuffle(kinds)
    progress = sorted(rng.randint(1, builds.NUM_UNITS + 2) for _ in kinds)
    return [
        Moment(when, rng.uniform(0, 0.4), kind) for when, kind in zip(progress, kinds, strict=True)
    ]


def progress_of(location: str | Path) -> int:
    """Return how far a build has come: 1 locked, 2 planned, then one more for every unit."""
    store = open_store(location)
    if not store.exists("plan.json"):
        return int(store.exists(".lock"))
    return 2 + sum(bool(re.fullmatch(r"units/\d+\.json", name)) for name in store.names("units"))


class Story(NamedTuple):
    """What a disturbed build went through."""

    happened: list[Moment]
    missed: list[Moment]  # the build had ended before
    num_runs: int


def wait_for_the_command(process: "subprocess.Popen[bytes]") -> None:
    """Wait until a program is past Python's own start, where Ctrl-C is a traceback."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                return
        time.sleep(0.02)


def disturb(
    words: list[Any],
    out: str | Path,
    raylets: Raylets,
    moments: list[Moment],
    rng: random.Random,
    log: Path,
) -> Story:
    """Run a command until it has finished, while things happen.

    A run that ends by itself with an error is one line on stderr, and the command is run again.
    """
    happened: list[Moment] = []
    waiting = list(moments)
    for num_runs in range(1, _MAX_RUNS + 1):
        with log.open("ab") as file:
            file.write(f"--- run {num_runs} of {out}\n".encode())
        process = builds.start(words, log, raylets.address)
        try:
            while waiting and process.poll() is None:
                if progress_of(out) < waiting[0].progress:
                    time.sleep(0.02)
                    continue
                moment = waiting[0]
                time.sleep(moment.delay_s)
                if process.poll() is not None:
                    break
                del waiting[0]
                happened.append(moment)
                if moment.kind == "worker":
                    for worker in raylets.workers()[rng.randrange(2) :][:1]:
                        builds.end(worker)
                elif moment.kind == "raylet":
                    raylets.replace_one(rng)
                elif moment.kind == "driver":
                    process.send_signal(signal.SIGKILL)
                else:
                    wait_for_the_command(process)
                    process.send_signal(signal.SIGINT)
                if moment.kind in {"driver", "interrupt"}:
                    break
            status = process.wait(builds.TIMEOUT_S)
        finally:
            builds.kill(process)
        assert "Traceback" not in log.read_text(), log.read_text()
        if status == 0:
            return Story(happened, waiting, num_runs)
    raise AssertionError(f"{_MAX_RUNS} runs have not finished it:\n{log.read_text()}")
