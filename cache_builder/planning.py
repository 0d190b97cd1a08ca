"""The plan of a build: written once, and the measure of every later run of the same command."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeGuard

from cache_builder import files
from cache_builder.commit import layer_store
from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats import zarr_store
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.headers import shorten
from cache_builder.formats.manifest import CODEBOOK_NAME, PLAN_NAME, CacheSpec, read_model, to_json
from cache_builder.formats.plan import BuildPlan, PlanUnit, plan_unit_name
from cache_builder.stores import LOCK_NAME, Store

# What a driver writes before plan.json: plan units, and files under temporary names.
_EARLY_FILES = re.compile(r"plan|plan/\d{6,}\.json|(plan/)?\.[^/]+\.tmp|" + re.escape(LOCK_NAME))

_MAX_SHOWN = 200  # characters of a setting; the names of two folders differ at their ends


class LayerSpec(NamedTuple):
    """A layer that is to be built."""

    name: str
    spec: CacheSpec
    codebook: Codebook


def settle_plan(
    store: Store,
    spec: CacheSpec,
    units: Iterable[PlanUnit],
    codebook: Codebook,
    layers: Iterable[LayerSpec] = (),
) -> BuildPlan:
    """Write the plan, or check that the one that is there is this one; make ready for workers.

    Args:
        store: Of the cache.
        spec: Its settings.
        units: Its units; gone through twice.
        codebook: Of the cache itself.
        layers: What is built in the same pass.

    Raises:
        ConfigError: The store holds a build with other settings or images, or something else.
        TokenizerMismatchError: It holds a build with another tokenizer.
    """
    digests = [files.sha256_bytes(to_json(unit)) for unit in units]
    layers = tuple(layers)
    plan = BuildPlan(
        spec=spec,
        num_units=len(digests),
        units_sha256=_sha256_of(digests),
        layers=tuple(sorted(layer.name for layer in layers)),
    )
    is_there = store.exists(PLAN_NAME)
    if is_there:
        _refuse_other_plan(store.location, read_model(BuildPlan, store, PLAN_NAME), plan)
        # What killed writers left may be all that fills a disk.
        store.sweep()
    else:
        _refuse_foreign_folder(store)
    for unit, digest in zip(units, digests, strict=True):
        name = plan_unit_name(unit.unit)
        if not is_there or not _has(store, name, digest):
            store.publish(name, to_json(unit))
    if not is_there:
        store.publish_new(PLAN_NAME, to_json(plan))
    _make_ready(store, plan, codebook)
    for layer in layers:
        settle_layer(layer_store(store, layer.name), plan, layer)
    return plan


def settle_layer(store: Store, base: BuildPlan, layer: LayerSpec) -> BuildPlan:
    """Write the plan of a layer, whose units are those of its cache, or check the one there.

    Raises:
        ConfigError: The layer was begun with other settings.
    """
    plan = BuildPlan(spec=layer.spec, num_units=base.num_units, units_sha256=base.units_sha256)
    if store.exists(PLAN_NAME):
        _refuse_other_plan(store.location, read_model(BuildPlan, store, PLAN_NAME), plan)
    else:
        store.publish_new(PLAN_NAME, to_json(plan))
    _make_ready(store, plan, layer.codebook)
    return plan


def _make_ready(store: Store, plan: BuildPlan, codebook: Codebook) -> None:
    # Done on every run, with the same bytes: what a kill or a damaged disk left out is back.
    store.publish(CODEBOOK_NAME, codebook.to_bytes())
    if plan.spec.layout == "zarr":
        zarr_store.create_store(store, plan.spec, plan.num_units)


def _has(store: Store, name: str, digest: str) -> bool:
    try:
        return store.measure(name).sha256 == digest
    except FileNotFoundError:
        return False


def units_sha256(texts: Iterable[bytes]) -> str:
    """Return the one digest of the contents of every plan unit file, in order."""
    return _sha256_of(files.sha256_bytes(text) for text in texts)


def _sha256_of(digests: Iterable[str]) -> str:
    return files.sha256_bytes("".join(digests).encode())


def _refuse_foreign_folder(store: Store) -> None:
    """Accept a place that is absent, empty, or holds what a driver left that died early."""
    left = []
    for name in store.names():
        if not _EARLY_FILES.fullmatch(name):
            raise ConfigError(
                f"{store.location} is not empty and holds no {PLAN_NAME}. "
                "Choose another --out, or empty it."
            )
        left.append(name)
    for name in left:
        if name != LOCK_NAME:
            store.remove(name)


def _refuse_other_plan(out: str, there: BuildPlan, asked: BuildPlan) -> None:
    if there == asked:
        return
    before, after = there.model_dump(mode="json"), asked.model_dump(mode="json")
    if there.spec.fingerprint != asked.spec.fingerprint:
        raise TokenizerMismatchError(
            f"{out} holds a build with tokenizer {there.spec.fingerprint}, but the codebook is "
            f"{asked.spec.fingerprint}. Use the first codebook, or another --out."
        )
    differences = [
        f"{name}: {_short(old)} there, {_short(new)} now"
        for name, old, new in _differences("", before, after)
        if name != "units_sha256"
    ] or ["the list of images has changed"]
    raise ConfigError(
        f"{out} holds a build with other settings: {'; '.join(differences)}. "
        "Run the first command again to finish it, or choose another --out."
    )


def _differences(prefix: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) or isinstance(new, dict):
        before, after = (value if isinstance(value, dict) else {} for value in (old, new))
        for name in sorted(before.keys() | after.keys()):
            path = f"{prefix}.{name}".removeprefix(".spec").removeprefix(".")
            yield from _differences(path, before.get(name), after.get(name))
    elif old != new:
        if _are_names(old) and _are_names(new) and set(old) != set(new):
            # Of a thousand class names, those that the other does not have.
            yield (
                prefix,
                [name for name in old if name not in new],
                [name for name in new if name not in old],
            )
        else:
            yield prefix, old, new


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _short(value: object) -> str:
    return shorten(json.dumps(value), _MAX_SHOWN)
