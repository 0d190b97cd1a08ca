"""What a GPU gives: nearest centroids and fits, tokenizers, steps of every method, whole runs.

    python -m tests.devices.bench                           # `make gpu-bench`: ten minutes
    python -m tests.devices.bench --only steps
    python -m tests.devices.bench --device cpu              # small, to see that it runs

It asks for torch, torchvision, timm, numpy and safetensors; with faiss there is a peer more. Where
torch sees no CUDA device the same code runs on the CPU with small sizes, and says so: those figures
say nothing about a GPU. Exit status: 0 every table was printed; 1 one could not be made.

Times are of the wall clock, the device waited for at both ends. `steps` are those of
`patchcache train` on batches in pinned memory; FLOPs are counted as `trainer/flops.py` does, and
MFU is against the card's data sheet. How the trainer does with its data read is in the tables that
`bench_train.py` prints too.
"""

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_builder.formats import Codebook, ExtractorSpec, PixelRule
from cache_builder.kmeans import fit_centroids
from cache_builder.tokenizers import CentroidIndex, PatchTokenizer
from tests import factories
from tests.benchmarks import bench_train
from tests.benchmarks.bench_train import BASE, DROP, KEEP, MAPET, PATCH, SIZE, TINY, Bench
from tests.benchmarks.tables import Table
from trainer import flops
from trainer.data import Batch
from trainer.step import step_inputs

METHODS: dict[str, dict[str, Any]] = {
    "BEiT, keep": KEEP,
    "BEiT, drop": DROP,
    "MaPeT": MAPET,
    "CCViT": {"method": "ccvit"},
    "DTM": {"method": "dtm"},
}
NUM_WARM = 5  # steps that are not timed: compilation, and the choice of kernels


class Sizes(NamedTuple):
    """How much is measured."""

    num_points: int
    num_centroids: int
    num_assigned: int
    num_views: int
    feature_model: str
    student: str
    batch_size: int
    num_steps: int


ON_GPU = Sizes(9_800_000, 8192, 1_000_000, 2048, "vit_base_patch16_224", BASE, 256, 30)
ON_CPU = Sizes(20_000, 256, 5_000, 16, "vit_tiny_patch16_224", TINY, 2, 2)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    tables: dict[str, Callable[[Sizes, torch.device], Table]] = {
        "nearest": nearest_table,
        "encode": encode_table,
        "steps": step_table,
        "loop": loop_table,
        "in-loop": in_loop_table,
    }
    parser.add_argument("--only", choices=tables, help="one of the tables")
    parser.add_argument("--device", help="cuda, cuda:N or cpu; by default a GPU if there is one")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    logging.disable(logging.WARNING)
    if device.type == "cpu":
        torch.set_num_threads(1)
        print("No CUDA device: small sizes on the CPU. No figure below is one of a GPU.")
    else:
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}")
    print()
    sizes = ON_CPU if device.type == "cpu" else ON_GPU
    for name, make_table in tables.items():
        if args.only in (None, name):
            print(make_table(sizes, device), flush=True)


def nearest_table(sizes: Sizes, device: torch.device) -> Table:
    """Time assignment and CCViT's fit beside float32 products and faiss."""
    k = sizes.num_centroids
    table = Table(
        f"Nearest of {k:,} centroids and a fit, pixel patches, D = 768, {device}", ("what",),
        ("float32 s", "faiss s", "ours s", "x float32", "x faiss", "ids that differ"),
    )  # fmt: skip
    points = patches(sizes.num_points)
    centroids, x = points[:k].to(device), points[: sizes.num_assigned].to(device)
    index, as_float = CentroidIndex(centroids), centroids.float()
    ours = seconds(lambda: index.assign(x), device)
    reference = seconds(lambda: dense(x, as_float), device)
    differ = int((index.assign(x)[0] != dense(x, as_float)).sum())
    gpu_of_faiss = faiss_gpu() if device.type == "cuda" else None
    of_faiss = None
    if gpu_of_faiss:
        flat = gpu_of_faiss.index_cpu_to_all_gpus(gpu_of_faiss.IndexFlatL2(768), ngpu=1)
        flat.add(as_float.cpu().numpy())
        queries = x.cpu().float().numpy()
        of_faiss = seconds(lambda: flat.search(queries, 1), device)
    add_times(table, f"nearest, {len(x):,} patches", reference, of_faiss, ours, f"{differ}")
    ours = seconds(lambda: fit_centroids(points.to(device), k, iterations=20), device)
    of_faiss = None
    if gpu_of_faiss:
        options = {"niter": 20, "gpu": 1, "max_points_per_centroid": 10**7, "seed": 1}
        theirs = gpu_of_faiss.Kmeans(768, k, **options)
        as_floats = points.float().numpy()
        of_faiss = seconds(lambda: theirs.train(as_floats), device)
    add_times(table, f"fit, {len(points):,} patches, 20 iterations", None, of_faiss, ours, "-")
    return table


