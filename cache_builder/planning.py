"""The plan of a build: written once, and the measure of every later run of the same command."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cache_builder import files
from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats import zarr_store
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    PLAN_NAME,
    BuildPlan,
    CacheSpec,
    plan_unit_path,
    read_model,
    to_json,
)
from cache_builder.sources import Listing

# What a driver writes before plan.json: plan units, and files under temporary names.
_EARLY_FILES = re.compile(r"plan|plan/\d{6,}\.json|(plan/)?\.[^/]+\.tmp")


def settle_plan(out: Path, spec: CacheSpec, listing: Listing, codebook: Codebook) -> BuildPlan:
    """Write the plan, or check that the one that is there is this one; make ready for workers.

    Raises:
        ConfigError: `out` holds a build with other settings or images, or something else.
        TokenizerMismatchError: It holds a build with another tokenizer.
    """
    # The units are made twice, here and below, and never held all at once.
    digest = units_sha256(map(to_json, listing.units))
    plan = BuildPlan(spec=spec, num_units=listing.num_units, units_sha256=digest)
    path = out / PLAN_NAME
    if path.is_file():
        _refuse_other_plan(out, read_model(BuildPlan, path), plan)
    else:
        _refuse_foreign_folder(out)
    for unit, text in enumerate(map(to_json, listing.units)):
        target = plan_unit_path(out, unit)
        if not target.is_file() or target.read_bytes() != text:
            files.publish(target, text)
    if not path.is_file():
        files.publish_new(path, to_json(plan))
    # Done on every run, with the same bytes: what a kill or a damaged disk left out is back.
    codebook.save(out / CODEBOOK_NAME)
    if spec.layout == "zarr":
        zarr_store.create_store(out, spec, listing.num_units)
    return plan


def units_sha256(texts: Iterable[bytes]) -> str:
    """Return the one digest of the contents of every plan unit file, in order."""
    return files.sha256_bytes("".join(files.sha256_bytes(text) for text in texts).encode())


def _refuse_foreign_folder(out: Path) -> None:
    """Accept a folder that is absent, empty, or holds what a driver left that died early."""
    left = []
    for path in out.rglob("*"):
        if not _EARLY_FILES.fullmatch(path.relative_to(out).as_posix()):
            raise ConfigError(
                f"{out} is not empty and holds no {PLAN_NAME}. Choose another --out, or empty it."
            )
        left.append(path)
    for path in left:
        if path.is_file():
            path.unlink()


def _refuse_other_plan(out: Path, there: BuildPlan, asked: BuildPlan) -> None:
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
        yield prefix, old, new


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
