"""`patchcache verify`: is a cache what its manifest says, and are its tokens right?

Every file is digested, every sample is read and checked against the plan: nothing lost, nothing
twice, every id below K, every view a box. On request a sample of the images is tokenised again
with the cache's own codebook. A feature tokenizer may answer differently on another device where
two centroids are equally near; such near ties are counted apart. Soft targets and features are
checked in the same two ways.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_builder.errors import ArtifactError, ImageError, PatchCacheError, TokenizerMismatchError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.manifest import (
    PLAN_NAME,
    SKIPPED_NAME,
    BuildPlan,
    PlanUnit,
    ShardInfo,
    UnitRecord,
    plan_unit_name,
    read_model,
    to_json,
    unit_record_name,
)
from cache_builder.formats.payloads import FeatureTotals, SoftTotals, sum_features, sum_soft
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.views import View
from cache_builder.imaging import apply_view, decode
from cache_builder.payload_checks import (
    compare_features,
    compare_soft,
    num_near_ties,
    payload_problem,
)
from cache_builder.planning import units_sha256
from cache_builder.sources import ImageJoin
from cache_builder.targets import TargetMaker
from cache_builder.tokenizers import PatchTokenizer


class Retokenized(NamedTuple):
    """How the tokens of a sample compare with those of the same views tokenised again."""

    num_images: int
    num_tokens: int
    num_near_ties: int
    num_different: int
    num_soft_ids: int = 0
    num_soft_near_ties: int = 0
    num_soft_different: int = 0
    num_soft_probs_different: int = 0  # of ids that do not differ
    num_features: int = 0  # one per patch
    num_features_different: int = 0

    def problems(self) -> list[str]:
        """Say what is different."""
        return [
            f"{different:,} of {total:,} {what} differ from those of the same views tokenised again"
            for different, total, what in (
                (self.num_different, self.num_tokens, "token ids"),
                (self.num_soft_different, self.num_soft_ids, "soft ids"),
                (self.num_soft_probs_different, self.num_soft_ids, "soft probabilities"),
                (self.num_features_different, self.num_features, "features"),
            )
            if different
        ]


class VerifyReport(NamedTuple):
    """What was found; no problem means that the cache is whole."""

    problems: list[str]
    num_files: int
    num_samples: int
    num_skipped: int
    retokenized: Retokenized | None


Progress = Callable[[int, int], None]
"""Called with the number of units checked and of all units."""


def run(
    cache_dir: str | Path,
    *,
    retokenize: int = 0,
    images: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a finished cache.

    Args:
        cache_dir: The cache.
        retokenize: How many images to tokenise again, chosen by their keys.
        images: Where the images lie, for a cache that holds none and whose source has moved.
        device: Where the tokenizer runs.
        weights: Weights file of the feature model, if it is not where the codebook says.
        progress: Told of every unit.

    Raises:
        ArtifactError: There is no finished cache to check.
    """
    cache = TokenCache.open(cache_dir)
    checker = _Checker(cache)
    checker.check_codebook()
    checker.check_plan()
    for unit in range(len(cache.manifest.shards)):
        checker.check_unit(unit)
        if progress:
            progress(unit + 1, len(cache.manifest.shards))
    checker.check_totals()
    retokenized = None
    if retokenize and not checker.problems:
        join = None
        if cache.manifest.spec.images_in_cache == "none":
            join = ImageJoin(cache.store, cache.manifest.spec.source, images)
        tokenizer = PatchTokenizer.load(cache.codebook, device, weights)
        retokenized = _retokenize(cache, retokenize, tokenizer, join)
        checker.problems += retokenized.problems()
    cache.close()
    return VerifyReport(
        problems=checker.problems,
        num_files=checker.num_files,
        num_samples=checker.num_samples,
        num_skipped=checker.num_skipped,
        retokenized=retokenized,
    )


