"""The WebDataset layout: a unit of samples as one plain tar.

    {key}.jpg           the image, in its own format (absent with --images-in-cache none)
    {key}.json          label, source path, height and width of the decoded picture, `extra`
    {key}.tokens.npy    (V, rows, cols[, M]) uint16 token ids
    {key}.views.npy     (V, 5) int32 boxes: top, left, height, width, hflip
    {key}.soft_ids.npy ...      optional payloads, as `payloads` lists them

Any tar or WebDataset reader reads it. Ours does not walk it: the unit's commit record holds the
byte offset of every member, so one `pread` brings a whole sample, in any order. Features
come last, so that a reader that leaves them out reads that much less. Modification times, owners
and order are fixed, so the same samples give the same bytes.
"""

import contextlib
import hashlib
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from pydantic import BaseModel, Field, JsonValue, ValidationError

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.columns import NO_LABEL, ShardColumns, npy_column
from cache_builder.formats.headers import first_problem, shorten
from cache_builder.formats.manifest import FileDigest, SampleEntry, UnitRecord, Written
from cache_builder.formats.payloads import PAYLOAD_OF_ARRAY, PayloadName
from cache_builder.formats.sample import (
    CachedSample,
    NewSample,
    SampleInfo,
    from_npy,
    npy_bytes,
    read_sample,
)
from cache_builder.formats.tar_stream import TarStream
from cache_builder.stores import RandomReader, Store

TOKENS = "tokens.npy"
VIEWS = "views.npy"
INFO = "json"

_ARRAY_OF_EXTENSION = {f"{name}.npy": name for name in PAYLOAD_OF_ARRAY}
_PAYLOAD_OF_EXTENSION: dict[str, PayloadName | None] = {
    **dict.fromkeys((INFO, TOKENS, VIEWS)),
    **{extension: PAYLOAD_OF_ARRAY[name] for extension, name in _ARRAY_OF_EXTENSION.items()},
}
_PART_OF_EXTENSION = {INFO: "info", TOKENS: "tokens", VIEWS: "views"}
_SEE_WHAT_ELSE = "Run `patchcache verify` on its cache to see what else is."
_BLOCK_BYTES = 512
_READ_BYTES = 1 << 22  # at a time, where no images lie between the targets
_GAP_BYTES = 1 << 12  # that are rather read than jumped over


def shard_name(unit: int) -> str:
    """Return the name of one unit's tar."""
    return f"shards/{unit:06d}.tar"


class ShardWriter:
    """Writes one unit as a tar, which appears when `finish` returns and not before.

    A context manager: leaving it without `finish` leaves nothing behind.
    """

    def __init__(self, store: Store, unit: int) -> None:
        """Begin a tar under a temporary name."""
        self._name = shard_name(unit)
        self._entries: list[SampleEntry] = []
        self._publishing = contextlib.ExitStack()
        file = self._publishing.enter_context(store.publishing(self._name))
        self._file = _Hashed(file)
        self._tar = TarStream(self._file)

    def add(self, new: NewSample) -> None:
        """Append one sample."""
        key, content = new.sample.key, _members(new)
        starts = self._tar.add({f"{key}.{name}": data for name, data in content.items()})
        places = zip(starts, map(len, content.values()), strict=True)
        members = dict(zip(content, places, strict=True))
        self._entries.append(SampleEntry(key=key, members=members))

    def finish(self) -> Written:
        """Publish the tar and say where its members lie."""
        self._tar.finish()
        self._publishing.close()
        digest = FileDigest(
            path=self._name, bytes=self._file.num_bytes, sha256=self._file.digest.hexdigest()
        )
        return Written(
            (digest,), len(self._entries), tuple(self._entries), _payload_bytes(self._entries)
        )

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Discard the tar unless it is finished."""
        if exc_info[0] is None:
            exc_info = (_Unfinished, _Unfinished(), None)
        with contextlib.suppress(_Unfinished):
            self._publishing.__exit__(*exc_info)


class _Unfinished(Exception):  # noqa: N818  no error: what makes `publishing` discard
    """A writer was left before its end."""


class _Hashed:
    """A file that is digested while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def read_shard(path: Path) -> Iterator[CachedSample]:
    """Walk a tar without its commit record, sample by sample.

    Raises:
        ArtifactError: The tar is cut short, or a sample lacks its targets.
    """
    key, members = "", dict[str, bytes]()
    try:
        num_bytes = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                if member.offset_data + member.size > num_bytes:
                    raise tarfile.ReadError(f"cut short or damaged at byte {member.offset:,}")
                file = tar.extractfile(member)
                assert file is not None
                name, _, extension = member.name.partition(".")
                if name != key and members:
                    yield _sample(key, members, path)
                    members = {}
                key = name
                members[extension] = file.read()
            _check_end(tar)
    except (tarfile.TarError, OSError) as exc:
        raise ArtifactError(f"{path} is not a whole tar ({exc}). {_SEE_WHAT_ELSE}") from exc
    if members:
        yield _sample(key, members, path)


