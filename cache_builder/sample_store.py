"""The sample of a fit on disk: a folder that is whole or is made whole.

sample.json                 what was asked for; another question to the same folder is refused
000000.npy                  sampled points (n, D): uint8 pixels, or float16 or float32
000000.held_out.npy         likewise, of images that are held out
000000.json                 written last: counts and digests; what has one is not done again
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, JsonValue, ValidationError

from cache_builder import files
from cache_builder.errors import ConfigError
from cache_builder.formats.headers import shorten
from cache_builder.formats.sample import npy_bytes

_PLAN_NAME = "sample.json"


class UnitSample(NamedTuple):
    """The sampled patches of one unit."""

    unit: int
    points: NDArray[np.generic]  # (n, D)
    held_out: NDArray[np.generic]
    num_images: int  # that the points come from
    num_skipped: int


class UnitSampleRecord(BaseModel, frozen=True, extra="forbid"):
    """`NNNNNN.json` of a store: the unit's arrays are whole."""

    num_images: int
    num_skipped: int
    sha256: str
    held_out_sha256: str


def settle(store: Path, question: dict[str, JsonValue], *, replace: bool) -> None:
    """Make the store, or make sure that it belongs to this sample.

    Args:
        store: The folder.
        question: Everything that its content depends on.
        replace: Empty a store of another sample, rather than refuse it.

    Raises:
        ConfigError: The folder holds another sample, or something else.
    """
    path = store / _PLAN_NAME
    if store.is_dir():
        files.sweep(store)
    if path.is_file():
        before = _read_plan(path)
        changed = [name for name in question if before.get(name) != question[name]]
        if not changed:
            return
        if not replace:
            differences = "; ".join(
                f"{name} was {shorten(json.dumps(before.get(name)))}, "
                f"is {json.dumps(question[name])}"
                for name in changed
            )
            raise ConfigError(
                f"{store} holds another sample: {differences}. "
                "Use another --sample-dir, or delete this one."
            )
        shutil.rmtree(store)
    elif store.is_dir() and any(store.iterdir()):
        raise ConfigError(
            f"{store} holds files but no {_PLAN_NAME}: it is not a sample. "
            "Use another --sample-dir."
        )
    files.publish(path, files.canonical_json(question))


def _read_plan(path: Path) -> dict[str, Any]:
    """Return what the store was made for; nothing, if that cannot be read."""
    try:
        before = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return before if isinstance(before, dict) else {}


def write_unit(store: Path, sample: UnitSample) -> UnitSampleRecord:
    """Write the points of a unit, and its record last."""
    digests = []
    for held_out, array in ((False, sample.points), (True, sample.held_out)):
        data = npy_bytes(array)
        files.publish(_array_path(store, sample.unit, held_out=held_out), data)
        digests.append(files.sha256_bytes(data))
    record = UnitSampleRecord(
        num_images=sample.num_images,
        num_skipped=sample.num_skipped,
        sha256=digests[0],
        held_out_sha256=digests[1],
    )
    text = files.canonical_json(record.model_dump(mode="json"))
    files.publish(store / f"{sample.unit:06d}.json", text)
    return record


def whole_unit(store: Path, unit: int) -> UnitSampleRecord | None:
    """Return a unit's record if its arrays are undamaged."""
    try:
        text = (store / f"{unit:06d}.json").read_bytes()
        record = UnitSampleRecord.model_validate_json(text)
        found = [
            files.sha256_file(_array_path(store, unit, held_out=held_out))
            for held_out in (False, True)
        ]
    except (FileNotFoundError, ValidationError):
        return None
    return record if found == [record.sha256, record.held_out_sha256] else None


def _array_path(store: Path, unit: int, *, held_out: bool) -> Path:
    return store / (f"{unit:06d}.held_out.npy" if held_out else f"{unit:06d}.npy")


def read_array(store: Path, unit: int, *, held_out: bool) -> NDArray[np.generic]:
    """Map the points of a unit into memory."""
    path = _array_path(store, unit, held_out=held_out)
    array: NDArray[np.generic] = np.load(path, mmap_mode="r" if _has_rows(path) else None)
    return array


def _has_rows(path: Path) -> bool:
    """Say whether a .npy file holds anything; what holds nothing cannot be mapped."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return bool(np.prod(shape))
