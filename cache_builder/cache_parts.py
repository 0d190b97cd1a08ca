"""A cache and its layers as far as their plans and manifests can still be read.

The settings of a cache stand in its plan and in its manifest. Where the two differ, or one of them
is gone, the rest of the cache is asked which is right: codebook, layers, and the views of a sample.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cache_builder.commit import layer_store, summarise
from cache_builder.damage import Damage, Examined, examine, full_name, model_differences
from cache_builder.errors import ArtifactError, FormatVersionError, PatchCacheError
from cache_builder.files import sha256_bytes
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    CacheManifest,
    CacheSpec,
    LayerInfo,
    UnitRecord,
    read_model,
    unit_record_name,
)
from cache_builder.formats.plan import BuildPlan
from cache_builder.formats.units import open_unit
from cache_builder.sources import open_source
from cache_builder.stores import Store
from cache_builder.unit_checks import sample_problem

_LAYERS_FOLDER = "targets"
_NUM_WITNESSES = 3  # samples that are looked at


class CachePart(NamedTuple):
    """A cache, or a layer of one."""

    name: str  # of the layer; empty is the cache itself
    store: Store
    spec: CacheSpec  # what is believed
    num_units: int
    plan: Examined[BuildPlan]
    manifest: Examined[CacheManifest]
    is_settled: bool = True  # plan and manifest agree, or it is known which is right

    def file(self, name: str) -> str:
        """Return a file's name relative to the cache."""
        return full_name(self.name, name)


def read_parts(store: Store) -> tuple[list[CachePart], list[Damage]]:
    """Read the plans and manifests of a finished cache and its layers, the cache itself first.

    Returns:
        The parts, and what is wrong with their plans, and with manifests that cannot be read.

    Raises:
        ArtifactError: This is no cache, or not a finished one, or neither plan nor manifest can
            be read.
        FormatVersionError: It was written by a newer version.
    """
    plan = examine(BuildPlan, store, PLAN_NAME)
    manifest = examine(CacheManifest, store, MANIFEST_NAME)
    _refuse_hopeless(store, plan, manifest)
    layers, damages = [], list[Damage]()
    for name, info in _layer_names(store, plan.model, manifest.model):
        part, found = _read_layer(store, name, info)
        damages += found
        if part is not None:
            layers.append(part)
    base, found = _settle(store, "", plan, manifest, [layer.spec for layer in layers])
    known = {part.name for part in layers} | {damage.layer for damage in damages}
    for name in plan.model.layers if plan.model else ():
        if name not in known:
            detail = f"{store.where(PLAN_NAME)} names layer {name}, which is not there"
            found.append(Damage("changed", detail, PLAN_NAME))
    return [base, *layers], found + damages


def _refuse_hopeless(
    store: Store, plan: Examined[BuildPlan], manifest: Examined[CacheManifest]
) -> None:
    if plan.model is None and manifest.model is None:
        for found in (plan, manifest):
            if found.is_newer:
                raise FormatVersionError(found.detail)
        if plan.kind == "missing" and manifest.kind == "missing":
            CacheManifest.load(store)  # raises: this is no cache
        raise ArtifactError(
            f"Neither {PLAN_NAME} nor {MANIFEST_NAME} of {store.location} can be read "
            f"({plan.detail}; {manifest.detail}), and nothing else says how the cache was built. "
            "Build it again into an empty place with its first command."
        )
    if manifest.kind == "missing" and plan.model is not None:
        there = set(store.names("units"))
        if any(unit_record_name(unit) not in there for unit in range(plan.model.num_units)):
            CacheManifest.load(store)  # raises: the build has not finished


def _layer_names(
    store: Store, plan: BuildPlan | None, manifest: CacheManifest | None
) -> Iterator[tuple[str, LayerInfo | None]]:
    """Yield the folders of the layers, and what the cache's manifest says of each."""
    folders = {
        name.rpartition("/")[0]
        for name in store.names(_LAYERS_FOLDER)
        if name.endswith((f"/{PLAN_NAME}", f"/{MANIFEST_NAME}"))
    }
    listed = {layer.name: layer for layer in manifest.layers} if manifest else {}
    finished = {name for name in folders if store.exists(f"{name}/{MANIFEST_NAME}")}
    for name in [name for name in listed if name not in folders]:
        # A name that was damaged: the manifest of the layer is still the one that is meant.
        info = listed.pop(name)
        for other in sorted(finished - listed.keys()):
            digest = store.measure(f"{other}/{MANIFEST_NAME}").sha256
            if digest == info.manifest.sha256:
                listed[other] = info
                break
        else:
            listed[name] = info
    planned = set(plan.layers) & folders if plan else set()
    names = listed.keys() | planned | (finished if manifest is None else set())
    yield from ((name, listed.get(name)) for name in sorted(names))


