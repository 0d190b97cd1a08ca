"""The Zarr layout: the samples of every unit as rows of one Zarr v3 group, `tokens.zarr`.

    tokens        (n, V, rows, cols[, M]) uint16, fill 65,535
    views         (n, V, 5) int32          top, left, height, width, hflip
    sizes         (n, 2) int32             height, width of the decoded picture
    labels        (n,) int64, fill -1      no label
    keys, source  (n,) string
    image_spans   (n, 2) int64             start and stop of the image's bytes in images/NNNNNN
    images/NNNNNN (bytes,) uint8           the images of a unit, end to end, one uncompressed chunk
    extra         (n,) string              JSON of further columns, where the source has any
    soft_ids ...  (n, ...)                 optional payloads, as `payloads` lists them

Unit u owns the rows [u * unit_size, (u + 1) * unit_size); its samples come first, the rest is
fill. Those rows are exactly one Zarr shard of every array, and one process writes it: two writers
in one Zarr shard lose data without an error. The arrays are created at full shape before any
worker starts and never resized. `image_spans` and `images` exist only in a cache with images.

A reader holds the token ids of a unit in memory, which are small. Soft targets and features are
not: they lie in chunks of at most 1 MiB, and the reader holds the last chunk.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.manifest import CacheSpec, FileDigest
from cache_builder.formats.payloads import PAYLOAD_OF_ARRAY, PayloadName
from cache_builder.formats.sample import CachedSample, NewSample

STORE_NAME = "tokens.zarr"
ABSENT = 65_535

_UNREADABLE = (OSError, KeyError, ValueError, RuntimeError)  # what zarr raises of damage
_MAX_CHUNK_ROWS = 256
_MAX_PAYLOAD_CHUNK_BYTES = 1 << 20


class _Array(NamedTuple):
    tail: tuple[int, ...]
    dtype: Any
    fill: Any
    dimensions: tuple[str, ...]
    max_chunk_rows: int = _MAX_CHUNK_ROWS


def create_store(cache_dir: Path, spec: CacheSpec, num_units: int) -> None:
    """Create the group and its arrays at full shape; what is there already is kept."""
    import zarr
    from zarr.codecs import BloscCodec

    group = zarr.open_group(cache_dir / STORE_NAME, mode="a", zarr_format=3)
    group.attrs.update(
        {"patchcache": {"fingerprint": spec.fingerprint, "vocab_size": spec.vocab_size}}
    )
    rows = spec.unit_size
    for name, array in _arrays(spec).items():
        if name in group:
            continue
        most = min(rows, array.max_chunk_rows)
        chunk_rows = max(n for n in range(1, most + 1) if rows % n == 0)
        options: dict[str, Any] = {}
        if array.dtype is not str:
            typesize = np.dtype(array.dtype).itemsize
            options["compressors"] = BloscCodec(
                cname="lz4", shuffle="bitshuffle", typesize=typesize
            )
        group.create_array(
            name,
            shape=(num_units * rows, *array.tail),
            shards=(rows, *array.tail),
            chunks=(chunk_rows, *array.tail),
            dtype=array.dtype,
            fill_value=array.fill,
            dimension_names=array.dimensions,
            **options,
        )


def write_unit(
    cache_dir: Path, spec: CacheSpec, unit: int, samples: list[NewSample]
) -> list[FileDigest]:
    """Write the rows of one unit; return the files that hold them.

    Raises:
        ArtifactError: More samples than a unit has rows.
    """
    import zarr

    if len(samples) > spec.unit_size:
        raise ArtifactError(f"unit {unit} has {len(samples)} samples, more than {spec.unit_size}")
    if not samples:
        return []
    root = cache_dir / STORE_NAME
    group = zarr.open_group(root, mode="r+")
    start = unit * spec.unit_size
    paths = []
    for name, values in _columns(spec, samples).items():
        array = group[name]
        tail = "/".join("0" for _ in array.shape[1:])
        path = root / name / "c" / str(unit) / tail
        # zarr reads a shard before it writes into it, and fails on one that is damaged.
        path.unlink(missing_ok=True)
        array[start : start + spec.unit_size] = values
        paths.append(path)
    if spec.images_in_cache != "none":
        paths.append(_write_images(root, unit, samples))
    # A shard whose values all equal the fill is not stored.
    stored = [path for path in paths if path.is_file()]
    for path in stored:
        files.flush_file(path)
    return [FileDigest.of(cache_dir, path) for path in stored]


def payload_bytes(written: Iterable[FileDigest]) -> Counter[PayloadName]:
    """Return the size of soft targets and features among the files of one unit, in bytes."""
    sizes = Counter[PayloadName]()
    for file in written:
        payload = PAYLOAD_OF_ARRAY.get(PurePosixPath(file.path).parts[1])
        if payload:
            sizes[payload] += file.bytes
    return sizes


class ZarrShard:
    """The samples of one unit: token ids in memory, the rest read when it is asked for."""

    def __init__(self, cache_dir: Path, spec: CacheSpec, unit: int, num_samples: int) -> None:
        """Read the token ids of one unit.

        Raises:
            ArtifactError: The store is missing or damaged.
        """
        import zarr

        root = cache_dir / STORE_NAME
        start = unit * spec.unit_size
        rows = slice(start, start + num_samples)
        self._cache_dir, self._unit = cache_dir, unit
        self._handle: int | None = None
        self._path = root / "images" / f"{unit:06d}" / "c" / "0"
        try:
            group = zarr.open_group(root, mode="r")
            self._tokens: NDArray[np.uint16] = group["tokens"][rows]
            self._views: NDArray[np.int32] = group["views"][rows]
            self._labels: list[int] = group["labels"][rows].tolist()
            self._keys: list[str] = group["keys"][rows].tolist()
            self._extra: list[str] = group["extra"][rows].tolist() if spec.has_extra else []
            # A unit whose images were all skipped has no image file.
            if num_samples and spec.images_in_cache != "none":
                self._spans: list[tuple[int, int]] = group["image_spans"][rows].tolist()
                self._handle = os.open(self._path, os.O_RDONLY)
            self._payloads = {
                name: (array.payload, _Chunks(group[name], start, num_samples))
                for name, array in spec.payload_arrays.items()
            }
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

    def close(self) -> None:
        """Close the image file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _image(self, row: int) -> bytes | None:
        if self._handle is None:
            return None
        start, stop = self._spans[row]
        data = os.pread(self._handle, stop - start, start)
        if len(data) < stop - start:
            raise ArtifactError(f"{self._path} ends before sample {self._keys[row]}.")
        return data

    def _damaged(self, exc: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self._cache_dir / STORE_NAME}: unit {self._unit} cannot be read ({exc}). "
            f"Run `patchcache verify {self._cache_dir}`."
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


