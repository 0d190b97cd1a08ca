"""Object stores and web servers: the only `import fsspec` of this package.

Whatever scheme fsspec knows can be read. Credentials and endpoints come from where the scheme's
library looks for them: for S3 the AWS_* variables and files that botocore reads, for GCS the
application default credentials.

A request that fails is tried again after a pause that doubles each time, with some chance in it so
that many workers do not come back at once. What the server says will not change (404, 403) is not
asked again.
"""

import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO, Any, NamedTuple, TypeVar

from cache_builder.errors import (
    ConfigError,
    MissingDependencyError,
    NotServedError,
    SourceError,
)
from cache_builder.prefetch import map_ahead
from cache_builder.sources.names import MAX_IMAGE_BYTES, size_problem

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_MAX_TRIES = 6  # s3fs and botocore try again by themselves before that
_FIRST_WAIT_S = 0.25  # 8 s over all tries
_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 4
_WORTH_ASKING_AGAIN = frozenset({408, 425, 429})  # of the 4xx
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})
_PERMANENT = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError,
    TypeError, NotImplementedError,
)  # fmt: skip
_HEADERS = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file
_LOCK = threading.Lock()


class RemoteFile(NamedTuple):
    """What is known of a file before it is read."""

    num_bytes: int | None  # None: the server does not say
    has_ranges: bool  # a part of it can be asked for


class Entry(NamedTuple):
    """Something in a remote folder."""

    name: str  # within the folder
    num_bytes: int
    is_folder: bool


def describe(url: str) -> RemoteFile:
    """Ask for the size of a file.

    Raises:
        SourceError: It is not there, or the server does not answer.
    """
    if _is_http(url):
        return _retrying(url, "found", lambda: _describe_http(url))
    info = _retrying(url, "found", lambda: _filesystem(url).info(url))
    if info.get("type") == "directory":
        raise SourceError(f"{url} is a folder, not a file.")
    size = info.get("size")
    return RemoteFile(None if size is None else int(size), has_ranges=size is not None)


def read_range(url: str, offset: int, num_bytes: int) -> bytes:
    """Read a part of a file; shorter than `num_bytes` where the file ends before.

    Raises:
        SourceError: It cannot be read.
    """
    if not num_bytes:
        return b""

    headers = {"headers": _HEADERS} if _is_http(url) else {}

    def ask() -> bytes:
        stop = offset + num_bytes
        data = bytes(_filesystem(url).cat_file(url, start=offset, end=stop, **headers))
        if len(data) > num_bytes:
            raise OSError("the server sent more than the part that was asked for")
        return data

    return _retrying(url, "read", ask)


def read_image(url: str) -> tuple[bytes, str]:
    """Read a whole file; returns its bytes, or none and why it is too large to be an image.

    Raises:
        SourceError: It cannot be read.
    """
    return _retrying(url, "read", lambda: _read_image(url))


def stage(url: str, found: RemoteFile, file: IO[bytes]) -> int:
    """Copy a file to a local one and return its size; a broken connection is taken up again.

    Raises:
        SourceError: It cannot be read.
    """
    if found.num_bytes is None or not found.has_ranges:
        return _retrying(url, "read", lambda: _copy(url, file))
    num_bytes = found.num_bytes

    def chunk(start: int) -> bytes:
        return read_range(url, start, min(_CHUNK_BYTES, num_bytes - start))

    num_read = 0
    for data in map_ahead(chunk, range(0, num_bytes, _CHUNK_BYTES), _CHUNKS_AHEAD):
        file.write(data)
        num_read += len(data)
    return num_read


def list_folder(url: str) -> Iterator[Entry]:
    """Yield what a folder holds, not what its subfolders hold.

    Raises:
        ConfigError: The place is a web server, which has no folders.
        SourceError: There is nothing there, or it cannot be listed.
    """
    if _is_http(url):
        raise ConfigError(
            f"{url}: a web server does not list its folders. Name files (a brace pattern, as "
            "`https://host/train-{000..146}.tar`), or a text file with one URL per line."
        )

    def ask() -> list[dict[str, Any]]:
        filesystem = _filesystem(url)
        filesystem.invalidate_cache()
        found: list[dict[str, Any]] = filesystem.ls(url, detail=True)
        filesystem.invalidate_cache()  # a listing is read once
        return found

    own = _retrying(url, "listed", lambda: _filesystem(url)._strip_protocol(url)).rstrip("/")
    for info in _retrying(url, "listed", ask):
        path = str(info["name"]).rstrip("/")
        is_folder = info.get("type") == "directory"
        # An object whose name is the folder's own stands for the folder.
        if path != own:
            yield Entry(path.rpartition("/")[2], int(info.get("size") or 0), is_folder)


def _describe_http(url: str) -> RemoteFile:
    """Ask for one byte: the answer says the size, and whether parts can be asked for."""
    with closing(_open_http(url, {"Range": "bytes=0-0"})) as stream:
        response = stream.r
        if response.status == 206:
            _, _, total = response.headers.get("Content-Range", "").rpartition("/")
            return RemoteFile(int(total) if total.isdecimal() else None, has_ranges=True)
        length = response.headers.get("Content-Length", "")
        return RemoteFile(int(length) if length.isdecimal() else None, has_ranges=False)


