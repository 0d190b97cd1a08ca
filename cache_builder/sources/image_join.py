"""The images of a cache that holds none, by key, where they lie."""

from collections import OrderedDict
from pathlib import Path

from cache_builder.errors import ImageError, SourceError
from cache_builder.formats.manifest import SourceInfo, read_model
from cache_builder.formats.plan import PlanRow, PlanUnit, plan_unit_name
from cache_builder.sources.containers import Container, open_inflated
from cache_builder.sources.files import read_row as read_file
from cache_builder.sources.names import is_list, is_remote, moved_place, parent
from cache_builder.sources.reading import read_row
from cache_builder.stores import Store

_MAX_UNITS = 64  # as many shards as the trainer has open
_MAX_COPIES = 4  # of remote files without ranges and of compressed tars, which take disk


class ImageJoin:
    """Finds the images of a cache that holds none, by key, where they lie.

    Args of `read` name a unit and a key; positions are never compared.
    """

    def __init__(self, cache: Store, info: SourceInfo, location: str | None = None) -> None:
        """Join to the recorded source, or to `location` if the images have moved.

        Raises:
            SourceError: There is nothing at the place.
        """
        self._cache = cache
        self._place = (location or info.location).removeprefix("file://")
        self._moved = location is not None
        self._units: OrderedDict[int, tuple[PlanUnit, dict[str, PlanRow]]] = OrderedDict()
        self._containers: OrderedDict[str, Container] = OrderedDict()
        if info.kind == "folder" and not is_remote(self._place) and not Path(self._place).is_dir():
            raise SourceError(
                f"{cache.location} holds no images, and their folder {self._place} is not there. "
                "Name the folder that they lie in now."
            )

    def read(self, unit: int, key: str) -> bytes:
        """Return the encoded image of one sample.

        Raises:
            SourceError: It is not there.
        """
        plan, rows = self._plan(unit)
        if key not in rows:
            raise SourceError(f"{self._cache.location}: unit {unit} has no image of key {key}.")
        if plan.container:
            image = read_row(self._container(plan), rows[key])
        else:
            root = parent(self._place) if is_list(self._place) else self._place
            image = read_file(root, rows[key])
        if isinstance(image, ImageError):
            raise SourceError(f"The image of {key}, {rows[key].source}, is refused: {image}.")
        return image

    def _plan(self, unit: int) -> tuple[PlanUnit, dict[str, PlanRow]]:
        if unit not in self._units:
            plan = read_model(PlanUnit, self._cache, plan_unit_name(unit))
            self._units[unit] = plan, {row.key: row for row in plan.rows}
            if len(self._units) > _MAX_UNITS:
                self._units.popitem(last=False)
        self._units.move_to_end(unit)
        return self._units[unit]

    def _container(self, plan: PlanUnit) -> Container:
        location = moved_place(plan.container, self._place) if self._moved else plan.container
        if location not in self._containers:
            container = open_inflated(location, plan.container_bytes)
            copies = [name for name, one in self._containers.items() if one.is_copy]
            if container.is_copy and len(copies) >= _MAX_COPIES:
                self._containers.pop(copies[0]).close()
            elif len(self._containers) >= _MAX_UNITS:
                self._containers.popitem(last=False)[1].close()
            self._containers[location] = container
        self._containers.move_to_end(location)
        return self._containers[location]
