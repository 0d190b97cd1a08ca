"""The three works of a soak: each does something again and again, and says what was lost."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch

from cache_builder import imaging, verify
from cache_builder.errors import ImageError
from cache_builder.formats.views import centre_square
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import open_store
from cache_builder.tokenizers import PatchTokenizer
from tests.integration import builds, cluster
from tests.integration.proxy import Proxy, at_random
from tests.integration.soak_memory import Memory
from tests.mutants import mutants
from tests.servers import free_port

LAYOUTS = ("webdataset", "zarr")
FAILING_SHARE = 0.05  # of the requests to the object store
AMPLE = "128m"
GIVE_UP_S = 900.0  # on a busy machine
REFUSALS = (400, 413, 415, 422)
TRY_LATER = (429, 503, 504)


class Work(Protocol):
    """Something that is done again and again."""

    name: str
    unit: str  # what is counted
    num_done: int

    def once(self) -> None:
        """Do it once; an exception is something lost."""

    def end(self) -> list[str]:
        """Stop what runs; return what was lost without an exception."""

    def row(self) -> str:
        """Return a line of the table."""


class Building:
    """Builds one cache after another, and disturbs each in another way."""

    name, unit = "build", "caches"

    def __init__(
        self, folder: Path, codebook: Path, photos: Path, rng: random.Random, memory: Memory
    ) -> None:
        self.num_done = 0
        self._folder, self._rng, self._memory = folder, rng, memory
        self._codebook, self._photos = codebook, photos
        self._faults = Counter[str]()
        self._expected = {}
        for layout in LAYOUTS:
            options = self._options(folder / layout, layout)
            builds.build_here(options)
            self._expected[layout] = _digests(options.out)
            shutil.rmtree(options.out)
        self._disk = folder / "disk"
        self._disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={AMPLE}", "tmpfs", self._disk]
        subprocess.run(command, check=True)
        self._proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
        os.environ["AWS_ENDPOINT_URL"] = self._proxy.url  # of Ray's workers too
        httpx.put(f"{self._proxy.url}/soak").raise_for_status()
        self._raylets = cluster.Raylets(2)

    def once(self) -> None:
        """Build a cache, and hold it against the undisturbed one."""
        number, layout = self.num_done, LAYOUTS[self.num_done % 2]
        kind = ("killed", "disk", "store", "calm")[number % 4]
        place = {"disk": str(self._disk / f"{number}"), "store": f"s3://soak/{number}"}
        out = place.get(kind, str(self._folder / f"{number}"))
        words = builds.words_of(self._options(out, layout))
        log = self._folder / f"{number}.log"
        kinds = self._rng.choices(cluster.KINDS, k=2) if kind == "killed" else []
        failing = at_random(number, FAILING_SHARE if kind == "store" else 0.0)
        if kind == "disk":
            self._fill_the_disk(words, log)
        with self._proxy.failing(failing) as failed:
            moments = cluster.draw_moments(self._rng, kinds)
            story = cluster.disturb(words, out, self._raylets, moments, self._rng, log)
        self._faults.update(moment.kind for moment in story.happened)
        self._faults["requests"] += len(failed)
        report = verify.run(out, cluster=ClusterOptions(num_workers=0))
        assert not report.problems, report.problems
        found, expected = _digests(out), self._expected[layout]
        wrong = [name for name in found.keys() | expected if found.get(name) != expected.get(name)]
        assert not wrong, f"{out} differs from an undisturbed cache in {wrong[:5]}"
        store = open_store(out)
        for name in list(store.names()):
            store.remove(name)
        shutil.rmtree(out, ignore_errors=True)
        self.num_done += 1

    def end(self) -> list[str]:
        """Stop the cluster."""
        self._raylets.stop()
        subprocess.run(["umount", "--lazy", self._disk], check=False)
        self._proxy.stop()
        return []

    def row(self) -> str:
        """Return how many were built, and through what."""
        faults = ", ".join(f"{count} x {what}" for what, count in sorted(self._faults.items()))
        return f"{self.num_done:,} caches built and verified, equal to the undisturbed: {faults}"

    def _fill_the_disk(self, words: list[str], log: Path) -> None:
        self._resize(f"{self._rng.randint(2, 20)}m")
        process = builds.start(words, log, self._raylets.address)
        status = process.wait(GIVE_UP_S)
        assert status == 1, log.read_text()
        assert "No space left on device" in log.read_text(), log.read_text()
        self._faults["full disk"] += 1
        self._resize(AMPLE)

    def _resize(self, size: str) -> None:
        command = ["mount", "-o", f"remount,size={size}", self._disk]
        subprocess.run(command, check=True)

    def _options(self, out: Path | str, layout: str) -> Any:
        return builds.options_of(
            self._photos, [self._codebook], out, layout=layout, num_views=2, unit_size=21
        )


class Serving:
    """Two replicas of the service, clients with good and bad pictures, and who kills a replica."""

    name, unit = "serve", "pictures"

    def __init__(
        self, folder: Path, codebook: Path, photos: Path, rng: random.Random, memory: Memory
    ) -> None:
        torch.set_num_threads(1)
        self.num_done = 0
        self._folder, self._rng, self._memory, self._codebook = folder, rng, memory, codebook
        self._tokenizer = PatchTokenizer.load(codebook)
        self._photos = [path.read_bytes() for path in sorted(photos.iterdir())[:40]]
        self._expected = [self._ids_of(body) for body in self._photos]
        self._mutants = mutants(10**9, rng.randrange(1 << 30))
        self._ports = [free_port(), free_port()]
        self._replicas = [self._start(number) for number in range(2)]
        for port in self._ports:
            _wait_until(lambda port=port: _is_ready(port))
        self._is_killed = False
        self._statuses, self._faults = Counter[int](), Counter[str]()
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(4)

    def once(self) -> None:
        """Send a burst of pictures; in every twelfth round a replica ends in its middle."""
        round_number = self.num_done // 16
        asked = [self._pool.submit(self._ask, *self._picture()) for _ in range(16)]
        if round_number % 12 == 6 and _is_ready(self._ports[1]):
            self._disturb((signal.SIGKILL, signal.SIGTERM)[round_number // 12 % 2])
        for answer in asked:
            answer.result()
        self.num_done += len(asked)
        if self._replicas[1].poll() is not None:
            self._replicas[1] = self._start(1)
            self._is_killed = False
        time.sleep(0.5)  # the other works need the machine too

    def end(self) -> list[str]:
        """Let both replicas drain."""
        self._pool.shutdown()
        failures = []
        for replica in self._replicas:
            replica.send_signal(signal.SIGTERM)
            if replica.wait(GIVE_UP_S) != 0:
                failures.append(f"a replica ended with {replica.returncode}")
        return failures

    def row(self) -> str:
        """Return what was answered."""
        statuses = ", ".join(f"{status}: {count:,}" for status, count in self._statuses.items())
        faults = ", ".join(f"{count} x {what}" for what, count in sorted(self._faults.items()))
        return f"{self.num_done:,} pictures answered rightly ({statuses}): {faults}"

    def _disturb(self, how: signal.Signals) -> None:
        self._is_killed = how == signal.SIGKILL
        self._faults[how.name] += 1
        time.sleep(0.05)
        self._replicas[1].send_signal(how)
        status = self._replicas[1].wait(GIVE_UP_S)
        assert status == (0 if how == signal.SIGTERM else -how), status

    def _picture(self) -> tuple[bytes, Callable[[], list[int] | None], int]:
        number = next(self._numbers)
        if number % 4 == 3:
            body = next(self._mutants)
            return body, lambda: self._ids_of(body), number
        index = self._rng.randrange(len(self._photos))
        # Bytes behind the end of a JPEG change its digest, not its pixels: no answer is a kept one.
        body = self._photos[index] + number.to_bytes(8, "big")
        return body, lambda: self._expected[index], number

    def _ask(self, body: bytes, expected: Callable[[], list[int] | None], number: int) -> None:
        """Ask one replica, and the other if the first is gone, until there is an answer."""
        end = time.monotonic() + GIVE_UP_S
        for attempt in itertools.count(number):
            assert time.monotonic() < end, "no answer in time"
            which = attempt % 2
            url = f"http://127.0.0.1:{self._ports[which]}/v1/tokenize"
            try:
                answer = httpx.post(url, content=body, timeout=GIVE_UP_S, trust_env=False)
            except httpx.ConnectError:
                assert which == 1, "the replica that nobody killed does not listen"
                time.sleep(0.05)
                continue
            except httpx.TransportError as exc:
                if which == 0 or not self._is_killed:
                    raise AssertionError("a replica that nobody killed gave no answer") from exc
                self._faults["lost with a killed replica, asked again"] += 1
                continue
            self._statuses[answer.status_code] += 1
            if answer.status_code in TRY_LATER:
                time.sleep(0.2)
                continue
            ids = expected()
            if answer.status_code == 200:
                assert answer.json()["token_ids"] == ids, f"picture {number}: wrong ids"
            else:
                assert answer.status_code in REFUSALS, answer.text
                assert number % 4 == 3, f"a good picture was refused: {answer.text}"
            return

    def _ids_of(self, body: bytes) -> list[int] | None:
        try:
            pixels = imaging.decode(body)
        except ImageError:
            return None
        rule = self._tokenizer.codebook.pixel_rule
        view = centre_square(tuple(pixels.shape[-2:]))
        resized = imaging.apply_view(pixels, view, rule.size, rule.interpolation)
        ids: list[int] = self._tokenizer.encode(resized[None])[0].flatten().tolist()
        return ids

    def _start(self, number: int) -> "subprocess.Popen[bytes]":
        words = ["serve", "--codebook", self._codebook, "--port", self._ports[number]]
        process = _command(words, self._folder / f"{number}.log")
        self._memory.name(process.pid, ("service", "service, killed")[number])
        return process


class Training:
    """Trains one model after another from the same cache, to the same losses."""

    name, unit = "train", "steps"
    num_steps = 300

    def __init__(
        self, folder: Path, codebook: Path, photos: Path, rng: random.Random, memory: Memory
    ) -> None:
        self.num_done = 0
        self._folder, self._rng, self._memory = folder, rng, memory
        self._cache = folder / "cache"
        builds.build_here(builds.options_of(photos, [codebook], self._cache, unit_size=50))
        self._faults = Counter[str]()
        self._numbers = itertools.count(1)
        status = self._start(folder / "undisturbed").wait()
        assert status == 0, (folder / "undisturbed.log").read_text()
        self._expected = _losses(folder / "undisturbed")
        assert len(self._expected) == self.num_steps

    def once(self) -> None:
        """Train a model through kills and stops, and compare every loss."""
        out = self._folder / f"{next(self._numbers)}"
        ends = time.monotonic() + 3 * GIVE_UP_S
        while max(_losses(out), default=0) < self.num_steps or not self._is_whole(out):
            assert time.monotonic() < ends, "it does not come to an end"
            log = out.with_suffix(".log")
            begins_at = log.stat().st_size if log.exists() else 0
            process = self._start(out)
            try:
                status = process.wait(self._rng.uniform(6, 60))
                assert status == 0, out.with_suffix(".log").read_text()
                continue
            except subprocess.TimeoutExpired:
                self._disturb(out, process, begins_at)
        found = _losses(out)
        wrong = [step for step, loss in self._expected.items() if found.get(step) != loss]
        assert not wrong, f"losses of steps {wrong[:5]} differ from the undisturbed ones"
        assert found.keys() == self._expected.keys()
        self.num_done += self.num_steps
        shutil.rmtree(out)

    def end(self) -> list[str]:
        """Nothing runs."""
        return []

    def row(self) -> str:
        """Return how many steps were trained, and through what."""
        faults = ", ".join(f"{count} x {what}" for what, count in sorted(self._faults.items()))
        return f"{self.num_done:,} steps with the losses of the undisturbed run: {faults}"

    def _disturb(self, out: Path, process: "subprocess.Popen[bytes]", begins_at: int) -> None:
        how = self._rng.choice(("SIGKILL", "SIGTERM", "checkpoint cut"))
        log = out.with_suffix(".log").read_bytes()[begins_at:]
        has_begun = re.search(rb"step \d+ loss", log)  # before, Python still imports
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        status = process.wait(GIVE_UP_S)
        self._faults[how] += 1
        if how == "SIGTERM" and has_begun:
            assert status == 0, out.with_suffix(".log").read_text()
        checkpoints = sorted((out / "checkpoints").glob("step_*.pt"))
        if how == "checkpoint cut" and len(checkpoints) > 1:
            os.truncate(checkpoints[-1], checkpoints[-1].stat().st_size // 2)

    def _is_whole(self, out: Path) -> bool:
        """Say whether the last step is saved: a run that was killed behind it goes on once more."""
        return (out / "checkpoints" / f"step_{self.num_steps:08d}.pt").exists()

    def _start(self, out: Path) -> "subprocess.Popen[bytes]":
        words = ["train", "beit_drop", "--cache", self._cache, "--out", out]
        for setting in (
            f"run.steps={self.num_steps}", "run.checkpoint_every=20", "run.log_every=1",
            "run.precision=fp32", "run.device=cpu", "data.batch_size=16", "data.num_workers=1",
            "model.embed_dim=64", "model.depth=2", "model.num_heads=2", "optim.warmup_steps=10",
        ):  # fmt: skip
            words += ["--set", setting]
        process = _command(words, out.with_suffix(".log"))
        self._memory.name(process.pid, "training")
        return process


def _command(words: list[Any], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cache_builder", *map(str, words)],
            stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _digests(location: Path | str) -> dict[str, str]:
    """Return the digest of every file of a cache, by name."""
    store = open_store(location)
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in store.names()}


def _losses(out: Path) -> dict[int, float]:
    """Return the losses that a run has logged; a last line that is half written is none."""
    path = out / "log.jsonl"
    losses = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            losses[row["step"]] = row["loss"]
    return losses


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + GIVE_UP_S
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
