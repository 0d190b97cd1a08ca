"""`patchcache inspect CACHE`: one pass over the targets of a cache, and what it comes to.

Shards are read whole, as arrays, and never their images, soft targets or features. What is kept is
counts and sums, so memory does not grow with the number of images: medians are exact, from counts
of the values that occur.

The images that a page shows are chosen in the same pass: of every class the ones whose keys have
the smallest hash, so that the choice depends on the keys alone.
"""

import hashlib
import heapq
import re
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder import build_log
from cache_builder.build_log import BuildRun
from cache_builder.errors import ArtifactError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.columns import NO_LABEL, ShardColumns
from cache_builder.formats.manifest import SKIPPED_NAME, CacheManifest, SkippedSample
from cache_builder.quality import Agreement, mean_agreement, neighbour_agreement
from cache_builder.reporting import Progress

_MAX_SKIPPED = 50
_COVER_CELLS = 16  # per side, to measure what views show together
_EVEN_CLASSES = 64  # with more, a class gets two examples at most


class Spread(NamedTuple):
    """Smallest, middle and largest value."""

    smallest: float
    median: float
    largest: float


class ViewUse(NamedTuple):
    """What views show of their images. Shares of area, means over images."""

    first: float | None  # view 0; None where the views are crops that were added later
    others: Spread | None  # of single crops, to a thousandth; None with one view
    together: float  # shown by one view or more, on a grid of 16 x 16 points
    mirrored: float | None  # share of the crops


class Example(NamedTuple):
    """Where an image for the page lies."""

    shard: int
    row: int
    key: str
    label: int | None
    image_size: tuple[int, int]


