"""The table of a surveyed cache, from its size to its build: for the terminal and the page."""

import math
from collections.abc import Iterator

from cache_builder import build_log
from cache_builder.cache_survey import CacheSurvey, Spread
from cache_builder.cache_table import class_counts, num_empty_classes, workers_text
from cache_builder.formats.columns import NO_LABEL
from cache_builder.measures import Measure, size_text
from cache_builder.quality import idle, usage

_PART_NAMES = {
    "image": "images",
    "tokens": "token ids",
    "views": "views",
    "info": "keys, sizes, labels",
    "soft": "soft targets",
    "features": "features",
}


def facts(survey: CacheSurvey) -> list[Measure]:
    """Return the table of a cache, from its size to its build."""
    return [
        *_size_facts(survey),
        *_view_facts(survey),
        *_token_facts(survey),
        *_payload_facts(survey),
        *_label_facts(survey),
        *_build_facts(survey),
    ]


def _size_facts(survey: CacheSurvey) -> Iterator[Measure]:
    manifest = survey.manifest
    spec = manifest.spec
    skipped = f"{manifest.num_skipped:,} skipped" if manifest.num_skipped else "none skipped"
    yield Measure(
        "images", f"{manifest.num_samples:,}", skipped,
        f"From {spec.source.location}; skipped ones could not be tokenised.",
    )  # fmt: skip
    low, middle, high = (size_text(value) for value in survey.shard_bytes)
    yield Measure(
        "shards", f"{len(manifest.shards):,}", f"{low} to {high}",
        f"Layout {spec.layout}; the median shard has {middle}.",
    )  # fmt: skip
    yield Measure(
        "size", size_text(manifest.bytes),
        f"{size_text(manifest.bytes / manifest.num_samples)} per image", "Of all shards.",
    )  # fmt: skip
    meanings = {
        "image": f"--images-in-cache {spec.images_in_cache}.",
        "tokens": "uint16.",
        "views": "Boxes, int32.",
    }
    for part, name in _PART_NAMES.items():
        if part in survey.part_bytes:
            num_bytes = survey.part_bytes[part]
            each = f"{size_text(num_bytes / survey.num_images)} per image"
            yield Measure(f"- {name}", size_text(num_bytes), each, meanings.get(part, ""))
    yield Measure(
        "image height, pixels", _number_text(survey.heights.median), _ends(survey.heights),
        "Median; smallest and largest beside.",
    )  # fmt: skip
    yield Measure(
        "image width, pixels", _number_text(survey.widths.median), _ends(survey.widths), "The same."
    )


def _payload_facts(survey: CacheSurvey) -> Iterator[Measure]:
    manifest = survey.manifest
    if (soft := manifest.soft) and (settings := manifest.spec.soft):
        yield Measure(
            "soft targets, perplexity", f"{soft.perplexity:.3g}", f"of {settings.top_k}",
            f"Of a patch's probabilities, mean; temperature {settings.temperature:g}.",
        )  # fmt: skip
        yield Measure(
            "soft targets, mass", f"{soft.mass:.1%}", "",
            f"Of all probability, held by the {settings.top_k} nearest centroids.",
        )  # fmt: skip
    if (features := manifest.features) and (stored := manifest.spec.features):
        yield Measure(
            "features, relative error", f"{features.relative_error:.2g}",
            f"cosine {features.cosine:.6f}", f"{stored.dim:,} values stored as {stored.dtype}.",
        )  # fmt: skip


def _view_facts(survey: CacheSurvey) -> Iterator[Measure]:
    spec, views = survey.manifest.view_spec, survey.views
    yield Measure(
        "views per image", f"{spec.num_views:,}", f"{spec.size} x {spec.size} pixels",
        "View 0 is the largest centred square, the others are random crops.",
    )  # fmt: skip
    if views.first is not None:
        yield Measure(
            "area of the first view", f"{views.first:.1%}", "",
            "Share of its image, mean over images.",
        )  # fmt: skip
    if views.others is None or views.mirrored is None:
        return
    low, middle, high = views.others
    yield Measure(
        "area of random crops", f"{middle:.1%}", f"{low:.1%} to {high:.1%}",
        f"Share of the image, median; {spec.scale[0]:.0%} to {spec.scale[1]:.0%} asked for.",
    )  # fmt: skip
    yield Measure(
        "area of all views", f"{views.together:.1%}", "",
        "Share of an image that at least one of its views shows, mean over images.",
    )  # fmt: skip
    yield Measure(
        "mirrored", f"{views.mirrored:.1%}", f"{spec.hflip:.0%} asked for", "Of the random crops."
    )


