"""What a worker of `import` does: joins images to token ids that another tool made, unit by unit.

No pixel is tokenised. An image is decoded for its size, so that whoever trains will find it whole;
an image whose picture, token ids or boxes are not what they should be is left out with the reason.
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_builder.commit import UnitSummary, commit_unit, take_unit
from cache_builder.errors import ImageError
from cache_builder.formats.manifest import PLAN_NAME, SkippedSample, UnitRecord, read_model
from cache_builder.formats.plan import BuildPlan, PlanRow, PlanUnit, plan_unit_name
from cache_builder.formats.sample import CachedSample, NewSample
from cache_builder.formats.views import View, centre_square, draw_views
from cache_builder.formats.writers import open_writer
from cache_builder.image_types import image_extension
from cache_builder.imaging import decode
from cache_builder.sources import image_bytes, open_source
from cache_builder.stores import open_store
from cache_builder.token_files import as_token_ids, as_views, open_rows


class ImportTask(NamedTuple):
    """What every worker of one import is told; the rest stands in the plans."""

    out: str  # where the cache goes
    images: str  # where the source lies
    tokens: str
    crop_settings: str | None  # boxes in the manner of 4M; None: centred squares
    resized_short_side: int  # of the pictures that the centred squares were cut from


class ImportUnit(NamedTuple):
    """One unit: its number, and the row of each of its images where rows have no names."""

    number: int
    rows: tuple[int | None, ...]


class ImportReport(NamedTuple):
    """A unit is finished."""

    summary: UnitSummary
    was_there: bool  # finished by an earlier run and found undamaged


class ImportWorker:
    """Imports units, in a process of its own."""

    def __init__(self, task: ImportTask) -> None:
        """Open the cache, the images and the token ids."""
        self._task = task
        self._store = open_store(task.out)
        self._source = open_source(task.images)
        self._tokens = open_rows(Path(task.tokens))
        self._boxes = open_rows(Path(task.crop_settings)) if task.crop_settings else None

    def run(self, unit: ImportUnit) -> ImportReport:
        """Write one unit, unless it is there and undamaged."""
        there = take_unit(self._store, unit.number)
        if there is not None:
            return ImportReport(there, was_there=True)
        plan = read_model(PlanUnit, self._store, plan_unit_name(unit.number))
        skipped = []
        with open_writer(self._store, self._plan, unit.number) as writer:
            pictures = self._source.read(plan)
            for (row, data), place in zip(pictures, unit.rows, strict=True):
                try:
                    writer.add(self._sample(row, image_bytes(data), place))
                except ImageError as exc:
                    reason = SkippedSample(key=row.key, source=row.source, reason=str(exc))
                    skipped.append(reason)
            written = writer.finish()
        record = UnitRecord(
            unit=unit.number,
            num_samples=written.num_samples,
            files=written.files,
            skipped=tuple(skipped),
            samples=written.samples,
        )
        return ImportReport(commit_unit(self._store, record), was_there=False)

    @cached_property
    def _plan(self) -> BuildPlan:
        return read_model(BuildPlan, self._store, PLAN_NAME)

    def _sample(self, row: PlanRow, data: bytes, place: int | None) -> NewSample:
        spec = self._plan.spec
        num_views = spec.view_spec.num_views
        found = self._tokens.read(row.key, place)
        token_ids = as_token_ids(found, num_views, spec.grid, spec.vocab_size)
        height, width = decode(data).shape[-2:]
        views = self._views(row.key, place, (int(height), int(width)))
        embedded = spec.images_in_cache != "none"
        sample = CachedSample(
            key=row.key,
            image=data if embedded else None,
            label=row.label,
            views=np.array(views, np.int32),
            token_ids=token_ids,
            extra=row.extra,
        )
        extension = image_extension(data) if embedded else ""
        return NewSample(sample, extension, row.source, (int(height), int(width)))

    def _views(self, key: str, place: int | None, image_size: tuple[int, int]) -> list[View]:
        spec = self._plan.spec.view_spec
        if self._boxes is not None:
            return as_views(self._boxes.read(key, place), spec.num_views, image_size)
        if not spec.given:
            return draw_views(spec, key, image_size)
        return [_centre_crop(image_size, spec.size, self._task.resized_short_side)]


def _centre_crop(image_size: tuple[int, int], size: int, short_side: int) -> View:
    """Return the centred square of `size` pixels in a picture resized to `short_side`."""
    height, width = image_size
    square = centre_square(image_size)
    side = max(1, round(square.height * size / short_side))
    return View((height - side) // 2, (width - side) // 2, side, side, hflip=False)