def _read_layer(
    store: Store, name: str, info: LayerInfo | None
) -> tuple[CachePart | None, list[Damage]]:
    below = layer_store(store, name)
    plan = examine(BuildPlan, below, PLAN_NAME)
    manifest = examine(CacheManifest, below, MANIFEST_NAME)
    if plan.model is None and manifest.model is None:
        detail = f"{below.location}: neither plan nor manifest can be read ({plan.detail})"
        return None, [Damage("unreadable", detail, full_name(name, PLAN_NAME), layer=name)]
    if manifest.model and info and sha256_bytes(manifest.text) == info.manifest.sha256:
        # The cache's manifest vouches for this one.
        return _part(below, name, manifest.model.spec, plan, manifest)
    return _settle(below, name, plan, manifest, [])


def _settle(
    store: Store,
    name: str,
    plan: Examined[BuildPlan],
    manifest: Examined[CacheManifest],
    others: list[CacheSpec],
) -> tuple[CachePart, list[Damage]]:
    """Decide what to believe."""
    if plan.model is None or manifest.model is None or plan.model.spec == manifest.model.spec:
        believed = plan.model or manifest.model
        assert believed is not None
        return _part(store, name, believed.spec, plan, manifest)
    candidates = plan.model.spec, manifest.model.spec
    planned, finished = (_objections(store, spec, others) for spec in candidates)
    if planned != finished:
        return _part(store, name, candidates[planned > finished], plan, manifest)
    part, damages = _part(store, name, manifest.model.spec, plan, manifest)
    differ = next(model_differences(*candidates))
    detail = (
        f"{store.where(PLAN_NAME)} and the manifest are of two builds: in the first {differ} as in "
        f"the second. Nothing else tells which is right: remove the wrong one of the two, and "
        "--repair writes it again from the other"
    )
    others_damages = [damage for damage in damages if damage.file != part.file(PLAN_NAME)]
    unsettled = Damage("contradicts", detail, part.file(PLAN_NAME), layer=name)
    return part._replace(is_settled=False), [unsettled, *others_damages]


def _part(
    store: Store,
    name: str,
    spec: CacheSpec,
    plan: Examined[BuildPlan],
    manifest: Examined[CacheManifest],
) -> tuple[CachePart, list[Damage]]:
    """Return a part with these settings, and what is wrong with its plan or missing manifest."""
    num_units = _num_units(store, plan.model, manifest.model)
    part = CachePart(name, store, spec, num_units, plan, manifest)
    damages = []
    if plan.model is None:
        assert plan.kind is not None
        damages.append(Damage(plan.kind, plan.detail, part.file(PLAN_NAME), layer=name))
    else:
        right = plan.model.model_copy(update={"spec": spec, "num_units": num_units})
        for difference in model_differences(plan.model, right):
            detail = f"{store.where(PLAN_NAME)} and the manifest are of two builds: {difference}"
            damages.append(Damage("changed", detail, part.file(PLAN_NAME), layer=name))
    if manifest.kind:
        damages.append(Damage(manifest.kind, manifest.detail, part.file(MANIFEST_NAME), layer=name))
    return part, damages


def _num_units(store: Store, plan: BuildPlan | None, manifest: CacheManifest | None) -> int:
    found = {plan.num_units} if plan else set()
    found |= {len(manifest.shards)} if manifest else set()
    if len(found) == 1:
        return found.pop()
    there = sum(1 for _ in store.names("units"))
    return there if there in found else max(found)


def _objections(store: Store, spec: CacheSpec, others: list[CacheSpec]) -> int:
    """Count what speaks against the settings."""
    return sum(1 for _ in _all_objections(store, spec, others))


def _all_objections(store: Store, spec: CacheSpec, others: list[CacheSpec]) -> Iterator[str]:
    try:
        codebook = Codebook.from_bytes(store.read(CODEBOOK_NAME), store.where(CODEBOOK_NAME))
        rule, views = codebook.pixel_rule, spec.view_spec
        made = (codebook.fingerprint, codebook.vocab_size, codebook.num_stages, rule.grid)
        if made != (spec.fingerprint, spec.vocab_size, spec.num_stages, spec.grid):
            yield "another tokenizer"
        cut = (views.size, views.patch_size, views.interpolation)
        if cut != (rule.size, rule.patch_size, rule.interpolation):
            yield "other views"
    except (FileNotFoundError, PatchCacheError):
        pass
    for other in others:
        shared = {"layout", "unit_size", "source", "class_names", "resized_short_side"}
        for name in sorted(shared | {"jpeg_quality"}):
            if getattr(spec, name) != getattr(other, name):
                yield name
        for name in ("seed", "scale", "ratio", "hflip"):
            if getattr(spec.view_spec, name) != getattr(other.view_spec, name):
                yield name
    try:
        open_source(spec.source.location)
    except PatchCacheError:
        yield "the source is not there"
    yield from _sample_objections(store, spec)


def _sample_objections(store: Store, spec: CacheSpec) -> Iterator[str]:
    """Look at the first samples with these settings."""
    try:
        record = read_model(UnitRecord, store, unit_record_name(0))
        shard = open_unit(store, spec, 0, summarise(0, record).shard)
    except (PatchCacheError, ValueError, KeyError) as exc:
        yield str(exc)
        return
    try:
        for row in range(min(_NUM_WITNESSES, len(shard))):
            if problem := sample_problem(shard.read(row), shard.info(row), spec):
                yield problem
    except (PatchCacheError, ValueError, KeyError) as exc:
        yield str(exc)
    finally:
        shard.close()
