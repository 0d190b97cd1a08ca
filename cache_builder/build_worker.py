"""What a worker of a build does: unit after unit, each at most once."""

import threading
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from cache_builder.build_log import UnitMeter, UnitWork
from cache_builder.commit import UnitSummary, commit_unit, layer_store, summarise, take_unit
from cache_builder.decoders import Decoders
from cache_builder.errors import SourceError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    PLAN_NAME,
    UnitRecord,
    read_model,
    unit_record_name,
)
from cache_builder.formats.plan import BuildPlan, PlanUnit, plan_unit_name
from cache_builder.formats.units import IMAGE_ALONE, open_unit
from cache_builder.sources import Source, open_source
from cache_builder.stores import open_store
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.units import Picture, Target, build_unit


class UnitReport(NamedTuple):
    """A unit is finished."""

    unit: int
    num_samples: int
    num_skipped: int
    num_views: int  # tokenised by this run
    bytes: int  # of the shards that this run wrote
    was_there: bool  # finished by an earlier run and found undamaged
    summaries: tuple[UnitSummary, ...]  # of every target, for the manifests
    work: UnitWork | None = None  # how this run built it
    node: str = ""  # where it was done
    seconds: float = 0  # how long it took there

    @property
    def bytes_read(self) -> int:
        """Read by this run, of images."""
        return self.work.bytes_read if self.work else 0


class BuildTask(NamedTuple):
    """What every worker of one build is told; the rest stands in the plans."""

    cache: str  # where it lies
    names: tuple[str, ...]  # what to build: "" is the cache itself, others are its layers
    images: str  # where the source lies
    device: str = "auto"
    weights: str | None = None
    decode_threads: int = 1


class BuildWorker:
    """Builds units, in a process of its own; several at once, where threads call it."""

    def __init__(self, task: BuildTask) -> None:
        """Open the cache; tokenizers are loaded when the first unit needs them."""
        self._task = task
        self._store = open_store(task.cache)
        self._stores = {
            name: layer_store(self._store, name) if name else self._store for name in task.names
        }
        self._targets: dict[str, Target] = {}
        self._loading = threading.RLock()
        self._turn = threading.Lock()  # on the device: one batch at a time

    def run(self, unit: int) -> UnitReport:
        """Build what is missing of one unit; what is there and undamaged is kept."""
        found = {name: take_unit(store, unit) for name, store in self._stores.items()}
        missing = [name for name, there in found.items() if there is None]
        summaries = {name: there for name, there in found.items() if there is not None}
        work = None
        if missing:
            targets = [self._target(name) for name in missing]
            meter = UnitMeter(str(targets[0].tokenizer.device))
            records = self._build(unit, missing, targets, meter)
            for name, record in zip(missing, records, strict=True):
                summaries[name] = commit_unit(self._stores[name], record)
            work = meter.work()
        first = summaries[self._task.names[0]]
        return UnitReport(
            unit=unit,
            num_samples=first.shard.num_samples,
            num_skipped=first.shard.num_skipped,
            num_views=first.shard.num_samples
            * sum(self._target(name).plan.spec.view_spec.num_views for name in missing),
            bytes=sum(summaries[name].shard.bytes for name in missing),
            was_there=not missing,
            summaries=tuple(summaries[name] for name in self._task.names),
            work=work,
        )

    def _build(
        self, unit: int, names: list[str], targets: list[Target], meter: UnitMeter
    ) -> list[UnitRecord]:
        with self._loading:
            decoders = self._decoders
        plan = read_model(PlanUnit, self._store, plan_unit_name(unit))
        spec = self._base.spec
        if "" in names:
            pictures = map(Picture._make, self._source.read(plan))
            resized = spec.images_in_cache == "resized"
            return build_unit(
                targets,
                unit,
                meter.count(pictures),
                shrink_to=(spec.resized_short_side, spec.jpeg_quality) if resized else None,
                decoders=decoders,
                turn=self._turn,
            )
        base = read_model(UnitRecord, self._store, unit_record_name(unit))
        return build_unit(
            targets,
            unit,
            meter.count(self._cached(plan, base)),
            skipped=base.skipped,
            decoders=decoders,
            turn=self._turn,
        )

    def _cached(self, plan: PlanUnit, record: UnitRecord) -> Iterator[Picture]:
        """Yield the images of a finished unit: from the cache, or where they lie if it has none."""
        left_out = {sample.key for sample in record.skipped}
        rows = tuple(row for row in plan.rows if row.key not in left_out)
        if self._base.spec.images_in_cache == "none":
            whole = plan.model_copy(update={"rows": rows})
            yield from (Picture(*pair) for pair in self._source.read(whole))
            return
        claim = summarise(plan.unit, record).shard
        shard = open_unit(self._store, self._base.spec, plan.unit, claim)
        try:
            for number, row in enumerate(rows):
                sample = shard.read(number, IMAGE_ALONE)
                if row.key != sample.key or sample.image is None:
                    raise SourceError(
                        f"{self._store.location}: unit {plan.unit} holds {sample.key} where "
                        f"{row.key} is planned. Run `patchcache verify {self._store.location}`."
                    )
                yield Picture(row, sample.image)
        finally:
            shard.close()

    @cached_property
    def _source(self) -> Source:
        # A cache with images is extended without its source, which may be gone.
        return open_source(self._task.images)

    @cached_property
    def _base(self) -> BuildPlan:
        return read_model(BuildPlan, self._store, PLAN_NAME)

    @cached_property
    def _decoders(self) -> Decoders | None:
        num_threads = self._task.decode_threads
        device = self._target(self._task.names[0]).tokenizer.device
        if num_threads == 1 and device.type == "cpu":
            return None  # the tokenizer takes the only core; a thread beside it gains nothing
        return Decoders(num_threads)

    def _target(self, name: str) -> Target:
        with self._loading:
            if name not in self._targets:
                self._targets[name] = self._load(name)
            return self._targets[name]

    def _load(self, name: str) -> Target:
        store = self._stores[name]
        codebook = Codebook.from_bytes(store.read(CODEBOOK_NAME), store.where(CODEBOOK_NAME))
        return Target(
            store,
            read_model(BuildPlan, store, PLAN_NAME),
            PatchTokenizer.load(codebook, self._task.device, self._task.weights),
        )
