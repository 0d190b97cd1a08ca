"""Which files make up a finished cache, so that just these are sent to a Hub, or fetched from it.

The names come from the manifests, and a manifest that was fetched is believed no more than any
other text from the net: a name that leads out of the cache is refused.
"""

from pathlib import PurePosixPath
from typing import NamedTuple

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    SKIPPED_NAME,
    CacheManifest,
    FileDigest,
    UnitRecord,
    read_model,
    to_json,
    unit_record_name,
)
from cache_builder.formats.plan import BuildPlan, plan_unit_name
from cache_builder.hub import RemoteFile
from cache_builder.planning import units_sha256
from cache_builder.stores import Store


class CacheFiles(NamedTuple):
    """The files of a cache and its layers but the cache's own manifest, which comes last."""

    digested: tuple[FileDigest, ...]
    derived: tuple[str, ...]  # what follows from the others: the plan, and who was skipped


def files_below(manifest: CacheManifest, num_units: int, layer: str = "") -> CacheFiles:
    """Return the files of a cache or one of its layers, by their names relative to the cache.

    Args:
        manifest: Of the cache or layer.
        num_units: Of the cache.
        layer: Its folder; empty is the cache itself.

    Raises:
        ArtifactError: A name leads out of the cache.
    """
    prefix = f"{layer}/" if layer else ""
    listed = [
        *(file for shard in manifest.shards for file in (*shard.files, shard.record)),
        manifest.codebook,
        *manifest.store_files,
    ]
    digested = [file.model_copy(update={"path": prefix + file.path}) for file in listed]
    digested += [below.manifest for below in manifest.layers]
    derived = [prefix + PLAN_NAME, prefix + SKIPPED_NAME]
    if not layer:
        derived += [plan_unit_name(unit) for unit in range(num_units)]
    for name in (*derived, *(file.path for file in digested)):
        _refuse_outside(name)
    return CacheFiles(tuple(digested), tuple(derived))


def derived_damage(store: Store, manifest: CacheManifest, layer: str = "") -> str | None:
    """Say which file that follows from the others is not what they say, or None.

    Args:
        store: Of the cache; everything but its manifest is there.
        manifest: Of the cache or layer.
        layer: Its folder; empty is the cache itself.
    """
    prefix = f"{layer}/" if layer else ""
    plan = read_model(BuildPlan, store, prefix + PLAN_NAME)
    if plan.spec != manifest.spec or plan.num_units != len(manifest.shards):
        return f"{store.where(prefix + PLAN_NAME)} is not the plan of the manifest"
    if not layer:
        names = (plan_unit_name(unit) for unit in range(plan.num_units))
        if units_sha256(store.read(name) for name in names) != plan.units_sha256:
            return f"the files below {store.where('plan')} are not those of {PLAN_NAME}"
    records = (prefix + unit_record_name(unit) for unit in range(plan.num_units))
    skipped = b"".join(
        to_json(sample)
        for name in records
        for sample in read_model(UnitRecord, store, name).skipped
    )
    if store.read(prefix + SKIPPED_NAME) != skipped:
        return f"{store.where(prefix + SKIPPED_NAME)} is not that of the commit records"
    return None


def is_on_hub(there: RemoteFile | None, store: Store, name: str, sha256: str | None = None) -> bool:
    """Whether a Hub has just the file of this name that is in `store`.

    Args:
        there: What the Hub says of the file, None if it lists none.
        store: Where the file is.
        name: The file.
        sha256: Its digest where it is known; it is not read for it again.
    """
    if there is None or there.bytes != store.size(name):
        return False
    if there.sha256 is not None:
        return there.sha256 == (sha256 or store.measure(name).sha256)
    return there.blob == git_blob(store.read(name))


def git_blob(data: bytes) -> str:
    """Return what git calls a file of this content, by which a Hub lists small files."""
    return files.sha1_bytes(b"blob %d\0" % len(data) + data)


def _refuse_outside(name: str) -> None:
    parts = PurePosixPath(name).parts
    odd = {"..", "."} & set(name.split("/")) or "\\" in name or ":" in name or "\0" in name
    if not parts or name.startswith("/") or "" in name.split("/") or odd:
        raise ArtifactError(
            f"{MANIFEST_NAME} names {name!r}, which is no file below a cache. Nothing was written."
        )
