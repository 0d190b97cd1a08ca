"""`patchcache build` beside a 4M-style script and Ray Data, and beside what the cores could do.

    python tests/benchmarks/bench_build.py             # four minutes on two cores
    python tests/benchmarks/bench_build.py --quick     # fewer images, for a look
    python tests/benchmarks/bench_build.py --only limits --features timm:vit_tiny_patch16_224
    python tests/benchmarks/bench_build.py --device cuda

Data: photographs (`../shared/data/photos` or $PATCHCACHE_TEST_DATA/photos; drawn ones where there
are none), repeated under other names. All routes use our tokenizer, and the peers our decoder and
cropper too, so only what is around them differs. With their own, decode and crop by Pillow would
cost them 6.5 ms per image more at four views, and the usual nearest centroid by a matrix product
fifteen times the CPU (bench_kmeans.py).

`--only device` puts a device that waits and computes nothing in the place of the tokenizer: see
`paced_device`. Its rates are set to 0.5 and 1.5 times the decode rate.

CPU time is that of all processes of a command, Ray's included. "Once it runs" leaves out the start:
it is counted from the moment at which a sixth of the images was done. A command is killed (SIGKILL,
all of its processes) when half of its images are done.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cache_builder.build_worker import BuildTask
from cache_builder.ray_cluster import ClusterOptions
from tests import factories
from tests.benchmarks import paced_device, process_tree
from tests.benchmarks.build_inputs import (
    NUM_VIEWS,
    Settings,
    model_codebook,
    pixel_codebook,
    write_images,
)
from tests.benchmarks.build_limits import add_limits, decode_rate, limit_table
from tests.benchmarks.build_routes import (
    ENV,
    Measured,
    build_command,
    check_same_ids,
    finished_at,
    measure,
    peer_command,
)
from tests.benchmarks.build_stages import stage_table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument(
        "--only", choices=("peers", "limits", "device", "stages"), help="one table alone"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--features", help="a timm or open_clip model of random weights, in limits")
    parser.add_argument("--num-images", type=int, help="a multiple of 64 times the processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    num_images = args.num_images or (256 if args.quick else 768)
    console.print(
        f"torch {torch.__version__}, {num_images:,} images, {NUM_VIEWS} views each, "
        f"{args.processes} processes, device {args.device}"
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        images = write_images(work / "images", num_images)
        settings = Settings(pixel_codebook(images, work), args.processes, args.device)
        measured = None
        if args.only in (None, "peers"):
            table, measured = peer_table(images, settings, work)
            console.print(table)
        if args.only in (None, "stages"):
            console.print(stage_table(images, settings, work))
        if args.only in (None, "limits"):
            table = limit_table()
            add_limits(table, "pixel", images, settings, work, measured)
            if model := args.features:
                fewer = write_images(work / "fewer", 96 if args.device == "cpu" else num_images)
                of_model = settings._replace(codebook=model_codebook(model, fewer, work))
                add_limits(table, model, fewer, of_model, work, None)
            console.print(table)
        if args.only in (None, "device"):
            console.print(device_table(work, settings, num_images))


def peer_table(images: Path, settings: Settings, work: Path) -> tuple[Table, Measured]:
    """Run every route: undisturbed, again, and again after a kill."""
    num_images = len(list(images.iterdir()))
    table = Table(title=f"Building a cache of {num_images:,} images, {NUM_VIEWS} views each")
    for name in ("route", "s", "images/s", "once it runs", "CPU ms per image", "once it runs",
                 "MB", "MB on disk", "files", "again, finished, s",
                 "again, killed half-way, s"):  # fmt: skip
        table.add_column(name, justify="left" if name == "route" else "right")
    to_tars = build_command(settings, "webdataset", "none")
    routes = {
        "build, webdataset": to_tars,
        "build, zarr": build_command(settings, "zarr", "none"),
        "DataLoader, .npy per image": peer_command(settings, "per-image"),
        "Ray Data map_batches, parquet": peer_command(settings, "ray-data"),
    }
    if importlib.util.find_spec("pandas") is None:
        del routes["Ray Data map_batches, parquet"]
        table.caption = "Ray Data is left out: it needs pandas. Run: pip install pandas"
    reference = work / "build, webdataset"
    found: dict[str, Measured] = {}
    for name, command in routes.items():
        out = work / name
        found[name] = measured = measure(command, images, out)
        again = process_tree.run(command(images, out), env=ENV)
        check_same_ids(out, reference)
        killed = work / "killed"
        process_tree.run(command(images, killed), kill_after_s=measured.half_way_s, env=ENV)
        resumed = process_tree.run(command(images, killed), env=ENV)
        check_same_ids(killed, reference)
        shutil.rmtree(killed)
        content, allocated, num_files = process_tree.disk_use(out)
        cost = measured.cost
        row = (
            name, f"{cost.seconds:.1f}", f"{num_images / cost.seconds:.0f}", f"{measured.rate:.0f}",
            f"{cost.cpu_s / num_images * 1e3:.1f}", f"{measured.cpu_ms:.1f}",
            f"{content / 1e6:.1f}", f"{allocated / 1e6:.1f}", f"{num_files:,}",
            f"{again.seconds:.1f}", f"{resumed.seconds:.1f}",
        )  # fmt: skip
        print(" | ".join(row), file=sys.stderr)  # what is known if the rest is not waited for
        table.add_row(*row)
    return table, found["build, webdataset"]


DEVICE_RATES = (0.5, 1.5)  # of a simulated device, as shares of the decode rate
UNITS_PER_PROCESS = 12


def device_table(work: Path, settings: Settings, num_images: int) -> Table:
    """Build beside a device that is not a core: see `paced_device`."""
    import ray

    num_cores = settings.num_processes
    table = Table(title=f"A build on {num_cores} cores and a simulated device, images/s")
    for name in ("decode and crop", "device", "workers", "GPUs each", "CPUs each", "build",
                 "of the lesser"):  # fmt: skip
        table.add_column(name, justify="right")
    os.environ.update(ENV)
    images = write_images(work / "many-images", 3 * num_images)
    unit_size = 3 * num_images // (UNITS_PER_PROCESS * num_cores)
    ray.init(num_cpus=num_cores, num_gpus=1, include_dashboard=False, log_to_driver=False)
    for num_workers in sorted({1, num_cores}, reverse=True):
        cluster = ClusterOptions(
            num_workers=num_workers,
            gpus_per_worker=1 / num_workers,
            cpus_per_worker=num_cores // num_workers,
        )
        for share in DEVICE_RATES:
            before = decode_rate(images, settings)
            rate = share * before
            built = build_on_device(images, settings, unit_size, work / "paced", rate, cluster)
            decoded = (before + decode_rate(images, settings)) / 2
            row = (
                f"{decoded:.0f}", f"{rate:.0f}", f"{num_workers}",
                f"{cluster.gpus_per_worker:g}", f"{cluster.cpus_per_worker:g}",
                f"{built:.0f}", f"{built / min(decoded, rate):.0%}",
            )  # fmt: skip
            print(" | ".join(row), file=sys.stderr)
            table.add_row(*row)
    ray.shutdown()
    return table


def build_on_device(
    images: Path, settings: Settings, unit_size: int, out: Path, rate: float,
    cluster: ClusterOptions,
) -> float:  # fmt: skip
    """Return images per second of a build, once it runs."""
    plan = factories.plan_cache(
        images=str(images), codebook=settings.codebook, out=out, num_views=NUM_VIEWS,
        images_in_cache="none", unit_size=unit_size,
    )  # fmt: skip
    task = BuildTask(
        cache=str(out), names=("",), images=str(images), device="cpu",
        decode_threads=cluster.threads_per_worker,
    )  # fmt: skip
    lock = out.with_name("device")
    for _ in paced_device.build_units(task, plan.num_units, lock, rate * NUM_VIEWS, cluster):
        pass
    last = finished_at(out)[-1]
    shutil.rmtree(out)
    batches = np.loadtxt(lock)
    start = batches[len(batches) // 6, 0]
    return float(batches[batches[:, 0] > start, 1].sum()) / NUM_VIEWS / (last - start)


if __name__ == "__main__":
    main()
