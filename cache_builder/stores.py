"""Where a cache lies: a local directory or a prefix of an object store, behind one interface.

A file of a cache has a name relative to its root, `units/000000.json`, whatever the root is. A
name appears with its whole content or not at all: on a disk by a rename, on an object store by one
request. `publish` replaces; `publish_new` refuses to, so that of two writers one wins.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from cache_builder import files
from cache_builder.errors import CacheInUseError, ConfigError

LOCK_NAME = ".lock"  # of the driver that writes; removed when it ends
_MAX_TRIES = 20  # of making the folder of a lock, while other drivers remove it


class Measure(NamedTuple):
    """Length and digest of a file."""

    bytes: int
    sha256: str


class RandomReader(Protocol):
    """An opened file."""

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on; fewer at the end of the file."""

    def close(self) -> None:
        """Release what it holds."""


class Store(Protocol):
    """The root of a cache.

    Every method that reads raises FileNotFoundError when there is no such name, and every method
    raises StorageError when an object store does not answer or refuses.
    """

    location: str

    def where(self, name: str) -> str:
        """Return where `name` lies, for people."""

    def exists(self, name: str) -> bool:
        """Say whether there is a file of that name."""

    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    def measure(self, name: str) -> Measure:
        """Return length and SHA-256 of a file, never holding all of it."""

    def size(self, name: str) -> int:
        """Return the length of a file, bytes."""

    def open(self, name: str) -> RandomReader:
        """Open a file for reads in any order."""

    def publish(self, name: str, data: bytes) -> None:
        """Write `data` as `name`, whole or not at all, replacing what was there."""

    def publish_new(self, name: str, data: bytes) -> None:
        """Write `data` as `name`, whole or not at all, only if nothing is there yet.

        Raises:
            FileExistsError: `name` exists; it is left as it was.
        """

    def publishing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a file that becomes `name` on a clean exit and vanishes on any other."""

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names below a folder, in no order."""

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    def sweep(self) -> list[str]:
        """Remove what killed writers left behind; return its names."""

    def folder(self, name: str) -> Any:
        """Return what zarr reads the files below `name` by: a path, or an obstore store."""

    def lock(self, holder: str) -> contextlib.AbstractContextManager[None]:
        """Keep other drivers out while the block runs; a killed driver's lock does not last.

        Args:
            holder: Who locks, for the message that the other one gets.

        Raises:
            CacheInUseError: Another driver is at work.
        """


def open_store(location: str | Path) -> Store:
    """Return the store at a directory or at a URL of an object store.

    Raises:
        ConfigError: The URL is of a kind that a cache cannot lie on.
    """
    text = str(location)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return LocalStore(Path(location))
    if scheme == "file":
        return LocalStore(Path(rest))
    from cache_builder.object_store import SCHEMES, ObjectStore

    if scheme not in SCHEMES:
        raise ConfigError(
            f"A cache can lie in a directory or on {', '.join(f'{s}://' for s in SCHEMES)}, "
            f"not on {scheme}://. Choose another place than {text}."
        )
    return ObjectStore(text)


def join_location(location: str | Path, name: str) -> str:
    """Return the location of `name` below `location`, which is a directory or a URL."""
    text = str(location)
    return f"{text.rstrip('/')}/{name}" if "://" in text else str(Path(text) / name)


def absolute_location(location: str | Path) -> str:
    """Return a location that means the same in another process: URLs as they are."""
    return str(location) if "://" in str(location) else str(Path(location).resolve())


def read_location(location: str | Path) -> bytes:
    """Return the content of one file at a path or a URL.

    Raises:
        FileNotFoundError: There is none.
        StorageError: The object store does not answer or refuses.
    """
    text = str(location).removeprefix("file://")
    if "://" not in text:
        return Path(text).read_bytes()
    root, _, name = text.rpartition("/")
    return open_store(root).read(name)


class LocalStore:
    """A directory."""

    def __init__(self, root: Path) -> None:
        """Take the directory, which need not exist yet."""
        self.root = root
        self.location = str(root)

    def where(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.root / name)

    def exists(self, name: str) -> bool:
        """Say whether there is a file of that name."""
        with contextlib.suppress(FileNotFoundError), _names_of_no_files():
            return (self.root / name).is_file()
        return False

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with _names_of_no_files():
            return (self.root / name).read_bytes()

    def measure(self, name: str) -> Measure:
        """Return length and SHA-256 of a file."""
        with _names_of_no_files(), (self.root / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return Measure(file.tell(), digest.hexdigest())

    def size(self, name: str) -> int:
        """Return the length of a file, bytes."""
        with _names_of_no_files():
            return (self.root / name).stat().st_size

    def open(self, name: str) -> "LocalReader":
        """Open a file for reads in any order."""
        with _names_of_no_files():
            return LocalReader(self.root / name)

    def publish(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name, flush it, rename it."""
        files.publish(self.root / name, data)

    def publish_new(self, name: str, data: bytes) -> None:
        """Write a file that is not there yet."""
        files.publish_new(self.root / name, data)

    def publishing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a temporary file that becomes `name`."""
        return files.publishing(self.root / name)

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names below a folder."""
        for folder, _, names in os.walk(self.root / prefix):
            below = Path(folder).relative_to(self.root)
            yield from ((below / name).as_posix() for name in names)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.root / name).unlink(missing_ok=True)

    def sweep(self) -> list[str]:
        """Remove files under temporary names."""
        return [path.relative_to(self.root).as_posix() for path in files.sweep(self.root)]

    def folder(self, name: str) -> Path:
        """Return the path of a folder."""
        return self.root / name

    @contextlib.contextmanager
    def lock(self, holder: str) -> Iterator[None]:
        """Hold a lock of the operating system, which ends with the process that holds it."""
        path = self.root / LOCK_NAME
        handle = _lock_file(path)
        try:
            with files.naming(path):
                os.truncate(handle, 0)
                os.pwrite(handle, holder.encode(), 0)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)
            with contextlib.suppress(OSError):  # it is not empty
                self.root.rmdir()


class LocalReader:
    """An opened local file; `read` is one system call."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._handle).st_size

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on."""
        # Memory for all of `size` would be taken first, however little there is to read.
        size = min(size, self._size - start)
        return os.pread(self._handle, size, start) if size > 0 else b""

    def close(self) -> None:
        """Close the file; twice is once."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@contextlib.contextmanager
def _names_of_no_files() -> Iterator[None]:
    """Say of a name that is a folder's, leads through a file or is too long: there is no file."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}:
            raise
        raise FileNotFoundError(exc.errno, exc.strerror, exc.filename) from exc


def _lock_file(path: Path) -> int:
    """Open and lock a file, its folder made, and make sure that the name still stands for it."""
    num_tries = 0
    while True:
        num_tries += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):
            # A holder that ends takes an empty folder away; so often in a row it is no holder.
            if num_tries >= _MAX_TRIES:
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(handle, 1000, 0).decode(errors="replace")
            os.close(handle)
            raise in_use(str(path.parent), other) from None
        # Its last holder may have removed it between our opening and our locking.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)


def in_use(location: str, holder: str) -> CacheInUseError:
    """Return the refusal of a second driver."""
    return CacheInUseError(
        f"{location} is being written by {holder or 'another patchcache'}. Wait for it, stop it, "
        "or choose another --out."
    )