class CacheSurvey(NamedTuple):
    """A cache, counted."""

    location: str
    manifest: CacheManifest  # of the tokenizer that was counted
    tokenizers: dict[str, int]  # views of every tokenizer of the cache, by its fingerprint
    num_images: int  # that were looked at, in whole shards
    num_shards: int
    counts: NDArray[np.int64]  # (M, K), how often each id occurs
    neighbours: Agreement  # of the first stage
    shard_bytes: Spread
    part_bytes: dict[str, int]  # of the shards looked at: image, tokens, views, info, ...
    heights: Spread
    widths: Spread
    views: ViewUse
    labels: dict[int, int]  # images of every label that occurs, and of -1 without one
    skip_reasons: list[tuple[str, int]]  # most frequent first; numbers in them are #
    skipped: list[SkippedSample]  # the first 50
    builds: list[BuildRun]  # oldest first; none where no log lies beside the cache
    examples: list[Example]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Of every stage, in what was looked at."""
        return int(self.counts[0].sum())


def run(
    cache: TokenCache,
    max_images: int | None = None,
    num_examples: int = 0,
    progress: Progress | None = None,
) -> CacheSurvey:
    """Read the targets of every shard, and the log beside the cache.

    Args:
        cache: Opened.
        max_images: Stop at so many, in whole shards chosen by hash of their number.
        num_examples: Images to choose for a page.
        progress: Told after every shard.

    Raises:
        ArtifactError: A shard is damaged.
    """
    started_s = time.monotonic()
    shards = _choose_shards(cache.manifest, max_images)
    infos = [cache.manifest.shards[shard] for shard in shards]
    total = sum(info.num_samples for info in infos)
    sums = _Sums(cache.manifest, num_examples)
    num_seen = 0
    for shard in shards:
        sums.add(shard, cache.columns(shard))
        sums.part_bytes.update(cache.part_bytes(shard))
        num_seen += cache.manifest.shards[shard].num_samples
        if progress:
            progress(num_seen, total)
    location = cache.location
    reasons, skipped = _skipped(cache)
    return CacheSurvey(
        location=location,
        manifest=cache.manifest,
        tokenizers=CacheManifest.load(cache.store).tokenizers,
        num_images=num_seen,
        num_shards=len(shards),
        counts=sums.counts,
        neighbours=mean_agreement(sums.neighbours),
        shard_bytes=spread(Counter(info.bytes for info in infos)),
        part_bytes=dict(sums.part_bytes),
        heights=spread(sums.heights),
        widths=spread(sums.widths),
        views=sums.view_use(),
        labels=dict(sorted(sums.labels.items())),
        skip_reasons=reasons,
        skipped=skipped,
        builds=build_log.read(location),
        examples=sums.examples(),
        seconds=time.monotonic() - started_s,
    )


def spread(counts: Counter[int]) -> Spread:
    """Return the smallest, the middle and the largest of counted values."""
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[int(value)] for value in values])
    total = int(ends[-1])
    middle = np.searchsorted(ends, [(total - 1) // 2, total // 2], side="right")
    return Spread(float(values[0]), float(values[middle].mean()), float(values[-1]))


class _Sums:
    """What is kept of the shards seen so far."""

    def __init__(self, manifest: CacheManifest, num_examples: int) -> None:
        spec = manifest.spec
        self._num_stages, self._vocab_size = spec.num_stages, spec.vocab_size
        self.counts = np.zeros((spec.num_stages, spec.vocab_size), np.int64)
        self.neighbours: list[tuple[int, Agreement]] = []
        self.part_bytes = Counter[str]()
        self.heights, self.widths = Counter[int](), Counter[int]()
        self.labels = Counter[int]()
        self._area_thousandths = Counter[int]()  # of views after the first
        self._sum_first = self._sum_together = 0.0
        self._num_images = self._num_others = self._num_mirrored = 0
        self._crops = slice(0 if spec.view_spec.first_view else 1, None)
        self._num_examples = num_examples
        self._per_class = num_examples if len(spec.class_names) <= _EVEN_CLASSES else 2
        self._candidates: dict[int, list[tuple[int, Example]]] = {}

    def add(self, shard: int, columns: ShardColumns) -> None:
        """Count one shard."""
        self._add_tokens(shard, columns.token_ids)
        self._add_views(columns)
        self.heights.update(_counted(columns.image_sizes[:, 0]))
        self.widths.update(_counted(columns.image_sizes[:, 1]))
        self.labels.update(_counted(columns.labels))
        if self._num_examples:
            self._add_candidates(shard, columns)

    def view_use(self) -> ViewUse:
        thousandths = self._area_thousandths
        others = [value / 1000 for value in spread(thousandths)] if thousandths else None
        return ViewUse(
            first=self._sum_first / self._num_images if self._crops.start else None,
            others=Spread(*others) if others else None,
            together=self._sum_together / self._num_images,
            mirrored=self._num_mirrored / self._num_others if self._num_others else None,
        )

    def examples(self) -> list[Example]:
        """Return the chosen images, one of every class before the second of any."""
        ranked = [
            (rank, priority, example)
            for candidates in self._candidates.values()
            for rank, (priority, example) in enumerate(candidates)
        ]
        chosen = [example for _, _, example in sorted(ranked)[: self._num_examples]]
        return sorted(chosen, key=lambda example: (example.shard, example.row))

    def _add_tokens(self, shard: int, token_ids: NDArray[np.uint16]) -> None:
        largest = int(token_ids.max())
        if largest >= self._vocab_size:
            raise ArtifactError(
                f"Shard {shard} holds token id {largest}, which is not below K="
                f"{self._vocab_size}. Run `patchcache verify` to see what else is wrong."
            )
        stages = token_ids.reshape(-1, self._num_stages).T
        for counts, ids in zip(self.counts, stages, strict=True):
            counts += np.bincount(ids, minlength=self._vocab_size)
        first = token_ids[..., 0] if self._num_stages > 1 else token_ids
        maps = first.reshape(-1, *first.shape[2:])
        self.neighbours.append((len(maps), neighbour_agreement(maps)))

    def _add_views(self, columns: ShardColumns) -> None:
        sizes = columns.image_sizes.astype(np.int64)
        boxes = columns.views.astype(np.int64)
        areas = boxes[..., 2] * boxes[..., 3] / sizes.prod(1)[:, None]  # (n, V)
        crops = areas[:, self._crops]
        self._sum_first += float(areas[:, 0].sum())
        self._area_thousandths.update(_counted((crops * 1000).round().astype(np.int64)))
        self._num_mirrored += int(boxes[:, self._crops, 4].sum())
        self._num_others += crops.size
        self._num_images += len(sizes)
        points = (np.arange(_COVER_CELLS) + 0.5) / _COVER_CELLS
        rows, cols = (
            _within(boxes[..., side], boxes[..., side + 2], sizes[:, side, None] * points)
            for side in (0, 1)
        )
        seen = (rows[..., :, None] & cols[..., None, :]).any(1)
        self._sum_together += float(seen.mean((1, 2)).sum())

    def _add_candidates(self, shard: int, columns: ShardColumns) -> None:
        rows = zip(columns.keys, columns.labels.tolist(), columns.image_sizes.tolist(), strict=True)
        found: dict[int, list[tuple[int, Example]]] = {}
        for row, (key, label, (height, width)) in enumerate(rows):
            shown = None if label == NO_LABEL else label
            example = Example(shard, row, key, shown, (height, width))
            found.setdefault(label, []).append((_priority(key), example))
        for label, candidates in found.items():
            both = self._candidates.get(label, []) + candidates
            self._candidates[label] = heapq.nsmallest(self._per_class, both)


def _choose_shards(manifest: CacheManifest, max_images: int | None) -> list[int]:
    """Return the shards to read, those without samples left out."""
    full = [shard for shard, info in enumerate(manifest.shards) if info.num_samples]
    if max_images is None or max_images >= manifest.num_samples:
        return full
    chosen, num_images = [], 0
    for shard in sorted(full, key=lambda shard: _priority(str(shard))):
        if num_images >= max_images:
            break
        chosen.append(shard)
        num_images += manifest.shards[shard].num_samples
    return sorted(chosen)


def _skipped(cache: TokenCache) -> tuple[list[tuple[str, int]], list[SkippedSample]]:
    if not cache.manifest.num_skipped:
        return [], []
    reasons, first = Counter[str](), list[SkippedSample]()
    try:
        for line in cache.store.read(SKIPPED_NAME).splitlines():
            sample = SkippedSample.model_validate_json(line)
            reasons[re.sub(r"\d[\d,]*", "#", sample.reason)] += 1
            if len(first) < _MAX_SKIPPED:
                first.append(sample)
    except (OSError, ValueError) as exc:
        raise ArtifactError(
            f"{cache.store.where(SKIPPED_NAME)} cannot be read ({exc}). "
            f"Run `patchcache verify {cache.location}`."
        ) from exc
    return reasons.most_common(), first


def _counted(values: NDArray[np.integer]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _within(
    begins: NDArray[np.int64],  # (n, V)
    lengths: NDArray[np.int64],  # (n, V)
    points: NDArray[np.float64],  # (n, P)
) -> NDArray[np.bool_]:
    """Say which points of an image lie between the borders of which view, (n, V, P)."""
    places = points[:, None, :]
    inside: NDArray[np.bool_] = (places >= begins[..., None]) & (
        places < (begins + lengths)[..., None]
    )
    return inside


def _priority(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