class _Checker:
    """Collects what is wrong with one cache."""

    def __init__(self, cache: TokenCache) -> None:
        self.problems: list[str] = []
        self.num_files = 0
        self.num_samples = 0
        self.num_skipped = 0
        self._cache = cache
        self._spec = cache.manifest.spec
        self._skipped: list[bytes] = []
        self._keys: set[str] = set()
        self._soft: list[SoftTotals] = []
        self._features: list[FeatureTotals] = []

    def check_codebook(self) -> None:
        manifest = self._cache.manifest
        self.num_files += 1
        if damage := manifest.codebook.damage(self._cache.store):
            self.problems.append(damage)
        try:
            codebook = self._cache.codebook
        except (ArtifactError, TokenizerMismatchError) as exc:
            self.problems.append(str(exc))
            return
        if codebook.vocab_size != manifest.vocab_size:
            self.problems.append(
                f"the manifest says K={manifest.vocab_size}, the codebook {codebook.vocab_size}"
            )

    def check_plan(self) -> None:
        manifest, store = self._cache.manifest, self._cache.store
        units = [plan_unit_name(unit) for unit in range(len(manifest.shards))]
        try:
            plan = read_model(BuildPlan, store, PLAN_NAME)
        except ArtifactError as exc:
            self.problems.append(str(exc))
            return
        if plan.spec != manifest.spec or plan.num_units != len(manifest.shards):
            self.problems.append(f"{store.where(PLAN_NAME)} and the manifest are of two builds")
        try:
            digest = units_sha256(store.read(name) for name in units)
        except FileNotFoundError as exc:
            self.problems.append(f"a file of the plan is missing: {exc}")
            return
        if plan.units_sha256 != digest:
            self.problems.append(
                f"{store.where('plan')} is not the list of images of {store.where(PLAN_NAME)}"
            )

    def check_unit(self, unit: int) -> None:
        """Check one unit; whatever is wrong with it is one problem or more, never an exception."""
        info = self._cache.manifest.shards[unit]
        whole = True
        for file in (*info.files, info.record):
            self.num_files += 1
            if damage := file.damage(self._cache.store):
                self.problems.append(f"unit {unit}: {damage}")
                whole = False
        if not whole:
            return
        try:
            self._check_samples(unit, info)
        except PatchCacheError as exc:
            self.problems.append(f"unit {unit}: {exc}")

    def check_totals(self) -> None:
        manifest = self._cache.manifest
        for what, found, expected in (
            ("samples", self.num_samples, manifest.num_samples),
            ("skipped images", self.num_skipped, manifest.num_skipped),
            ("listed images", self.num_samples + self.num_skipped, self._spec.source.num_samples),
        ):
            if found != expected and not self.problems:
                self.problems.append(f"{found:,} {what} found, {expected:,} expected")
        if manifest.payloads != self._spec.payloads:
            self.problems.append(
                f"the manifest lists payloads {', '.join(manifest.payloads)}, and its settings are "
                f"those of {', '.join(self._spec.payloads)}"
            )
        totals = sum_soft(self._soft), sum_features(self._features)
        if totals != (manifest.soft, manifest.features) and not self.problems:
            self.problems.append("soft or features of the manifest are not those of its records")
        store = self._cache.store
        if not store.exists(SKIPPED_NAME) or store.read(SKIPPED_NAME) != b"".join(self._skipped):
            self.problems.append(
                f"{store.where(SKIPPED_NAME)} does not list the skipped images of the "
                "commit records"
            )

    def _check_samples(self, unit: int, info: ShardInfo) -> None:
        record = read_model(UnitRecord, self._cache.store, unit_record_name(unit))
        planned = read_model(PlanUnit, self._cache.store, plan_unit_name(unit))
        self._skipped += [to_json(sample) for sample in record.skipped]
        self.num_skipped += len(record.skipped)
        self._soft += [record.soft] if record.soft else []
        self._features += [record.features] if record.features else []
        keys = []
        for sample in self._cache.read_shard(unit):
            keys.append(sample.key)
            if problem := self._problem(sample):
                self.problems.append(f"unit {unit}, {sample.key}: {problem}")
        self.num_samples += len(keys)
        if len(keys) != info.num_samples:
            self.problems.append(f"unit {unit}: {len(keys)} samples, expected {info.num_samples}")
        bad = {sample.key for sample in record.skipped}
        expected = [row.key for row in planned.rows if row.key not in bad]
        if keys != expected:
            odd = sorted(set(keys) ^ set(expected))[:3]
            self.problems.append(f"unit {unit}: keys do not match the plan, first {odd}")
        if twice := self._keys.intersection(keys):
            self.problems.append(f"unit {unit}: keys seen before, first {min(twice)}")
        self._keys.update(keys)

    def _problem(self, sample: CachedSample) -> str | None:
        largest = int(sample.token_ids.max())
        if largest >= self._spec.vocab_size:
            return f"token id {largest} is not below K={self._spec.vocab_size}"
        if sample.views.shape != (self._spec.view_spec.num_views, 5):
            return f"views of shape {sample.views.shape}"
        top, left, height, width, hflip = sample.views.T
        if (
            min(top.min(), left.min()) < 0
            or min(height.min(), width.min()) < 1
            or not np.isin(hflip, (0, 1)).all()
        ):
            return f"views {sample.views.tolist()} are not boxes"
        if (sample.image is None) != (self._spec.images_in_cache == "none"):
            return "the image is missing"
        return payload_problem(sample, self._spec)


