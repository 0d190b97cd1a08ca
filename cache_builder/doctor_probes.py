"""What `patchcache doctor` tries, each in a process of its own: import it, and use it once.

A probe prints one marked line of JSON per finding; libraries print lines of their own. What it does
not survive is found out from how its process ends.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

_PATIENCE_S = 120  # torch and ray take seconds to import, and longer on a busy machine


class Probe(NamedTuple):
    """Something to try."""

    name: str
    distributions: tuple[str, ...]  # one of them brings it
    code: str
    hint_when_broken: str


class Line(NamedTuple):
    """What a probe says."""

    name: str
    state: Literal["ok", "weak", "broken"]
    value: str
    hint: str = ""


class Answer(NamedTuple):
    """What came of a probe."""

    lines: tuple[Line, ...]
    problem: str = ""  # how it ended, if not well


_MARK = "finding: "
_TELL = f"""
import json
def tell(name, state, value, hint=""):
    print({_MARK!r} + json.dumps([name, state, value, hint]), flush=True)
"""

_TORCH = """
import glob, time
import torch
build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"
if torch.cuda.is_available():
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in gpus)
    torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
    tell("torch", "ok", f"{torch.__version__}, {build}, {names}")
elif glob.glob("/dev/nvidia[0-9]*"):
    tell("torch", "weak", f"{torch.__version__}, {build}, sees no GPU, but the machine has one",
         "install a CUDA build of torch that the driver (nvidia-smi) is new enough for")
else:
    tell("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads, no GPU")

from cache_builder.tokenizers.kernels.library import kernels
found = kernels()
if found is None:
    tell("kernel", "weak", "not compiled, or not for this machine: tokenising is slower",
         "install a C++ compiler, then patchcache again: pip install --force-reinstall patchcache")
else:
    tell("kernel", "ok", f"compiled, runs with {found.variant} instructions")

import io
import numpy
from PIL import Image
from cache_builder import imaging
waves = numpy.add.outer(numpy.sin(numpy.arange(375) / 9), numpy.sin(numpy.arange(500) / 7))
grain = numpy.random.default_rng(0).normal(0, 6, (375, 500, 3))
pixels = (waves[..., None] * 50 + 128 + grain).clip(0, 255).astype("uint8")
buffer = io.BytesIO()
Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
data = buffer.getvalue()
imaging.decode(data)
num, begun = 0, time.perf_counter()
while (taken := time.perf_counter() - begun) < SECONDS:
    imaging.decode(data)
    num += 1
rate = f"{num / taken:,.0f} images/s per core, 500 x 375 pixels, {len(data) / 1000:.0f} kB"
if imaging._decode_jpeg is None:
    tell("JPEG decoder", "weak", f"Pillow: {rate}",
         "torchcodec cannot be imported; with it decoding takes a third: pip install torchcodec")
else:
    tell("JPEG decoder", "ok", f"torchcodec: {rate}")
"""

_FAISS = """
import faiss, numpy
index = faiss.IndexFlatL2(8)
points = numpy.eye(8, dtype=numpy.float32)
index.add(points)
assert index.search(points, 1)[1].ravel().tolist() == list(range(8))
gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
options = faiss.get_compile_options().strip()
tell("faiss", "ok", f"{faiss.__version__}, {options}, {gpus} GPUs; searches")
"""

_RAY = """
import os, ray
address = os.environ.get("RAY_ADDRESS", "")
tell("ray", "ok", f"{ray.__version__}, RAY_ADDRESS " + (address or "not set: this machine"))
"""

_SECONDS = 1.0  # that JPEGs are decoded for

PROBES = (
    Probe(
        "torch", ("torch",), f"SECONDS = {_SECONDS}\n{_TORCH}",
        "pip install --force-reinstall torch torchvision torchcodec, of one release",
    ),
    Probe(
        "faiss", ("faiss-cpu", "faiss-gpu"), _FAISS,
        "uninstall faiss-cpu and faiss-gpu, then install one; patchcache runs without",
    ),
    Probe("ray", ("ray",), _RAY, "pip install --force-reinstall 'ray[default]'"),
)  # fmt: skip


def ask(probes: Sequence[Probe]) -> Iterator[Answer]:
    """Run probes side by side and yield what each says, in their order."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _TELL + probe.code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for probe in probes
    ]
    for process in running:
        yield _answer(process)


def _answer(process: "subprocess.Popen[str]") -> Answer:
    try:
        out, err = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return Answer(_lines(out), f"hung for {_PATIENCE_S} s")
    return Answer(_lines(out), _ending(process.returncode, err))


def _lines(out: str) -> tuple[Line, ...]:
    return tuple(
        Line(*json.loads(line.removeprefix(_MARK)))
        for line in out.splitlines()
        if line.startswith(_MARK)
    )


def _ending(status: int, err: str) -> str:
    if status == 0:
        return ""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return (err.strip().splitlines() or [f"exit status {status}"])[-1]
