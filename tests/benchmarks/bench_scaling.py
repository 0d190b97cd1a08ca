"""How far a build scales: units on a cluster of several raylets, and what the driver does alone.

    python tests/benchmarks/bench_scaling.py             # three minutes on two cores
    python tests/benchmarks/bench_scaling.py --quick     # fewer actors and units, for a look

Workers sleep instead of decoding, so that many of them fit on one machine; everything between them
and the driver is real: raylets of `ray.cluster_utils.Cluster`, actors, `map_units`. Listing, plan
and manifest are measured on real files of made-up samples. The last tables carry the measured costs
on to larger numbers of images; they are arithmetic, and say on what assumptions.
"""

import argparse
import logging
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cache_builder import build, ray_jobs
from cache_builder.build_worker import UnitReport
from cache_builder.commit import summarise, write_manifest
from cache_builder.formats.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    read_model,
    to_json,
)
from cache_builder.formats.plan import BuildPlan
from cache_builder.planning import settle_plan
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.sources import open_source
from cache_builder.stores import open_store
from tests import factories
from tests.benchmarks.made_up_samples import (
    UNIT_SIZE,
    synthetic_listing,
    synthetic_record,
    write_empty_files,
    write_small_tar,
)

SLEEP_S = 0.5
NUM_RAYLETS = 4

# Assumptions of the extrapolation.
CPU_MS_PER_IMAGE = 10.0  # decode, four crops, pixel tokenizer: bench_build.py
NUM_CORES = 1000
PUTS_PER_S, GETS_PER_S = 3_500, 5_500  # of one prefix, as Amazon states for S3
MEMORY_BYTES = 64 << 30  # of the driver's machine
SIZES = (10**6, 10**7, 10**8, 10**9)


class Costs(NamedTuple):
    """What was measured, per image or per unit."""

    listing_s: float  # per image
    listing_bytes: float  # per image, of memory
    plan_s: float  # per unit
    plan_bytes: float  # per unit, on disk
    driver_s: float  # per unit, CPU
    finish_s: float  # per unit
    finish_bytes: float  # per unit, of memory
    record_bytes: float  # per unit, on disk
    manifest_bytes: float  # per unit


class SleepingWorker:
    """Takes the time of a unit, and returns what a build's worker returns."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._summary = summarise(0, synthetic_record(0))

    def run(self, unit: int) -> UnitReport:
        """Sleep."""
        time.sleep(self._seconds)
        summaries = (self._summary._replace(unit=unit),)
        name = f"{os.getpid()}"
        return UnitReport(unit, UNIT_SIZE, 0, 4 * UNIT_SIZE, 10**8, False, summaries, node=name)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer actors and units")
    parser.add_argument("--only", choices=("cluster", "driver"), help="one half alone")
    parser.add_argument("--max-workers", type=int, default=32)
    args = parser.parse_args()
    console = Console(width=150)
    most = min(args.max_workers, 4) if args.quick else args.max_workers
    driver_s = 0.001
    if args.only != "driver":
        table, driver_s = scaling_table(most)
        console.print(table)
    if args.only != "cluster":
        table, costs = driver_table(driver_s, args.quick)
        console.print(table)
        console.print(extrapolation_table(costs))
        console.print(request_table())
        console.print(limits_table(costs))


def scaling_table(most: int) -> tuple[Table, float]:
    """Run units that sleep on 1, 2, 4, ... workers of a cluster of several raylets."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    table = Table(title=f"map_units on {NUM_RAYLETS} raylets, workers that sleep, one driver")
    for name in ("workers", "in flight", "unit s", "units/s", "ideal", "share",
                 "driver CPU ms per unit"):  # fmt: skip
        table.add_column(name, justify="right")
    # A driver that asks for no CPU needs none; every worker finds a place of its own.
    per_raylet = -(-most // NUM_RAYLETS)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": per_raylet})
    try:
        for _ in range(NUM_RAYLETS - 1):
            cluster.add_node(num_cpus=per_raylet)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        num_workers, driver_s = 1, 0.0
        while num_workers <= most:
            add_scaling(table, num_workers, SLEEP_S)
            num_workers *= 2
        # Without any work, only the messages are left: the most that a driver can hand out. What it
        # costs to watch as many units as 100 and 1,000 workers have in flight is seen on a few.
        table.add_section()
        driver_s = add_scaling(table, min(4, most), 0.0)
        for in_flight in (200, 2000):
            add_scaling(table, min(4, most), 0.0, in_flight)
        ray.shutdown()
    finally:
        cluster.shutdown()
    return table, driver_s


def add_scaling(table: Table, num_workers: int, seconds: float, in_flight: int = 0) -> float:
    """Add a row; return the driver's CPU seconds per unit."""
    before = ray_jobs._UNITS_IN_FLIGHT
    ray_jobs._UNITS_IN_FLIGHT = in_flight // num_workers or before
    num_flying = ray_jobs._UNITS_IN_FLIGHT * num_workers
    num_measured = 12 * num_workers if seconds else 2000
    options = ClusterOptions(num_workers=num_workers)
    work = partial(SleepingWorker, seconds)
    # More units than are waited for: towards the end fewer would be in flight.
    results = ray_jobs.map_units(work, range(1_000_000), options)
    started = {next(results).result.node for _ in range(num_flying)}
    while len(started) < num_workers:
        started.add(next(results).result.node)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_measured):
        next(results)
    elapsed, driver_s = time.perf_counter() - wall, time.process_time() - cpu
    results.close()
    ray_jobs._UNITS_IN_FLIGHT = before
    rate = num_measured / elapsed
    ideal = num_workers / seconds if seconds else None
    table.add_row(
        f"{num_workers}", f"{num_flying:,}", f"{seconds:.1f}", f"{rate:.1f}",
        f"{ideal:.1f}" if ideal else "", f"{rate / ideal:.1%}" if ideal else "",
        f"{driver_s / num_measured * 1e3:.2f}",
    )  # fmt: skip
    return driver_s / num_measured