def _retokenize(
    cache: TokenCache, num_images: int, tokenizer: PatchTokenizer, join: ImageJoin | None
) -> Retokenized:
    places = _choose(cache, num_images)
    maker = TargetMaker(tokenizer, cache.manifest.spec)
    counts = []
    for shard, row in places:
        sample = cache.read(shard, row)
        image = sample.image if join is None else join.read(shard, sample.key)
        counts.append(_compare(sample, image or b"", tokenizer, maker))
    return Retokenized(*(sum(column) for column in zip(*counts, strict=True)))


def _choose(cache: TokenCache, num_images: int) -> list[tuple[int, int]]:
    """Choose samples spread over the cache, the same ones on every run."""
    ranked = sorted(
        range(len(cache)), key=lambda index: hashlib.sha256(str(index).encode()).digest()
    )
    return sorted(cache.place(index) for index in ranked[:num_images])


def _compare(
    sample: CachedSample, image: bytes, tokenizer: PatchTokenizer, maker: TargetMaker
) -> Retokenized:
    """Tokenise one sample again."""
    try:
        pixels = torch.stack(list(_views(sample, image, tokenizer)))
    except ImageError as exc:
        raise ArtifactError(f"The image of {sample.key} cannot be tokenised again: {exc}") from exc
    again = maker.make(pixels)
    different = sample.token_ids != again.token_ids
    num_different, num_ties = int(different.sum()), 0
    if num_different and tokenizer.codebook.num_stages == 1 and not tokenizer.decodes_to_pixels:
        features = tokenizer.features(pixels).flatten(0, 1)[torch.from_numpy(different.ravel())]
        before, after = (
            torch.from_numpy(ids[different].astype(np.int64))
            for ids in (sample.token_ids, again.token_ids)
        )
        num_ties = num_near_ties(tokenizer, features, before, after)
    soft = (0, 0, 0, 0)
    if sample.soft_ids is not None:
        soft = compare_soft(sample, again, tokenizer, pixels)
    stored = (0, 0) if sample.features is None else compare_features(sample, again)
    return Retokenized(1, different.size, num_ties, num_different - num_ties, *soft, *stored)


def _views(sample: CachedSample, image: bytes, tokenizer: PatchTokenizer) -> Iterator[Tensor]:
    rule = tokenizer.pixel_rule
    picture = decode(image)
    for top, left, height, width, hflip in sample.views.tolist():
        view = View(top, left, height, width, bool(hflip))
        yield apply_view(picture, view, rule.size, rule.interpolation)
