"""What `verify` does with one unit, in a process of its own.

The files of a unit are named and digested twice: in its commit record, and in the manifest, which
also digests the record. Where the two disagree the files themselves decide which of them is
damaged. A tar is read once: it is digested, and then parsed, in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder.commit import UnitSummary, layer_store, summarise
from cache_builder.damage import (
    Damage,
    examine,
    file_damage,
    full_name,
    is_misspelt,
    is_whole,
    measure,
)
from cache_builder.errors import PatchCacheError
from cache_builder.files import canonical_json, sha256_bytes
from cache_builder.formats.headers import shorten
from cache_builder.formats.manifest import (
    CacheSpec,
    FileDigest,
    ShardInfo,
    UnitRecord,
    unit_record_name,
)
from cache_builder.formats.plan import PlanRow, PlanUnit, plan_unit_name
from cache_builder.formats.sample import CachedSample, SampleInfo
from cache_builder.formats.shards import TarShard, shard_name
from cache_builder.formats.units import Shard, array_problem, open_unit
from cache_builder.formats.views import draw_views
from cache_builder.payload_checks import payload_problem
from cache_builder.stores import Measure, Store, open_store

_MAX_HELD_BYTES = 1 << 28  # of a tar; a larger one is read twice
_MAX_NAMED = 20  # samples of one unit
_MAX_SHOWN = 80  # characters of a value
_TOKEN_TYPE = np.dtype(np.uint16)
# What reading by the offsets of a damaged record may raise.
_UNREADABLE = (PatchCacheError, ValueError, KeyError, IndexError, TypeError)


class UnitClaim(NamedTuple):
    """What the manifests say of a unit."""

    unit: int
    shards: Mapping[str, ShardInfo]  # by layer; "" is the cache itself


class PartFinding(NamedTuple):
    """What was found of a unit in the cache or in one of its layers."""

    summary: UnitSummary | None  # of its commit record; None if that is damaged or missing
    num_files: int


class UnitFinding(NamedTuple):
    """What was found of a unit."""

    unit: int
    damages: tuple[Damage, ...]
    contradictions: tuple[Damage, ...]  # of the plan and the shards: one of them is wrong
    parts: Mapping[str, PartFinding]
    plan_sha256: str | None  # of its plan, if that can be read
    num_rows: int  # of its plan
    keys: NDArray[np.uint64]  # hashes of the keys of its samples


class CheckTask(NamedTuple):
    """What every worker is told."""

    cache: str  # where it lies
    specs: Mapping[str, CacheSpec]  # by layer; "" is the cache itself
    closed: frozenset[str] = frozenset()  # layers whose samples cannot be read


class UnitChecker:
    """Checks units."""

    def __init__(self, task: CheckTask) -> None:
        """Open the cache and its layers."""
        store = open_store(task.cache)
        self._closed = task.closed
        self._parts = {
            name: _Part(name, layer_store(store, name) if name else store, spec)
            for name, spec in task.specs.items()
        }

    def run(self, claim: UnitClaim) -> UnitFinding:
        """Check one unit; whatever is wrong with it is found, never raised.

        Raises:
            StorageError: The object store does not answer.
        """
        unit, base = claim.unit, self._parts[""]
        name = plan_unit_name(unit)
        planned = examine(PlanUnit, base.store, name)
        damages = []
        plan = planned.model
        if plan is not None and plan.unit != unit:
            detail = f"{base.store.where(name)} is the plan of unit {plan.unit}"
            damages.append(Damage("changed", detail, name, unit))
            plan = None
        elif planned.kind:
            damages.append(Damage(planned.kind, planned.detail, name, unit))
        rows = {} if plan is None else {row.key: row for row in plan.rows}
        contradictions: list[Damage] = []
        parts: dict[str, PartFinding] = {}
        keys: list[str] | None = None
        for part in self._parts.values():
            checked = _UnitOfPart(part, unit, claim.shards.get(part.name))
            damages += checked.damages
            num_files = len(checked.measured) + 1
            parts[part.name] = PartFinding(checked.summary, num_files)
            if checked.damages or checked.record is None or part.name in self._closed:
                continue
            content = _Content(part, checked, rows)
            damages += content.damages
            if content.keys is None:
                continue
            if plan is not None:
                contradictions += content.against_plan(plan)
            if keys is not None and keys != content.keys:
                odd = sorted(set(keys) ^ set(content.keys))[:3]
                detail = f"keys are not those of the cache, first {odd}"
                damages.append(Damage("content", detail, checked.main_file, unit, part.name))
            keys = keys or content.keys
        return UnitFinding(
            unit=unit,
            damages=tuple(damages),
            contradictions=tuple(contradictions),
            parts=parts,
            plan_sha256=None if plan is None else sha256_bytes(planned.text),
            num_rows=len(rows),
            keys=hash_keys(keys or []),
        )


def hash_keys(keys: list[str]) -> NDArray[np.uint64]:
    """Return 64 bits of every key."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)


