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

import json
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.manifest import SampleEntry, UnitRecord
from cache_builder.formats.payloads import PAYLOAD_OF_ARRAY, PayloadName
from cache_builder.formats.sample import CachedSample, NewSample, from_npy, npy_bytes

TOKENS = "tokens.npy"
VIEWS = "views.npy"
INFO = "json"

_ARRAY_OF_EXTENSION = {f"{name}.npy": name for name in PAYLOAD_OF_ARRAY}
_BLOCK_BYTES = 512


def shard_path(cache_dir: Path, unit: int) -> Path:
    """Return the path of one unit's tar."""
    return cache_dir / "shards" / f"{unit:06d}.tar"


def write_shard(path: Path, samples: Iterable[NewSample]) -> list[SampleEntry]:
    """Write samples as one tar, whole or not at all; return where their members lie."""
    import webdataset

    entries = []
    with (
        files.publishing(path) as file,
        webdataset.TarWriter(
            file, user="", group="", mtime=0, encoder=False, format="GNU_FORMAT"
        ) as tar,
    ):
        for new in samples:
            members = {}
            for extension, data in _members(new).items():
                tar.write({"__key__": new.sample.key, extension: data})
                # tarfile has padded the data to whole blocks; what follows starts at `offset`.
                padded = -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
                members[extension] = (int(tar.tarstream.offset) - padded, len(data))
            entries.append(SampleEntry(key=new.sample.key, members=members))
    return entries


def read_shard(path: Path) -> Iterator[CachedSample]:
    """Walk a tar without its commit record, sample by sample.

    Raises:
        ArtifactError: The tar is cut short, or a sample lacks its targets.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    continue
                name, _, extension = member.name.partition(".")
                if name != key and members:
                    yield _sample(key, members, path)
                    members = {}
                key = name
                members[extension] = file.read()
            check_end(tar)
    except (tarfile.TarError, OSError) as exc:
        raise ArtifactError(f"{path} is not a whole tar ({exc}).") from exc
    if members:
        yield _sample(key, members, path)


def check_end(tar: tarfile.TarFile) -> None:
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

    def __init__(self, path: Path, record: UnitRecord) -> None:
        """Open the tar.

        Raises:
            ArtifactError: It is missing.
        """
        self._path = path
        self._entries = record.samples
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as exc:
            raise ArtifactError(
                f"{path} cannot be opened ({exc}). Run `patchcache verify {path.parent.parent}`."
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
                if (payload := payload_of(extension)) is None or payload in payloads
            }
        start = min(offset for offset, _ in wanted.values())
        stop = max(offset + size for offset, size in wanted.values())
        data = os.pread(self._handle, stop - start, start)
        if len(data) < stop - start:
            raise ArtifactError(
                f"{self._path} ends before sample {entry.key}. "
                f"Run `patchcache verify {self._path.parent.parent}`."
            )
        members = {
            extension: data[offset - start : offset - start + size]
            for extension, (offset, size) in wanted.items()
        }
        return _sample(entry.key, members, self._path)

    def close(self) -> None:
        """Close the tar."""
        os.close(self._handle)


def payload_of(extension: str) -> PayloadName | None:
    """Return the optional payload that a member belongs to, by its extension."""
    if extension in (INFO, TOKENS, VIEWS):
        return None
    array = _ARRAY_OF_EXTENSION.get(extension)
    return "image" if array is None else PAYLOAD_OF_ARRAY[array]


def payload_bytes(entries: Iterable[SampleEntry]) -> Counter[PayloadName]:
    """Return the size of every optional payload of a tar, in bytes without tar headers."""
    sizes = Counter[PayloadName]()
    for entry in entries:
        for extension, (_, size) in entry.members.items():
            if payload := payload_of(extension):
                sizes[payload] += size
    return sizes


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


def _sample(key: str, members: dict[str, bytes], path: Path) -> CachedSample:
    missing = {INFO, TOKENS, VIEWS} - members.keys()
    if missing:
        raise ArtifactError(
            f"{path}: sample {key} has no {', '.join(sorted(missing))}. "
            "This tar was not written by `patchcache build`, or it is damaged."
        )
    images = [data for extension, data in members.items() if payload_of(extension) == "image"]
    try:
        info = json.loads(members[INFO])
        label, extra = info.get("label"), info.get("extra", {})
    except (ValueError, AttributeError) as exc:
        raise ArtifactError(f"{path}: {key}.{INFO} is damaged ({exc}).") from exc
    return CachedSample(
        key=key,
        image=images[0] if images else None,
        label=label,
        views=from_npy(members[VIEWS], f"{path}: {key}.{VIEWS}"),
        token_ids=from_npy(members[TOKENS], f"{path}: {key}.{TOKENS}"),
        extra=extra,
        **{
            name: from_npy(members[extension], f"{path}: {key}.{extension}")
            for extension, name in _ARRAY_OF_EXTENSION.items()
            if extension in members
        },
    )
