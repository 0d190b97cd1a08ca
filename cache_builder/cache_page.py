"""The page of a cache: what `patchcache inspect CACHE --page` writes.

One HTML file with its pictures inside. The numbers are those of the survey; the images that are
shown were chosen by it, and are read here, from the cache or from where they lie.
"""

import html
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder import files, pages, pictures
from cache_builder.cache_facts import facts
from cache_builder.cache_survey import CacheSurvey, Example
from cache_builder.cache_table import (
    BUILD_COLUMNS,
    build_rows,
    class_counts,
    class_lines,
    class_name,
    surveyed_text,
    tokenizer_lines,
    warnings,
)
from cache_builder.errors import ConfigError, ImageError, PatchCacheError, SourceError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.views import View
from cache_builder.imaging import apply_view, decode
from cache_builder.measures import decibel_text
from cache_builder.quality import psnr
from cache_builder.sources import ImageJoin
from cache_builder.tokenizers import PatchTokenizer

NUM_EXAMPLES = 24

_THUMBNAIL_SIDE = 640
_TOP_CLASSES, _TAIL_CLASSES = 24, 8
_CLASSES_FOR_CURVE = 50
_FEW_VIEWS = 2  # of which two images find place side by side


class _View(NamedTuple):
    """One view as it is shown."""

    pixels: pictures.Pixels | None  # None where the image cannot be had
    token_ids: NDArray[np.uint16]  # (rows, cols) of the first stage
    stands_for: pictures.Pixels | None  # what the ids decode to; None where they are not pixels


def write(
    path: Path, survey: CacheSurvey, cache: TokenCache, images: str | None = None
) -> list[str]:
    """Write the page, whole or not at all.

    Args:
        path: Of the page.
        survey: Of the cache, with examples.
        cache: Opened.
        images: Where the images of a cache without images lie now.

    Returns:
        Why images are not shown, one line for each reason.

    Raises:
        ConfigError: `images` was given and the cache holds its images.
        ArtifactError: The cache is damaged.
    """
    spec = survey.manifest.spec
    if images is not None and spec.images_in_cache != "none":
        raise ConfigError(
            f"{survey.location} holds its images; --images is for caches that were built with "
            "--images-in-cache none. Leave it out."
        )
    shelf = _Shelf(cache, images)
    codebook = cache.codebook
    examples = _examples_section(survey, cache, shelf)
    rows, cols = spec.grid
    stages = f"{spec.num_stages} stages of " if spec.num_stages > 1 else ""
    lead = (
        f"{codebook.extractor.id}, {codebook.metric}, {stages}K = {spec.vocab_size:,}, "
        f"{rows} x {cols} ids per view; {survey.manifest.num_samples:,} images in "
        f"{spec.view_spec.num_views} views each, layout {spec.layout}. "
        f"Counted: {surveyed_text(survey)}."
    )
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in warnings(survey))
    sections = [
        pages.measure_table(facts(survey)) + (f"<ul>{notes}</ul>" if notes else ""),
        examples,
        _usage_section(survey),
        _labels_section(survey),
        _builds_section(survey),
        _skipped_section(survey),
        f'<p class="muted">Fingerprint <code>{survey.manifest.fingerprint}</code></p>',
        "".join(f'<p class="muted">Tokenizer {line}</p>' for line in tokenizer_lines(survey)),
    ]
    name = survey.location.rstrip("/").rpartition("/")[2]
    files.publish(path, pages.document(f"Cache {name}", lead, sections).encode())
    return shelf.problems


