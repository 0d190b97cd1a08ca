"""What a training step costs from a cache, beside the same step done the usual way.

    python tests/benchmarks/bench_train.py             # ten minutes on two quiet cores
    python tests/benchmarks/bench_train.py --quick     # one student, fewer steps
    python tests/benchmarks/bench_train.py --device cuda --batch-size 64

Four tables of one run: cached token ids beside a tokenizer in the loop; `train.run` beside the bare
forward and backward pass on pictures in memory; MaPeT's one mask beside masks of every picture and
head; the head on masked patches beside all of them. The peers are in `train_peers`.

Data: photographs (`../shared/data/photos` or $PATCHCACHE_TEST_DATA/photos; drawn ones where there
are none), two views of 224 pixels, K = 8,192. The tokenizer of the loop is a ViT-B/16 of timm with
random weights, which cost what trained ones do, and our nearest centroid. Everything else of the
step is the same: decoding, crop, jitter, masks, forward, backward, optimizer. One thread computes.
Process time on a CPU, wall time on a GPU and for images/s. On a GPU other cores read beside a step,
so that reading does not count, and the blocks of the last two tables, whose peers have blocks of
their own, are not compiled.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

from cache_builder.formats import TokenCache
from cache_builder.tokenizers import CentroidIndex
from tests import factories
from tests.benchmarks import train_peers
from tests.benchmarks.tables import Table
from tests.places import DATA
from trainer import train
from trainer.config import TrainConfig, parse_config
from trainer.data import Batch, BatchOrder, CachedViews
from trainer.distributed import Ranks
from trainer.model import uses_bf16
from trainer.step import Stepper, step_inputs

K, SIZE, PATCH = 8192, 224, 16
TEACHER, TEACHER_DIM = "vit_base_patch16_224", 768
TINY, SMALL, BASE = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base"))
NUM_IMAGES = 32
KEEP = {"method": "beit"}
DROP = {"method": "beit", "mask_ratio": 0.75, "mask_kind": "random", "masked_tokens": "drop"}
OBJECTIVES = {"keep, 75 in blocks": KEEP, "drop, 147 at random": DROP}
MAPET = {"method": "mapet"}
MB = 1e6


class Bench(NamedTuple):
    """What every table is measured with."""

    cache_path: Path
    device: torch.device
    batch_size: int
    num_steps: int  # that are timed, of which the median counts
    students: tuple[str, ...]

    @property
    def is_on_gpu(self) -> bool:
        """Whether the device is no core of this machine."""
        return self.device.type == "cuda"

    @property
    def log_every(self) -> int:
        """Steps of an interval of `train.run`: a few seconds of either device."""
        return 20 if self.is_on_gpu else 5

    def config(
        self,
        student: str,
        objective: dict[str, Any],
        steps: int,
        *,
        num_workers: int = 0,
        compiled: bool = True,
    ) -> TrainConfig:
        """Return the settings of a run."""
        return parse_config(
            {
                "data": {
                    "batch_size": self.batch_size,
                    "color_jitter": 0.4,
                    "num_workers": num_workers,
                },
                "model": {"name": student},
                "objective": objective,
                "optim": {"lr": 1e-3},
                "run": {
                    "steps": steps, "device": self.device.type, "log_every": self.log_every,
                    "checkpoint_every": steps, "compile": "auto" if compiled else "off",
                },
            }
        )  # fmt: skip

    def stepper(self, config: TrainConfig) -> Stepper:
        """Return a model and its optimizer."""
        with TokenCache.open(self.cache_path) as cache:
            stepper = Stepper(config, cache.manifest, cache.codebook, Ranks(), self.device)
        stepper.objective.train()
        return stepper

    def batches(self, count: int) -> list[Batch]:
        """Return the first batches of a run, as the trainer's reader hands them on."""
        with TokenCache.open(self.cache_path) as cache:
            sizes = [shard.num_samples for shard in cache.manifest.shards]
        order = BatchOrder(sizes, self.batch_size, seed=0)
        dataset = CachedViews(self.cache_path, image_size=SIZE)
        found = [dataset.read(order.picks(step)) for step in range(count)]
        dataset.close()
        return [pinned(batch) for batch in found] if self.is_on_gpu else found

    def ms_per_image(self, *works: Callable[[int], object]) -> list[float]:
        """Return medians of calls with 0, 1, ...; the first calls are not counted.

        The works take turns, as a machine changes its pace.
        """
        seconds = [
            [self._clocked(work, step) for work in works] for step in range(self.num_steps + 1)
        ]
        return [
            statistics.median(column) * 1e3 / self.batch_size
            for column in zip(*seconds[1:], strict=True)
        ]

    def _clocked(self, work: Callable[[int], object], step: int) -> float:
        if self.is_on_gpu:
            torch.cuda.synchronize()
            began = time.perf_counter()
            work(step)
            torch.cuda.synchronize()
            return time.perf_counter() - began
        began = time.process_time()
        work(step)
        return time.process_time() - began


