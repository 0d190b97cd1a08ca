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
from collections.abc import Iterator
from typing import IO, Any, Final

import obstore
from obstore import exceptions
from obstore.store import from_url

from cache_builder.errors import StorageError
from cache_builder.stores import LOCK_NAME, Measure, in_use

logger = logging.getLogger(__name__)

SCHEMES: Final = ("s3", "gs", "az")
_READ_AHEAD_BYTES = 4 << 20
_BEAT_S = 5.0  # how often the holder of a lock shows that it lives
_LOST_AFTER_S = 20.0  # without a beat its lock may be taken


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
        with self._asking("read", name):
            return bytes(obstore.get(self._store, name).bytes())

    def measure(self, name: str) -> Measure:
        """Return length and SHA-256 of an object."""
        digest, size = hashlib.sha256(), 0
        with self._asking("read", name):
            for block in obstore.get(self._store, name).stream():
                digest.update(block)
                size += len(block)
        return Measure(size, digest.hexdigest())

    def size(self, name: str) -> int:
        """Return the length of an object, bytes."""
        with self._asking("find", name):
            return int(obstore.head(self._store, name)["size"])

    def open(self, name: str) -> "ObjectReader":
        """Open an object for reads in any order."""
        return ObjectReader(self, name, self.size(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, which lie within the object."""
        with self._asking("read", name):
            return bytes(obstore.get_range(self._store, name, start=start, end=stop))

    def publish(self, name: str, data: bytes) -> None:
        """Write an object."""
        with self._asking("write", name):
            obstore.put(self._store, name, data)

    def publish_new(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet."""
        with self._asking("write", name):
            obstore.put(self._store, name, data, mode="create")

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a temporary local file that is sent when it is whole."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with self._asking("write", name):
                obstore.put(self._store, name, file)

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names below a folder."""
        with self._asking("list", prefix):
            for page in obstore.list(self._store, prefix or None):
                for entry in page:
                    yield str(entry["path"])

    def remove(self, name: str) -> None:
        """Remove an object."""
        with self._asking("remove", name), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, name)

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

    @contextlib.contextmanager
    def _asking(self, what: str, name: str) -> Iterator[None]:
        """Turn obstore's exceptions into Python's and ours."""
        try:
            yield
        except FileNotFoundError as exc:
            if what == "write":
                raise StorageError(
                    f"Cannot write {self.where(name)}: there is no such bucket. Create it first."
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


class _Lease:
    """A lock on an object store, kept by beats and conditional writes."""

    def __init__(self, store: Any, holder: str) -> None:
        self._store = store
        self._holder = holder
        self._token = uuid.uuid4().hex
        self._count = 0
        self._tag = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> str | None:
        """Take the lease; return who holds it if another driver does."""
        try:
            written = obstore.put(self._store, LOCK_NAME, self._text(), mode="create")
        except exceptions.AlreadyExistsError:
            other = self._take_over()
            if other is not None:
                return other
        else:
            self._tag = str(written["e_tag"])
        self._thread.start()
        return None

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(exceptions.BaseError, FileNotFoundError):
            obstore.delete(self._store, LOCK_NAME)

    def _take_over(self) -> str | None:
        """Take a lease that is not kept any more; return who holds one that is."""
        tag, holder = self._look()
        end = time.monotonic() + _LOST_AFTER_S
        logger.info("waiting %.0f s to see whether %s is alive", _LOST_AFTER_S, holder)
        while time.monotonic() < end:
            time.sleep(_BEAT_S / 5)
            now, holder = self._look()
            if now != tag:
                return holder
        try:
            written = obstore.put(self._store, LOCK_NAME, self._text(), mode={"e_tag": tag})
        except exceptions.PreconditionError:
            return self._look()[1]
        self._tag = str(written["e_tag"])
        return None

    def _look(self) -> tuple[str, str]:
        found = obstore.get(self._store, LOCK_NAME)
        try:
            holder = str(json.loads(bytes(found.bytes()))["holder"])
        except (ValueError, KeyError, TypeError):
            holder = "another patchcache"
        return str(found.meta["e_tag"]), holder

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            try:
                written = obstore.put(
                    self._store, LOCK_NAME, self._text(), mode={"e_tag": self._tag}
                )
            except exceptions.PreconditionError:
                # Two drivers at work waste work and harm nothing: they write the same bytes.
                logger.warning("another driver has taken the lock of this cache")
                return
            except exceptions.BaseError as exc:
                logger.warning("the lock of the cache could not be kept: %s", _first_line(exc))
            else:
                self._tag = str(written["e_tag"])

    def _text(self) -> bytes:
        self._count += 1
        beat = {"holder": self._holder, "token": self._token, "beat": self._count}
        return json.dumps(beat).encode()


def _connect(url: str) -> Any:
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        return from_url(
            url,
            client_options={"allow_http": True} if plain else None,
            retry_config={"max_retries": 8},
        )
    except (exceptions.BaseError, ValueError) as exc:
        raise StorageError(f"{url} cannot be used: {_first_line(exc)}") from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".") + "."