class _Shelf:
    """Where the images of the page come from; what cannot be had is a problem, not an error."""

    def __init__(self, cache: TokenCache, images: str | None) -> None:
        self._join: ImageJoin | None = None
        self._embedded = cache.manifest.spec.images_in_cache != "none"
        self.problems: list[str] = []
        self.num_missing = 0
        if self._embedded:
            return
        try:
            self._join = ImageJoin(cache.store, cache.manifest.spec.source, images)
        except PatchCacheError as exc:
            self.problems.append(str(exc))

    def picture(self, shard: int, sample: CachedSample) -> torch.Tensor | None:
        """Return the decoded image of a sample, (3, H, W) uint8, or None."""
        try:
            return decode(self._encoded(shard, sample))
        except (SourceError, ImageError) as exc:
            self.num_missing += 1
            if str(exc) not in self.problems:
                self.problems.append(str(exc))
            return None

    def _encoded(self, shard: int, sample: CachedSample) -> bytes:
        if self._embedded:
            return sample.image or b""
        if self._join is None:
            raise SourceError(self.problems[0])
        return self._join.read(shard, sample.key)


def _examples_section(survey: CacheSurvey, cache: TokenCache, shelf: _Shelf) -> str:
    tokenizer = _pixel_tokenizer(cache.codebook)
    figures = [_figure(survey, cache, tokenizer, shelf, place) for place in survey.examples]
    missing = ""
    if shelf.num_missing:
        reasons = "".join(f"<li>{html.escape(text)}</li>" for text in shelf.problems[:5])
        advice = (
            "Name the place where the images lie now with <code>--images</code>."
            if survey.manifest.spec.images_in_cache == "none"
            else "They are damaged in the cache: run <code>patchcache verify</code>."
        )
        missing = (
            f"<p><strong>{shelf.num_missing:,} of these images cannot be shown</strong>, their "
            f"boxes and token maps can. {advice}</p><ul>{reasons}</ul>"
        )
    third = (
        "and the pixels of the centroids that those ids name"
        if tokenizer
        else "and the two over one another"
    )
    few = survey.manifest.view_spec.num_views <= _FEW_VIEWS
    layout = ' class="few"' if few else ""
    kinds = "one of every class as far as they go, " if len(survey.labels) > 1 else ""
    return (
        f"<h2>Images, views and tokens</h2><p>{len(figures)} images, {kinds}chosen by the hash of "
        "their keys. The boxes are the stored views; a dashed box with &#8644; is mirrored. "
        "Of every view: its pixels as the trainer sees them, its token ids (one colour per id, the "
        f"same in all pictures), {third}.</p>{missing}<div{layout}>{''.join(figures)}</div>"
    )


def _figure(
    survey: CacheSurvey,
    cache: TokenCache,
    tokenizer: PatchTokenizer | None,
    shelf: _Shelf,
    place: Example,
) -> str:
    spec = survey.manifest.spec
    sample = cache.read(place.shard, place.row, payloads={"image"})
    picture = shelf.picture(place.shard, sample)
    thumbnail = None
    size = place.image_size
    if picture is not None:
        thumbnail = pictures.jpeg(pictures.channels_last(picture), _THUMBNAIL_SIDE)
        size = (int(picture.shape[-2]), int(picture.shape[-1]))
    first_view = spec.view_spec.first_view
    cells, errors = [], []
    for number, (top, left, height, width, hflip) in enumerate(sample.views.tolist()):
        view = View(top, left, height, width, bool(hflip))
        shown = _view(cache, sample.token_ids[number], view, tokenizer, picture)
        if shown.pixels is not None and shown.stands_for is not None:
            errors.append(float(np.square(shown.pixels.astype(float) - shown.stands_for).mean()))
        cells.append(_view_cell(shown, first_view + number, view, sample.key))
    label = (
        ""
        if sample.label is None
        else f"{html.escape(class_name(spec.class_names, sample.label))}, "
    )
    quality = ""
    if errors:
        quality = f", reconstruction: {decibel_text(psnr(float(np.mean(errors))), 1)}"
    label_text = f"{sample.key} with its views as boxes"
    drawn = pictures.boxes(sample.views, size, thumbnail, label_text, first_view)
    return (
        f'<div class="sample"><figure>{drawn}<figcaption>{label}{html.escape(sample.key)}, '
        f"{size[1]:,} x {size[0]:,} pixels{quality}</figcaption></figure>"
        f'<div class="views">{"".join(cells)}</div></div>'
    )


