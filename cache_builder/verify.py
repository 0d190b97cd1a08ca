"""`patchcache verify`: is a cache what its manifest says, and are its tokens right?

Every file is digested, every sample is read and checked against the plan: nothing lost, nothing
twice, every id below K, every view the one that its key draws and within its picture. On request a
sample of the images is tokenised again with the cache's own codebook. What is damaged is named, and
on request just that is made again.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cache_builder.cache_check import CacheCheck
from cache_builder.commit import holder
from cache_builder.damage import Damage
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.manifest import MANIFEST_NAME, PLAN_NAME, CacheManifest
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.repair import RepairOptions, RepairOutcome, repair_cache
from cache_builder.reporting import Progress
from cache_builder.retokenize import Retokenized, RetokenizeTask, retokenize_sample
from cache_builder.stores import Store, open_store


class VerifyReport(NamedTuple):
    """What was found; no damage means that the cache is whole."""

    damages: list[Damage]  # after the repair, if there was one
    notes: list[str]  # what is odd and does no harm
    num_files: int
    num_samples: int
    num_skipped: int
    retokenized: dict[str, Retokenized]  # by tokenizer
    repaired: list[str]  # what was made again
    refused: list[str]  # why something was not

    @property
    def problems(self) -> list[str]:
        """Every damage in one line."""
        return [damage.line() for damage in self.damages]


def run(
    cache: str | Path,
    *,
    retokenize: int = 0,
    tokenizer: str | None = None,
    repair: bool = False,
    images: str | None = None,
    codebook: str | Path | None = None,
    device: str = "auto",
    weights: str | None = None,
    cluster: ClusterOptions | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a finished cache, and repair it if asked to.

    Args:
        cache: Where it lies.
        retokenize: How many images to tokenise again.
        tokenizer: The one to do it with, by its first characters; None means all of the cache.
        repair: Make again what is damaged.
        images: Where the images lie now, if they have moved.
        codebook: A copy of the codebook, to repair with.
        device: Where the tokenizer runs.
        weights: Weights file of the feature model, if it is not where the codebook says.
        cluster: Where the work is done; None is this machine.
        progress: Told of every unit.

    Raises:
        ArtifactError: There is no finished cache to check, or nothing of it can be read.
        CacheInUseError: It is to be repaired, and another driver writes there.
        SourceError: Images are to be tokenised again, and are not there.
    """
    cluster = cluster or ClusterOptions()
    with _locked(open_store(cache)) if repair else contextlib.nullcontext():
        check = CacheCheck(cache)
        check.check_units(range(check.base.num_units), cluster, progress)
        outcome = RepairOutcome([], [])
        conclusion = check.conclude()
        if repair and conclusion.damages:
            options = RepairOptions(images, codebook, device, weights, cluster)
            outcome = repair_cache(check, conclusion, options)
            conclusion = check.conclude()
    damages = conclusion.damages
    retokenized: dict[str, Retokenized] = {}
    if retokenize and not damages:
        for fingerprint in _tokenizers(check.location, tokenizer):
            task = RetokenizeTask(check.location, fingerprint, images, device, weights)
            retokenized[fingerprint] = retokenize_sample(task, retokenize, cluster)
        damages = [
            Damage("tokens", f"tokenizer {fingerprint[:12]}: {problem}")
            for fingerprint, again in retokenized.items()
            for problem in again.problems()
        ]
    shards = [
        found.summary.shard
        for finding in check.findings.values()
        if (found := finding.parts[""]).summary
    ]
    return VerifyReport(
        damages=damages,
        notes=[f"nothing names {check.store.where(name)}" for name in check.stray_files()],
        num_files=conclusion.num_files,
        num_samples=sum(shard.num_samples for shard in shards),
        num_skipped=sum(shard.num_skipped for shard in shards),
        retokenized=retokenized,
        repaired=outcome.repaired,
        refused=outcome.refused,
    )


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    if not store.exists(PLAN_NAME) and not store.exists(MANIFEST_NAME):
        CacheManifest.load(store)  # raises: there is no cache
    with store.lock(holder()):
        yield


def _tokenizers(location: str, wanted: str | None) -> list[str]:
    """Return the fingerprints of the tokenizers of a cache, its own first, or of the one wanted.

    Raises:
        TokenizerMismatchError: There is none that begins so.
    """
    if wanted is not None:
        with TokenCache.open(location, wanted) as cache:
            return [cache.manifest.fingerprint]
    return [*CacheManifest.load(location).tokenizers]