def main() -> None:
    """Print the tables."""
    tables = {
        "tokenizer": tokenizer_table,
        "loop": speed_table,
        "mapet": mapet_table,
        "head": head_table,
    }
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one student, fewer steps")
    parser.add_argument("--only", choices=tables, help="one of the tables")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            build_cache(Path(folder), max(NUM_IMAGES, args.batch_size)),
            torch.device(args.device), args.batch_size,
            num_steps=3 if args.quick else 6,
            students=(TINY,) if args.quick else (TINY, SMALL, BASE),
        )  # fmt: skip
        for name, make_table in tables.items():
            if args.only in (None, name):
                print(make_table(bench))


def build_cache(folder: Path, num_images: int = NUM_IMAGES) -> Path:
    """Tokenise some photographs with a codebook of random centroids."""
    photos = sorted((DATA / "photos").glob("*.JPEG"))[:num_images]
    images = folder / "images"
    if len(photos) == num_images:
        images.mkdir()
        for path in photos:
            (images / path.name).symlink_to(path.resolve())
    else:
        factories.write_folder(images, factories.photo_images(num_images, height=375, width=500))
    colours = np.random.default_rng(0).integers(0, 256, (K, 3))
    codebook = factories.write_codebook(
        folder / "codebook.safetensors", colours=colours, size=SIZE, patch_size=PATCH
    )
    factories.build_cache(images=str(images), codebook=codebook, out=folder / "cache", num_views=2)
    return folder / "cache"


def tokenizer_table(bench: Bench) -> Table:
    """Time steps as `patchcache train` takes them, and the tokenizer that they do without."""
    table = Table(
        f"A step from cached token ids and with the tokenizer in the loop, ms per image, batches "
        f"of {bench.batch_size}, {bench.device}",
        ("student", "masked patches"),
        ("read", "step", "cached ids", "tokenizer", "in the loop", "ratio"),
    )
    tokenizer_ms = time_tokenizer(bench)
    batches = bench.batches(bench.num_steps + 1)
    read_ms = 0.0 if bench.is_on_gpu else time_reading(bench)
    for student in bench.students:
        for name, objective in OBJECTIVES.items():
            stepper = bench.stepper(bench.config(student, objective, bench.num_steps + 1))
            (step_ms,) = bench.ms_per_image(
                lambda step, stepper=stepper: stepper.take(step, batches[step])
            )
            cached_ms = read_ms + step_ms
            in_loop_ms = cached_ms + tokenizer_ms
            times = (read_ms, step_ms, cached_ms, tokenizer_ms, in_loop_ms)
            ratio = in_loop_ms / cached_ms
            table.add_row(student, name, *(f"{ms:.1f}" for ms in times), f"{ratio:.2f}")
    return table


def time_reading(bench: Bench) -> float:
    """Return what decoding and cropping take, ms per image."""
    with TokenCache.open(bench.cache_path) as cache:
        sizes = [shard.num_samples for shard in cache.manifest.shards]
    order = BatchOrder(sizes, bench.batch_size, seed=0)
    dataset = CachedViews(bench.cache_path, image_size=SIZE)
    (ms,) = bench.ms_per_image(lambda step: dataset.read(order.picks(step)))
    dataset.close()
    return ms


def time_tokenizer(bench: Bench) -> float:
    """Return what features and nearest centroids of a batch take, ms per image."""
    device = bench.device
    teacher = timm.create_model(TEACHER, num_classes=0).eval().to(device)
    index = CentroidIndex(torch.randn(K, TEACHER_DIM, device=device))
    images = torch.randn(bench.batch_size, 3, SIZE, SIZE, device=device)

    @torch.inference_mode()
    def tokenise(_: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(bench)):
            features = teacher.forward_features(images)[:, teacher.num_prefix_tokens :]
        index.assign(features.flatten(0, 1).float())

    (ms,) = bench.ms_per_image(tokenise)
    return ms


def speed_table(bench: Bench) -> Table:
    """Time whole runs of the trainer beside the model alone, on the wall clock."""
    table = Table(
        f"The trainer and the bare forward and backward pass, images/s, batches of "
        f"{bench.batch_size}, {bench.device}",
        ("student", "masked patches", "workers that decode"),
        ("bare", "train.run", "share", "data wait"),
    )
    for student in bench.students[:2]:
        for name, objective in OBJECTIVES.items():
            for num_workers in (os.cpu_count() or 1,) if bench.is_on_gpu else (0, 1):
                # Before and after, as other work on the machine comes and goes.
                before = bare_speed(bench, student, objective)
                trained, waited = trained_speed(bench, student, objective, num_workers)
                bare = (before + bare_speed(bench, student, objective)) / 2
                table.add_row(
                    student, name, f"{num_workers}", f"{bare:.1f}", f"{trained:.1f}",
                    f"{100 * trained / bare:.0f} %", f"{100 * waited:.1f} %",
                )  # fmt: skip
    return table


