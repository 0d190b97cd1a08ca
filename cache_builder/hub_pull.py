"""`patchcache pull`: fetch a codebook or a cache from the Hugging Face Hub.

Everything comes from one commit. Files arrive beside the cache, are digested, and only then get
their names; the manifest comes last, so that a pull that was stopped leaves an unfinished cache,
and the same command fetches what is missing. What the manifest digests is held against it, and what
follows from other files against those.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cache_builder import files
from cache_builder.commit import holder
from cache_builder.errors import ArtifactError, ConfigError, StorageError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    CacheManifest,
    FileDigest,
    read_model,
)
from cache_builder.formats.plan import BuildPlan
from cache_builder.hub import HubFolder, RemoteFile
from cache_builder.hub_files import CacheFiles, derived_damage, files_below, is_on_hub
from cache_builder.reporting import Progress
from cache_builder.stores import LOCK_NAME, LocalStore

_ARRIVALS = ".arrivals"  # beside the files of a cache, or beside a codebook
_THREADS = 8


class PullSummary(NamedTuple):
    """What was fetched."""

    out: Path
    commit: str
    num_fetched: int
    num_there: int
    bytes_fetched: int
    fingerprint: str


def pull_codebook(hub: HubFolder, name: str, out: Path) -> PullSummary:
    """Fetch one codebook; a file at `out` is replaced once the new one is there and whole.

    Raises:
        ArtifactError: What arrived is no codebook, or damaged.
        StorageError: It is not there, or the Hub does not answer.
    """
    commit = hub.commit_id()
    arrivals = out.with_name(f"{_ARRIVALS}-{out.name}")
    try:
        data = hub.fetch(name, commit, arrivals).read_bytes()
        codebook = Codebook.from_bytes(data, f"{hub.place}/{name}")
        files.publish(out, data)
    finally:
        shutil.rmtree(arrivals, ignore_errors=True)
    return PullSummary(out, commit, 1, 0, len(data), codebook.fingerprint)


def pull_cache(hub: HubFolder, out: Path, progress: Progress | None = None) -> PullSummary:
    """Fetch a cache, or what is missing of it.

    Raises:
        ArtifactError: The cache on the Hub is damaged.
        ConfigError: `out` holds something else.
        StorageError: There is no finished cache, or the Hub does not answer.
        CacheInUseError: Another driver writes at `out`.
    """
    commit = hub.commit_id()
    remote = hub.files(commit)
    for name in (PLAN_NAME, MANIFEST_NAME):
        if name not in remote:
            raise StorageError(
                f"{hub.place} on the Hub has no {name}: it is no cache, or its push has not "
                "finished. Run `patchcache push` again."
            )
    store = LocalStore(out)
    with store.lock(holder()):
        pulling = _Pull(hub, commit, remote, store)
        summary = pulling.run(progress)
        shutil.rmtree(store.folder(_ARRIVALS), ignore_errors=True)
    return summary


class _Pull:
    """One cache on its way."""

    def __init__(
        self, hub: HubFolder, commit: str, remote: dict[str, RemoteFile], store: LocalStore
    ) -> None:
        self._hub = hub
        self._commit = commit
        self._remote = remote
        self._store = store
        self._arrivals = store.folder(_ARRIVALS)
        self._fetched: list[int] = []  # bytes of every file that was

    def run(self, progress: Progress | None) -> PullSummary:
        """Fetch what is missing, the manifest last."""
        self._refuse_foreign_folder()
        plan = self._arrive(PLAN_NAME)
        self._refuse_other_cache(plan)
        text = self._arrive(MANIFEST_NAME).read_bytes()
        arrived = LocalStore(self._arrivals / self._hub.folder)
        manifest = read_model(CacheManifest, arrived, MANIFEST_NAME)
        num_units = read_model(BuildPlan, arrived, PLAN_NAME).num_units
        # From here on the place is that of an unfinished cache.
        self._publish(PLAN_NAME, plan.read_bytes())
        if self._store.exists(MANIFEST_NAME) and self._store.read(MANIFEST_NAME) != text:
            self._store.remove(MANIFEST_NAME)
        layers = {"": manifest}
        for layer in manifest.layers:
            self._take(layer.manifest)
            layers[layer.name] = read_model(
                CacheManifest, self._store, f"{layer.name}/{MANIFEST_NAME}"
            )
        parts = [files_below(each, num_units, name) for name, each in layers.items()]
        num_files = self._fetch_all(parts, progress)
        for name, each in layers.items():
            if damage := derived_damage(self._store, each, name):
                raise ArtifactError(
                    f"{damage}: the cache at {self._hub.place} is damaged. Push it again."
                )
        self._publish(MANIFEST_NAME, text)
        num_fetched = len(self._fetched)
        return PullSummary(
            self._store.root,
            self._commit,
            num_fetched,
            num_files + 1 - num_fetched,
            sum(self._fetched),
            manifest.fingerprint,
        )

    def _refuse_foreign_folder(self) -> None:
        """Accept a place that is absent or empty, or holds a cache or some of one."""
        if self._store.exists(PLAN_NAME):
            return
        for name in self._store.names():
            if name != LOCK_NAME and not name.startswith(f"{_ARRIVALS}/"):
                raise ConfigError(
                    f"{self._store.location} is not empty and holds no {PLAN_NAME}. "
                    "Choose another --out, or empty it."
                )

    def _refuse_other_cache(self, plan: Path) -> None:
        there = self._store.read(PLAN_NAME) if self._store.exists(PLAN_NAME) else None
        if there not in (None, plan.read_bytes()):
            shutil.rmtree(self._arrivals, ignore_errors=True)
            raise ConfigError(
                f"{self._store.location} holds another cache than {self._hub.place}. "
                "Choose another --out."
            )

    def _fetch_all(self, parts: list[CacheFiles], progress: Progress | None) -> int:
        digested = [file for part in parts for file in part.digested]
        derived = [name for part in parts for name in part.derived]
        num_files = len(digested) + len(derived)
        with ThreadPoolExecutor(_THREADS) as threads:
            for number, _ in enumerate(self._results(threads, digested, derived), 1):
                if progress:
                    progress(number, num_files)
        return num_files

    def _results(
        self, threads: ThreadPoolExecutor, digested: list[FileDigest], derived: list[str]
    ) -> Iterator[None]:
        yield from threads.map(self._take_derived, derived)
        yield from threads.map(self._take, digested)

    def _take(self, file: FileDigest) -> None:
        """Fetch a file with a digest, unless it is there and whole."""
        if file.damage(self._store) is None:
            return
        there = self._remote.get(file.path)
        if there is not None and there.bytes != file.bytes:
            raise ArtifactError(
                f"{self._hub.place}/{file.path} on the Hub has {there.bytes:,} bytes, and the "
                f"manifest says {file.bytes:,}. Push the cache again."
            )
        path = self._arrive(file.path)
        actual = files.sha256_file(path)
        if actual != file.sha256:
            path.unlink()
            raise ArtifactError(
                f"{self._hub.place}/{file.path} arrived with SHA-256 {actual}, and the manifest "
                f"says {file.sha256}. Run the same command again, or push the cache again."
            )
        self._move(path, file.path)

    def _take_derived(self, name: str) -> None:
        """Fetch a file that other files vouch for, unless the Hub has the one that is there."""
        if self._store.exists(name) and is_on_hub(self._remote.get(name), self._store, name):
            return
        self._move(self._arrive(name), name)

    def _publish(self, name: str, data: bytes) -> None:
        if not self._store.exists(name) or self._store.read(name) != data:
            self._store.publish(name, data)
            self._fetched.append(len(data))

    def _arrive(self, name: str) -> Path:
        return self._hub.fetch(name, self._commit, self._arrivals)

    def _move(self, path: Path, name: str) -> None:
        size = path.stat().st_size
        target = self._store.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        files.flush_file(path)
        path.replace(target)
        files.flush_directory(target.parent)
        self._fetched.append(size)
