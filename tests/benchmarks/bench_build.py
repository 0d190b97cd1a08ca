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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

from cache_builder import files, image_types, imaging, sources
from cache_builder.build_worker import BuildTask
from cache_builder.formats import manifest, shards, tar_stream, views, zarr_store
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.formats.views import View, draw_views
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.kmeans import fit_centroids
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.sources import open_source
from cache_builder.targets import TargetMaker, Targets
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from cache_builder.tokenizers.quantizer import ResidualQuantizer
from tests import factories
from tests.benchmarks import build_peers, paced_device, process_tree
from tests.benchmarks.process_tree import Cost
from tests.benchmarks.stages import Stage, StageClock
from tests.places import DATA, ROOT

NUM_VIEWS = 4
ENV = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # else Ray's workers alone give way to other processes
}

Command = Callable[[Path, Path], list[str]]
"""Return the command that tokenises the images of the first folder into the second."""


class Settings(NamedTuple):
    """What all routes share."""

    codebook: Path
    num_processes: int
    device: str


class Measured(NamedTuple):
    """One route over the same images."""

    cost: Cost
    finished: list[float]  # when every image was done, in order, as time.time()

    @property
    def num_images(self) -> int:
        """Of the source."""
        return len(self.finished)

    @property
    def rate(self) -> float:
        """Images per second, once it runs."""
        start, stop, number = self._steady()
        return number / (stop - start) if number else float("nan")  # all was written at once

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per image, once it runs."""
        start, stop, number = self._steady()
        return self.cost.cpu_between(start, stop) / number * 1e3 if number else float("nan")

    @property
    def half_way_s(self) -> float:
        """Seconds until half of the images were done."""
        return self.finished[self.num_images // 2] - self.cost.started

    def _steady(self) -> tuple[float, float, int]:
        """Return the time from the first sixth of the images to the last, and how many that are."""
        start, stop = self.finished[self.num_images // 6], self.finished[-1]
        return start, stop, sum(moment > start for moment in self.finished)


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


def measure(command: Command, images: Path, out: Path) -> Measured:
    """Run a command to its end."""
    cost = process_tree.run(command(images, out), env=ENV)
    return Measured(cost, finished_at(out))


def finished_at(out: Path) -> list[float]:
    """Return when every image of an output was done: the times of the files that say so."""
    if (out / "units").is_dir():
        records = [*(out / "units").iterdir()]
        counts = [
            factories.read(manifest.UnitRecord, out, f"units/{path.name}").num_samples
            for path in records
        ]
    elif (out / "tokens").is_dir():
        records = [*(out / "tokens").iterdir()]
        counts = [1] * len(records)
    else:
        records = [*out.glob("*.parquet")]
        counts = [build_peers.num_rows(path) for path in records]
    moments = [path.stat().st_mtime for path in records]
    return sorted(m for m, count in zip(moments, counts, strict=True) for _ in range(count))


def build_command(settings: Settings, layout: str, kept: str, *more: str) -> Command:
    """Return `patchcache build` as anyone would call it."""

    def command(images: Path, out: Path) -> list[str]:
        return [
            sys.executable, "-m", "cache_builder.cli", "build", "--images", str(images),
            "--codebook", str(settings.codebook), "--out", str(out), "--views", str(NUM_VIEWS),
            "--layout", layout, "--images-in-cache", kept, "--device", settings.device,
            "--workers", str(settings.num_processes), *gpu_share(settings), *more,
        ]  # fmt: skip

    return command


def peer_command(settings: Settings, peer: str) -> Command:
    """Return one of the peers."""

    def command(images: Path, out: Path) -> list[str]:
        return [
            sys.executable, "-m", "tests.benchmarks.build_peers", peer, "--images", str(images),
            "--codebook", str(settings.codebook), "--out", str(out), "--views", str(NUM_VIEWS),
            "--processes", str(settings.num_processes), "--device", settings.device,
        ]  # fmt: skip

    return command


def gpu_share(settings: Settings) -> list[str]:
    """Return how the actors of a build share one GPU."""
    if settings.device == "cpu":
        return []
    return ["--gpus-per-worker", str(1 / settings.num_processes)]


def check_same_ids(out: Path, cache_dir: Path) -> None:
    """Compare every token id of a route with those of a build.

    Raises:
        RuntimeError: An image is missing or has other ids.
    """
    with TokenCache.open(cache_dir) as cache:
        expected = {cache[i].key: cache[i].token_ids for i in range(len(cache))}
    found = token_ids_of(out)
    wrong = [k for k in expected if k not in found or not np.array_equal(found[k], expected[k])]
    if wrong or len(found) != len(expected):
        raise RuntimeError(f"{out}: {len(found)} images, {len(wrong)} missing or different")


def token_ids_of(out: Path) -> dict[str, Any]:
    """Return the token ids in the output of any route, by name."""
    if (out / "manifest.json").is_file():
        with TokenCache.open(out) as cache:
            return {cache[i].key: cache[i].token_ids for i in range(len(cache))}
    if (out / "tokens").is_dir():
        return {path.stem: np.load(path) for path in (out / "tokens").iterdir()}
    return build_peers.read_parquet(out)


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


def decode_rate(images: Path, settings: Settings) -> float:
    """Return images per second that all cores decode and crop, one process for each."""
    found = run_limits(images, settings, LIMITS[:1])[LIMITS[0]]
    return len(list(images.iterdir())) / max(share.seconds for share in found)


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


PUBLISHING = ("publish_new", "_flush", "flush_directory", "flush_file")
WRITERS = (shards.ShardWriter, zarr_store.RowWriter)
WRITING = ("add", "finish")
PARTS = ("read", "decode", "crop", "tokenise")


def stages_of_build(source: Any) -> list[Stage]:
    """Return the functions in which a build spends its time, by what they are for."""
    return [
        Stage("read", ((sources, "read_unit"),)),
        Stage("decode", ((imaging, "decode"),)),
        Stage("crop", ((imaging, "apply_view"),)),
        Stage("tokenise", ((PatchTokenizer, "features"), (ResidualQuantizer, "encode"))),
        Stage("draw views", ((views, "draw_views"),)),
        Stage("image extension", ((image_types, "image_extension"),)),
        Stage("other targets", ((TargetMaker, "make"), (Targets, "split"))),
        Stage("tar members", ((tar_stream.TarStream, "add"),)),
        Stage("write shard", tuple((writer, name) for writer in WRITERS for name in WRITING)),
        Stage("publish", tuple((files, name) for name in PUBLISHING)),
        Stage("digest", ((shards._Hashed, "write"), (manifest.FileDigest, "of_content"))),
        Stage("plan and record as JSON", ((manifest, "read_model"), (manifest, "to_json"))),
    ]


def stage_table(images: Path, settings: Settings, work: Path) -> Table:
    """Build every unit in this process and charge its CPU to stages."""
    table = Table(title="Where a worker's CPU goes, ms per image (wall ms in brackets)")
    routes = (("webdataset", "none"), ("webdataset", "original"), ("zarr", "none"))
    columns = [f"{layout}, {kept}" for layout, kept in routes]
    for name in ("stage", *columns):
        table.add_column(name, justify="left" if name == "stage" else "right")
    found = [profile(images, settings, work / "profiled", *route) for route in routes]
    for name in found[0]:
        table.add_row(name, *(f"{f[name].cpu_s:.3f} ({f[name].wall_s:.3f})" for f in found))
    shares = []
    for stages in found:
        parts = sum(stages[part].cpu_s for part in PARTS)
        shares.append(f"{1 - parts / stages['all'].cpu_s:.1%}")
    table.add_section()
    table.add_row("engine: all but " + ", ".join(PARTS), *shares)
    return table


def profile(images: Path, settings: Settings, out: Path, layout: str, kept: str) -> dict[str, Any]:
    """Return milliseconds per image by stage, of all units built one after another."""
    some = sorted(images.iterdir())[:512]
    folder = out.with_name("some-images")
    if not folder.is_dir():
        factories.write_folder(folder, {path.name: path.read_bytes() for path in some})
    options: dict[str, Any] = {
        "images": str(folder), "codebook": settings.codebook, "out": out,
        "num_views": NUM_VIEWS, "layout": layout, "images_in_cache": kept,
    }  # fmt: skip
    plan = factories.plan_cache(**options)
    worker = factories.make_worker(out, plan, images=str(folder), device=settings.device)
    worker.run(0)  # what is done once: imports, the quantiser's preparation
    clock = StageClock()
    stages = stages_of_build(open_source(str(folder)))
    num_images = 0
    with clock.watching(stages):
        cpu, wall = time.process_time(), time.perf_counter()
        for unit in range(1, plan.num_units):
            num_images += worker.run(unit).num_samples
        total = (time.process_time() - cpu, time.perf_counter() - wall)
    shutil.rmtree(out)
    spent = {stage.name: clock.spent(stage.name) for stage in stages}
    rest = [total[kind] - sum(found[kind] for found in spent.values()) for kind in range(2)]
    spent |= {"everything else": type(spent["read"])(*rest), "all": type(spent["read"])(*total)}
    return {
        name: found._replace(
            cpu_s=found.cpu_s / num_images * 1e3, wall_s=found.wall_s / num_images * 1e3
        )
        for name, found in spent.items()
    }


def write_images(folder: Path, num_images: int) -> Path:
    """Write photographs, or drawn ones where there are none, again and again under new names."""
    paths = sorted((DATA / "photos").glob("*.JPEG"))
    found = [path.read_bytes() for path in paths] or [
        factories.encode(factories.draw_photo(seed, 375, 500), "JPEG", quality=90)
        for seed in range(100)
    ]
    content = {f"{n:06d}.jpg": found[n % len(found)] for n in range(num_images)}
    return factories.write_folder(folder, content)


def pixel_codebook(images: Path, work: Path, k: int = 8192) -> Path:
    """Fit K centroids to patches of the images: two iterations are enough to time a tokenizer."""
    parts = []
    for path in sorted(images.iterdir())[:250]:
        picture = decode(path.read_bytes())
        parts.append(patchify(apply_view(picture, centre(picture), 224)[None], 16)[0])
    centroids = fit_centroids(torch.cat(parts), k, iterations=2).centroids.numpy()
    rule = PixelRule(size=224, patch_size=16)
    return save_codebook(centroids, rule, ExtractorSpec(id="pixel"), work / "pixels.safetensors")


def model_codebook(model: str, images: Path, work: Path, k: int = 8192) -> Path:
    """Take features of a model of random weights as centroids: enough to time it."""
    options = FeatureOptions(model, image_size=224, random_weights_seed=0)
    extractor = make_extractor(options, torch.device("cpu"))
    side = extractor.pixel_rule.size
    num_images = -(-k // (extractor.pixel_rule.grid[0] * extractor.pixel_rule.grid[1]))
    pictures = [decode(path.read_bytes()) for path in sorted(images.iterdir())[:num_images]]
    pixels = [apply_view(picture, centre(picture), side) for picture in pictures]
    features = torch.cat([extractor(pixel[None])[0] for pixel in pixels])
    return save_codebook(
        features.numpy()[:k], extractor.pixel_rule, extractor.spec, work / "model.safetensors"
    )


def save_codebook(
    centroids: Any, pixel_rule: PixelRule, extractor: ExtractorSpec, path: Path
) -> Path:
    """Write (K, D) centroids as a codebook."""
    counts = np.ones((1, len(centroids)), np.int64)
    Codebook(centroids[None], counts, metric="l2", pixel_rule=pixel_rule, extractor=extractor).save(
        path
    )
    return path


def centre(picture: torch.Tensor) -> View:
    """Return a square in the picture."""
    side = min(picture.shape[-2:])
    return View(0, 0, side, side, False)


if __name__ == "__main__":
    main()