def bare_speed(bench: Bench, student: str, objective: dict[str, Any]) -> float:
    """Return images/s of forward and backward on one batch in memory: nothing is updated."""
    config = bench.config(student, objective, 1)
    module = bench.stepper(config).objective
    (batch,) = bench.batches(1)
    inputs = step_inputs(batch, config, 0, bench.device)
    seconds = []
    for _ in range(bench.num_steps + 1):
        began = time.perf_counter()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=is_bf16(bench)):
            loss = module(*inputs)["loss"]
        loss.backward()
        module.zero_grad()
        if bench.is_on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return bench.batch_size / statistics.median(seconds[1:])


def trained_speed(
    bench: Bench, student: str, objective: dict[str, Any], num_workers: int
) -> tuple[float, float]:
    """Return images/s and share of waiting of a run, medians of the intervals after the first."""
    steps = bench.log_every * (2 if bench.num_steps < 6 else 4 if bench.is_on_gpu else 3)
    with tempfile.TemporaryDirectory() as folder:
        config = bench.config(student, objective, steps, num_workers=num_workers)
        train.run(config, bench.cache_path, folder)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    # After the first step, and on a GPU after the first interval, in which the workers start.
    rows = [json.loads(line) for line in lines[2 if bench.is_on_gpu else 1 :]]
    speed = statistics.median(row["images_per_s"] for row in rows)
    return speed, statistics.median(row["data_wait"] for row in rows)


def mapet_table(bench: Bench) -> Table:
    """Time MaPeT with one mask for the run and with masks of every picture and head."""
    table = Table(
        f"MaPeT, forward and backward, {TINY}, batches of {bench.batch_size}, {bench.device}",
        ("masks",),
        ("ms per image", "masks, MB per image", "kept for backward, MB per image"),
    )
    config = bench.config(TINY, MAPET, 1, compiled=False)
    objective = bench.stepper(config).objective
    peer = train_peers.TwoStreams(objective)
    inputs = step_inputs(bench.batches(1)[0], config, 0, bench.device)

    def ours() -> torch.Tensor:
        return objective(*inputs)["loss"]

    costs = time_backward(bench, objective, ours, lambda: peer(*inputs))
    masks = (0, peer.mask_bytes / bench.batch_size)
    for name, (ms, kept), size in zip(
        ("one, from ranks", "dense, as official"), costs, masks, strict=True
    ):
        table.add_row(name, f"{ms:.1f}", f"{size / MB:.2f}", f"{kept / MB:.1f}")
    table.caption = f"The one mask of a run: {objective.sees.nbytes / MB:.2f} MB."
    return table


def head_table(bench: Bench) -> Table:
    """Time BEiT with a head on the masked patches and with one on all patches."""
    table = Table(
        f"BEiT, 75 of 196 patches masked, forward and backward, batches of {bench.batch_size}, "
        f"{bench.device}",
        ("student",),
        ("head on masked, ms per image", "on all, ms per image", "saved"),
    )
    for student in bench.students[:2]:
        config = bench.config(student, KEEP, 1, compiled=False)
        objective = bench.stepper(config).objective
        inputs = step_inputs(bench.batches(1)[0], config, 0, bench.device)
        (masked_ms, _), (all_ms, _) = time_backward(
            bench,
            objective,
            lambda o=objective, i=inputs: o(*i)["loss"],
            lambda o=objective, i=inputs: train_peers.loss_over_all_positions(o, *i),
        )
        saved = 1 - masked_ms / all_ms
        table.add_row(student, f"{masked_ms:.1f}", f"{all_ms:.1f}", f"{100 * saved:.0f} %")
    return table


def time_backward(
    bench: Bench, module: torch.nn.Module, *forwards: Callable[[], torch.Tensor]
) -> list[tuple[float, float]]:
    """Return ms and bytes kept, per image, of each of several forward and backward passes."""

    def cast(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=is_bf16(bench)):
            return forward()

    def step(_: int, forward: Callable[[], torch.Tensor]) -> None:
        cast(forward).backward()
        module.zero_grad()

    times = bench.ms_per_image(*(partial(step, forward=forward) for forward in forwards))
    kept = [train_peers.bytes_kept(module, partial(cast, forward)) for forward in forwards]
    return [(ms, size / bench.batch_size) for ms, size in zip(times, kept, strict=True)]


def pinned(batch: Batch) -> Batch:
    """Return a batch in memory from which a GPU copies by itself."""
    tensors = {n: v.pin_memory() for n, v in batch._asdict().items() if torch.is_tensor(v)}
    return batch._replace(**tensors)


def is_bf16(bench: Bench) -> bool:
    """Say whether the trainer would compute in bfloat16."""
    return uses_bf16("auto", bench.device)


if __name__ == "__main__":
    main()