def _arrays(spec: CacheSpec) -> dict[str, _Array]:
    stage = ("stage",) if spec.num_stages > 1 else ()
    dimensions = ("sample", "view", "row", "column", *stage)
    num_views = spec.view_spec.num_views
    arrays = {
        "tokens": _Array(spec.tokens_shape, np.uint16, ABSENT, dimensions),
        "views": _Array((num_views, 5), np.int32, 0, ("sample", "view", "box")),
        "sizes": _Array((2,), np.int32, 0, ("sample", "side")),
        "labels": _Array((), np.int64, -1, ("sample",)),
        "keys": _Array((), str, "", ("sample",)),
        "source": _Array((), str, "", ("sample",)),
    }
    if spec.images_in_cache != "none":
        arrays["image_spans"] = _Array((2,), np.int64, 0, ("sample", "span"))
    if spec.has_extra:
        arrays["extra"] = _Array((), str, "", ("sample",))
    for name, payload in spec.payload_arrays.items():
        row_bytes = payload.dtype.itemsize * math.prod(payload.shape)
        arrays[name] = _Array(
            payload.shape,
            payload.dtype,
            payload.fill,
            ("sample", *payload.dimensions),
            min(_MAX_CHUNK_ROWS, max(1, _MAX_PAYLOAD_CHUNK_BYTES // row_bytes)),
        )
    return arrays


def _columns(spec: CacheSpec, samples: list[NewSample]) -> dict[str, NDArray[Any]]:
    """Return one unit's rows of every array, padded with fill to the unit's size."""
    values: dict[str, list[Any]] = {
        "tokens": [new.sample.token_ids for new in samples],
        "views": [new.sample.views for new in samples],
        "sizes": [new.image_size for new in samples],
        "labels": [-1 if new.sample.label is None else new.sample.label for new in samples],
        "keys": [new.sample.key for new in samples],
        "source": [new.source for new in samples],
    }
    if spec.images_in_cache != "none":
        stops = np.cumsum([len(new.sample.image or b"") for new in samples])
        values["image_spans"] = list(np.stack([np.concatenate([[0], stops[:-1]]), stops], 1))
    if spec.has_extra:
        values["extra"] = [_json_text(new.sample.extra) for new in samples]
    for name in spec.payload_arrays:
        values[name] = [getattr(new.sample, name) for new in samples]
    columns = {}
    for name, array in _arrays(spec).items():
        dtype = object if array.dtype is str else array.dtype
        column = np.full((spec.unit_size, *array.tail), array.fill, dtype)
        column[: len(samples)] = values[name]
        columns[name] = column
    return columns


def _json_text(extra: Mapping[str, Any]) -> str:
    return files.canonical_json(dict(extra)).decode() if extra else ""


def _write_images(root: Path, unit: int, samples: list[NewSample]) -> Path:
    """Store the images of a unit end to end, as an array that is one uncompressed chunk."""
    import zarr

    content = np.frombuffer(b"".join(new.sample.image or b"" for new in samples), np.uint8)
    name = f"images/{unit:06d}"
    array = zarr.create_array(
        root,
        name=name,
        shape=content.shape,
        chunks=content.shape,
        dtype=np.uint8,
        compressors=None,
        filters=None,
        overwrite=True,
        dimension_names=("byte",),
    )
    array[:] = content
    return root / name / "c" / "0"
