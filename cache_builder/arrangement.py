"""Which samples of finished caches go into which unit of another one.

The arrangement is a function of the inputs' plans and of what was asked for, and of nothing else.
It is gone through several times, and holds one unit of an input at a time: to digest the plan, to
write it, and to hand units to workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.headers import first_problem
from cache_builder.formats.manifest import (
    PLAN_NAME,
    SKIPPED_NAME,
    SkippedSample,
    read_model,
    to_json,
)
from cache_builder.formats.plan import BuildPlan, PlanRow, PlanUnit, plan_unit_name
from cache_builder.stores import absolute_location


class Place(NamedTuple):
    """Where a sample lies."""

    cache: int  # its number among the inputs
    shard: int
    row: int


class Entry(NamedTuple):
    """A row of an input's plan, and what became of it."""

    row: PlanRow
    outcome: Place | SkippedSample


class ArrangedUnit(NamedTuple):
    """A unit of the output, and where its samples come from."""

    plan: PlanUnit
    places: tuple[Place, ...]  # of the rows that were not skipped, in their order
    skipped: tuple[SkippedSample, ...]


class InputCache:
    """A finished cache, by the rows of its plan."""

    def __init__(self, location: str) -> None:
        """Open the cache.

        Raises:
            ArtifactError: It is not finished, or damaged.
        """
        self.location = absolute_location(location)
        self.cache = TokenCache.open(location)
        self.spec = self.cache.manifest.spec
        self._plan = read_model(BuildPlan, self.cache.store, PLAN_NAME)
        self._skipped = self._read_skipped()
        layers = self.cache.manifest.layers
        others = {layer.fingerprint for layer in layers} - {self.spec.fingerprint}
        self.by_tokenizer = {
            fingerprint: TokenCache.open(location, fingerprint)
            for fingerprint in (self.spec.fingerprint, *sorted(others))
        }

    @property
    def has_containers(self) -> bool:
        """Say whether its images lie in files that hold many, such as tars."""
        return bool(read_model(PlanUnit, self.cache.store, plan_unit_name(0)).container)

    def units(self, number: int = 0) -> Iterator[tuple[PlanUnit, list[Entry]]]:
        """Yield the plan of every unit and its rows; `number` is the cache's among the inputs.

        Raises:
            ArtifactError: The plan is damaged.
        """
        digests = []
        for unit in range(self._plan.num_units):
            plan = read_model(PlanUnit, self.cache.store, plan_unit_name(unit))
            digests.append(files.sha256_bytes(to_json(plan)))
            entries, num_samples = [], 0
            for row in plan.rows:
                outcome = self._skipped.get(row.key)
                entries.append(Entry(row, outcome or Place(number, unit, num_samples)))
                num_samples += outcome is None
            expected = self.cache.manifest.shards[unit].num_samples
            if num_samples != expected:
                raise self._damaged(f"unit {unit} plans {num_samples} samples, not {expected}")
            yield plan, entries
        if files.sha256_bytes("".join(digests).encode()) != self._plan.units_sha256:
            raise self._damaged(f"the files below plan/ are not those of {PLAN_NAME}")

    def rows(self) -> Iterator[Entry]:
        """Yield every row of the plan."""
        for _, entries in self.units():
            yield from entries

    def _read_skipped(self) -> dict[str, SkippedSample]:
        try:
            lines = self.cache.store.read(SKIPPED_NAME).splitlines()
            skipped = [SkippedSample.model_validate_json(line) for line in lines]
        except FileNotFoundError as exc:
            raise self._damaged(f"{SKIPPED_NAME} is missing") from exc
        except ValidationError as exc:
            raise self._damaged(f"{SKIPPED_NAME}: {first_problem(exc)}") from exc
        if len(skipped) != self.cache.manifest.num_skipped:
            raise self._damaged(
                f"{SKIPPED_NAME} lists {len(skipped)} images, the manifest says "
                f"{self.cache.manifest.num_skipped}"
            )
        return {sample.key: sample for sample in skipped}

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.location} is damaged: {what}. Run `patchcache verify {self.location}`."
        )


class Arrangement:
    """The units of an output, made anew by every iteration."""

    def __init__(
        self,
        inputs: Sequence[InputCache],
        *,
        unit_size: int | None = None,
        choose: Callable[[Entry], bool] | None = None,
        relabel: Sequence[dict[int, int]] | None = None,
        as_containers: bool = False,
    ) -> None:
        """Say how samples are arranged.

        Args:
            inputs: Their samples follow one another.
            unit_size: Units are filled up to this size, but never from two containers; None makes
                every unit of the inputs one of the output.
            choose: Which rows are taken; None takes all.
            relabel: For every input, the labels that change.
            as_containers: Each input is recorded as the container of its images, in the place of
                tars, say, that it was built from.
        """
        self._inputs = inputs
        self._unit_size = unit_size
        self._choose = choose
        self._relabel = relabel or [{}] * len(inputs)
        self._as_containers = as_containers

    def __iter__(self) -> Iterator[PlanUnit]:
        """Yield the plan of every unit."""
        return (unit.plan for unit in self.units())

    def units(self) -> Iterator[ArrangedUnit]:
        """Yield every unit."""
        groups = self._groups() if self._unit_size is None else self._slices(self._unit_size)
        for number, (frame, entries) in enumerate(groups):
            rows = tuple(entry.row for entry in entries)
            outcomes = [entry.outcome for entry in entries]
            yield ArrangedUnit(
                plan=frame.model_copy(update={"unit": number, "rows": rows}),
                places=tuple(outcome for outcome in outcomes if isinstance(outcome, Place)),
                skipped=tuple(each for each in outcomes if isinstance(each, SkippedSample)),
            )

    def _groups(self) -> Iterator[tuple[PlanUnit, list[Entry]]]:
        """Yield what is taken of every unit of the inputs, with its plan less number and rows."""
        for number, cache in enumerate(self._inputs):
            relabel = self._relabel[number]
            for plan, entries in cache.units(number):
                frame = plan.model_copy(update={"unit": 0, "rows": ()})
                if self._as_containers:
                    frame = PlanUnit(unit=0, container=cache.location, rows=())
                taken = entries if self._choose is None else filter(self._choose, entries)
                yield frame, [_relabelled(entry, relabel) for entry in taken]

    def _slices(self, size: int) -> Iterator[tuple[PlanUnit, list[Entry]]]:
        last: PlanUnit | None = None
        waiting: list[Entry] = []
        for frame, entries in self._groups():
            if last is not None and frame != last and waiting:
                yield last, _sorted(waiting)
                waiting = []
            last = frame
            waiting += entries
            while len(waiting) >= size:
                yield last, _sorted(waiting[:size])
                waiting = waiting[size:]
        if last is not None and waiting:
            yield last, _sorted(waiting)


def _relabelled(entry: Entry, relabel: dict[int, int]) -> Entry:
    label = entry.row.label
    if label is None or label not in relabel:
        return entry
    return entry._replace(row=entry.row.model_copy(update={"label": relabel[label]}))


def _sorted(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.row.key)
