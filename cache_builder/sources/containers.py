"""Tars, zips and Parquet files as ranges of bytes, wherever they lie.

A local file is read where it is. A remote one is asked for ranges, or, where most of it is wanted
or the server knows no ranges, copied to an unlinked temporary file for the time that it is open. A
compressed tar is always copied, inflated.

What a compressed file inflates to is limited by what it really makes, whatever it claims.
"""

import gzip
import io
import os
import tempfile
import weakref
import zlib
from typing import IO, Final

from cache_builder.errors import SourceError
from cache_builder.formats.headers import shorten
from cache_builder.sources import remote
from cache_builder.sources.names import MAX_IMAGE_BYTES, is_gzip, is_remote

_STREAM_BYTES = 4 << 20  # of a remote file at once, when it is read from its beginning
_BLOCK_BYTES = 1 << 20
_MAX_INFLATION: Final = 100  # images hardly shrink; tars of their labels do, tenfold or so


def unreadable(location: str, reason: object, how: str = "") -> SourceError:
    """Return the refusal of a file that is damaged; `how` it was read, such as "as a tar"."""
    read = f"read {how}".rstrip()
    return SourceError(f"{location} cannot be {read}: {reason}. Restore it, or leave it out.")


class Container:
    """A file that is read by ranges; it closes itself when nothing holds it any more."""

    def __init__(self, location: str, num_bytes: int, handle: int | None, *, is_copy: bool) -> None:
        """Take an open local file, or None to ask a server."""
        self.location = location
        self.num_bytes = num_bytes  # that can be read: of a compressed tar, of its content
        self.is_remote = handle is None  # every read is a request
        self.is_copy = is_copy
        self._handle = handle
        self.close = weakref.finalize(self, _close, handle)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range; shorter than asked for where the file ends before.

        Raises:
            SourceError: It cannot be read.
        """
        num_bytes = min(num_bytes, self.num_bytes - offset)
        if num_bytes <= 0:
            return b""  # also where a damaged archive points beyond what any file can be asked for
        if self._handle is None:
            return remote.read_range(self.location, offset, num_bytes)
        try:
            return os.pread(self._handle, num_bytes, offset)
        except OSError as exc:
            raise unreadable(self.location, exc.strerror) from exc

    def __enter__(self) -> "Container":
        """Return the container."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()


class ContainerFile(io.RawIOBase):
    """A container as a file with a position, for libraries that want one."""

    def __init__(self, container: Container) -> None:
        """Start at the beginning."""
        super().__init__()
        self._container = container
        self._position = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read in any order."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move."""
        base = (0, self._position, self._container.num_bytes)[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Fill a buffer as far as there is something."""
        data = self._container.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class InflatedFile:
    """What a gzip file holds, read forward, up to a limit."""

    def __init__(self, file: IO[bytes], num_bytes: int, name: str) -> None:
        """Take the compressed file and its size."""
        self._file = gzip.GzipFile(fileobj=file, mode="rb")
        self._limit = max(MAX_IMAGE_BYTES, _MAX_INFLATION * num_bytes)
        self._num_bytes = num_bytes
        self._name = name
        self._position = 0

    def read(self, num_bytes: int) -> bytes:
        """Read so many bytes; fewer at the end.

        Raises:
            SourceError: It is damaged, or inflates beyond all measure.
        """
        try:
            data = self._file.read(num_bytes)
        except (OSError, EOFError, zlib.error) as exc:
            raise unreadable(self._name, exc, "as a tar") from exc
        self._position += len(data)
        if self._position > self._limit:
            raise SourceError(
                f"{self._name} has {self._num_bytes:,} bytes and inflates to more than "
                f"{self._limit:,}: a bomb. Leave it out, or inflate it yourself."
            )
        return data

    def seek(self, position: int) -> None:
        """Go forward to a position, or to the end."""
        while self._position < position:
            if not self.read(min(_BLOCK_BYTES, position - self._position)):
                return

    def seek_end(self) -> None:
        """Go to the end, where the checksum of the content is compared."""
        while self.read(_BLOCK_BYTES):
            pass


Stream = IO[bytes] | InflatedFile
"""What is read forward: `read` and `seek`."""


def open_container(
    location: str, expected_bytes: int | None = None, *, wanted_bytes: int = 0
) -> Container:
    """Open a container.

    Args:
        location: Path or URL.
        expected_bytes: Its size when it was listed; None: not known.
        wanted_bytes: How much of it will be read; a remote one of which most is wanted is copied.

    Raises:
        SourceError: It cannot be read, or has another size than it had.
    """
    container = _open(location, wanted_bytes)
    if expected_bytes is not None and container.num_bytes != expected_bytes:
        raise SourceError(
            f"{location} has {container.num_bytes:,} bytes, and had {expected_bytes:,} when it was "
            "listed: it has changed since. Restore it, or build anew with another --out."
        )
    return container


def open_inflated(
    location: str, expected_bytes: int | None = None, *, wanted_bytes: int = 0
) -> Container:
    """Open a container as `open_container` does; of a compressed tar, its content.

    Raises:
        SourceError: It cannot be read, has another size than it had, or is a bomb.
    """
    if not is_gzip(location):
        return open_container(location, expected_bytes, wanted_bytes=wanted_bytes)
    with open_container(location, expected_bytes) as container:
        stream = inflated(container)
        with tempfile.TemporaryFile() as file:
            while data := stream.read(_BLOCK_BYTES):
                file.write(data)
            return _of_file(location, file)


def streamed(container: Container) -> IO[bytes]:
    """Return a container as a file that is read mostly forward."""
    buffer_bytes = _STREAM_BYTES if container.is_remote else _BLOCK_BYTES // 4
    return io.BufferedReader(ContainerFile(container), buffer_bytes)


def inflated(container: Container) -> InflatedFile:
    """Return the content of a compressed container."""
    return InflatedFile(streamed(container), container.num_bytes, container.location)


def _open(location: str, wanted_bytes: int) -> Container:
    if not is_remote(location):
        try:
            handle = os.open(location, os.O_RDONLY)
            return Container(location, os.fstat(handle).st_size, handle, is_copy=False)
        except (OSError, ValueError) as exc:  # a name with a zero byte is a ValueError
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise SourceError(
                f"{shorten(location)} cannot be opened: {reason}. Restore it and run the "
                "same command again."
            ) from exc
    found = remote.describe(location)
    if found.num_bytes is not None and found.has_ranges and 2 * wanted_bytes < found.num_bytes:
        return Container(location, found.num_bytes, None, is_copy=False)
    with tempfile.TemporaryFile() as file:
        remote.stage(location, found, file)
        return _of_file(location, file)


def _of_file(location: str, file: IO[bytes]) -> Container:
    file.flush()
    num_bytes = os.fstat(file.fileno()).st_size
    return Container(location, num_bytes, os.dup(file.fileno()), is_copy=True)


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