def _check_end(tar: tarfile.TarFile) -> None:
    """Check that a tar, walked to its end, ends there; tarfile takes a damaged header for the end.

    Raises:
        tarfile.ReadError: The tar is cut short or damaged.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
        raise tarfile.ReadError(f"cut short or damaged at byte {tar.offset:,}")


class TarShard:
    """Random access to the samples of one tar, by the offsets of its commit record."""

    def __init__(
        self, store: Store, unit: int, record: UnitRecord, file: RandomReader | None = None
    ) -> None:
        """Open the tar, unless it is opened already.

        Raises:
            ArtifactError: It is missing.
        """
        self._store = store
        self._path = store.where(shard_name(unit))
        self._entries = record.samples
        try:
            self._file = file or store.open(shard_name(unit))
        except OSError as exc:
            raise ArtifactError(
                f"{self._path} cannot be opened ({exc}). Run `patchcache verify {store.location}`."
            ) from exc

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._entries)

    @property
    def keys(self) -> list[str]:
        """Sample keys, in order."""
        return [entry.key for entry in self._entries]

    def read(self, row: int, payloads: Collection[PayloadName] | None = None) -> CachedSample:
        """Read one sample with one system call: its members lie side by side.

        Args:
            row: Of the shard.
            payloads: The optional ones to read; None reads all that there are.
        """
        entry = self._entries[row]
        wanted = entry.members
        if payloads is not None:
            wanted = {
                extension: place
                for extension, place in wanted.items()
                if (payload := _payload_of(extension)) is None or payload in payloads
            }
        start, stop = _span(wanted.values())
        data = self._bytes(start, stop, entry.key)
        members = {
            extension: data[offset - start : offset - start + size]
            for extension, (offset, size) in wanted.items()
        }
        return _sample(entry.key, members, self._path)

    def columns(self) -> ShardColumns:
        """Return the targets of all samples; images, soft targets and features are not read.

        Raises:
            ArtifactError: A member is missing or damaged.
        """
        wanted = (INFO, TOKENS, VIEWS)
        columns: dict[str, list[bytes]] = {extension: [] for extension in wanted}
        for start, stop, entries in self._stretches(wanted):
            data = self._bytes(start, stop, entries[0].key)
            for entry in entries:
                for extension in wanted:
                    offset, size = entry.members[extension]
                    columns[extension].append(data[offset - start : offset - start + size])
        infos = []
        for entry, text in zip(self._entries, columns[INFO], strict=True):
            info = _parse_info(text, self._path, entry.key)
            label = NO_LABEL if info.label is None else info.label
            infos.append((label, info.height, info.width))
        numbers = np.array(infos, np.int64).reshape(-1, 3)
        return ShardColumns(
            keys=self.keys,
            labels=numbers[:, 0],
            image_sizes=numbers[:, 1:].astype(np.int32),
            views=npy_column(columns[VIEWS], f"{self._path}: {VIEWS}"),
            token_ids=npy_column(columns[TOKENS], f"{self._path}: {TOKENS}"),
        )

    def part_bytes(self) -> Counter[str]:
        """Return the size of every kind of member, in bytes without tar headers."""
        sizes = Counter[str]()
        for entry in self._entries:
            for extension, (_, size) in entry.members.items():
                part = _PART_OF_EXTENSION.get(extension) or _payload_of(extension) or "info"
                sizes[part] += size
        return sizes

    def _stretches(self, wanted: Collection[str]) -> Iterator[tuple[int, int, list[SampleEntry]]]:
        """Yield what to read at a time: start, stop, and the samples whose members lie within."""
        start, stop, entries = 0, 0, list[SampleEntry]()
        for entry in self._entries:
            missing = set(wanted) - entry.members.keys()
            if missing:
                raise _incomplete(self._path, entry.key, missing)
            begin, end = _span(entry.members[extension] for extension in wanted)
            near = stop <= begin <= stop + _GAP_BYTES and end - start <= _READ_BYTES
            if entries and not near:
                yield start, stop, entries
                entries = []
            if not entries:
                start = begin
            stop = end
            entries.append(entry)
        if entries:
            yield start, stop, entries

    def _bytes(self, start: int, stop: int, key: str) -> bytes:
        return read_sample(self._file, start, stop, key, self._path, self._store.location)

    def info(self, row: int) -> SampleInfo:
        """Return what a sample's JSON says beside its label.

        Raises:
            ArtifactError: It is damaged.
        """
        entry = self._entries[row]
        text = self._file.read(*entry.members[INFO]) if INFO in entry.members else b""
        info = _parse_info(text, self._path, entry.key)
        return SampleInfo(info.source, (info.height, info.width))

    def close(self) -> None:
        """Close the tar."""
        self._file.close()


def _payload_of(extension: str) -> PayloadName | None:
    """Return the optional payload that a member belongs to, by its extension."""
    return _PAYLOAD_OF_EXTENSION.get(extension, "image")


def _payload_bytes(entries: Iterable[SampleEntry]) -> Counter[PayloadName]:
    """Return the size of every optional payload of a tar, in bytes without tar headers."""
    sizes = Counter[PayloadName]()
    for entry in entries:
        for extension, (_, size) in entry.members.items():
            if payload := _payload_of(extension):
                sizes[payload] += size
    return sizes


def _span(places: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the first and the last byte, exclusive, of (offset, size) places."""
    found = list(places)
    return min(start for start, _ in found), max(start + size for start, size in found)