def _view(
    cache: TokenCache,
    token_ids: NDArray[np.uint16],
    view: View,
    tokenizer: PatchTokenizer | None,
    picture: torch.Tensor | None,
) -> _View:
    spec = cache.manifest.spec.view_spec
    pixels = None
    if picture is not None:
        pixels = pictures.channels_last(apply_view(picture, view, spec.size, spec.interpolation))
    first = token_ids[..., 0] if cache.manifest.spec.num_stages > 1 else token_ids
    again = pictures.reconstruction(tokenizer, token_ids) if tokenizer else None
    return _View(pixels, first, again)


def _view_cell(view: _View, number: int, box: View, key: str) -> str:
    what = f"view {number} of {key}"
    colour = pictures.view_colour(number)
    images = []
    if view.pixels is not None:
        images.append(("photo", pictures.jpeg(view.pixels), what))
    # One pixel per id: the page enlarges it.
    colours = pictures.token_map(view.token_ids, max(view.token_ids.shape))
    images.append(("", pictures.png(colours), f"token ids of {what}"))
    if view.stands_for is not None:
        images.append(("", pictures.jpeg(view.stands_for), f"centroids of {what}"))
    elif view.pixels is not None:
        over = pictures.token_map(view.token_ids, view.pixels.shape[0])
        both = pictures.blended(view.pixels, over)
        images.append(("", pictures.jpeg(both), f"{what} and its token ids"))
    drawn = "".join(
        f'<img class="{kind}" alt="{html.escape(text)}" src="{uri}">' for kind, uri, text in images
    )
    mirrored = " &#8644;" if box.hflip else ""
    return (
        f'<div class="view"><span><b style="background:{colour};color:#000">{number}{mirrored}</b>'
        f" <small>{box.height} x {box.width}</small></span>{drawn}</div>"
    )


def _pixel_tokenizer(codebook: Codebook) -> PatchTokenizer | None:
    """Return the tokenizer if its centroids are pictures; no model is loaded for it."""
    return PatchTokenizer.load(codebook) if codebook.has_pixel_centroids else None


def _usage_section(survey: CacheSurvey) -> str:
    charts = "".join(
        (f"<h3>Stage {number}</h3>" if len(survey.counts) > 1 else "")
        + pictures.usage_curve(counts)
        for number, counts in enumerate(survey.counts, 1)
    )
    return (
        "<h2>Use of the ids</h2><p>Tokens per id, most frequent first, on a logarithmic scale; the "
        f"dashed line is the even share.</p>{charts}"
    )


def _labels_section(survey: CacheSurvey) -> str:
    counts = class_counts(survey)
    if not counts:
        return "<h2>Labels</h2><p>The images have no labels.</p>"
    curve = ""
    if len(counts) > _CLASSES_FOR_CURVE:
        numbers = np.array([line.num_images for line in counts])
        curve = pictures.usage_curve(numbers, ("rank of the class", "images"))
    bars = pages.count_bars(class_lines(survey, _TOP_CLASSES, _TAIL_CLASSES))
    return f"<h2>Labels</h2><p>Images per class, most frequent first.</p>{curve}{bars}"


def _builds_section(survey: CacheSurvey) -> str:
    if not survey.builds:
        return ""
    return (
        "<h2>Builds</h2><p>From the log beside the cache, newest first; rates are those while "
        f"units were at work.</p>{pages.table(BUILD_COLUMNS, build_rows(survey.builds))}"
    )


def _skipped_section(survey: CacheSurvey) -> str:
    num_skipped = survey.manifest.num_skipped
    if not num_skipped:
        return ""
    reasons = pages.table(
        ("reason", "images"),
        ((reason, f"{count:,}") for reason, count in survey.skip_reasons),
        classes=("", "number"),
    )
    some = f"The first {len(survey.skipped):,}" if len(survey.skipped) < num_skipped else "They are"
    listed = pages.table(
        ("image", "reason"), ((sample.source, sample.reason) for sample in survey.skipped)
    )
    return (
        f"<h2>Skipped images</h2><p>{num_skipped:,} could not be tokenised.</p>{reasons}"
        f"<p>{some}:</p>{listed}"
    )
