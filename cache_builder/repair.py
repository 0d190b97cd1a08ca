"""`patchcache verify --repair`: what is damaged is made again, and nothing else is touched.

In this order, because each needs the ones before: the files of the plan (from the source),
plan.json (from the manifest), codebooks (from a copy), the metadata of a Zarr group, damaged units
(from the source), skipped.jsonl and manifests (from the commit records). What cannot be made as it
was is left as it is, with the reason.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cache_builder.cache_check import CacheCheck, Conclusion
from cache_builder.cache_parts import CachePart
from cache_builder.damage import Damage, is_misspelt
from cache_builder.errors import PatchCacheError
from cache_builder.files import sha256_bytes
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    SKIPPED_NAME,
    ShardInfo,
    read_model,
    to_json,
)
from cache_builder.formats.plan import BuildPlan, PlanUnit, plan_unit_name
from cache_builder.formats.zarr_store import create_store
from cache_builder.origins import find_origins
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.relisting import list_again, moved_container
from cache_builder.stores import LocalStore, read_location
from cache_builder.unit_jobs import FEW_BUILDS, run_units
from cache_builder.unit_repair import RebuildJob, RebuildTask, UnitRebuilder

_PLAN_FOLDER = "plan"


class RepairOptions(NamedTuple):
    """What a repair may use."""

    images: str | None = None  # where the images lie now, if they have moved
    codebook: str | Path | None = None  # a copy of a codebook
    device: str = "auto"
    weights: str | None = None
    cluster: ClusterOptions = ClusterOptions()


class RepairOutcome(NamedTuple):
    """What a repair did."""

    repaired: list[str]  # names relative to the cache
    refused: list[str]  # why something was not repaired


def repair_cache(check: CacheCheck, found: Conclusion, options: RepairOptions) -> RepairOutcome:
    """Make again what is damaged; the caller holds the lock of the cache.

    Args:
        check: Of the whole cache; brought up to date.
        found: What it came to.
        options: What the repair may use.
    """
    return _Repair(check, found, options).run()


class _Repair:
    def __init__(self, check: CacheCheck, found: Conclusion, options: RepairOptions) -> None:
        self._check = check
        self._options = options
        self._damages = found.damages
        self._files = {damage.file for damage in found.damages}
        self._outcome = RepairOutcome([], [])
        self._images = options.images or check.base.spec.source.location

    def run(self) -> RepairOutcome:
        self._repair_plan_units()
        self._repair_plans()
        self._repair_codebooks()
        self._repair_store_files()
        self._check.read_parts()
        self._damages = self._check.conclude().damages
        self._repair_units()
        self._repair_summaries()
        self._check.read_parts()
        return self._outcome

    def _repair_plan_units(self) -> None:
        prefix = f"{_PLAN_FOLDER}/"
        damaged = {
            damage.unit
            for damage in self._damages
            if damage.unit is not None and damage.file.startswith(prefix)
        }
        if not damaged and _PLAN_FOLDER not in self._files:
            return
        check, base = self._check, self._check.base
        try:
            for units in list_again(base.spec, self._options.images, check.num_rows()):
                texts = self._right_plan_units(
                    {unit.unit: to_json(unit) for unit in units}, damaged
                )
                if texts is not None:
                    break
        except PatchCacheError as exc:
            self._refuse(
                f"the plan cannot be written again from its source: {exc} "
                "--images names the place where the images lie now"
            )
            return
        if texts is None:
            self._refuse(
                f"the images of {self._images} are not those that the cache was planned for: one "
                "was added, removed or renamed since. Restore the source, then repair again"
            )
            return
        for unit, text in texts.items():
            self._publish(base, plan_unit_name(unit), text)
        check.check_units(sorted(texts), self._options.cluster)

    def _right_plan_units(
        self, listed: dict[int, bytes], damaged: set[int]
    ) -> dict[int, bytes] | None:
        """Return what belongs into damaged files, or None if the listing is not that of the plan.

        Where it is not known which files are damaged, those are that the listing has otherwise.
        """
        check = self._check
        there = [check.findings[unit].plan_sha256 for unit in range(check.base.num_units)]
        again = [sha256_bytes(listed.get(unit, b"")) for unit in range(len(there))]
        if not damaged:
            damaged = {unit for unit, digest in enumerate(there) if digest != again[unit]}
        mended = [
            again[unit] if unit in damaged else digest or "" for unit, digest in enumerate(there)
        ]
        claims, digest = check.claimed_units(), sha256_bytes("".join(mended).encode())
        is_known = digest in claims or any(is_misspelt(digest, claim) for claim in claims)
        if not (is_known if claims else mended == again):
            return None
        return {unit: listed[unit] for unit in sorted(damaged)}

    def _repair_plans(self) -> None:
        check = self._check
        for part in check.parts.values():
            if part.file(PLAN_NAME) not in self._files or not part.is_settled:
                continue
            digest = check.units_sha256()
            claims = check.claimed_units()
            if digest is None and len(claims) == 1:
                digest = next(iter(claims))
            if digest is None:
                self._refuse(f"{part.store.where(PLAN_NAME)} needs every file of the plan")
                continue
            plan = BuildPlan(
                spec=part.spec,
                num_units=part.num_units,
                units_sha256=digest,
                layers=() if part.name else self._layers_of_plan(),
            )
            self._publish(part, PLAN_NAME, to_json(plan))

    def _layers_of_plan(self) -> tuple[str, ...]:
        """Return the layers that were built with the cache, as far as it can be known."""
        base = self._check.base
        layers = [part for part in self._check.parts.values() if part.name]
        if base.plan.model is not None:
            known = {part.name for part in layers}
            spare = sorted(known - set(base.plan.model.layers))
            return tuple(
                name if name in known else next((s for s in spare if is_misspelt(s, name)), name)
                for name in base.plan.model.layers
            )
        text = base.plan.text
        if text:
            named = [part.name for part in layers if part.name.encode() in text]
            return tuple(sorted(named, key=lambda name: text.find(name.encode())))
        views = base.spec.view_spec
        return tuple(
            part.name
            for part in layers
            if (part.spec.view_spec.first_view, part.spec.view_spec.num_views)
            == (views.first_view, views.num_views)
        )

    def _repair_codebooks(self) -> None:
        for part in self._check.parts.values():
            if part.file(CODEBOOK_NAME) not in self._files:
                continue
            text = next(self._codebook_copies(part), None)
            if text is None:
                self._refuse(
                    f"{part.store.where(CODEBOOK_NAME)} has no copy that is the same, byte for "
                    f"byte. --codebook names one, of tokenizer {part.spec.fingerprint}"
                )
                continue
            self._publish(part, CODEBOOK_NAME, text)

    def _codebook_copies(self, part: CachePart) -> Iterator[bytes]:
        """Yield the contents of codebook files that belong in a part."""
        model = part.manifest.model
        digest = model.codebook.sha256 if model else None
        candidates = []
        if self._options.codebook is not None:
            codebook = Codebook.load(self._options.codebook)
            candidates += [read_location(self._options.codebook), codebook.to_bytes()]
        for other in self._check.parts.values():
            if other.name != part.name and other.spec.fingerprint == part.spec.fingerprint:
                try:
                    candidates.append(other.store.read(CODEBOOK_NAME))
                except FileNotFoundError:
                    continue
        for text in candidates:
            try:
                fingerprint = Codebook.from_bytes(text, CODEBOOK_NAME).fingerprint
            except PatchCacheError:
                continue
            own = sha256_bytes(text)
            is_same = digest is None or own == digest or is_misspelt(own, digest)
            if fingerprint == part.spec.fingerprint and is_same:
                yield text

    def _repair_store_files(self) -> None:
        for part in self._check.parts.values():
            if part.spec.layout != "zarr":
                continue
            model = part.manifest.model
            claims = {file.path: file for file in model.store_files} if model else {}
            with tempfile.TemporaryDirectory() as folder:
                made = LocalStore(Path(folder))
                create_store(made, part.spec, part.num_units)
                for name in sorted(made.names()):
                    if part.file(name) not in self._files:
                        continue
                    text = made.read(name)
                    claim = claims.get(name)
                    if claim and claim.sha256 != sha256_bytes(text):
                        self._refuse(
                            f"{part.store.where(name)} was written by another version of zarr, "
                            "and this one writes it otherwise"
                        )
                        continue
                    self._publish(part, name, text)
        if any(name.endswith("/zarr.json") for name in self._outcome.repaired):
            # What they describe could not be read before.
            self._check.check_units(sorted(self._check.findings), self._options.cluster)

    def _repair_units(self) -> None:
        wanted: dict[int, dict[str, ShardInfo | None]] = defaultdict(dict)
        for damage in self._damages:
            if damage.unit is None or damage.file.startswith(f"{_PLAN_FOLDER}/"):
                continue
            wanted[damage.unit][damage.layer] = self._expected(damage)
        if not wanted:
            return
        check = self._check
        jobs = list(self._jobs(wanted))
        if check.base.spec.source.kind == "cache":
            copies, jobs = self._copies(jobs)
            refused = self._rebuild(copies)
            # What is left of such a unit needs the images that were not copied.
            jobs = [job for job in jobs if job.unit not in refused]
        self._rebuild(jobs)
        check.check_units(sorted(wanted), self._options.cluster)

    def _rebuild(self, jobs: list[RebuildJob]) -> set[int]:
        """Make units again; return those that were not."""
        check = self._check
        plans = {name: self._plan(part) for name, part in check.parts.items()}
        task = RebuildTask(
            check.location, plans, self._images, self._options.device, self._options.weights
        )
        rebuilder, cluster = partial(UnitRebuilder, task), self._options.cluster
        refused = set()
        for result in run_units(rebuilder, jobs, cluster, FEW_BUILDS):
            self._outcome.repaired.extend(result.written)
            if result.refused:
                self._refuse(f"unit {result.unit}: {result.refused}")
                refused.add(result.unit)
        return refused

    def _copies(self, jobs: list[RebuildJob]) -> tuple[list[RebuildJob], list[RebuildJob]]:
        """Return what can be copied from the caches that were merged, and what is to be built."""
        origins = find_origins([PlanUnit.model_validate_json(job.plan) for job in jobs])
        specs = {name: part.spec for name, part in self._check.parts.items()}
        copies, others = [], []
        for job in jobs:
            origin = origins[job.unit]
            if isinstance(origin, str):
                if job.reads_source:
                    self._refuse(f"unit {job.unit}: {origin}")
                else:
                    others.append(job)
                continue
            # Views and tokenizers that were added after the merge are in none of the caches.
            copied = {
                name: shard
                for name, shard in job.expected.items()
                if specs[name].fingerprint in origin.tokenizers
                and specs[name].view_spec.first_view == specs[""].view_spec.first_view
            }
            added = {name: shard for name, shard in job.expected.items() if name not in copied}
            if copied:
                copies.append(job._replace(expected=copied, copied=origin.unit))
            if added:
                others.append(job._replace(expected=added, reads_source="" in added))
        return copies, others

    def _jobs(self, wanted: dict[int, dict[str, ShardInfo | None]]) -> Iterator[RebuildJob]:
        check = self._check
        for unit, expected in sorted(wanted.items()):
            try:
                plan = read_model(PlanUnit, check.store, plan_unit_name(unit))
            except PatchCacheError as exc:
                self._refuse(f"unit {unit} needs its plan: {exc}")
                continue
            unreadable = [
                name
                for name in expected
                if check.parts[name].file(CODEBOOK_NAME) in self._files
                and check.parts[name].file(CODEBOOK_NAME) not in self._outcome.repaired
            ]
            if unreadable:
                self._refuse(f"unit {unit} needs the codebook of its tokenizer")
                continue
            if plan.container and self._options.images:
                there = moved_container(plan.container, self._images)
                plan = plan.model_copy(update={"container": there})
            in_cache = check.base.spec.images_in_cache != "none"
            yield RebuildJob(unit, to_json(plan), expected, "" in expected or not in_cache)

    def _expected(self, damage: Damage) -> ShardInfo | None:
        """Return what a unit was; None if what it was is what is wrong."""
        assert damage.unit is not None
        if damage.kind == "content":
            return None
        finding = self._check.findings[damage.unit].parts[damage.layer]
        if finding.summary is not None:
            return finding.summary.shard
        model = self._check.parts[damage.layer].manifest.model
        if model is None or damage.unit >= len(model.shards):
            return None
        return model.shards[damage.unit]

    def _plan(self, part: CachePart) -> BuildPlan:
        return BuildPlan(spec=part.spec, num_units=part.num_units, units_sha256="")

    def _repair_summaries(self) -> None:
        """Write what follows from the commit records: layers first, which the cache digests."""
        check = self._check
        conclusion = check.conclude()
        files = {damage.file for damage in conclusion.damages}
        for part in reversed(check.parts.values()):
            text = check.skipped_text(part)
            if part.file(SKIPPED_NAME) in files:
                if text is None:
                    self._refuse(f"{part.store.where(SKIPPED_NAME)} needs every commit record")
                else:
                    self._publish(part, SKIPPED_NAME, text)
            if part.file(MANIFEST_NAME) not in files:
                continue
            manifest = conclusion.manifests.get(part.name)
            if manifest is None:
                self._refuse(f"{part.store.where(MANIFEST_NAME)} needs every commit record")
            else:
                self._publish(part, MANIFEST_NAME, to_json(manifest))

    def _publish(self, part: CachePart, name: str, text: bytes) -> None:
        part.store.publish(name, text)
        self._outcome.repaired.append(part.file(name))

    def _refuse(self, reason: str) -> None:
        self._outcome.refused.append(reason)