def _read_image(url: str) -> tuple[bytes, str]:
    if not _is_http(url):
        filesystem = _filesystem(url)
        problem = size_problem(int(filesystem.info(url).get("size") or 0))
        return (b"", problem) if problem else (bytes(filesystem.cat_file(url)), "")
    parts, num_bytes = [], 0
    with closing(_open_http(url)) as stream:
        while data := stream.read(1 << 20):
            parts.append(data)
            num_bytes += len(data)
            if num_bytes > MAX_IMAGE_BYTES:
                return b"", f"it has more than the limit of {MAX_IMAGE_BYTES:,} bytes"
    return b"".join(parts), ""


def _copy(url: str, file: IO[bytes]) -> int:
    file.seek(0)
    file.truncate()
    opened = _open_http(url) if _is_http(url) else _filesystem(url).open(url, "rb")
    with closing(opened) as stream:
        while data := stream.read(1 << 20):
            file.write(data)
    return file.tell()


def _open_http(url: str, headers: dict[str, str] | None = None) -> Any:
    # Block size 0 streams; a size that is given is not asked for.
    headers = _HEADERS | (headers or {})
    return _filesystem(url).open(url, "rb", block_size=0, size=1, headers=headers)


def _filesystem(url: str) -> Any:
    scheme, _, rest = url.partition("://")
    host = "" if _is_http(url) else rest.partition("/")[0]
    place = f"{scheme}://{host}"
    with _LOCK:
        return _filesystem_of(place, os.getpid())


@functools.lru_cache(maxsize=64)
def _filesystem_of(place: str, process: int) -> Any:
    # fsspec makes one per thread; sessions are shared by threads, but not by a forked process.
    try:
        import fsspec
    except ImportError as exc:
        raise _missing(place, exc) from exc
    try:
        return fsspec.core.url_to_fs(place)[0]
    except ImportError as exc:
        raise _missing(place, exc) from exc
    except ValueError as exc:
        raise ConfigError(f"{place} cannot be read: {exc}.") from exc


def _missing(place: str, exc: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"{place} needs a library that is not installed ({exc}). "
        "Run: pip install 'patchcache[remote]'"
    )


def _retrying(url: str, done: str, ask: Callable[[], _T]) -> _T:
    """Return what `ask` returns, asking again after what may pass."""
    for attempt in range(1, _MAX_TRIES + 1):
        try:
            return ask()
        except (SourceError, ConfigError, MissingDependencyError):
            raise
        except Exception as exc:  # every scheme's library has errors of its own
            if _is_permanent(exc):
                raise NotServedError(_permanent_message(url, done, exc)) from exc
            if attempt == _MAX_TRIES:
                raise SourceError(
                    f"{url} cannot be {done}: {_reason(exc)}, {_MAX_TRIES} times in a row. Run the "
                    "same command again when the server answers; what was finished is kept."
                ) from exc
            wait_s = _FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            logger.info("%s: %s; asking again in %.1f s", url, _reason(exc), wait_s)
        time.sleep(wait_s)
    raise AssertionError


def _is_permanent(exc: BaseException) -> bool:
    status = _status(exc)
    if status is not None:
        return 400 <= status < 500 and status not in _WORTH_ASKING_AGAIN
    return isinstance(exc, _PERMANENT) or type(exc).__name__ in _NO_CREDENTIALS


def _status(exc: BaseException | None) -> int | None:
    """Return the HTTP status that an error comes from, its own or that of its cause."""
    while exc is not None:
        response = getattr(exc, "response", None)
        said = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        # aiohttp gives errors of the line a `code` of 400; gcsfs' is that of the answer.
        code = getattr(exc, "code", None) if type(exc).__name__ == "HttpError" else None
        for status in (getattr(exc, "status", None), code, said.get("HTTPStatusCode")):
            if isinstance(status, int) and 400 <= status < 600:
                return status
        exc = exc.__cause__
    return None


def _permanent_message(url: str, done: str, exc: Exception) -> str:
    status = _status(exc)
    denied = isinstance(exc, PermissionError) or status in (401, 403)
    if denied or type(exc).__name__ in _NO_CREDENTIALS:
        advice = (
            "Check the credentials in the environment: for S3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and AWS_ENDPOINT_URL of a store that is not "
            "Amazon's; for GCS GOOGLE_APPLICATION_CREDENTIALS."
        )
    else:
        advice = "Check the name, or restore it, and run the same command again."
    return f"{url} cannot be {done}: {_reason(exc)}. {advice}"


def _reason(exc: Exception) -> str:
    status = _status(exc)
    if isinstance(exc, FileNotFoundError) and status in (None, 404):
        return "it is not there (404)"
    lines = str(exc).strip().splitlines() or [""]
    text = f"{type(exc).__name__}: {lines[0]}" if lines[0] else type(exc).__name__
    said = status is None or str(status) in text
    return (text if said else f"{text} ({status})").rstrip(".")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))