def _members(new: NewSample) -> dict[str, bytes]:
    sample = new.sample
    height, width = new.image_size
    info: dict[str, Any] = {"height": height, "width": width, "source": new.source}
    if sample.label is not None:
        info["label"] = sample.label
    if sample.extra:
        info["extra"] = dict(sample.extra)
    image = {} if sample.image is None else {new.image_extension: sample.image}
    return {
        **image,
        INFO: files.canonical_json(info),
        TOKENS: npy_bytes(sample.token_ids),
        VIEWS: npy_bytes(sample.views),
        **{
            extension: npy_bytes(getattr(sample, name))
            for extension, name in _ARRAY_OF_EXTENSION.items()
            if getattr(sample, name) is not None
        },
    }


def _incomplete(path: object, key: str, missing: Collection[str]) -> ArtifactError:
    return ArtifactError(
        f"{path}: sample {shorten(key)} has no {', '.join(sorted(missing))}. This tar was not "
        f"written by `patchcache build`, or it is damaged. {_SEE_WHAT_ELSE}"
    )


class _Info(BaseModel, extra="ignore"):
    """The JSON of a sample."""

    source: str
    height: int = Field(strict=True, ge=0, lt=1 << 31)
    width: int = Field(strict=True, ge=0, lt=1 << 31)
    label: int | None = Field(None, strict=True, ge=-(1 << 63), lt=1 << 63)
    extra: dict[str, JsonValue] = {}


def _parse_info(text: bytes, path: object, key: str) -> _Info:
    try:
        return _Info.model_validate_json(text)
    except ValidationError as exc:
        raise ArtifactError(
            f"{path}: {shorten(key)}.{INFO} is damaged ({first_problem(exc)}). {_SEE_WHAT_ELSE}"
        ) from exc


def _sample(key: str, members: dict[str, bytes], path: object) -> CachedSample:
    missing = {INFO, TOKENS, VIEWS} - members.keys()
    if missing:
        raise _incomplete(path, key, missing)
    images = [data for extension, data in members.items() if _payload_of(extension) == "image"]
    info = _parse_info(members[INFO], path, key)
    return CachedSample(
        key=key,
        image=images[0] if images else None,
        label=info.label,
        views=from_npy(members[VIEWS], f"{path}: {key}.{VIEWS}"),
        token_ids=from_npy(members[TOKENS], f"{path}: {key}.{TOKENS}"),
        extra=info.extra,
        **{
            name: from_npy(members[extension], f"{path}: {key}.{extension}")
            for extension, name in _ARRAY_OF_EXTENSION.items()
            if extension in members
        },
    )
