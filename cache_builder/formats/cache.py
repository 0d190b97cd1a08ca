"""The one reader of finished caches, whichever layout they have."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Self, get_args

import numpy as np

from cache_builder.errors import ArtifactError, TokenizerMismatchError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.columns import ShardColumns, no_columns
from cache_builder.formats.manifest import (
    CacheManifest,
    UnitRecord,
    read_model,
    unit_record_path,
)
from cache_builder.formats.payloads import PayloadName
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.shards import TarShard, shard_path
from cache_builder.formats.zarr_store import ZarrShard

_MAX_OPEN_SHARDS = 64
_PAYLOAD_NAMES: frozenset[str] = frozenset(get_args(PayloadName))
_TOKEN_TYPE = np.dtype(np.uint16)


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

    def close(self) -> None:
        """Release the files."""


class TokenCache:
    """A finished cache, read sample by sample in any order.

    A sample has a place (shard, row), and an index that counts through the shards. Shards are
    opened when first read, and the least recently read are closed again. One object belongs to
    one thread; a process that forks gives each child its own.
    """

    def __init__(self, path: Path, manifest: CacheManifest) -> None:
        """Keep the manifest; call `open` to get one from disk."""
        self.path = path
        self.manifest = manifest
        self._starts = [0, *accumulate(shard.num_samples for shard in manifest.shards)]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._tokens_shape = manifest.spec.tokens_shape
        self._payload_arrays = manifest.spec.payload_arrays

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a cache.

        Raises:
            ArtifactError: The build has not finished, or the manifest is damaged.
        """
        path = Path(path)
        return cls(path, CacheManifest.load(path))

    @cached_property
    def codebook(self) -> Codebook:
        """The codebook that the token ids belong to, from the copy in the cache.

        Raises:
            TokenizerMismatchError: The copy is another tokenizer's.
        """
        path = self.path / self.manifest.codebook.path
        codebook = Codebook.load(path)
        if codebook.fingerprint != self.manifest.fingerprint:
            raise TokenizerMismatchError(
                f"{path} is tokenizer {codebook.fingerprint}, but the token ids in {self.path} "
                f"come from {self.manifest.fingerprint}. Put the right codebook back."
            )
        return codebook

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> CachedSample:
        """Return the sample that `index` counts to."""
        return self.read(*self.place(index))

    def place(self, index: int) -> tuple[int, int]:
        """Return (shard, row) of a sample index.

        Raises:
            IndexError: No such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a cache of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - self._starts[shard]

    def read(
        self, shard: int, row: int, payloads: Collection[PayloadName] | None = None
    ) -> CachedSample:
        """Return one sample by its place.

        Args:
            shard: Number of the shard.
            row: Of the shard.
            payloads: Which of `image`, `soft` and `features` to read; None reads all that the
                cache has. What is left out, or not in the cache, is None in the sample.

        Raises:
            ArtifactError: The shard is damaged, or an array has another shape than it says.
            ValueError: There is no payload of that name.
        """
        if payloads is not None and not set(payloads) <= _PAYLOAD_NAMES:
            raise ValueError(f"payloads {sorted(payloads)} are not all of {sorted(_PAYLOAD_NAMES)}")
        sample = self.shard(shard).read(row, payloads)
        self._check_array(sample, "token_ids", self._tokens_shape, _TOKEN_TYPE)
        for name, array in self._payload_arrays.items():
            if payloads is None or array.payload in payloads:
                self._check_array(sample, name, array.shape, array.dtype)
        return sample

    def read_shard(
        self, index: int, skip: int = 0, payloads: Collection[PayloadName] | None = None
    ) -> Iterator[CachedSample]:
        """Yield the samples of one shard in order, from the `skip`-th on."""
        for row in range(skip, len(self.shard(index))):
            yield self.read(index, row, payloads)

    def columns(self, index: int) -> ShardColumns:
        """Return the targets of one shard as arrays; its images are not read.

        Raises:
            ArtifactError: The shard is damaged, or an array has another shape than it says.
        """
        num_views = self.manifest.view_spec.num_views
        if not self.manifest.shards[index].num_samples:
            return no_columns((num_views, 5), self._tokens_shape)
        columns = self.shard(index).columns()
        if columns.views.shape[1:] != (num_views, 5):
            raise ArtifactError(
                f"{self.path}: views of shard {index} are {columns.views.shape[1:]}, expected "
                f"{(num_views, 5)}. Run `patchcache verify {self.path}`."
            )
        shape, found = self._tokens_shape, columns.token_ids
        if found.shape[1:] != shape or found.dtype != _TOKEN_TYPE:
            raise ArtifactError(
                f"{self.path}: token ids of shard {index} are {found.shape[1:]} {found.dtype}, "
                f"expected {shape} {_TOKEN_TYPE}. Run `patchcache verify {self.path}`."
            )
        return columns

    def shard(self, index: int) -> Shard:
        """Return one shard, opened."""
        shard = self._open.get(index)
        if shard is None:
            shard = self._open_shard(index)
            self._open[index] = shard
            if len(self._open) > _MAX_OPEN_SHARDS:
                _, oldest = self._open.popitem(last=False)
                oldest.close()
        else:
            self._open.move_to_end(index)
        return shard

    def close(self) -> None:
        """Close every open shard."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        """Return the cache."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close every open shard."""
        self.close()

    def _check_array(
        self, sample: CachedSample, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        values = getattr(sample, name)
        if values is None or values.shape != shape or values.dtype != dtype:
            found = "missing" if values is None else f"{values.shape} {values.dtype}"
            raise ArtifactError(
                f"{self.path}: {name.replace('_', ' ')} of {sample.key} are {found}, expected "
                f"{shape} {dtype}. Run `patchcache verify {self.path}`."
            )

    def _open_shard(self, index: int) -> Shard:
        info = self.manifest.shards[index]
        if self.manifest.spec.layout == "zarr":
            return ZarrShard(self.path, self.manifest.spec, index, info.num_samples)
        record = read_model(UnitRecord, unit_record_path(self.path, index))
        if len(record.samples) != info.num_samples:
            raise ArtifactError(
                f"{self.path}: unit {index} lists {len(record.samples)} samples, the manifest "
                f"says {info.num_samples}. Run `patchcache verify {self.path}`."
            )
        return TarShard(shard_path(self.path, index), record)
