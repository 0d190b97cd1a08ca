"""The one reader of finished caches, whichever layout they have."""

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import ArtifactError, TokenizerMismatchError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.columns import ShardColumns, no_columns
from cache_builder.formats.layers import (
    LayeredShard,
    Part,
    choose_tokenizer,
    merged_manifest,
    open_layer,
)
from cache_builder.formats.manifest import (
    CacheManifest,
    UnitRecord,
    read_model,
    unit_record_name,
)
from cache_builder.formats.payloads import (
    FeatureTotals,
    PayloadName,
    SoftTotals,
    sum_features,
    sum_soft,
)
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.units import Shard, array_problem, open_unit
from cache_builder.stores import Store, open_store

_MAX_OPEN_SHARDS = 64
_PAYLOAD_NAMES: frozenset[str] = frozenset(get_args(PayloadName))
_TOKEN_TYPE = np.dtype(np.uint16)
_BOX_TYPE = np.dtype(np.int32)


class TokenCache:
    """A finished cache, read sample by sample in any order.

    A sample has a place (shard, row), and an index that counts through the shards. Shards are
    opened when first read, and the least recently read are closed again. One object belongs to
    one thread; a process that forks gives each child its own.

    A cache that was extended holds the targets of several tokenizers, or views that were added
    later, in layers. One object shows one tokenizer, with all its views in the order of their
    indices; `manifest` is what a manifest would say of a cache that held just that.
    """

    def __init__(
        self,
        store: Store,
        manifest: CacheManifest,
        parts: Sequence[Part],
        images: CacheManifest | None = None,
    ) -> None:
        """Keep what was found; call `open` to get a cache by its place."""
        self.store = store
        self.manifest = manifest
        self._parts = parts
        self._images = images  # the cache's own manifest, where no part holds the images
        self._starts = [0, *accumulate(shard.num_samples for shard in manifest.shards)]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._tokens_shape = manifest.spec.tokens_shape
        self._vocab_size = manifest.vocab_size
        self._payload_arrays = manifest.spec.payload_arrays

    @classmethod
    def open(cls, path: str | Path, tokenizer: str | None = None) -> Self:
        """Open a cache, in a directory or at a URL of an object store.

        Args:
            path: Where it lies.
            tokenizer: Fingerprint of a tokenizer, or its first characters; None is the one that
                the cache was built with first.

        Raises:
            ArtifactError: The build has not finished, or a manifest is damaged.
            TokenizerMismatchError: The cache holds no targets of that tokenizer.
        """
        store = open_store(path)
        base = CacheManifest.load(store)
        fingerprint = choose_tokenizer(base, tokenizer, store.location)
        parts = [Part(store, base)] if base.fingerprint == fingerprint else []
        parts += [
            open_layer(store, layer)
            for layer in sorted(base.layers, key=lambda layer: layer.first_view)
            if layer.fingerprint == fingerprint
        ]
        manifest = base if parts == [Part(store, base)] else merged_manifest(base, parts)
        # Layers hold no images; theirs are the cache's.
        elsewhere = parts[0].manifest is not base and "image" in base.payloads
        return cls(store, manifest, parts, base if elsewhere else None)

    @property
    def location(self) -> str:
        """Where the cache lies, a path or a URL."""
        return self.store.location

    @cached_property
    def codebook(self) -> Codebook:
        """The codebook that the token ids belong to, from the copy in the cache.

        Raises:
            ArtifactError: The copy is missing or damaged.
            TokenizerMismatchError: The copy is another tokenizer's.
        """
        store, manifest = self._parts[0]
        place = store.where(manifest.codebook.path)
        try:
            codebook = Codebook.from_bytes(store.read(manifest.codebook.path), place)
        except FileNotFoundError as exc:
            raise ArtifactError(f"{place} is missing. Copy it back from its source.") from exc
        if codebook.fingerprint != self.manifest.fingerprint:
            raise TokenizerMismatchError(
                f"{place} is tokenizer {codebook.fingerprint}, but the token ids in "
                f"{self.location} come from {self.manifest.fingerprint}. "
                "Put the right codebook back."
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
        self._check_array(sample, "views", (self._tokens_shape[0], 5), _BOX_TYPE)
        for name, array in self._payload_arrays.items():
            if payloads is None or array.payload in payloads:
                self._check_array(sample, name, array.shape, array.dtype)
        self._check_ids(sample.token_ids, sample.key)
        if sample.soft_ids is not None:
            self._check_ids(sample.soft_ids, sample.key)
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
                f"{self.location}: views of shard {index} are {columns.views.shape[1:]}, expected "
                f"{(num_views, 5)}. Run `patchcache verify {self.location}`."
            )
        shape, found = self._tokens_shape, columns.token_ids
        if found.shape[1:] != shape or found.dtype != _TOKEN_TYPE:
            raise ArtifactError(
                f"{self.location}: token ids of shard {index} are {found.shape[1:]} {found.dtype}, "
                f"expected {shape} {_TOKEN_TYPE}. Run `patchcache verify {self.location}`."
            )
        self._check_ids(found, f"shard {index}")
        return columns

    def part_bytes(self, index: int) -> Counter[str]:
        """Return what the parts of one shard take, bytes without tar headers.

        Parts are image, tokens, views, soft, features, and info for all the rest.
        """
        return self.shard(index).part_bytes()

    def damage(self, index: int) -> str | None:
        """Digest the files of one shard; say what is wrong with them, or None."""
        images = [] if self._images is None else [Part(self.store, self._images)]
        for store, manifest in (*self._parts, *images):
            info = manifest.shards[index]
            for file in (*info.files, info.record):
                if damage := file.damage(store):
                    return damage
        return None

    def totals(self, index: int) -> tuple[SoftTotals | None, FeatureTotals | None]:
        """Return what was measured of one shard's `soft` and `features`, by its commit records."""
        name = unit_record_name(index)
        records = [read_model(UnitRecord, part.store, name) for part in self._parts]
        return (
            sum_soft(record.soft for record in records if record.soft),
            sum_features(record.features for record in records if record.features),
        )

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

    def _check_ids(self, ids: NDArray[np.uint16], of_what: str) -> None:
        """Refuse ids that a model would look up behind the end of its tables."""
        if (largest := int(ids.max())) >= self._vocab_size:
            raise ArtifactError(
                f"{self.location}: token id {largest} of {of_what} is not below "
                f"K={self._vocab_size}. Run `patchcache verify {self.location}`."
            )

    def _check_array(
        self, sample: CachedSample, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        if problem := array_problem(sample, name, shape, dtype):
            raise ArtifactError(
                f"{self.location}: {problem}. Run `patchcache verify {self.location}`."
            )

    def _open_shard(self, index: int) -> Shard:
        images = [] if self._images is None else [Part(self.store, self._images)]
        opened: list[Shard] = []
        with contextlib.ExitStack() as if_one_fails:
            for part in (*self._parts, *images):
                opened.append(_open_unit_of(part, index))
                if_one_fails.callback(opened[-1].close)
            if_one_fails.pop_all()
        if len(opened) == 1:
            return opened[0]
        image_shard = opened.pop() if images else None
        return LayeredShard(self.location, opened, image_shard)


def _open_unit_of(part: Part, unit: int) -> Shard:
    manifest = part.manifest
    return open_unit(part.store, manifest.spec, unit, manifest.shards[unit], manifest.store_files)