def sample_problem(sample: CachedSample, info: SampleInfo, spec: CacheSpec) -> str | None:
    """Say what is wrong with the targets, views and image of a sample, or None."""
    shapes = {"token_ids": (spec.tokens_shape, _TOKEN_TYPE)} | {
        name: (array.shape, array.dtype) for name, array in spec.payload_arrays.items()
    }
    for name, (shape, dtype) in shapes.items():
        if problem := array_problem(sample, name, shape, dtype):
            return problem
    largest = int(sample.token_ids.max())
    if largest >= spec.vocab_size:
        return f"token id {largest} is not below K={spec.vocab_size}"
    if problem := _view_problem(sample, info, spec):
        return problem
    if (sample.image is None) != (spec.images_in_cache == "none"):
        return "the image is missing" if sample.image is None else "there is an image"
    return payload_problem(sample, spec)


def _view_problem(sample: CachedSample, info: SampleInfo, spec: CacheSpec) -> str | None:
    if sample.views.shape != (spec.view_spec.num_views, 5):
        return f"views of shape {sample.views.shape}"
    top, left, height, width, hflip = sample.views.T.astype(np.int64)
    if (
        min(top.min(), left.min()) < 0
        or min(height.min(), width.min()) < 1
        or not np.isin(hflip, (0, 1)).all()
    ):
        return f"views {sample.views.tolist()} are not boxes"
    rows, columns = info.image_size
    if min(rows, columns) < 1:
        return f"a picture of {rows} x {columns} pixels"
    if (top + height).max() > rows or (left + width).max() > columns:
        return f"views {sample.views.tolist()} leave the picture of {rows} x {columns} pixels"
    if spec.view_spec.given:
        return None
    drawn = np.array(draw_views(spec.view_spec, sample.key, info.image_size), np.int32)
    if not np.array_equal(sample.views, drawn):
        return f"views {sample.views.tolist()} are not those of its key, {drawn.tolist()}"
    return None


class _Part(NamedTuple):
    name: str
    store: Store
    spec: CacheSpec


class _UnitOfPart:
    """The files of one unit in the cache or a layer, and which of them are damaged."""

    def __init__(self, part: _Part, unit: int, claim: ShardInfo | None) -> None:
        self.unit = unit
        self.damages: list[Damage] = []
        self.measured: dict[str, Measure | None] = {}
        self.tar: bytes | None = None
        self._part = part
        found = examine(UnitRecord, part.store, unit_record_name(unit))
        self.record = found.model
        if found.kind:
            self._record_damage(Damage(found.kind, found.detail))
        elif self.record is not None and self.record.unit != unit:
            where = part.store.where(unit_record_name(unit))
            self._record_damage(Damage("changed", f"{where} is of unit {self.record.unit}"))
        for file in (*(self.record.files if self.record else ()), *(claim.files if claim else ())):
            if file.path not in self.measured:
                self.measured[file.path] = self._measure(file.path)
        if self.record is not None and claim is not None:
            self._compare(found.text, self.record, claim)
        self._check_files(claim)

    @property
    def summary(self) -> UnitSummary | None:
        return None if self.record is None else summarise(self.unit, self.record)

    @property
    def main_file(self) -> str:
        """The file that stands for the content of the unit."""
        files = self.record.files if self.record else ()
        return full_name(self._part.name, files[0].path if files else unit_record_name(self.unit))

    def open(self) -> Shard:
        """Open the samples; those of a tar that was read lie in memory."""
        assert self.record is not None
        if self.tar is None:
            part, claim = self._part, summarise(self.unit, self.record).shard
            return open_unit(part.store, part.spec, self.unit, claim)
        return TarShard(self._part.store, self.unit, self.record, _Held(self.tar))

    def _measure(self, name: str) -> Measure | None:
        store = self._part.store
        if name != shard_name(self.unit):
            return measure(store, name)
        try:
            if store.size(name) > _MAX_HELD_BYTES:
                return measure(store, name)
            self.tar = store.read(name)
        except FileNotFoundError:
            return None
        return Measure(len(self.tar), sha256_bytes(self.tar))

    def _compare(self, text: bytes, record: UnitRecord, claim: ShardInfo) -> None:
        """Find out which is damaged if the manifest has another digest of the record."""
        own = FileDigest.of_content(unit_record_name(self.unit), text)
        if own.sha256 == claim.record.sha256 or is_misspelt(own.sha256, claim.record.sha256):
            return
        if self._are_whole(record.files) and not self._are_whole(claim.files):
            return
        damage = file_damage(
            self._part.store, "", Measure(own.bytes, own.sha256), claim.record, self.unit
        )
        # Where only the path of the digest differs, it is the manifest's.
        if damage is not None:
            self._record_damage(damage)

    def _check_files(self, claim: ShardInfo | None) -> None:
        trusted = self.record.files if self.record else claim.files if claim else ()
        for file in trusted:
            found = self.measured[file.path]
            if found and is_misspelt(found.sha256, file.sha256):
                if self.record is not None:
                    where = self._part.store.where(unit_record_name(self.unit))
                    self._record_damage(
                        Damage("changed", f"{where} has a wrong digest of {file.path}")
                    )
                continue
            damage = file_damage(self._part.store, self._part.name, found, file, self.unit)
            if damage:
                self.damages.append(damage)

    def _are_whole(self, expected: tuple[FileDigest, ...]) -> bool:
        return all(is_whole(self.measured[file.path], file) for file in expected)

    def _record_damage(self, damage: Damage) -> None:
        name = full_name(self._part.name, unit_record_name(self.unit))
        self.damages.append(damage._replace(file=name, unit=self.unit, layer=self._part.name))
        self.record = None


