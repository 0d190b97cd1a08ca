"""A training step from cached token ids, beside the same step with the tokenizer in the loop.

    python tests/benchmarks/bench_train.py             # five minutes on one core
    python tests/benchmarks/bench_train.py --quick     # one student, fewer steps
    python tests/benchmarks/bench_train.py --device cuda --batch-size 64

Data: photographs (`../shared/data/photos` or $PATCHCACHE_TEST_DATA/photos; drawn ones where there
are none), two views of 224 pixels, K = 8,192. The tokenizer of the loop is a ViT-B/16 of timm with
random weights, which cost what trained ones do, and our nearest centroid. Everything else of the
step is the same: decoding, crop, jitter, masks, forward, backward, optimizer. Process time on a
CPU, wall time on a GPU.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table

from cache_builder.formats import TokenCache
from cache_builder.tokenizers import CentroidIndex
from tests import factories
from tests.conftest import DATA
from trainer.config import parse_config
from trainer.data import BatchOrder, CachedViews
from trainer.distributed import Ranks
from trainer.step import Stepper

K, SIZE, PATCH = 8192, 224, 16
TEACHER, TEACHER_DIM = "vit_base_patch16_224", 768
STUDENTS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
NUM_IMAGES = 32
OBJECTIVES = {
    "keep, 75 in blocks": {"method": "beit"},
    "drop, 147 at random": {
        "method": "beit", "mask_ratio": 0.75, "mask_kind": "random", "masked_tokens": "drop",
    },
}  # fmt: skip


class Times(NamedTuple):
    """Milliseconds per image."""

    read: float  # decode and crop
    step: float  # forward, backward, optimizer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one student, fewer steps")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_steps = 3 if args.quick else 6
    device = torch.device(args.device)
    table = Table(title=f"ms per image, batches of {args.batch_size}, {args.device}")
    for name in ("student", "masked patches", "read", "step", "cached ids", "tokenizer",
                 "in the loop", "ratio"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("student", "masked patches") else "right")
    with tempfile.TemporaryDirectory() as folder:
        cache_path = build_cache(Path(folder))
        tokenizer_ms = time_tokenizer(device, args.batch_size, num_steps)
        for student in STUDENTS[:1] if args.quick else STUDENTS:
            for name, objective in OBJECTIVES.items():
                times = time_steps(
                    cache_path, student, objective, device, args.batch_size, num_steps
                )
                cached = times.read + times.step
                table.add_row(
                    student, name, f"{times.read:.1f}", f"{times.step:.1f}", f"{cached:.1f}",
                    f"{tokenizer_ms:.1f}", f"{cached + tokenizer_ms:.1f}",
                    f"{(cached + tokenizer_ms) / cached:.2f}",
                )  # fmt: skip
    Console(width=130).print(table)


def build_cache(folder: Path) -> Path:
    """Tokenise some photographs with a codebook of random centroids."""
    photos = sorted((DATA / "photos").glob("*.JPEG"))[:NUM_IMAGES]
    images = folder / "images"
    if photos:
        images.mkdir()
        for path in photos:
            (images / path.name).symlink_to(path.resolve())
    else:
        factories.write_folder(images, factories.photo_images(NUM_IMAGES, height=375, width=500))
    colours = np.random.default_rng(0).integers(0, 256, (K, 3))
    codebook = factories.write_codebook(
        folder / "codebook.safetensors", colours=colours, size=SIZE, patch_size=PATCH
    )
    factories.build_cache(images=str(images), codebook=codebook, out=folder / "cache", num_views=2)
    return folder / "cache"


def time_steps(
    cache_path: Path,
    student: str,
    objective: dict[str, object],
    device: torch.device,
    batch_size: int,
    num_steps: int,
) -> Times:
    """Take steps as `patchcache train` does."""
    config = parse_config(
        {
            "data": {"batch_size": batch_size, "color_jitter": 0.4},
            "model": {"name": student},
            "objective": objective,
            "optim": {"lr": 1e-3},
            "run": {"steps": num_steps + 1, "device": device.type},
        }
    )
    with TokenCache.open(cache_path) as cache:
        stepper = Stepper(config, cache.manifest, cache.codebook, Ranks(), device)
        sizes = [shard.num_samples for shard in cache.manifest.shards]
    stepper.objective.train()
    order = BatchOrder(sizes, batch_size, seed=0)
    dataset = CachedViews(cache_path, image_size=SIZE)
    batches = [dataset.read(order.picks(step)) for step in range(num_steps + 1)]
    stepper.take(0, batches[0])  # what is made once
    read = [
        clocked(lambda s=step: dataset.read(order.picks(s)), device) for step in range(num_steps)
    ]
    steps = [
        clocked(lambda s=step: stepper.take(s, batches[s]), device)
        for step in range(1, num_steps + 1)
    ]
    dataset.close()
    return Times(*(statistics.median(found) * 1e3 / batch_size for found in (read, steps)))


def time_tokenizer(device: torch.device, batch_size: int, num_steps: int) -> float:
    """Return what features and nearest centroids of a batch take, ms per image."""
    teacher = timm.create_model(TEACHER, num_classes=0).eval().to(device)
    index = CentroidIndex(torch.randn(K, TEACHER_DIM, device=device))
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=device)

    @torch.inference_mode()
    def tokenise() -> None:
        features = teacher.forward_features(images)[:, teacher.num_prefix_tokens :]
        index.assign(features.flatten(0, 1))

    tokenise()
    return statistics.median(clocked(tokenise, device) for _ in range(num_steps)) * 1e3 / batch_size


def clocked(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    run()
    return time.process_time() - began


if __name__ == "__main__":
    main()
