"""Builds that are small but not too quick, and what they leave behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_builder import build
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import open_store
from tests import factories

TIMEOUT_S = 300
NUM_IMAGES = 60
UNIT_SIZE = 5
NUM_UNITS = NUM_IMAGES // UNIT_SIZE

KILLS_CLIENTS = pytest.mark.filterwarnings("ignore:Exception ignored in.*socket")
"""The local S3 server leaves connections of killed clients to the garbage collector."""

COMMAND = """
import sys
from cache_builder import object_store
object_store._BEAT_S, object_store._LOST_AFTER_S = 0.2, 1.0
from cache_builder.cli import main
main()
"""
"""The command line with leases that run out quickly."""


def write_images(
    root: Path, num_images: int = NUM_IMAGES, size: tuple[int, int] = (64, 48)
) -> Path:
    """Write JPEGs of (width, height), all different; a whole unit and two more are no images."""
    images = {}
    for number in range(num_images):
        small = Image.fromarray(factories.draw_photo(number, 48, 64))
        photo = small.resize(size, Image.Resampling.BILINEAR)
        images[f"{'ab'[number % 2]}/{number:03d}.jpg"] = factories.encode(photo, "JPEG")
    names = sorted(images)
    for number in (*range(UNIT_SIZE, 2 * UNIT_SIZE), 0, num_images - 1):
        images[names[number]] = b"not an image"
    return factories.write_folder(root, images)


def write_codebooks(folder: Path) -> list[Path]:
    """Write two pixel codebooks with different patches."""
    coarse = np.concatenate([factories.COLOURS, 255 - factories.COLOURS // 2])
    return [
        factories.write_codebook(folder / "codebook.safetensors"),
        factories.write_codebook(folder / "coarse.safetensors", colours=coarse, patch_size=8),
    ]


def options_of(images: Path, codebooks: Iterable[Path], out: str | Path, **changes: Any):
    """Return the options of a build with one or more codebooks."""
    first, *further = codebooks
    defaults: dict[str, Any] = {
        "images": str(images),
        "codebook": first,
        "further_codebooks": tuple(further),
        "out": out,
        "num_views": 3,
        "unit_size": UNIT_SIZE,
        "device": "cpu",
    }
    return build.BuildOptions(**(defaults | changes))


def words_of(options: build.BuildOptions) -> list[str]:
    """Return the command line that has these options."""
    words = ["build", "--images", options.images, "--out", options.out, "--device", "cpu"]
    for codebook in (options.codebook, *options.further_codebooks):
        words += ["--codebook", codebook]
    words += ["--views", options.num_views, "--unit-size", options.unit_size]
    words += ["--layout", options.layout, "--images-in-cache", options.images_in_cache]
    return list(map(str, words))


def build_here(options: build.BuildOptions) -> None:
    """Build in this process all that the command builds, one unit after another, without Ray."""
    build.run(options._replace(cluster=ClusterOptions(num_workers=0)))


def start(words: Iterable[object], log: Path, ray_address: str = "", workers: int = 2):
    """Start the command as a process; what it says goes to the end of `log`."""
    place = ["--workers", workers, *(["--ray-address", ray_address] if ray_address else [])]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, (*words, *place))],
            stdout=file,
            stderr=file,
        )


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < TIMEOUT_S
        time.sleep(0.01)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a driver as nothing else does."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def contents(location: str | Path) -> dict[str, bytes]:
    """Return every file of a cache, wherever it lies, by name."""
    store = open_store(location)
    return {name: store.read(name) for name in store.names()}


def assert_same(location: str | Path, expected: dict[str, bytes]) -> None:
    """Check that a cache holds these files, byte for byte, and nothing else."""
    found = contents(location)
    assert sorted(found) == sorted(expected)
    assert [name for name, data in found.items() if data != expected[name]] == []


def children(pid: int) -> dict[int, str]:
    """Return the processes that a process has started, and their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = text.strip()
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
    return found


def end(pid: int) -> None:
    """SIGKILL a process that may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
