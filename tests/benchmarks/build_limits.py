"""What the machine could do: decoding, cropping and tokenising in processes of their own."""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import multiprocessing

from cache_builder.formats.views import draw_views
from cache_builder.imaging import decode
from cache_builder.tokenizers import PatchTokenizer
from tests.benchmarks import build_peers
from tests.benchmarks.build_inputs import NUM_VIEWS, Settings
from tests.benchmarks.build_routes import Measured, build_command, measure


class Share(NamedTuple):
    """What one process did of a limit: seconds from a common start, and CPU."""

    seconds: float
    cpu_s: float


LIMITS = ("decode and crop", "tokenise", "both in one loop")


def limit_table() -> Table:
    """Return the head of the table that `add_limits` fills."""
    table = Table(title="What the machine could do, and the share that a build reaches, images/s")
    for name in ("features", "decode and crop", "tokenizer", "both in one loop", "build",
                 "of the lesser", "of the loop", "CPU ms, loop", "CPU ms, build"):  # fmt: skip
        table.add_column(name, justify="left" if name == "features" else "right")
    return table


def add_limits(
    table: Table, name: str, images: Path, settings: Settings, work: Path, of_build: Measured | None
) -> None:
    """Add a row: the parts alone in as many processes, both, and a build."""
    num_images = len(list(images.iterdir()))
    if of_build is None:
        # Units of one batch of images where there are few, so that all actors have as many.
        unit = 64 if num_images >= 64 * 2 * settings.num_processes else 16
        command = build_command(settings, "webdataset", "none", "--unit-size", str(unit))
        out = work / "of-limits"
        of_build = measure(command, images, out)
        shutil.rmtree(out)
    limits = run_limits(images, settings)
    rates = [num_images / max(share.seconds for share in limits[kind]) for kind in LIMITS]
    cpu_ms = sum(share.cpu_s for share in limits[LIMITS[2]]) / num_images * 1e3
    table.add_row(
        name, *(f"{rate:.1f}" for rate in rates), f"{of_build.rate:.1f}",
        f"{of_build.rate / min(rates[:2]):.0%}", f"{of_build.rate / rates[2]:.0%}",
        f"{cpu_ms:.2f}", f"{of_build.cpu_ms:.2f}",
    )  # fmt: skip


def run_limits(
    images: Path, settings: Settings, kinds: tuple[str, ...] = LIMITS
) -> dict[str, list[Share]]:
    """Run parts of the work in processes that do nothing else."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(settings.num_processes), context.Queue()
    processes = [
        context.Process(
            target=_limit_process, args=(rank, images, settings, kinds, barrier, answers)
        )
        for rank in range(settings.num_processes)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return {kind: [answer[kind] for answer in found] for kind in kinds}


def _limit_process(
    rank: int, images: Path, settings: Settings, kinds: tuple[str, ...], barrier: Any, answers: Any
) -> None:
    torch.set_num_threads(1)
    tokenizer = PatchTokenizer.load(settings.codebook, settings.device)
    spec = build_peers.view_spec(tokenizer, NUM_VIEWS)
    paths = sorted(images.iterdir())[rank :: settings.num_processes]
    size = build_peers.IMAGES_PER_BATCH
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]

    def cropped(batch: list[Path]) -> torch.Tensor:
        parts = []
        for path in batch:
            pixels = decode(path.read_bytes())
            boxes = draw_views(spec, path.stem, tuple(pixels.shape[-2:]))
            parts.append(build_peers.cut(pixels, boxes, spec))
        return torch.cat(parts)

    some = [cropped(batch) for batch in batches[:16]]
    tokenizer.encode(some[0])

    def decode_all() -> None:
        for batch in batches:
            cropped(batch)

    def tokenise_all() -> None:
        for number, batch in enumerate(batches):
            tokenizer.encode(some[number % len(some)][: len(batch) * NUM_VIEWS])

    def do_both() -> None:
        for batch in batches:
            tokenizer.encode(cropped(batch))

    works = dict(zip(LIMITS, (decode_all, tokenise_all, do_both), strict=True))
    found = {}
    for kind in kinds:
        barrier.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        works[kind]()
        found[kind] = Share(time.perf_counter() - wall, time.process_time() - cpu)
    answers.put(found)


def decode_rate(images: Path, settings: Settings) -> float:
    """Return images per second that all cores decode and crop, one process for each."""
    found = run_limits(images, settings, LIMITS[:1])[LIMITS[0]]
    return len(list(images.iterdir())) / max(share.seconds for share in found)
