"""Tokenising a sample of a cache again, to compare with the targets that it holds.

A feature tokenizer may answer differently on another device where two centroids are equally near;
such near ties are counted apart. Soft targets and features are compared in the same way.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_builder.errors import ArtifactError, ImageError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.views import View
from cache_builder.imaging import apply_view, decode
from cache_builder.payload_checks import compare_features, compare_soft, num_near_ties
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.sources import ImageJoin
from cache_builder.targets import TargetMaker
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.unit_jobs import FEW_CHECKS, run_units


class Retokenized(NamedTuple):
    """How the targets of a sample compare with those of the same views made again."""

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


class RetokenizeTask(NamedTuple):
    """What every worker is told."""

    cache: str  # where it lies
    fingerprint: str  # of the tokenizer
    images: str | None = None  # where the images of a cache without images lie now
    device: str = "auto"
    weights: str | None = None


def retokenize_sample(
    task: RetokenizeTask, num_images: int, cluster: ClusterOptions
) -> Retokenized:
    """Tokenise images again, chosen evenly and the same ones on every run.

    Raises:
        ArtifactError: A view cannot be cut from its image.
        SourceError: The images of a cache that holds none are not there.
        TokenizerMismatchError: The weights are not those of the tokenizer.
    """
    with TokenCache.open(task.cache, task.fingerprint) as cache:
        places = _choose(cache, num_images)
    units = [tuple(group) for _, group in groupby(places, key=lambda place: place[0])]
    counts = list(run_units(partial(_Retokenizer, task), units, cluster, FEW_CHECKS))
    return Retokenized(*(sum(column) for column in zip(*counts, strict=True)))


class _Retokenizer:
    """Tokenises images again, in a process of its own."""

    def __init__(self, task: RetokenizeTask) -> None:
        self._cache = TokenCache.open(task.cache, task.fingerprint)
        spec = self._cache.manifest.spec
        codebook = self._cache.codebook
        self._tokenizer = PatchTokenizer.load(codebook, task.device, task.weights)
        self._maker = TargetMaker(self._tokenizer, spec)
        self._join = None
        if spec.images_in_cache == "none":
            self._join = ImageJoin(self._cache.store, spec.source, task.images)

    def run(self, places: tuple[tuple[int, int], ...]) -> Retokenized:
        """Compare some samples of one unit."""
        counts = []
        for shard, row in places:
            sample = self._cache.read(shard, row)
            image = sample.image if self._join is None else self._join.read(shard, sample.key)
            counts.append(_compare(sample, image or b"", self._tokenizer, self._maker))
        self._cache.close()
        return Retokenized(*(sum(column) for column in zip(*counts, strict=True)))


def _choose(cache: TokenCache, num_images: int) -> list[tuple[int, int]]:
    """Choose samples, the same ones on every run."""
    chosen = random.Random(0).sample(range(len(cache)), min(num_images, len(cache)))
    return sorted(cache.place(index) for index in chosen)


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
    if num_different and tokenizer.has_near_ties:
        features = tokenizer.features(pixels).flatten(0, 1)[torch.from_numpy(different.ravel())]
        before, after = (
            torch.from_numpy(ids[different].astype(np.int64))
            for ids in (sample.token_ids, again.token_ids)
        )
        num_ties = num_near_ties(tokenizer.codebook.centroids[0], features, before, after)
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
