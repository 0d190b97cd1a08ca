"""What was counted in a surveyed cache: plain values for a script, ranks, classes and builds."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cache_builder.build_log import BuildRun
from cache_builder.cache_survey import CacheSurvey
from cache_builder.formats.columns import NO_LABEL
from cache_builder.measures import size_text
from cache_builder.quality import idle, usage

_TOKENS_PER_CENTROID = 50  # below it, usage says more of the sample than of the codebook


class Rank(NamedTuple):
    """One line of the histogram: the id at a rank, most frequent first."""

    rank: int  # from 1
    tokens: int  # of the id at this rank
    cumulative_share: float  # of all tokens, of this id and those before it


class ClassCount(NamedTuple):
    """Images of one class."""

    name: str
    num_images: int


def survey_result(survey: CacheSurvey) -> dict[str, JsonValue]:
    """Return everything, for a script."""
    manifest = survey.manifest
    spec = manifest.spec
    views = survey.views
    return {
        "kind": "cache",
        "fingerprint": manifest.fingerprint,
        "tokenizers": [
            {"fingerprint": fingerprint, "num_views": num_views}
            for fingerprint, num_views in survey.tokenizers.items()
        ],
        "layout": spec.layout,
        "num_samples": manifest.num_samples,
        "num_skipped": manifest.num_skipped,
        "skip_reasons": dict(survey.skip_reasons),
        "num_shards": len(manifest.shards),
        "num_samples_surveyed": survey.num_images,
        "num_shards_surveyed": survey.num_shards,
        "bytes": manifest.bytes,
        "bytes_per_sample": round(manifest.bytes / manifest.num_samples, 1),
        "part_bytes": dict(survey.part_bytes),
        "shard_bytes": survey.shard_bytes._asdict(),
        "payloads": list(manifest.payloads),
        **manifest.payload_totals(),
        "images_in_cache": spec.images_in_cache,
        "image_heights": survey.heights._asdict(),
        "image_widths": survey.widths._asdict(),
        "views": spec.view_spec.model_dump(mode="json"),
        "view_areas": {
            "first": views.first,
            "others": views.others._asdict() if views.others else None,
            "together": views.together,
        },
        "mirrored_share": views.mirrored,
        "grid": list(manifest.grid),
        "vocab_size": manifest.vocab_size,
        "num_stages": spec.num_stages,
        "stages": [_stage_result(counts) for counts in survey.counts],
        "neighbours": {name: _number(v) for name, v in survey.neighbours._asdict().items()},
        "labels": {line.name: line.num_images for line in class_counts(survey) if line.num_images},
        "num_unlabelled": survey.labels.get(NO_LABEL, 0),
        "num_classes": len(spec.class_names),
        "num_empty_classes": num_empty_classes(survey),
        "source": spec.source.model_dump(mode="json"),
        "builds": [run.model_dump(mode="json") for run in survey.builds],
    }


def tokenizer_lines(survey: CacheSurvey) -> list[str]:
    """Return the tokenizers of a cache that has several, and what shows the others."""
    if len(survey.tokenizers) == 1:
        return []
    return [
        f"{fingerprint}, {num_views:,} views: "
        + (
            "the one counted here"
            if fingerprint == survey.manifest.fingerprint
            else f"--tokenizer {_shortest(fingerprint, survey.tokenizers)} counts it"
        )
        for fingerprint, num_views in survey.tokenizers.items()
    ]


def surveyed_text(survey: CacheSurvey) -> str:
    """Say what was looked at, and how long it took."""
    total = survey.manifest.num_samples
    part = f"{survey.num_images:,} of {total:,} images, in {survey.num_shards:,} shards"
    if survey.num_images == total:
        part = f"all {total:,} images"
    return f"{part}, in {survey.seconds:,.1f} s"


def warnings(survey: CacheSurvey) -> list[str]:
    """Say what limits the numbers, and what to look at."""
    lines = []
    if survey.num_images < survey.manifest.num_samples:
        lines.append(
            f"counts are those of {survey.num_images:,} images in {survey.num_shards:,} shards "
            "chosen by hash"
        )
    if survey.num_tokens < _TOKENS_PER_CENTROID * survey.manifest.vocab_size:
        lines.append(
            f"{survey.num_tokens:,} tokens are fewer than {_TOKENS_PER_CENTROID} per id: usage is "
            "that of the images more than of the codebook"
        )
    if num_empty := num_empty_classes(survey):
        lines.append(f"{num_empty:,} of {len(class_counts(survey)):,} classes have no image")
    return lines


def histogram(counts: NDArray[np.int64]) -> list[Rank]:
    """Return the ids at ranks 1, 2, 4, ... and at the last one, of counts (K,)."""
    ordered = np.sort(counts)[::-1]
    sums = np.cumsum(ordered)
    ranks = [1 << power for power in range(len(ordered).bit_length())]
    if ranks[-1] != len(ordered):
        ranks.append(len(ordered))
    total = max(int(sums[-1]), 1)
    return [Rank(r, int(ordered[r - 1]), round(int(sums[r - 1]) / total, 6)) for r in ranks]


def class_counts(survey: CacheSurvey) -> list[ClassCount]:
    """Return all classes, those without images included, most frequent first."""
    names = survey.manifest.spec.class_names
    labels = dict.fromkeys(range(len(names)), 0) | survey.labels
    labels.pop(NO_LABEL, None)
    ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    return [ClassCount(class_name(names, label), count) for label, count in ordered]


def class_lines(survey: CacheSurvey, num_top: int, num_tail: int) -> list[tuple[str, int]]:
    """Return the classes with most and with fewest images, a remark (count -1) between them."""
    counts = [(line.name, line.num_images) for line in class_counts(survey)]
    num_between = len(counts) - num_top - num_tail
    if num_between <= 1:
        return counts
    return [
        *counts[:num_top],
        (f"({num_between:,} classes between)", -1),
        *counts[len(counts) - num_tail :],
    ]


def class_name(names: Sequence[str], label: int) -> str:
    """Return the name of a label, or its number where it has none."""
    return names[label] if label < len(names) else str(label)


def num_empty_classes(survey: CacheSurvey) -> int:
    """Return how many classes have a name and no image."""
    return sum(not line.num_images for line in class_counts(survey))


def build_rows(builds: Sequence[BuildRun]) -> list[tuple[str, ...]]:
    """Return the log as rows under `BUILD_COLUMNS`, newest first."""
    return [
        (
            f"{run.started:%Y-%m-%d %H:%M:%S}",
            run.outcome + (f": {run.error}" if run.error else ""),
            f"{run.seconds:,.0f} s",
            f"{run.num_images:,}",
            f"{run.num_units:,} built, {run.num_units_kept:,} kept",
            f"{run.images_per_s:,.0f}",
            f"{run.views_per_s:,.0f}",
            f"{size_text(run.bytes_read)} read, {size_text(run.bytes_written)} written",
            workers_text(run),
        )
        for run in reversed(builds)
    ]


BUILD_COLUMNS = (
    "started, UTC", "outcome", "took", "images", "shards", "images/s", "views/s", "bytes", "on",
)  # fmt: skip


def build_lines(builds: Sequence[BuildRun]) -> list[str]:
    """Return the log as lines of text, newest first."""
    return [
        f"{run.started:%Y-%m-%d %H:%M} UTC, {run.outcome} after {run.seconds:,.0f} s: "
        + (
            f"{run.num_images:,} images at {run.images_per_s:,.0f} images/s, {workers_text(run)}"
            if run.num_images
            else "no images"
        )
        + (f", {run.num_units_kept:,} shards kept" if run.num_units_kept else "")
        + (f"; {run.error}" if run.error else "")
        for run in reversed(builds)
    ]


def workers_text(run: BuildRun) -> str:
    """Say where a run took place."""
    if not run.num_workers:
        return "no worker"
    workers = f"{run.num_workers:,} worker" + ("s" if run.num_workers > 1 else "")
    hosts = ", ".join(run.hosts[:3]) + (", ..." if len(run.hosts) > 3 else "")
    return f"{workers} on {hosts} ({', '.join(run.devices)})"


def _stage_result(counts: NDArray[np.int64]) -> dict[str, JsonValue]:
    use = usage(counts)
    return {
        "num_tokens": use.num_tokens,
        "num_used": use.num_used,
        "perplexity": round(use.perplexity, 2),
        "entropy_bits": round(use.entropy_bits, 4),
        "max_share": round(use.max_share, 6),
        **idle(counts)._asdict(),
        "histogram": [line._asdict() for line in histogram(counts)],
    }


def _shortest(fingerprint: str, every: Iterable[str]) -> str:
    """Return as much of a fingerprint as names no other one, eight digits or more."""
    others = [other for other in every if other != fingerprint]
    length = 8
    while any(other.startswith(fingerprint[:length]) for other in others):
        length += 1
    return fingerprint[:length]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
