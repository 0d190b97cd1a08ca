"""How files reach the disk: under a temporary name, flushed, then renamed.

A reader never sees half a file, and a power cut never leaves an empty one under a final name.
`publish` replaces; `publish_new` refuses to (the commit records and the plan are created once).
Temporary names start with a dot and end in `.tmp`, so that `sweep` can tell them from results.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on a clean exit it becomes `path`.

    When the block raises, the temporary file is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with naming(path):
            with temporary.open("xb") as file:
                yield file
                _flush(file)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def publish(path: Path, data: bytes) -> None:
    """Write `data` as `path`, whole or not at all, replacing what was there."""
    with publishing(path) as file:
        file.write(data)


def publish_new(path: Path, data: bytes) -> None:
    """Write `data` as `path`, whole or not at all, only if nothing is there yet.

    Raises:
        FileExistsError: `path` exists; it is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with naming(path):
            with temporary.open("xb") as file:
                file.write(data)
                _flush(file)
            # A link, unlike a rename, fails when the target exists: of two writers one wins.
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_directory(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file an error belongs to; a write that finds a full disk does not tell."""
    try:
        yield
    except OSError as exc:
        if exc.errno is not None and exc.filename is None:
            exc.filename = str(path)
        raise


def sweep(directory: Path) -> list[Path]:
    """Remove what killed writers left behind below `directory`; returns the removed paths.

    Ours end in `.tmp`; zarr's LocalStore leaves `<name>.<uuid>.partial`.
    """
    leftovers = [
        p for pattern in (".*.tmp", "*.partial") for p in directory.rglob(pattern) if p.is_file()
    ]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def flush_file(path: Path) -> None:
    """Make sure that a file written by a library has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Make sure that the names in `directory` have reached the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha1_bytes(data: bytes) -> str:
    """Return the SHA-1 of `data` in hexadecimal: what git names things by, no proof of anything."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of `value`, for digests: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _flush(file: IO[bytes]) -> None:
    file.flush()
    # Without this, a power cut after the rename can leave an empty file.
    os.fsync(file.fileno())
