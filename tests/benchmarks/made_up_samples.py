"""Samples that nobody has: listings, tars and records as large as one asks for."""

from collections.abc import Iterator
from pathlib import Path

from cache_builder import files
from cache_builder.formats.manifest import (
    FileDigest,
    SampleEntry,
    SourceInfo,
    UnitRecord,
)
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.sources import Listing
from tests import factories

UNIT_SIZE = 1024


def write_empty_files(folder: Path, num_files: int) -> Path:
    """Make an ImageFolder of a thousand classes; listing does not look into the files."""
    for number in range(num_files):
        place = folder / f"n{number % 1000:08d}"
        if number < 1000:
            place.mkdir(parents=True)
        (place / f"n{number % 1000:08d}_{number}.JPEG").touch()
    return folder


def write_small_tar(path: Path, num_samples: int) -> Path:
    """Write samples of three members, as WebDataset has them."""
    members = (
        (f"{number:09d}.{extension}", data)
        for number in range(num_samples)
        for extension, data in (("cls", b"7"), ("jpg", bytes(20_000)), ("json", b"{}"))
    )
    return factories.write_tar(path, members)


def rows(unit: int) -> Iterator[PlanRow]:
    """Yield made-up rows of one unit, named as those of ImageNet."""
    for number in range(unit * UNIT_SIZE, (unit + 1) * UNIT_SIZE):
        key = f"n{number % 1000:08d}/n{number % 1000:08d}_{number}"
        yield PlanRow(key=key, source=f"{key}.JPEG", label=number % 1000)


def synthetic_listing(num_units: int) -> Listing:
    """Return a listing of images that are nowhere."""
    units = [PlanUnit(unit=unit, rows=tuple(rows(unit))) for unit in range(num_units)]
    info = SourceInfo(kind="folder", location="/made-up", num_samples=num_units * UNIT_SIZE)
    names = tuple(f"n{label:08d}" for label in range(1000))
    return Listing(info, units, names, UNIT_SIZE)


def synthetic_record(unit: int) -> UnitRecord:
    """Return the commit record of a unit with images, as the WebDataset layout has it."""
    digest = files.sha256_bytes(str(unit).encode())
    entries = []
    for number, row in enumerate(rows(unit)):
        start = number * 120_000
        members = {
            "jpg": (start + 512, 110_000), "json": (start + 111_512, 90),
            "tokens.npy": (start + 112_536, 1_696), "views.npy": (start + 115_096, 208),
        }  # fmt: skip
        entries.append(SampleEntry(key=row.key, members=members))
    return UnitRecord(
        unit=unit,
        num_samples=UNIT_SIZE,
        files=(FileDigest(path=f"shards/{unit:06d}.tar", bytes=123_000_000, sha256=digest),),
        samples=tuple(entries),
    )
