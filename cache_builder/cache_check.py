"""The check of a whole cache: its units, wherever they are checked, and what they come to together.

A manifest follows from plan, records and codebook, byte for byte. So a manifest is whole if and
only if it is the one that follows from the files that it names.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_builder.cache_parts import CachePart, read_parts
from cache_builder.commit import UnitSummary, describe_layer
from cache_builder.damage import (
    Damage,
    file_damage,
    full_name,
    is_misspelt,
    is_whole,
    measure,
    model_differences,
)
from cache_builder.errors import PatchCacheError
from cache_builder.files import sha256_bytes
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.headers import shorten
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    SKIPPED_NAME,
    CacheManifest,
    CacheSpec,
    FileDigest,
    LayerInfo,
    ShardInfo,
    to_json,
    unit_record_name,
)
from cache_builder.formats.payloads import sum_features, sum_soft
from cache_builder.formats.plan import plan_unit_name
from cache_builder.formats.units import open_unit
from cache_builder.formats.zarr_store import metadata_files
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.reporting import Progress
from cache_builder.stores import LOCK_NAME, Store, absolute_location, open_store
from cache_builder.unit_checks import CheckTask, UnitChecker, UnitClaim, UnitFinding
from cache_builder.unit_jobs import FEW_CHECKS, run_units


class Conclusion(NamedTuple):
    """What is wrong, and the manifests that follow from what is right."""

    damages: list[Damage]
    manifests: dict[str, CacheManifest]  # by layer; lacks what cannot be known yet
    num_files: int


class CacheCheck:
    """What has been found out about a cache."""

    def __init__(self, location: str | Path) -> None:
        """Read plans and manifests.

        Raises:
            ArtifactError: There is no finished cache to check.
        """
        self.location = absolute_location(location)  # for workers
        self.store: Store = open_store(location)
        self.findings: dict[int, UnitFinding] = {}
        self._metadata: dict[tuple[CacheSpec, int], tuple[FileDigest, ...]] = {}
        self.read_parts()

    def read_parts(self) -> None:
        """Read plans and manifests, again after a repair."""
        parts, self._part_damages = read_parts(self.store)
        self.parts = {part.name: part for part in parts}

    @property
    def base(self) -> CachePart:
        """The cache itself."""
        return self.parts[""]

    def check_units(
        self, units: Iterable[int], cluster: ClusterOptions, progress: Progress | None = None
    ) -> None:
        """Check units, again after a repair."""
        specs = {name: part.spec for name, part in self.parts.items()}
        # Samples of a Zarr group whose metadata is damaged cannot be read.
        closed = {name for name, part in self.parts.items() if self._store_files(part)[1]}
        worker = partial(UnitChecker, CheckTask(self.location, specs, frozenset(closed)))
        claims = [UnitClaim(unit, self._claim(unit)) for unit in units]
        for done, finding in enumerate(run_units(worker, claims, cluster, FEW_CHECKS), 1):
            self.findings[finding.unit] = finding
            if progress:
                progress(done, len(claims))

    def conclude(self) -> Conclusion:
        """Put together what was found."""
        damages = list(self._part_damages)
        manifests: dict[str, CacheManifest] = {}
        layers: list[LayerInfo] | None = []
        plan_damages, plan_is_right = self._plan_damages()
        damages += plan_damages
        num_files = 0
        ordered = [*(part for part in self.parts.values() if part.name), self.base]
        late: list[Damage] = []
        for part in ordered:
            codebook, found = self._codebook(part)
            damages += found
            store_files, found = self._store_files(part)
            damages += found
            num_files += 1 + len(store_files)
            infos = () if part.name else tuple(layers or ())
            expected = self._manifest(part, codebook, store_files, infos)
            if part.name == "" and layers is None:
                expected = None
            late += self._manifest_damages(part, expected)
            late += self._skipped_damages(part)
            if expected is not None:
                manifests[part.name] = expected
            if part.name and layers is not None:
                layers = [*layers, describe_layer(part.name, expected)] if expected else None
        for unit in sorted(self.findings):
            finding = self.findings[unit]
            damages += finding.damages
            damages += finding.contradictions if plan_is_right else ()
            num_files += sum(found.num_files for found in finding.parts.values())
        damages += self._repeated_keys()
        if not damages:
            damages += self._total_damages()
        return Conclusion(damages + late, manifests, num_files)

    def summaries(self, part: CachePart) -> list[UnitSummary] | None:
        """Return what the manifest says of every unit, if every record is whole."""
        found = [self._summary(part, unit) for unit in range(part.num_units)]
        whole = [summary for summary in found if summary is not None]
        return whole if len(whole) == len(found) else None

    def skipped_text(self, part: CachePart) -> bytes | None:
        """Return the content of `skipped.jsonl`, if every record is whole."""
        summaries = self.summaries(part)
        if summaries is None:
            return None
        return b"".join(to_json(sample) for each in summaries for sample in each.skipped)

    def claimed_units(self) -> set[str]:
        """Return the digests of all plan units that the plans name; one, if they agree."""
        models = [part.plan.model for part in self.parts.values()]
        return {model.units_sha256 for model in models if model}

    def units_sha256(self) -> str | None:
        """Return the digest of all plan units, if every one can be read."""
        digests = [self.findings[unit].plan_sha256 for unit in range(self.base.num_units)]
        whole = [digest for digest in digests if digest is not None]
        return sha256_bytes("".join(whole).encode()) if len(whole) == len(digests) else None

    def num_rows(self) -> list[int] | None:
        """Return the number of images of every unit, skipped ones counted, if it is known."""
        found = []
        for unit in range(self.base.num_units):
            summary = self._summary(self.base, unit)
            shard = summary.shard if summary else self._claim(unit).get("")
            if shard is None:
                return None
            found.append(shard.num_samples + shard.num_skipped)
        return found

    def stray_files(self) -> Iterator[str]:
        """Yield the names of files that nothing names."""
        known = {LOCK_NAME}
        for part in self.parts.values():
            names = {PLAN_NAME, MANIFEST_NAME, CODEBOOK_NAME, SKIPPED_NAME}
            names |= {file.path for file in self._metadata_files(part)}
            if part.manifest.model:
                names |= {file.path for file in part.manifest.model.store_files}
            known |= {full_name(part.name, name) for name in names}
        for unit, finding in self.findings.items():
            known.add(plan_unit_name(unit))
            for name, found in finding.parts.items():
                known.add(full_name(name, unit_record_name(unit)))
                claimed = self._claim(unit).get(name)
                recorded = found.summary.shard if found.summary else None
                for shard in (claimed, recorded):
                    known |= {full_name(name, file.path) for file in (shard.files if shard else ())}
        yield from sorted(name for name in self.store.names() if name not in known)

    def _claim(self, unit: int) -> dict[str, ShardInfo]:
        models = {name: part.manifest.model for name, part in self.parts.items()}
        return {
            name: model.shards[unit]
            for name, model in models.items()
            if model and unit < len(model.shards)
        }

    def _summary(self, part: CachePart, unit: int) -> UnitSummary | None:
        return self.findings[unit].parts[part.name].summary

    def _plan_damages(self) -> tuple[list[Damage], bool]:
        """Return what is wrong with plans, and whether they are right where shards differ."""
        contradictions = [
            damage for finding in self.findings.values() for damage in finding.contradictions
        ]
        claims, digest = self.claimed_units(), self.units_sha256()
        if digest is not None and (
            digest in claims or any(is_misspelt(digest, claim) for claim in claims)
        ):
            return list(self._wrong_units_sha256(digest)), True
        if contradictions:
            return [self._plan_damage(damage) for damage in contradictions], False
        if digest is None or not claims:
            return [], False
        detail = (
            f"{self.store.where('plan')} is not the list of images of "
            f"{self.store.where(PLAN_NAME)}; which of its files is wrong, the source can tell"
        )
        return [Damage("changed", detail, "plan")], False

    def _wrong_units_sha256(self, digest: str) -> Iterator[Damage]:
        for part in self.parts.values():
            plan = part.plan.model
            if plan and plan.units_sha256 != digest:
                detail = (
                    f"{part.store.where(PLAN_NAME)} has units_sha256 {shorten(plan.units_sha256)}, "
                    f"but the files of the plan have {digest}"
                )
                yield Damage("changed", detail, part.file(PLAN_NAME), layer=part.name)

    def _plan_damage(self, found: Damage) -> Damage:
        assert found.unit is not None
        name = plan_unit_name(found.unit)
        detail = f"{self.store.where(name)} is not the plan of its samples: {found.detail}"
        return Damage("changed", detail, name, found.unit)

    def _codebook(self, part: CachePart) -> tuple[FileDigest | None, list[Damage]]:
        """Return the digest of the codebook that belongs there, and what is wrong with the copy."""
        name, where = part.file(CODEBOOK_NAME), part.store.where(CODEBOOK_NAME)
        claim = part.manifest.model.codebook if part.manifest.model else None
        claim = claim and claim.model_copy(update={"path": CODEBOOK_NAME})
        found = measure(part.store, CODEBOOK_NAME)
        if found is None:
            return claim, [Damage("missing", f"{where} is missing", name, layer=part.name)]
        own = FileDigest(path=CODEBOOK_NAME, bytes=found.bytes, sha256=found.sha256)
        problem = None
        try:
            codebook = Codebook.from_bytes(part.store.read(CODEBOOK_NAME), where)
            if codebook.fingerprint != part.spec.fingerprint:
                problem = (
                    f"{where} is tokenizer {codebook.fingerprint}, but the token ids come from "
                    f"{part.spec.fingerprint}"
                )
        except PatchCacheError as exc:
            problem = str(exc)
        if claim is None or is_misspelt(own.sha256, claim.sha256) or own.sha256 == claim.sha256:
            found_damages = [Damage("changed", problem, name, layer=part.name)] if problem else []
            return (own if not problem else claim), found_damages
        damage = file_damage(part.store, part.name, found, claim)
        assert damage is not None
        detail = f"{damage.detail}; {problem}" if problem else damage.detail
        return claim, [damage._replace(detail=detail)]

    def _store_files(self, part: CachePart) -> tuple[tuple[FileDigest, ...], list[Damage]]:
        """Return the metadata files that belong there, and what is wrong with those there."""
        made = self._metadata_files(part)
        model = part.manifest.model
        if model is not None and not model.store_files:
            return (), []  # of a cache that was made before they were digested
        claims = model.store_files if model else made
        found = {file.path: measure(part.store, file.path) for file in (*made, *claims)}
        if all(is_whole(found[file.path], file) for file in made):
            return made, []
        pairs = [(file, found[file.path]) for file in claims]
        if all(
            is_whole(there, file) or (there and is_misspelt(there.sha256, file.sha256))
            for file, there in pairs
        ):
            right = [
                FileDigest(path=file.path, bytes=there.bytes, sha256=there.sha256)
                for file, there in pairs
                if there
            ]
            return tuple(right), []
        damages = [file_damage(part.store, part.name, there, file) for file, there in pairs]
        return claims, [damage for damage in damages if damage]

    def _metadata_files(self, part: CachePart) -> tuple[FileDigest, ...]:
        settings = part.spec, part.num_units
        if settings not in self._metadata:
            self._metadata[settings] = metadata_files(*settings)
        return self._metadata[settings]

    def _manifest(
        self,
        part: CachePart,
        codebook: FileDigest | None,
        store_files: tuple[FileDigest, ...],
        layers: tuple[LayerInfo, ...],
    ) -> CacheManifest | None:
        """Return the manifest that follows from what it names, if that is known."""
        claim = part.manifest.model
        summaries = [self._summary(part, unit) for unit in range(part.num_units)]
        shards = []
        for unit, summary in enumerate(summaries):
            if summary is not None:
                shards.append(summary.shard)
            elif claim and unit < len(claim.shards):
                shards.append(claim.shards[unit])
            else:
                return None
        if codebook is None:
            return None
        whole = [summary for summary in summaries if summary is not None]
        known = len(whole) == len(summaries)
        if not known and claim is None:
            return None
        soft = sum_soft(unit.soft for unit in whole if unit.soft)
        features = sum_features(unit.features for unit in whole if unit.features)
        return CacheManifest(
            spec=part.spec,
            payloads=part.spec.payloads,
            num_samples=sum(shard.num_samples for shard in shards),
            num_skipped=sum(shard.num_skipped for shard in shards),
            shards=tuple(shards),
            codebook=codebook,
            store_files=store_files,
            layers=layers,
            soft=soft if known or claim is None else claim.soft,
            features=features if known or claim is None else claim.features,
        )

    def _manifest_damages(
        self, part: CachePart, expected: CacheManifest | None
    ) -> Iterator[Damage]:
        model = part.manifest.model
        if model is None or expected is None or not part.is_settled:
            return  # what cannot be read was reported when it was read
        if part.manifest.text != to_json(expected):
            first = next(model_differences(model, expected), "it is written otherwise")
            detail = f"{part.store.where(MANIFEST_NAME)} is not that of its files: {first}"
            yield Damage("changed", detail, part.file(MANIFEST_NAME), layer=part.name)

    def _skipped_damages(self, part: CachePart) -> Iterator[Damage]:
        name, where = part.file(SKIPPED_NAME), part.store.where(SKIPPED_NAME)
        if not part.store.exists(SKIPPED_NAME):
            yield Damage("missing", f"{where} is missing", name, layer=part.name)
            return
        text = self.skipped_text(part)
        if text is not None and part.store.read(SKIPPED_NAME) != text:
            detail = f"{where} does not list the skipped images of the commit records"
            yield Damage("changed", detail, name, layer=part.name)

    def _repeated_keys(self) -> Iterator[Damage]:
        """Find keys that occur twice: by 64 bits of each, and exactly where those are equal."""
        units = sorted(self.findings)
        hashes = np.concatenate([self.findings[unit].keys for unit in units])
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        seen: dict[str, int] = {}
        for unit in units if len(twice) else ():
            if not np.isin(self.findings[unit].keys, twice).any():
                continue
            summary = self._summary(self.base, unit)
            if summary is None:  # its keys are those of a layer, its damage is told already
                continue
            shard = open_unit(self.store, self.base.spec, unit, summary.shard)
            counts = Counter(shard.keys)
            shard.close()
            repeated = [
                key
                for key, count in counts.items()
                if count > 1 or seen.setdefault(key, unit) != unit
            ]
            if repeated:
                detail = f"keys seen before, first {min(repeated)}"
                files = summary.shard.files
                yield Damage("content", detail, files[0].path if files else "", unit)

    def _total_damages(self) -> Iterator[Damage]:
        listed = sum(finding.num_rows for finding in self.findings.values())
        expected = self.base.spec.source.num_samples
        if listed != expected:
            detail = f"{listed:,} images are planned, and the settings say {expected:,}"
            yield Damage("contradicts", detail)
