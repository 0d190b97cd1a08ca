"""Reading one unit of the Zarr layout.

Token ids, views, labels and keys of a unit are read at once, as every sample is asked for them.
Soft targets and features are read by whole chunks, the last of which is kept, and images by their
span of the unit's one file.
"""

import json
from collections import Counter
from collections.abc import Collection, Sequence, Sized
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import ArtifactError
from cache_builder.formats.columns import ShardColumns
from cache_builder.formats.headers import shorten
from cache_builder.formats.manifest import (
    CacheSpec,
    FileDigest,
    ShardInfo,
    UnitRecord,
    read_model,
    unit_record_name,
)
from cache_builder.formats.payloads import PayloadName
from cache_builder.formats.sample import CachedSample, SampleInfo, read_sample
from cache_builder.formats.zarr_store import STORE_NAME, open_group, part_bytes, vouched_group
from cache_builder.stores import RandomReader, Store

# What zarr and its codecs raise of damage.
_UNREADABLE = (
    OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError,
    AssertionError, MemoryError, SystemError,
)  # fmt: skip


class ZarrShard:
    """The samples of one unit: token ids in memory, the rest read when it is asked for."""

    def __init__(
        self,
        store: Store,
        spec: CacheSpec,
        unit: int,
        claim: ShardInfo,
        store_files: Sequence[FileDigest] = (),
    ) -> None:
        """Read the token ids of one unit.

        Args:
            store: Where the group lies.
            spec: Of the cache or layer.
            unit: Its number.
            claim: What the manifest says of it.
            store_files: Digests of the metadata that units share, where they are known.

        Raises:
            ArtifactError: The store is missing or damaged.
        """
        num_samples = claim.num_samples
        start = unit * spec.unit_size
        rows = slice(start, start + num_samples)
        self._store, self._unit = store, unit
        self._images: RandomReader | None = None
        self._name = f"{STORE_NAME}/images/{unit:06d}/c/0"
        try:
            group = vouched_group(store, spec, (*claim.files, *store_files))
            self._tokens: NDArray[np.uint16] = group["tokens"][rows]
            self._views: NDArray[np.int32] = group["views"][rows]
            self._labels: list[int] = group["labels"][rows].tolist()
            self._keys: list[str] = group["keys"][rows].tolist()
            self._group, self._rows = group, rows
            self._extra: list[str] = group["extra"][rows].tolist() if spec.has_extra else []
            # A unit whose images were all skipped has no image file.
            has_images = num_samples > 0 and spec.images_in_cache != "none"
            if has_images:
                self._spans: list[tuple[int, int]] = group["image_spans"][rows].tolist()
            self._payloads = {}
            if spec.payload_arrays:
                large = open_group(store)
                self._payloads = {
                    name: (array.payload, _Chunks(large[name], start, num_samples))
                    for name, array in spec.payload_arrays.items()
                }
            self._check_rows(num_samples, has_images=has_images)
            # Last, because nobody closes it where something else is wrong.
            if has_images:
                self._images = store.open(self._name)
        except _UNREADABLE as exc:
            raise self._damaged(exc) from exc

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._keys)

    @property
    def keys(self) -> list[str]:
        """Sample keys, in order."""
        return self._keys

    def read(self, row: int, payloads: Collection[PayloadName] | None = None) -> CachedSample:
        """Return one sample with these optional payloads; None means all."""
        label = self._labels[row]
        try:
            arrays = {
                name: chunks.row(row)
                for name, (payload, chunks) in self._payloads.items()
                if payloads is None or payload in payloads
            }
            extra = json.loads(self._extra[row] or "{}") if self._extra else {}
        except _UNREADABLE as exc:
            raise self._damaged(exc) from exc
        return CachedSample(
            key=self._keys[row],
            image=self._image(row) if payloads is None or "image" in payloads else None,
            label=None if label < 0 else label,
            views=self._views[row],
            token_ids=self._tokens[row],
            extra=extra,
            **arrays,
        )

    def columns(self) -> ShardColumns:
        """Return the targets of all samples; images, soft targets and features are not read.

        Raises:
            ArtifactError: The sizes of the images cannot be read.
        """
        try:
            image_sizes = self._group["sizes"][self._rows]
        except _UNREADABLE as exc:
            raise self._damaged(exc) from exc
        labels = np.array(self._labels, np.int64)
        return ShardColumns(self._keys, labels, image_sizes, self._views, self._tokens)

    def info(self, row: int) -> SampleInfo:
        """Return where a sample came from and how large its picture was.

        Raises:
            ArtifactError: The store is damaged.
        """
        return self._infos[row]

    def part_bytes(self) -> Counter[str]:
        """Return what the parts of the unit take, bytes, by its commit record."""
        record = read_model(UnitRecord, self._store, unit_record_name(self._unit))
        return part_bytes(record.files)

    @cached_property
    def _infos(self) -> list[SampleInfo]:
        try:
            sources = self._group["source"][self._rows].tolist()
            sizes = self._group["sizes"][self._rows].tolist()
        except _UNREADABLE as exc:
            raise self._damaged(exc) from exc
        return [
            SampleInfo(source, (height, width))
            for source, (height, width) in zip(sources, sizes, strict=True)
        ]

    def close(self) -> None:
        """Close the image file."""
        if self._images is not None:
            self._images.close()

    def _image(self, row: int) -> bytes | None:
        if self._images is None:
            return None
        start, stop = self._spans[row]
        where = self._store.where(self._name)
        return read_sample(self._images, start, stop, self._keys[row], where, self._store.location)

    def _check_rows(self, num_samples: int, *, has_images: bool) -> None:
        """Refuse arrays that are shorter than the unit."""
        arrays: list[Sized] = [self._tokens, self._views, self._labels, self._keys]
        arrays += [self._extra] if self._extra else []
        arrays += [self._spans] if has_images else []
        lengths = {len(array) for array in arrays}
        if lengths != {num_samples}:
            raise self._damaged(ValueError(f"arrays of {lengths} rows, expected {num_samples}"))

    def _damaged(self, exc: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self._store.where(STORE_NAME)}: unit {self._unit} cannot be read "
            f"({shorten(str(exc)) or type(exc).__name__}). "
            f"Run `patchcache verify {self._store.location}`."
        )


class _Chunks:
    """One unit's rows of an array, read by whole chunks, the last of which is kept."""

    def __init__(self, array: Any, start: int, num_samples: int) -> None:
        self._array = array
        self._start = start
        self._num_samples = num_samples
        self._first = -1
        self._rows: NDArray[Any] = np.empty(0)

    def row(self, index: int) -> NDArray[Any]:
        size = self._array.chunks[0]
        first = index // size * size
        if first != self._first:
            stop = min(first + size, self._num_samples)
            self._rows = self._array[self._start + first : self._start + stop]
            self._first = first
        found: NDArray[Any] = self._rows[index - first]
        return found
