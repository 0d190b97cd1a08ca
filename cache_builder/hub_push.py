"""`patchcache push`: send a codebook or a finished cache to the Hugging Face Hub.

Only what is missing is sent: what the Hub has, by its digest, stays. Files go in commits of a
limited size, so that a push that was stopped goes on with the rest, and the manifest comes last: a
cache without it is unfinished there as it is here. Every file is digested before it is sent, and
damage is refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cache_builder.errors import ArtifactError, ConfigError
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
from cache_builder.hub_card import CARD_NAME, cache_card, codebook_card, is_ours
from cache_builder.hub_files import files_below, git_blob, is_on_hub
from cache_builder.reporting import Progress
from cache_builder.stores import LocalStore, Store

_COMMIT_FILES = 200
_COMMIT_BYTES = 2 << 30


class PushSummary(NamedTuple):
    """What was sent."""

    place: str  # on the Hub
    num_sent: int
    num_there: int
    bytes_sent: int


def push(
    source: Path, hub: HubFolder, *, private: bool = True, progress: Progress | None = None
) -> PushSummary:
    """Send a codebook file or a cache; the repository is made if it is not there.

    Args:
        source: A .safetensors file, or the folder of a finished cache.
        hub: Where it goes.
        private: A repository that is made is seen by its owner alone.
        progress: Told after every commit.

    Raises:
        ArtifactError: The codebook or cache is unfinished or damaged.
        ConfigError: The Hub holds another cache there.
        StorageError: The Hub refuses or does not answer.
    """
    if source.is_file():
        return _push_codebook(source, hub, private=private)
    store = LocalStore(source)
    manifest = CacheManifest.load(store)
    digests = _cache_files(store, manifest)
    hub.create(private=private)
    remote = hub.files()
    _refuse_other_cache(store, hub, remote)
    missing = {
        name: store.size(name)
        for name, sha256 in digests.items()
        if not is_on_hub(remote.get(name), store, name, sha256)
    }
    num_sent = 0
    for part in _parts(missing):
        hub.send({name: source / name for name in part}, f"Add {len(part)} files of a cache")
        num_sent += len(part)
        if progress:
            progress(num_sent, len(missing) + 1)
    last: dict[str, Path | bytes] = {}
    if not is_on_hub(remote.get(MANIFEST_NAME), store, MANIFEST_NAME):
        last[MANIFEST_NAME] = source / MANIFEST_NAME
    card = cache_card(manifest, hub.place, hub.options)
    last |= _card(hub, remote, card)
    if last:
        hub.send(last, "Finish the cache")
    bytes_sent = sum(missing.values()) + sum(store.size(name) for name in last if name != CARD_NAME)
    num_sent += MANIFEST_NAME in last
    return PushSummary(hub.place, num_sent, len(digests) + 1 - num_sent, bytes_sent)


def _push_codebook(source: Path, hub: HubFolder, *, private: bool) -> PushSummary:
    codebook = Codebook.load(source)
    if source.suffix != ".safetensors":
        raise ConfigError(f"{source} must end in .safetensors, by which a codebook is known.")
    store, name = LocalStore(source.parent), source.name
    hub.create(private=private)
    remote = hub.files()
    sent: dict[str, Path | bytes] = {}
    if not is_on_hub(remote.get(name), store, name):
        sent[name] = source
    card = codebook_card(codebook, f"{hub.place}/{name}", hub.options)
    sent |= _card(hub, remote, card)
    if sent:
        hub.send(sent, f"Add the codebook {name}")
    num_sent = int(name in sent)
    return PushSummary(f"{hub.place}/{name}", num_sent, 1 - num_sent, num_sent * store.size(name))


def _cache_files(store: Store, manifest: CacheManifest) -> dict[str, str | None]:
    """Return every file of a cache but its manifest, and its SHA-256 where the manifest has one.

    All of them were found undamaged.

    Raises:
        ArtifactError: One is damaged or missing.
    """
    num_units = read_model(BuildPlan, store, PLAN_NAME).num_units
    below = [files_below(manifest, num_units)]
    for layer in manifest.layers:
        _refuse_damage(store, layer.manifest)
        inner = read_model(CacheManifest, store, f"{layer.name}/{MANIFEST_NAME}")
        below.append(files_below(inner, num_units, layer.name))
    digests: dict[str, str | None] = {}
    for each in below:
        for file in each.digested:
            _refuse_damage(store, file)
            digests[file.path] = file.sha256
        digests |= dict.fromkeys(each.derived)
    return digests


def _refuse_damage(store: Store, file: FileDigest) -> None:
    if damage := file.damage(store):
        raise ArtifactError(
            f"{damage}. Nothing damaged is sent; `patchcache verify {store.location} --repair` "
            "makes it again."
        )


def _refuse_other_cache(store: Store, hub: HubFolder, remote: Mapping[str, RemoteFile]) -> None:
    if PLAN_NAME in remote and not is_on_hub(remote[PLAN_NAME], store, PLAN_NAME):
        raise ConfigError(
            f"{hub.place} holds another cache: its {PLAN_NAME} is not that of {store.location}. "
            "Choose another folder, USER/REPO/FOLDER."
        )


def _parts(missing: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names in parts that make a commit each."""
    part: list[str] = []
    size = 0
    for name in sorted(missing):
        if part and (len(part) == _COMMIT_FILES or size + missing[name] > _COMMIT_BYTES):
            yield part
            part, size = [], 0
        part.append(name)
        size += missing[name]
    if part:
        yield part


def _card(hub: HubFolder, remote: Mapping[str, RemoteFile], text: str) -> dict[str, bytes]:
    """Return the card as a file to send, unless it is there or somebody wrote one of their own."""
    data = text.encode()
    there = remote.get(CARD_NAME)
    if there is None:
        return {CARD_NAME: data}
    if there.blob == git_blob(data) or not is_ours(hub.read(CARD_NAME)):
        return {}
    return {CARD_NAME: data}