def _token_facts(survey: CacheSurvey) -> Iterator[Measure]:
    num_stages = survey.manifest.spec.num_stages
    for number, counts in enumerate(survey.counts, 1):
        suffix = f", stage {number}" if num_stages > 1 else ""
        use, few = usage(counts), idle(counts)
        yield Measure(f"token ids{suffix}", f"{use.num_tokens:,}", "", "Ids that were counted.")
        yield Measure(
            f"ids used{suffix}", f"{use.num_used:,}", f"of {use.vocab_size:,}",
            f"{few.num_dead:,} occur nowhere, {few.num_single:,} once, {few.num_rare:,} less often "
            "than a tenth of the even share.",
        )  # fmt: skip
        yield Measure(
            f"perplexity{suffix}", f"{use.perplexity:,.1f}", f"of {use.vocab_size:,}",
            "2 to the entropy of the ids; K for an even spread.",
        )  # fmt: skip
        yield Measure(
            f"entropy{suffix}", f"{use.entropy_bits:.2f} bits",
            f"of {math.log2(use.vocab_size):.2f}", "What one id says, taken by itself.",
        )  # fmt: skip
        yield Measure(
            f"largest share{suffix}", f"{use.max_share:.2%}", f"even {1 / use.vocab_size:.2%}",
            "Of all tokens, of the most frequent id.",
        )  # fmt: skip
    near = survey.neighbours
    if math.isfinite(near.shuffled):
        stage = " of stage 1" if num_stages > 1 else ""
        for name, value in (("left and right", near.horizontal), ("up and down", near.vertical)):
            if math.isfinite(value):
                yield Measure(
                    f"neighbours alike, {name}", f"{value:.1%}", f"{near.shuffled:.1%} shuffled",
                    f"Neighbouring patches with one id{stage}, beside ids shuffled within a view.",
                )  # fmt: skip


def _label_facts(survey: CacheSurvey) -> Iterator[Measure]:
    counts = [line.num_images for line in class_counts(survey)]
    if not counts:
        yield Measure("classes", "none", "", "The images have no labels.")
        return
    num_empty = num_empty_classes(survey)
    yield Measure(
        "classes", f"{len(counts):,}", f"{num_empty:,} without images" if num_empty else "",
        f"With {min(counts):,} to {max(counts):,} images each.",
    )  # fmt: skip
    if num_unlabelled := survey.labels.get(NO_LABEL, 0):
        yield Measure("images without label", f"{num_unlabelled:,}", "", "")


def _build_facts(survey: CacheSurvey) -> Iterator[Measure]:
    working = [run for run in survey.builds if run.num_images]
    if not working:
        log = build_log.log_location(survey.location)
        value, meaning = "no log", f"{log} is not there."
        if survey.builds:
            value, meaning = "no rate", f"Of the runs in {log} none tokenised an image."
        yield Measure("build", value, "", meaning)
        return
    last = working[-1]
    yield Measure(
        "build", f"{last.images_per_s:,.0f} images/s", f"{last.views_per_s:,.0f} views/s",
        f"{last.num_images:,} images by {workers_text(last)}, {last.started:%Y-%m-%d %H:%M} UTC; "
        "while units were at work, the start of workers left out.",
    )  # fmt: skip
    seconds = last.working_seconds or math.inf
    yield Measure(
        "bytes of the build", f"{size_text(last.bytes_read / seconds)}/s read",
        f"{size_text(last.bytes_written / seconds)}/s written",
        f"{size_text(last.bytes_read)} of images read, {size_text(last.bytes_written)} of shards "
        "written.",
    )  # fmt: skip


def _number_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _ends(values: Spread) -> str:
    return f"{_number_text(values.smallest)} to {_number_text(values.largest)}"
