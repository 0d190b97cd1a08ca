"""Build, serve and train at once on one machine, for long, while things go wrong.

    python -m tests.integration.soak --minutes 30 --out soak        `make soak`

Three works run side by side over the same real photographs until the time is over: builds into new
caches, on a disk that fills up and on a store whose requests fail, whose workers, drivers and
raylets are killed; a service of two replicas, one of which is killed and started again; training
that is killed, asked to stop and robbed of its newest checkpoint. Faults are drawn from a seed.

Fails unless nothing is lost: every cache verifies and has the bytes of one that was built
undisturbed, every picture is answered with the ids that the library gives, every training repeats
the losses of an undisturbed one to the bit. And unless memory is flat: see `soak_memory.py`.
Leaves a table, `soak.json` and `soak.png` in --out. Disks that fill up need root.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from cache_builder import ray_cluster
from tests.integration import builds
from tests.integration.soak_memory import Memory
from tests.integration.soak_picture import draw
from tests.integration.soak_works import GIVE_UP_S, Building, Serving, Training, Work
from tests.places import DATA
from tests.servers import free_port


def start_store(folder: Path) -> "subprocess.Popen[bytes]":
    """Start a server that speaks S3's protocol, and tell every client of it by the environment."""
    port = free_port()
    with (folder / "store.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log, stderr=log,
        )  # fmt: skip
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return process


def fit(folder: Path, photos: Path) -> Path:
    """Fit the codebook that everything here uses."""
    out = folder / "codebook.safetensors"
    words = ["fit", "--images", photos, "-k", 256, "--image-size", 112, "--patch-size", 16]
    words += ["--device", "cpu", "--workers", 0, "--out", out]
    subprocess.run(
        [sys.executable, "-m", "cache_builder", *map(str, words)], check=True, stdout=sys.stderr
    )
    return out


def repeat(work: Work, is_over: Callable[[], bool], failures: list[str]) -> None:
    """Do a work again and again."""
    while not is_over():
        try:
            work.once()
        except BaseException:  # noqa: BLE001  whatever it is, the soak has failed
            failures.append(f"{work.name}: {traceback.format_exc(limit=-8)}")
            print(failures[-1], flush=True)
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=Path, default=DATA / "photos")
    parser.add_argument("--out", type=Path, default=Path("soak"))
    options = parser.parse_args()
    logging.getLogger("cache_builder").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow thinks of damaged pictures
    builds.TIMEOUT_S = GIVE_UP_S
    ray_cluster._MAX_STARTS = 20  # nodes are started here while the machine is at its limit
    options.out.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = Path(name)
        store = start_store(folder)
        memory = Memory()
        memory.name(store.pid, "object store")
        begun_s = time.monotonic()
        works: list[Work] = []
        try:
            codebook = fit(folder, options.photos)
            for kind in (Building, Serving, Training):
                place = folder / kind.name
                place.mkdir()
                rng = random.Random(f"{options.seed} {kind.name}")
                works.append(kind(place, codebook, options.photos, rng, memory))
                print(f"{time.monotonic() - begun_s:>5.0f} s {kind.name} is ready", flush=True)
            begun_s = time.monotonic()
            end_s = begun_s + 60 * options.minutes
            memory.begin(lambda: {work.name: work.num_done for work in works})

            def is_over() -> bool:
                return time.monotonic() > end_s or bool(failures)

            def tell() -> None:
                while not is_over():
                    time.sleep(min(60.0, 6 * options.minutes))
                    done = ", ".join(f"{work.num_done:,} {work.unit}" for work in works)
                    print(f"{(time.monotonic() - begun_s) / 60:>5.1f} min {done}", flush=True)

            building, *others = works
            threads = [
                threading.Thread(target=repeat, args=(work, is_over, failures)) for work in others
            ]
            for thread in (*threads, threading.Thread(target=tell, daemon=True)):
                thread.start()
            repeat(building, is_over, failures)  # Ray starts nodes in the main thread alone
            for thread in threads:
                thread.join()
        finally:
            memory.end()
            for work in works:
                failures += [f"{work.name}: {failure}" for failure in work.end()]
            store.kill()
            store.wait()
    rows = memory.rows()
    failures += [f"memory of {row.name}: {row.problem}" for row in rows if row.problem]
    report = "\n".join([*(work.row() for work in works), "", *(row.text() for row in rows)])
    print(report)
    print("\n".join(failures) or "nothing was lost, and memory is flat")
    seconds = time.monotonic() - begun_s
    (options.out / "soak.json").write_text(
        json.dumps({"seconds": seconds, "report": report.splitlines(), "failures": failures})
    )
    draw(memory, options.out / "soak.png", title=f"{seconds / 60:.0f} minutes, seed {options.seed}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
