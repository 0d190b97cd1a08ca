"""The table of sizes in docs/operations.md: bytes from the formats, hours from the benchmarks."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.documents.table import table

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
GRID = 14, 14
BLOCK_BYTES = 512  # of a tar
NPY_HEADER_BYTES = 128
INFO_BYTES = 128  # of a sample's JSON, with a path of some sixty characters
VIEWS_MEASURED = 4  # of the table of stages in the benchmarks
CORES_OF_A_NODE = 32
HOURS_OF_A_NIGHT = 8
CASES = [(1_281_167, 1), (1_281_167, 4), (1_281_167, 8), (14_197_122, 4), (10**8, 2), (10**9, 1)]


class PerImage(NamedTuple):
    """Bytes that a cache takes for an image, beside the image."""

    tar: float
    zarr: float  # before compression
    plan_and_record: float


def per_image(views, grid=GRID):
    """Return the bytes of token ids, boxes and whatever names them."""
    ids, boxes = 2 * views * grid[0] * grid[1], 4 * 5 * views
    members = INFO_BYTES, NPY_HEADER_BYTES + ids, NPY_HEADER_BYTES + boxes
    tar = sum(BLOCK_BYTES + size + -size % BLOCK_BYTES for size in members)
    plan, record = (float(text) for text in re.findall(r"([\d.]+) MB", _row(r"10\^6"))[:2])
    return PerImage(tar, ids + boxes, plan + record)  # MB of 10^6 images: bytes of one


def cpu_ms(views):
    """Return the CPU time of an image with a codebook of 8,192 centroids of pixels."""
    stages = {name: float(_row(name).split("|")[2]) for name in ("all", "crop", "tokenise")}
    of_views = stages["crop"] + stages["tokenise"]
    return stages["all"] - of_views + of_views * views / VIEWS_MEASURED


def describe():
    """Return the table."""
    header = (
        "images", "views", "WebDataset", "Zarr, before compression", "plan and records", "CPU",
        f"nodes of {CORES_OF_A_NODE} cores for a night of {HOURS_OF_A_NIGHT} h", "GPU",
    )  # fmt: skip
    return table(header, [_case(*case) for case in CASES])


def _case(images, views):
    size, hours = per_image(views), images * cpu_ms(views) / 3_600_000
    nodes = -(-hours // (CORES_OF_A_NODE * HOURS_OF_A_NIGHT))
    return (
        f"{images:,}", str(views), *(_bytes(images * part) for part in size), f"{hours:,.0f} h",
        f"{nodes:,.0f}", "not measured",
    )  # fmt: skip


def _bytes(count):
    unit = "TB" if count >= 1e12 else "GB" if count >= 1e9 else "MB"
    return f"{count / {'TB': 1e12, 'GB': 1e9, 'MB': 1e6}[unit]:,.1f} {unit}"


def _row(first_cell):
    found = re.findall(rf"^\| {first_cell} \|.*$", BENCHMARKS.read_text(), re.MULTILINE)
    assert len(found) == 1, (first_cell, found)
    return found[0]