class _Content:
    """The samples of one unit whose files are whole."""

    def __init__(self, part: _Part, checked: _UnitOfPart, rows: Mapping[str, PlanRow]) -> None:
        assert checked.record is not None
        self._part, self._checked, self._record = part, checked, checked.record
        self._rows = rows
        self._differ: list[str] = []
        self.keys: list[str] | None = None
        problems: list[str] = []
        try:
            shard = checked.open()
            try:
                self.keys = list(shard.keys)
                problems += self._problems(shard)
            finally:
                shard.close()
        except _UNREADABLE as exc:
            problems.append(str(exc))
        if self.keys is not None and len(self.keys) != self._record.num_samples:
            problems.append(f"{len(self.keys)} samples, expected {self._record.num_samples}")
        self.damages = [self._damage(problem) for problem in problems]

    def against_plan(self, plan: PlanUnit) -> Iterator[Damage]:
        """Yield where the plan of the unit says something else than its samples."""
        skipped = {sample.key: sample.source for sample in self._record.skipped}
        expected = [row.key for row in plan.rows if row.key not in skipped]
        if self.keys != expected:
            odd = sorted(set(self.keys or ()) ^ set(expected))[:3]
            yield self._damage(f"keys do not match the plan, first {odd}")
            return
        for key, source in skipped.items():
            if key not in self._rows or self._rows[key].source != source:
                yield self._damage(f"skipped {key} of {source} does not match the plan")
        for problem in self._differ:
            yield self._damage(problem)

    def _problems(self, shard: Shard) -> Iterator[str]:
        num_named = 0
        for number in range(len(shard)):
            sample, info = shard.read(number), shard.info(number)
            row = self._rows.get(sample.key)
            if row:
                self._differ += _differences(sample, info, row)
            if problem := sample_problem(sample, info, self._part.spec):
                num_named += 1
                if num_named <= _MAX_NAMED:
                    yield f"{sample.key}: {problem}"
        if num_named > _MAX_NAMED:
            yield f"{num_named - _MAX_NAMED:,} further samples are damaged"

    def _damage(self, detail: str) -> Damage:
        checked = self._checked
        return Damage("content", detail, checked.main_file, checked.unit, self._part.name)


def _differences(sample: CachedSample, info: SampleInfo, row: PlanRow) -> Iterator[str]:
    """Say where a sample and its row of the plan differ."""
    if (row.source, row.label) != (info.source, sample.label):
        yield (
            f"{sample.key}: source {info.source} and label {sample.label}, planned "
            f"{row.source} and {row.label}"
        )
    if not row.extra and not sample.extra:
        return
    # As JSON, because 1, 1.0 and true are equal in Python.
    found, planned = (
        {name: canonical_json(value).decode() for name, value in extra.items()}
        for extra in (sample.extra, row.extra)
    )
    for name in sorted(found.keys() | planned.keys()):
        there, right = (shorten(each.get(name, "none"), _MAX_SHOWN) for each in (found, planned))
        if found.get(name) != planned.get(name):
            yield f"{sample.key}: column {name!r} is {there}, planned {right}"


class _Held:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, start: int, size: int) -> bytes:
        return self._data[start : start + size]

    def close(self) -> None:
        self._data = b""
