"""The service over loopback, beside the offline rate of the same tokenizer, and beside peers.

    python tests/benchmarks/bench_serve.py                  # all but the peers, about six minutes
    python tests/benchmarks/bench_serve.py --only device    # batching in front of an accelerator
    python tests/benchmarks/bench_serve.py --only peers     # LitServe and Ray Serve in front of it
    python tests/benchmarks/bench_serve.py --quick          # short runs, for a look

LitServe is no dependency of this project. Where it is not installed here, an environment that has
it may be named:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install litserve python-multipart
    python tests/benchmarks/bench_serve.py --only peers --peer-python /tmp/peers/bin/python

Data: photographs (`../shared/data/photos` or $PATCHCACHE_TEST_DATA/photos; drawn ones where there
are none). Codebooks: 8,192 patches of the photographs, and 8,192 features of a ViT-tiny with random
weights: what they cost, not what they are worth. Kept answers are off.

Offline is decode, crop and encode in one process per core, in batches of the best of three sizes.
`bare sockets` is what a service cannot do without (`served_bare.py`), `a queue that costs nothing`
a simulation: the same pictures, sizes and arrivals in front of as many servers as there are cores.
Service and client are processes of their own; `cpu` is of the service, `client` of the client, both
in milliseconds per image, and both share the cores. A run is worth as much as the machine is quiet:
what other processes took of it is printed too.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.imaging import patchify
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from tests import factories
from tests.benchmarks.without_service import NUM_CORES, bare_times, cut, ideal_queue, offline_rate
from tests.places import DATA, ROOT
from tests.servers import free_port
from tokenizers_svc.limits import Limits

K = 8192
NUM_PHOTOS = 120
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_START_S = 120
_PEERS = {"litserve": "litserve python-multipart", "ray": "'ray[serve]'"}  # modules, to install
_PROBES = {"litserve": "/health", "ray": "/-/healthz"}


class Service(NamedTuple):
    """A process that answers."""

    pid: int
    port: int
    as_form: bool = False  # what it takes: a form, or the bytes of the picture


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=("cpu", "device", "peers"))
    parser.add_argument("--quick", action="store_true", help="short runs")
    parser.add_argument(
        "--peer-python", metavar="PATH", help="interpreter for peers that are not installed here"
    )
    args = parser.parse_args()
    if args.peer_python and args.only != "peers":
        parser.error("--peer-python is for --only peers")
    seconds = 2.0 if args.quick else 10.0
    console = Console(width=130)
    console.print(f"torch {torch.__version__}, {NUM_CORES} cores")
    with tempfile.TemporaryDirectory() as scratch:
        photos = write_photos(Path(scratch))
        if args.only in (None, "cpu"):
            for name, codebook in make_codebooks(Path(scratch), photos).items():
                console.print(cpu_table(name, codebook, photos, seconds))
        if args.only in (None, "device"):
            console.print(device_table(photos, seconds / 2, {"device": sys.executable}))
        if args.only == "peers":
            kinds = {"device": sys.executable, **find_peers(args.peer_python, console)}
            console.print(device_table(photos, seconds / 2, kinds))


def cpu_table(name: str, codebook: Path, photos: list[str], seconds: float) -> Table:
    """Measure one tokenizer on the CPU: offline, closed loops, one request, half load."""
    table = Table(title=f"{name}, K={K}, on the CPU")
    for heading in ("load", "images/s", "of offline", "p50 ms", "p99 ms", "batch", "cpu", "client",
                    "others"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "load" else "right")
    rates = {size: offline_rate(codebook, photos, size, seconds / 2) for size in (1, 4, 8)}
    best = max(rates, key=lambda size: rates[size])
    offline = offline_rate(codebook, photos, best, seconds)
    times_ms = bare_times(codebook, photos, seconds / 2)
    bare_ms = float(np.median(times_ms))
    table.add_row(f"offline, batches of {best}", f"{offline:.1f}", "1.00", "", "", str(best))
    table.add_row("decode and encode one", "", "", f"{bare_ms:.2f}")
    max_batch = Limits().resolved(on_cpu=True, num_cores=NUM_CORES).max_batch
    half = offline / 2
    with serving("ours", str(codebook)) as service:
        for load in ({"concurrency": 1}, {"concurrency": 2 * max_batch}, {"rate": half}):
            found = measure(service, photos, seconds, **load)
            label = " ".join(f"{key} {value:.4g}" for key, value in load.items())
            table.add_row(label, *cells(found, offline))
            if load == {"concurrency": 1}:
                table.add_row("  over one bare", "", "", f"{found['p50_ms'] - bare_ms:+.2f}")
    table.add_row("  a queue that costs nothing", "", "", *ideal_queue(times_ms, half))
    with serving("bare", str(codebook)) as service:
        found = measure(service, photos, seconds, concurrency=2 * max_batch)
        table.add_row(f"bare sockets, concurrency {2 * max_batch}", *cells(found, offline))
    # A machine changes its pace: what came first is measured again at the end.
    again = offline_rate(codebook, photos, best, seconds)
    table.add_row("offline again", f"{again:.1f}", f"{again / offline:.2f}")
    return table


def find_peers(other_python: str | None, console: Console) -> dict[str, str]:
    """Return the interpreter that has each of the peers, and say which ones are nowhere."""
    found = {}
    for module, distributions in _PEERS.items():
        if find_spec(module) is not None:
            found[module] = sys.executable
        elif other_python is not None and _has_module(other_python, module):
            found[module] = other_python
        else:
            told = f"{module} is left out. To see it: pip install {distributions}"
            console.print(told, markup=False)
    return found


def _has_module(python: str, module: str) -> bool:
    search = f"import importlib.util; raise SystemExit(not importlib.util.find_spec({module!r}))"
    return subprocess.run([python, "-c", search], check=False).returncode == 0


def device_table(photos: list[str], seconds: float, kinds: dict[str, str]) -> Table:
    """Measure services, each run by its interpreter, in front of the simulated accelerator."""
    table = Table(title="An accelerator that takes 5 + 0.2 n ms for a batch of n, at most 32")
    for heading in ("service", "clients", "images/s", "p50 ms", "p99 ms", "batch", "cpu", "client",
                    "others"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "service" else "right")
    for kind, python in kinds.items():
        port = [] if kind == "device" else [str(free_port())]
        with serving(kind, *port, python=python) as service:
            for concurrency in (1, 8, 32, 64):
                found = measure(service, photos[:1], seconds, concurrency=concurrency)
                table.add_row(kind, str(concurrency), *cells(found, None))
    return table


def cells(found: dict[str, Any], offline: float | None) -> list[str]:
    """Return what a load came to, as text."""
    share = [] if offline is None else [f"{found['images_per_s'] / offline:.2f}"]
    failed = found["num_failed"] + found["num_refused"]
    return [
        f"{found['images_per_s']:.1f}" + (f" ({failed} failed)" if failed else ""),
        *share,
        f"{found['p50_ms']:.2f}",
        f"{found['p99_ms']:.2f}",
        f"{found['batch']:.1f}" if found["batch"] else "",
        f"{found['server_ms']:.2f}",
        f"{found['client_ms']:.2f}",
        f"{found['others']:.2f}",
    ]


def measure(service: Service, photos: list[str], seconds: float, **load: float) -> dict[str, Any]:
    """Run a client against a service; add what the CPUs did meanwhile."""
    options = {
        "port": service.port,
        "path": "/v1/tokenize",
        "as_form": service.as_form,
        "files": photos,
        "seconds": seconds,
        "warm_up_s": min(2.0, seconds / 4),
        **load,
    }
    before, busy, started = cpu_s(service.pid), machine_cpu_s(), time.perf_counter()
    client = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.serve_load", json.dumps(options)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        text=True, check=True, timeout=seconds + _START_S,
    )  # fmt: skip
    wall = time.perf_counter() - started
    found: dict[str, Any] = json.loads(client.stdout)
    used = cpu_s(service.pid) - before
    # Of what the start of the client cost nothing is told apart.
    found["others"] = max(0.0, machine_cpu_s() - busy - used - found["cpu_s"]) / wall
    found["server_ms"] = 1000 * used / found["num_sent"]
    found["client_ms"] = 1000 * found["cpu_s"] / found["num_sent"]
    return found


@contextlib.contextmanager
def serving(*arguments: str, python: str = sys.executable) -> Iterator[Service]:
    """Run a service until the block ends."""
    process = subprocess.Popen(
        [python, "-m", *_command(*arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    try:
        if arguments[0] in _PEERS:
            threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()
            port = int(arguments[1])
        else:
            port = _announced_port(process, lines)
            threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()
        _wait_until_it_answers(process, arguments[0], port, lines)
        yield Service(process.pid, port, as_form=arguments[0] == "litserve")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # LitServe leaves its workers behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(kind: str, *rest: str) -> list[str]:
    if kind in _PEERS:
        return [f"tests.benchmarks.served_by_{kind}", *rest]
    if kind == "bare":
        return ["tests.benchmarks.served_bare", *rest]
    return ["tests.benchmarks.served", kind, *rest]


def _announced_port(process: "subprocess.Popen[str]", lines: list[str]) -> int:
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        found = re.search(r"try: curl .*:([0-9]+)/", line)
        if found:
            return int(found[1])
    raise RuntimeError("the service did not start:\n" + "".join(lines))


def _wait_until_it_answers(
    process: "subprocess.Popen[str]", kind: str, port: int, lines: list[str]
) -> None:
    end = time.monotonic() + _START_S
    url = f"http://127.0.0.1:{port}{_PROBES.get(kind, '/readyz')}"
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:  # nobody listens, or the answer is an error
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the service does not answer:\n" + "".join(lines[-20:]))


def write_photos(scratch: Path) -> list[str]:
    """Return files of photographs, or of drawn ones where there are none."""
    found = sorted((DATA / "photos").glob("*.JPEG"))[:NUM_PHOTOS]
    if found:
        return [str(path) for path in found]
    content = {
        f"{seed:03d}.jpg": factories.encode(
            factories.draw_photo(seed, 375, 500), "JPEG", quality=90
        )
        for seed in range(NUM_PHOTOS)
    }
    folder = factories.write_folder(scratch / "photos", content)
    return [str(path) for path in sorted(folder.iterdir())]


def make_codebooks(scratch: Path, photos: list[str]) -> dict[str, Path]:
    """Write codebooks whose centroids are patches and features of the photographs."""
    torch.set_num_threads(NUM_CORES)
    options = FeatureOptions("timm:vit_tiny_patch16_224", random_weights_seed=0)
    vit = make_extractor(options, torch.device("cpu"))
    rules = {"pixel": PixelRule(size=224, patch_size=16), "ViT-tiny": vit.pixel_rule}
    written = {}
    for name, rule in rules.items():
        views = torch.stack([cut(Path(photo).read_bytes(), rule) for photo in photos])
        points = patchify(views, 16) if name == "pixel" else torch.cat(
            [vit(part) for part in views.split(8)]
        )  # fmt: skip
        points = points.flatten(0, 1)
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:K]
        codebook = Codebook(
            points[chosen].numpy()[None],
            np.ones((1, K), np.int64),
            metric="l2",
            pixel_rule=rule,
            extractor=ExtractorSpec(id="pixel") if name == "pixel" else vit.spec,
        )
        written[name] = scratch / f"{name}.safetensors"
        codebook.save(written[name])
    return written


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of all below it."""
    pids, used = [pid], 0.0
    parents = {
        int(path.name): path / "stat" for path in Path("/proc").iterdir() if path.name.isdecimal()
    }
    fields = {}
    for number, path in parents.items():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields[number] = path.read_text().rpartition(")")[2].split()
    while pids:
        one = pids.pop()
        if one in fields:
            used += (int(fields[one][11]) + int(fields[one][12])) / _TICKS_PER_S
            pids += [child for child, stat in fields.items() if int(stat[1]) == one]
    return used


def machine_cpu_s() -> float:
    """Return the CPU seconds of all processes of the machine."""
    numbers = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq = (int(number) for number in numbers[:7])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


if __name__ == "__main__":
    main()