def driver_table(driver_s: float, quick: bool) -> tuple[Table, Costs]:
    """Measure everything that one process does for all units."""
    table = Table(title="What the driver does alone")
    for name in ("what", "measured on", "s", "per million images s", "MB of memory", "MB on disk"):
        table.add_column(name, justify="left" if name in ("what", "measured on") else "right")
    num_files = 20_000 if quick else 100_000
    num_units = 50 if quick else 300

    def add(what: str, on: str, found: "Timed", num_images: int, disk: float = 0) -> None:
        table.add_row(
            what, on, f"{found.seconds:.2f}", f"{found.seconds / num_images * 1e6:.1f}",
            f"{found.memory_bytes / 1e6:.0f}", f"{disk / 1e6:.1f}",
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = write_empty_files(work / "images", num_files)
        listing = timed(lambda: open_source(str(folder)).scan(UNIT_SIZE))
        add("list a folder by classes", f"{num_files:,} files", listing, num_files)
        tar = write_small_tar(work / "images.tar", num_files // 10)
        of_tar = timed(lambda: open_source(str(tar)).scan(None))
        add("list a tar of 3 members each", f"{num_files // 10:,} samples", of_tar, num_files // 10)

        out = work / "cache"
        codebook = factories.colour_codebook()
        codebook_path = factories.write_codebook(work / "codebook.safetensors")
        made_up = synthetic_listing(num_units)
        options = build.BuildOptions(images="made up", codebook=codebook_path, out=out, num_views=4)
        spec = build._cache_spec(options, codebook, made_up)
        store = open_store(out)
        plan = timed(lambda: settle_plan(store, spec, made_up.units, codebook))
        num_images = num_units * UNIT_SIZE
        on = f"{num_units:,} units of {UNIT_SIZE:,}"
        plan_bytes = sum(path.stat().st_size for path in (out / "plan").iterdir())
        add("write the plan", on, plan, num_images, plan_bytes)
        again = timed(lambda: settle_plan(store, spec, made_up.units, codebook))
        add("check the plan", on, again, num_images)

        summaries, record_bytes = [], 0
        for unit in range(num_units):
            record = synthetic_record(unit)
            record_bytes += len(to_json(record))
            summaries.append(summarise(unit, record))
        build_plan = read_model(BuildPlan, store, PLAN_NAME)
        finish = timed(lambda: write_manifest(store, build_plan, summaries))
        add("write the manifest", on, finish, num_images, record_bytes)
        manifest_bytes = (out / MANIFEST_NAME).stat().st_size
        opened = timed(lambda: build.CacheManifest.load(out))
        add("a reader loads the manifest", on, opened, num_images, manifest_bytes)
    costs = Costs(
        listing_s=listing.seconds / num_files,
        listing_bytes=listing.memory_bytes / num_files,
        plan_s=plan.seconds / num_units,
        plan_bytes=plan_bytes / num_units,
        driver_s=driver_s,
        finish_s=finish.seconds / num_units,
        finish_bytes=finish.memory_bytes / num_units,
        record_bytes=record_bytes / num_units,
        manifest_bytes=manifest_bytes / num_units,
    )
    return table, costs


class Timed(NamedTuple):
    """What a call took."""

    seconds: float
    memory_bytes: int  # by which the resident set was larger at its largest


def timed(run: Callable[[], Any]) -> Timed:
    """Run something once, and watch the memory of this process meanwhile."""
    before = resident_bytes()
    largest = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            largest[0] = max(largest[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    largest[0] = max(largest[0], resident_bytes())
    done.set()
    watcher.join()
    del kept
    return Timed(seconds, largest[0] - before)


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def extrapolation_table(costs: Costs) -> Table:
    """Carry the costs on to larger numbers of images."""
    table = Table(
        title=f"Extrapolated: units of {UNIT_SIZE:,} images, {CPU_MS_PER_IMAGE:g} CPU ms per image "
        f"on {NUM_CORES:,} cores; the rest by one driver"
    )
    for name in ("images", "units", "work", "list", "list MB", "plan", "driver CPU", "finish",
                 "finish MB", "plan on disk", "records on disk", "manifest"):  # fmt: skip
        table.add_column(name, justify="right")
    for num_images in SIZES:
        units = -(-num_images // UNIT_SIZE)
        table.add_row(
            f"{num_images:.0e}", f"{units:,}",
            duration(num_images * CPU_MS_PER_IMAGE / 1e3 / NUM_CORES),
            duration(num_images * costs.listing_s), size(num_images * costs.listing_bytes),
            duration(units * costs.plan_s), duration(units * costs.driver_s),
            duration(units * costs.finish_s), size(units * costs.finish_bytes),
            size(units * costs.plan_bytes), size(units * costs.record_bytes),
            size(units * costs.manifest_bytes),
        )  # fmt: skip
    return table


def request_table() -> Table:
    """Count the requests to an object store, by what a build reads and writes."""
    table = Table(
        title=f"Requests to an object store that takes {PUTS_PER_S:,} PUT/s and {GETS_PER_S:,} "
        "GET/s per prefix (an assumption)"
    )
    for name in ("images", "output", "source", "PUT", "PUT at the limit", "GET", "GET at the limit",
                 "PUT/s while working"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("output", "source") else "right")
    routes = (
        # What a unit PUTs: its plan, its shard files and its record.
        ("webdataset", "tars", 3, lambda n, u: 3 * u),
        ("webdataset", "single images", 3, lambda n, u: n + 2 * u),
        ("zarr, no images", "tars", 8, lambda n, u: 3 * u),
        (".npy per image", "single images", 0, lambda n, u: n),
    )
    for num_images in SIZES:
        units = -(-num_images // UNIT_SIZE)
        work_s = num_images * CPU_MS_PER_IMAGE / 1e3 / NUM_CORES
        for output, source, puts_per_unit, gets in routes:
            puts = puts_per_unit * units or 2 * num_images
            num_gets = gets(num_images, units)
            table.add_row(
                f"{num_images:.0e}", output, source, f"{puts:,}", duration(puts / PUTS_PER_S),
                f"{num_gets:,}", duration(num_gets / GETS_PER_S), f"{puts / work_s:,.0f}",
            )  # fmt: skip
    return table


def limits_table(costs: Costs) -> Table:
    """Say at how many images, or cores, each part becomes what a build waits for."""
    table = Table(
        title=f"Where each limit lies, with {size(MEMORY_BYTES)} of memory and {NUM_CORES:,} cores"
    )
    for name in ("limit", "is reached at"):
        table.add_column(name)
    work_s = CPU_MS_PER_IMAGE / 1e3 / NUM_CORES
    found = [
        ("the listing fills the memory", MEMORY_BYTES / costs.listing_bytes, "images"),
        ("the records fill the memory at the end",
         MEMORY_BYTES / costs.finish_bytes * UNIT_SIZE, "images"),
        ("a manifest of 1 GB", 1e9 / costs.manifest_bytes * UNIT_SIZE, "images"),
        ("an hour of listing", 3600 / costs.listing_s, "images"),
        ("an hour of writing the plan", 3600 / costs.plan_s * UNIT_SIZE, "images"),
        ("an hour of finishing", 3600 / costs.finish_s * UNIT_SIZE, "images"),
        ("one driver hands out units as fast as it can",
         CPU_MS_PER_IMAGE / 1e3 * UNIT_SIZE / costs.driver_s, "cores"),
        ("the object store takes 3 PUTs a unit as fast as it can",
         PUTS_PER_S / 3 * CPU_MS_PER_IMAGE / 1e3 * UNIT_SIZE, "cores"),
    ]  # fmt: skip
    for what, number, unit in sorted(found, key=lambda row: (row[2], row[1])):
        table.add_row(what, f"{number:,.0f} {unit}")
    serial = {
        "listing": costs.listing_s, "plan": costs.plan_s / UNIT_SIZE,
        "driver": costs.driver_s / UNIT_SIZE, "finishing": costs.finish_s / UNIT_SIZE,
    }  # fmt: skip
    table.add_section()
    for what, seconds in serial.items():
        table.add_row(f"{what}, share of the work's time", f"{seconds / work_s:.1%}")
    return table


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86_400:,.1f} d"


def size(num_bytes: float) -> str:
    """Return bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


if __name__ == "__main__":
    main()
