"""Where the CPU of a worker goes: stages of a build, and the table of their shares."""

import shutil
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from cache_builder import files, image_types, imaging, sources
from cache_builder.formats import manifest, shards, tar_stream, views, zarr_store
from cache_builder.sources import open_source
from cache_builder.targets import TargetMaker, Targets
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.quantizer import ResidualQuantizer
from tests import factories
from tests.benchmarks.build_inputs import NUM_VIEWS, Settings
from tests.benchmarks.stages import Stage, StageClock

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