def encode_table(sizes: Sizes, device: torch.device) -> Table:
    """Time whole tokenizers beside the model alone."""
    k = sizes.num_centroids
    table = Table(
        f"Tokenizers, K = {k:,}, views of {SIZE} pixels in memory, {device}", ("features",),
        ("model alone, views/s", "encode, views/s", "share"),
    )  # fmt: skip
    views = factories.photo_views(8, SIZE).repeat(-(-sizes.num_views // 8), 1, 1, 1)
    for codebook in (pixel_codebook(k), model_codebook(sizes.feature_model, k)):
        tokenizer = PatchTokenizer.load(codebook, device)
        there = views.to(device)

        def model_alone(tokenizer: PatchTokenizer = tokenizer, there: Tensor = there) -> None:
            for batch in there.split(64):
                tokenizer.features(batch)

        alone = len(views) / seconds(model_alone, device)
        whole = len(views) / seconds(lambda t=tokenizer: t.encode(views), device)
        table.add_row(codebook.extractor.id, f"{alone:.0f}", f"{whole:.0f}", f"{whole / alone:.0%}")
    return table


def step_table(sizes: Sizes, device: torch.device) -> Table:
    """Time steps of methods on batches that have been read."""
    table = Table(
        f"Steps of {sizes.student}, batches of {sizes.batch_size}, {device}", ("method",),
        ("images/s", "TFLOP/s", "MFU", "peak memory, GB", "first steps, s"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = bench_of(sizes, device, Path(folder))
        (batch,) = bench.batches(1)
        for name, objective in METHODS.items():
            table.add_row(name, *step_costs(bench, objective, batch))
    return table


def step_costs(bench: Bench, objective: dict[str, Any], batch: Batch) -> list[str]:
    """Return the cells of a method."""
    (student,), device, num_steps = bench.students, bench.device, bench.num_steps
    config = bench.config(student, objective, NUM_WARM + num_steps)
    stepper = bench.stepper(config)
    few = batch.part(0, 2)
    cost = flops.training_flops(
        stepper.objective, lambda: stepper.objective(*step_inputs(few, config, 0, device)), 2
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = []
    for first, stop in ((0, NUM_WARM), (NUM_WARM, NUM_WARM + num_steps)):
        finish(device)
        began = time.perf_counter()
        for step in range(first, stop):
            stepper.take(step, batch)
        finish(device)
        took.append(time.perf_counter() - began)
    rate = num_steps * bench.batch_size / took[1]
    peak = flops.peak_flops(device)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return [
        f"{rate:.0f}",
        f"{rate * cost / 1e12:.2f}",
        "-" if peak is None else f"{rate * cost / peak:.1%}",
        "-" if memory is None else f"{memory:.1f}",
        f"{took[0]:.1f}",
    ]


def loop_table(sizes: Sizes, device: torch.device) -> Table:
    """Time whole runs of the trainer beside the bare forward and backward pass."""
    with tempfile.TemporaryDirectory() as folder:
        return bench_train.speed_table(bench_of(sizes, device, Path(folder)))


def in_loop_table(sizes: Sizes, device: torch.device) -> Table:
    """Time a step from the cache beside one with the tokenizer in the loop."""
    with tempfile.TemporaryDirectory() as folder:
        return bench_train.tokenizer_table(bench_of(sizes, device, Path(folder)))


def bench_of(sizes: Sizes, device: torch.device, folder: Path) -> Bench:
    """Return what `bench_train` measures with."""
    cache_path = bench_train.build_cache(folder, max(sizes.batch_size, bench_train.NUM_IMAGES))
    return Bench(cache_path, device, sizes.batch_size, sizes.num_steps, (sizes.student,))


def patches(count: int) -> Tensor:
    """Return patches (count, 768) uint8 of drawn photographs, no two alike."""
    generator = torch.Generator().manual_seed(0)
    drawn = factories.photo_patches(num_photos=64, patch_size=16)
    rows = torch.randint(len(drawn), (count,), generator=generator)
    parts = []
    for some in rows.split(1 << 18):
        noise = torch.randint(-16, 17, (len(some), 768), generator=generator, dtype=torch.int16)
        parts.append((drawn[some].short() + noise).clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def pixel_codebook(k: int) -> Codebook:
    """Return a codebook of K patches."""
    return Codebook(
        patches(k).numpy()[None],
        np.ones((1, k), np.int64),
        metric="l2",
        pixel_rule=PixelRule(size=SIZE, patch_size=PATCH),
        extractor=ExtractorSpec(id="pixel"),
    )


def model_codebook(name: str, k: int) -> Codebook:
    """Return a codebook of K features of a model of random weights, some of them with noise."""
    few = factories.feature_codebook(f"timm:{name}", image_size=SIZE, layer=None, num_centroids=64)
    found = few.centroids[0]
    rng = np.random.default_rng(0)
    noise = 0.1 * found.std() * rng.normal(size=(k, found.shape[1]))
    centroids = (found[np.arange(k) % len(found)] + noise).astype(np.float32)
    return Codebook(
        centroids[None], np.ones((1, k), np.int64), metric="l2", pixel_rule=few.pixel_rule,
        extractor=few.extractor,
    )  # fmt: skip


def dense(x: Tensor, centroids: Tensor) -> Tensor:
    """Do what anyone would write in torch, in float32 and in blocks."""
    norms = centroids.square().sum(1)
    parts = [
        torch.addmm(norms, part.float(), centroids.T, alpha=-2).argmin(1)
        for part in x.split(1 << 15)
    ]
    return torch.cat(parts)


def faiss_gpu() -> Any:
    """Return faiss where it is installed and sees a GPU, else None."""
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    return faiss if faiss.get_num_gpus() > 0 else None


def add_times(
    table: Table, what: str, reference: float | None, of_faiss: float | None, ours: float,
    differ: str,
) -> None:  # fmt: skip
    """Add a row of seconds and ratios."""
    times = [reference, of_faiss, ours]
    ratios = [reference and reference / ours, of_faiss and of_faiss / ours]
    table.add_row(
        what,
        *("-" if t is None else f"{t:.3g}" for t in times),
        *("-" if r is None else f"{r:.1f}" for r in ratios),
        differ,
    )


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a second run."""
    run()
    finish(device)
    began = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
