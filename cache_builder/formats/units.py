"""One finished unit of a cache, whichever layout it has: how it is opened and what it must hold."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np

from cache_builder.errors import ArtifactError
from cache_builder.formats.columns import ShardColumns
from cache_builder.formats.manifest import (
    CacheSpec,
    FileDigest,
    ShardInfo,
    UnitRecord,
    read_model,
    unit_record_name,
)
from cache_builder.formats.payloads import PayloadName
from cache_builder.formats.sample import CachedSample, SampleInfo
from cache_builder.formats.shards import TarShard
from cache_builder.formats.zarr_shard import ZarrShard
from cache_builder.stores import Store

IMAGE_ALONE: frozenset[PayloadName] = frozenset({"image"})


class Shard(Protocol):
    """The samples of one unit."""

    def __len__(self) -> int:
        """Return the number of samples."""

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys, in order."""

    def read(self, row: int, payloads: Collection[PayloadName] | None = None) -> CachedSample:
        """Return one sample with these optional payloads; None means all."""

    def columns(self) -> ShardColumns:
        """Return the targets of all samples as arrays."""

    def info(self, row: int) -> SampleInfo:
        """Return where a sample came from and how large its picture was."""

    def part_bytes(self) -> Counter[str]:
        """Return what image, tokens, views, soft, features, and info take, bytes."""

    def close(self) -> None:
        """Release the files."""


def array_problem(
    sample: CachedSample, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> str | None:
    """Say what is wrong with the shape or type of an array of a sample, or None."""
    values = getattr(sample, name)
    if values is not None and values.shape == shape and values.dtype == dtype:
        return None
    found = "missing" if values is None else f"{values.shape} {values.dtype}"
    return f"{name.replace('_', ' ')} of {sample.key} are {found}, expected {shape} {dtype}"


def open_unit(
    store: Store,
    spec: CacheSpec,
    unit: int,
    claim: ShardInfo,
    store_files: Sequence[FileDigest] = (),
) -> Shard:
    """Open the samples of one finished unit.

    What is read whole, the commit record of a tar and the small arrays of a Zarr store, is held
    against its digest. Images, and the members of a tar, are not: `verify` does that.

    Args:
        store: Of the cache or layer.
        spec: Of the cache or layer.
        unit: Its number.
        claim: What the manifest says of it, or would say by its commit record.
        store_files: Digests of the metadata of the Zarr group, where they are known.

    Raises:
        ArtifactError: They are missing or damaged, or not as many as expected.
    """
    if spec.layout == "zarr":
        return ZarrShard(store, spec, unit, claim, store_files)
    record = read_model(UnitRecord, store, unit_record_name(unit), claim.record)
    if len(record.samples) != claim.num_samples:
        raise ArtifactError(
            f"{store.location}: unit {unit} lists {len(record.samples)} samples, the manifest "
            f"says {claim.num_samples}. Run `patchcache verify {store.location}`."
        )
    return TarShard(store, unit, record)
