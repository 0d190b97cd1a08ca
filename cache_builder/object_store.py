"""Caches on S3, Google Cloud Storage and Azure: the only `import obstore` of this package.

Credentials, region and endpoint come from the environment, under the names that the vendors' own
tools read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...). obstore
repeats requests that fail for a while; what fails for good is a StorageError.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import obstore
from obstore import exceptions
from obstore.store import from_url

from cache_builder import files
from cache_builder.errors import StorageError
from cache_builder.stores import LOCK_NAME, Measure, in_use

if TYPE_CHECKING:
    from obstore import UpdateVersion

logger = logging.getLogger(__name__)

SCHEMES: Final = ("s3", "gs", "az")
_READ_AHEAD_BYTES = 4 << 20
_BEAT_S = 5.0  # how often the holder of a lock shows that it lives
_LOST_AFTER_S = 20.0  # without a beat its lock may be taken
_MAX_RETRIES = 8  # of a request, by obstore, with growing pauses
_PAUSES_S = (0.5, 2.0)  # before what obstore gives up at once is asked for again
_AT_ONCE_S = 5.0

_T = TypeVar("_T")


class ObjectStore:
    """A prefix of a bucket."""

    def __init__(self, url: str) -> None:
        """Take the URL; nothing is asked of the store yet.

        Raises:
            StorageError: The URL names no bucket, or a setting in the environment is wrong.
        """
        self.location = url.rstrip("/")
        self._store = _connect(self.location)

    def where(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.location}/{name}"

    def exists(self, name: str) -> bool:
        """Say whether there is an object of that name."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Return the content of an object."""
        return self._ask("read", name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def measure(self, name: str) -> Measure:
        """Return length and SHA-256 of an object."""

        def measure() -> Measure:
            digest, size = hashlib.sha256(), 0
            for block in obstore.get(self._store, name).stream():
                digest.update(block)
                size += len(block)
            return Measure(size, digest.hexdigest())

        return self._ask("read", name, measure)

    def size(self, name: str) -> int:
        """Return the length of an object, bytes."""
        return self._ask("find", name, lambda: int(obstore.head(self._store, name)["size"]))

    def open(self, name: str) -> "ObjectReader":
        """Open an object for reads in any order."""
        return ObjectReader(self, name, self.size(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, which lie within the object."""
        return self._ask(
            "read",
            name,
            lambda: bytes(obstore.get_range(self._store, name, start=start, end=stop)),
        )

    def publish(self, name: str, data: bytes) -> None:
        """Write an object."""
        self._ask("write", name, lambda: obstore.put(self._store, name, data))

    def publish_new(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet."""
        try:
            self._ask("write", name, lambda: obstore.put(self._store, name, data, mode="create"))
        except FileExistsError:
            # The answer may have been lost: then the repeated request meets what it has written.
            if self.read(name) != data:
                raise

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a temporary local file that is sent when it is whole."""

        def send() -> None:
            file.seek(0)
            obstore.put(self._store, name, file)

        with files.naming(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
            yield file
            file.flush()
            self._ask("write", name, send)

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names below a folder."""
        last: str | None = None
        pauses = iter(_PAUSES_S)
        while True:
            try:
                with self._asking("list", prefix):
                    for page in obstore.list(self._store, prefix or None, offset=last):
                        for entry in page:
                            last = str(entry["path"])
                            yield last
            except StorageError as exc:
                pause_s = next(pauses, None)
                if pause_s is None or not _is_passing(exc):
                    raise
                time.sleep(pause_s)
            else:
                return

    def remove(self, name: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("remove", name, lambda: obstore.delete(self._store, name))

    def sweep(self) -> list[str]:
        """Return nothing: an object store shows no half-written objects."""
        return []

    @contextlib.contextmanager
    def lock(self, holder: str) -> Iterator[None]:
        """Hold a lease: an object that its holder rewrites every few seconds.

        A lease that is not rewritten for a while belonged to a driver that died, and is taken.
        """
        lease = _Lease(self._store, holder)
        with self._asking("lock", LOCK_NAME):
            other = lease.take()
        if other is not None:
            raise in_use(self.location, other)
        try:
            yield
        finally:
            lease.end()

    def folder(self, name: str) -> Any:
        """Return an obstore store of the objects below `name`."""
        return _connect(f"{self.location}/{name}")

    def _ask(self, what: str, name: str, ask: Callable[[], _T]) -> _T:
        """Ask for something that may be asked for twice; more than once if need be.

        obstore repeats what fails on the way, but not an answer that breaks off in the middle.
        """
        for pause_s in _PAUSES_S:
            started_s = time.monotonic()
            try:
                with self._asking(what, name):
                    return ask()
            except StorageError as exc:
                if not _is_passing(exc) or time.monotonic() - started_s > _AT_ONCE_S:
                    raise
                time.sleep(pause_s)
        with self._asking(what, name):
            return ask()

    @contextlib.contextmanager
    def _asking(self, what: str, name: str) -> Iterator[None]:
        """Turn obstore's exceptions into Python's and ours."""
        try:
            yield
        except FileNotFoundError as exc:
            if what in {"write", "lock"}:
                raise StorageError(
                    f"Cannot {what} {self.where(name)}: there is no such bucket. Create it first."
                ) from exc
            raise FileNotFoundError(f"{self.where(name)} is not there") from exc
        except exceptions.AlreadyExistsError as exc:
            raise FileExistsError(f"{self.where(name)} is there already") from exc
        except exceptions.BaseError as exc:
            raise StorageError(
                f"Cannot {what} {self.where(name)}: {_first_line(exc)} Check the network, the "
                "bucket and the credentials in the environment, and run the same command again."
            ) from exc


class ObjectReader:
    """An object read in any order; reads that follow one another share requests."""

    def __init__(self, store: ObjectStore, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._start = 0
        self._block = b""

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on."""
        stop = min(start + size, self._size)
        if stop <= start:
            return b""
        if not self._start <= start <= stop <= self._start + len(self._block):
            follows = self._start < start <= self._start + len(self._block)
            ahead = _READ_AHEAD_BYTES if follows or start == 0 else 0
            self._block = self._store.read_range(
                self._name, start, min(self._size, max(stop, start + ahead))
            )
            self._start = start
        return self._block[start - self._start : stop - self._start]

    def close(self) -> None:
        """Forget what was read ahead."""
        self._block = b""


class _Seen(NamedTuple):
    """A lease that was looked at."""

    tag: "UpdateVersion"
    holder: str
    is_ours: bool


class _Lease:
    """A lock on an object store, kept by beats and conditional writes."""

    def __init__(self, store: Any, holder: str) -> None:
        self._store = store
        self._holder = holder
        self._token = uuid.uuid4().hex
        self._count = 0
        self._tag: UpdateVersion = {}  # of what we have written; empty if it is not there any more
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> str | None:
        """Take the lease; return who holds it if another driver does."""
        while True:
            try:
                written = obstore.put(self._store, LOCK_NAME, self._text(), mode="create")
            except exceptions.AlreadyExistsError:
                try:
                    other = self._take_over()
                except FileNotFoundError:  # its holder has ended meanwhile
                    continue
                if other is not None:
                    return other
            else:
                self._tag = _tag(written)
            self._thread.start()
            return None

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._tag:
            with contextlib.suppress(exceptions.BaseError, FileNotFoundError):
                obstore.delete(self._store, LOCK_NAME)

    def _take_over(self) -> str | None:
        """Take a lease that is not kept any more; return who holds one that is."""
        seen = self._look()
        if seen.is_ours:
            return None
        tag, end = seen.tag, time.monotonic() + _LOST_AFTER_S
        logger.info("waiting %.0f s to see whether %s is alive", _LOST_AFTER_S, seen.holder)
        while time.monotonic() < end:
            time.sleep(_BEAT_S / 5)
            seen = self._look()
            if seen.tag != tag:
                return seen.holder
        try:
            written = obstore.put(self._store, LOCK_NAME, self._text(), mode=tag)
        except exceptions.PreconditionError:
            seen = self._look()
            return None if seen.is_ours else seen.holder
        self._tag = _tag(written)
        return None

    def _look(self) -> "_Seen":
        """Return what the lease says; keep its tag if it is ours.

        A write whose answer is lost is repeated and then refused: what is there is our own.
        """
        found = obstore.get(self._store, LOCK_NAME)
        tag = _tag(found.meta)
        try:
            beat = json.loads(bytes(found.bytes()))
            holder, token = str(beat["holder"]), str(beat["token"])
        except (ValueError, KeyError, TypeError):
            holder, token = "another patchcache", ""
        is_ours = token == self._token
        self._tag = tag if is_ours else {}
        return _Seen(tag, holder, is_ours)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            try:
                written = obstore.put(self._store, LOCK_NAME, self._text(), mode=self._tag)
                self._tag = _tag(written)
            except (exceptions.PreconditionError, FileNotFoundError):
                if self._is_lost():
                    # Two drivers at work waste work and harm nothing: they write the same bytes.
                    logger.warning("another driver has taken the lock of this cache")
                    return
            except exceptions.BaseError as exc:
                logger.warning("the lock of the cache could not be kept: %s", _first_line(exc))

    def _is_lost(self) -> bool:
        try:
            return not self._look().is_ours
        except FileNotFoundError:
            self._tag = {}
            return True
        except exceptions.BaseError:
            return False  # the next beat tells

    def _text(self) -> bytes:
        self._count += 1
        beat = {"holder": self._holder, "token": self._token, "beat": self._count}
        return json.dumps(beat).encode()


def _tag(written: Mapping[str, Any]) -> "UpdateVersion":
    """Return what names one state of an object: to S3 and Azure the ETag, to Google the version."""
    tag: UpdateVersion = {"e_tag": str(written["e_tag"])}
    if written["version"] is not None:
        tag["version"] = str(written["version"])
    return tag


def _connect(url: str) -> Any:
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        return from_url(
            url,
            client_options={"allow_http": True} if plain else None,
            retry_config={"max_retries": _MAX_RETRIES},
        )
    except (exceptions.BaseError, ValueError) as exc:
        raise StorageError(f"{url} cannot be used: {_first_line(exc)}") from exc


def _is_passing(exc: StorageError) -> bool:
    """Say whether a request that failed may succeed when it is repeated."""
    return isinstance(exc.__cause__, exceptions.GenericError)


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".") + "."
