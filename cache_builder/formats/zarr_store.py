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

Soft targets and features lie in chunks of at most 1 MiB. `zarr_shard` reads what is written here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.manifest import CacheSpec, FileDigest, Written
from cache_builder.formats.payloads import PAYLOAD_OF_ARRAY, PayloadName
from cache_builder.formats.sample import NewSample
from cache_builder.stores import Store

STORE_NAME = "tokens.zarr"
ABSENT = 65_535

_PART_OF_ARRAY = {"tokens": "tokens", "views": "views", "images": "image"}
_MAX_CHUNK_ROWS = 256
_MAX_PAYLOAD_CHUNK_BYTES = 1 << 20


class _Array(NamedTuple):
    tail: tuple[int, ...]
    dtype: Any
    fill: Any
    dimensions: tuple[str, ...]
    max_chunk_rows: int = _MAX_CHUNK_ROWS


def create_store(store: Store, spec: CacheSpec, num_units: int) -> None:
    """Write the metadata of the group and of its arrays at full shape.

    What is there already is replaced by the same bytes.
    """
    for name, data in _metadata(spec, num_units).items():
        store.publish(name, data)


def metadata_files(spec: CacheSpec, num_units: int) -> tuple[FileDigest, ...]:
    """Return what `create_store` writes; nothing for caches of another layout."""
    if spec.layout != "zarr":
        return ()
    metadata = sorted(_metadata(spec, num_units).items())
    return tuple(FileDigest.of_content(name, data) for name, data in metadata)


class RowWriter:
    """Writes the rows of one unit: one shard of every array, each published whole.

    The shards are made in memory, so that they appear whole or not at all wherever the cache lies.
    """

    def __init__(self, store: Store, spec: CacheSpec, num_units: int, unit: int) -> None:
        """Take the place of the rows."""
        self._store, self._spec = store, spec
        self._num_units, self._unit = num_units, unit
        self._samples: list[NewSample] = []

    def add(self, new: NewSample) -> None:
        """Take the next row.

        Raises:
            ArtifactError: The unit has no more rows.
        """
        if len(self._samples) == self._spec.unit_size:
            raise ArtifactError(f"unit {self._unit} has more than {self._spec.unit_size} samples")
        self._samples.append(new)

    def finish(self) -> Written:
        """Write the rows; a shard whose values all equal the fill is not stored."""
        written = tuple(self._publish()) if self._samples else ()
        return Written(written, len(self._samples), (), _payload_bytes(written))

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Forget the rows."""
        self._samples = []

    def _publish(self) -> Iterator[FileDigest]:
        for name, data in self._shards():
            self._store.publish(name, data)
            yield FileDigest.of_content(name, data)

    def _shards(self) -> Iterator[tuple[str, bytes]]:
        import zarr

        memory: dict[str, Any] = {}
        group = _create_arrays(memory, self._spec, self._num_units)
        metadata = set(memory)
        start = self._unit * self._spec.unit_size
        for name, values in _columns(self._spec, self._samples).items():
            group[name][start : start + self._spec.unit_size] = values
        if self._spec.images_in_cache != "none":
            content = b"".join(new.sample.image or b"" for new in self._samples)
            name = f"images/{self._unit:06d}"
            zarr.create_array(
                group.store,
                name=name,
                shape=(len(content),),
                chunks=(len(content),),
                dtype=np.uint8,
                compressors=None,
                filters=None,
                dimension_names=("byte",),
            )
            # One uncompressed chunk is the bytes themselves.
            memory[f"{name}/c/0"] = content
        for name in sorted(memory.keys() - metadata):
            value = memory[name]
            data = value if isinstance(value, bytes) else value.to_bytes()
            yield f"{STORE_NAME}/{name}", data


def _metadata(spec: CacheSpec, num_units: int) -> dict[str, bytes]:
    """Return the metadata files of the group, by name."""
    memory: dict[str, Any] = {}
    _create_arrays(memory, spec, num_units)
    return {f"{STORE_NAME}/{name}": value.to_bytes() for name, value in memory.items()}


def _create_arrays(memory: dict[str, Any], spec: CacheSpec, num_units: int) -> Any:
    """Create the group and its arrays at full shape in memory; return the group."""
    import zarr
    from zarr.codecs import BloscCodec
    from zarr.storage import MemoryStore

    attributes = {"patchcache": {"fingerprint": spec.fingerprint, "vocab_size": spec.vocab_size}}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3, attributes=attributes)
    rows = spec.unit_size
    for name, array in _arrays(spec).items():
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
    if spec.images_in_cache != "none":
        group.create_group("images")
    return group


def open_group(store: Store) -> Any:
    """Open the group for reading; raises what zarr raises."""
    import zarr
    from zarr.storage import ObjectStore

    place = store.folder(STORE_NAME)
    return zarr.open_group(
        place if isinstance(place, Path) else ObjectStore(place, read_only=True), mode="r"
    )


def vouched_group(store: Store, spec: CacheSpec, digests: Iterable[FileDigest]) -> Any:
    """Return the group in memory, of one unit's shards without images, soft targets and features.

    Every file that a digest is known of has the bytes that it says: a damaged chunk may decode to
    other token ids, and to more of them than there is memory for.

    Raises:
        ValueError: A file has other bytes.
        OSError: A file is missing.
    """
    import zarr
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore

    expected = {file.path: file for file in digests}
    left_out = {*spec.payload_arrays, "images"}
    metadata = {f"{STORE_NAME}/{name}" for name in ("zarr.json", *_metadata_names(spec))}
    memory = {}
    for name in sorted(metadata | expected.keys()):
        array = PurePosixPath(name).parts[1]
        if array in left_out:
            continue
        content = store.read(name)
        if name in expected and (problem := expected[name].problem(content)):
            raise ValueError(f"{store.where(name)} {problem}")
        memory[name.removeprefix(f"{STORE_NAME}/")] = cpu.Buffer.from_bytes(content)
    return zarr.open_group(MemoryStore(memory), mode="r")


def _metadata_names(spec: CacheSpec) -> list[str]:
    return [f"{name}/zarr.json" for name in _arrays(spec)]


def _payload_bytes(written: Iterable[FileDigest]) -> Counter[PayloadName]:
    """Return the size of soft targets and features among the files of one unit, in bytes."""
    sizes = Counter[PayloadName]()
    for file in written:
        payload = PAYLOAD_OF_ARRAY.get(PurePosixPath(file.path).parts[1])
        if payload:
            sizes[payload] += file.bytes
    return sizes


def part_bytes(stored: Iterable[FileDigest]) -> Counter[str]:
    """Return the size of every kind of array among the files of one unit, in bytes."""
    sizes = Counter[str]()
    for file in stored:
        _, name, *_, last = PurePosixPath(file.path).parts
        part = _PART_OF_ARRAY.get(name) or PAYLOAD_OF_ARRAY.get(name)
        if part is None or last == "zarr.json":
            part = "info"
        sizes[part] += file.bytes
    return sizes


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
