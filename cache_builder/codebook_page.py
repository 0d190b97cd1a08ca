"""The page of an appraisal: what `patchcache inspect --images --page` writes.

One HTML file with its pictures inside. A second, short pass over the source reads the photos that
are shown; nothing is measured in it.
"""

import html
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder import files, pages, pictures
from cache_builder.appraisal import Appraisal
from cache_builder.appraisal_table import measures, picked_text, warnings
from cache_builder.errors import ImageError, SourceError
from cache_builder.tokenizers import PatchTokenizer

_MAX_PHOTOS = 8
_MAX_CENTROIDS = 512
_SHEET_COLUMNS = 32
_SHEET_PIXELS = 1000  # least width that a sheet is enlarged to
_MAX_IDS = 24  # of features, with examples
_EXAMPLES_PER_ID = 8


def write(path: Path, appraisal: Appraisal, name: str) -> None:
    """Write the page of the codebook called `name`, whole or not at all.

    Raises:
        SourceError: A photo cannot be read any more.
    """
    codebook, tokenizer = appraisal.codebook, appraisal.tokenizer
    rows, cols = tokenizer.grid
    stages = f"{codebook.num_stages} stages of " if codebook.num_stages > 1 else ""
    lead = (
        f"{codebook.extractor.id}, {codebook.metric}, {stages}K = {codebook.vocab_size:,}, "
        f"{rows} x {cols} ids per image of {tokenizer.pixel_rule.size} pixels. "
        f"Measured on {picked_text(appraisal)}."
    )
    examples = _Examples(appraisal, tokenizer)
    sections = [
        _table_section(appraisal),
        _photos_section(appraisal, tokenizer, examples),
        _usage_section(appraisal),
        _centroids_section(appraisal, tokenizer)
        if codebook.has_pixel_centroids
        else _examples_section(appraisal, tokenizer, examples),
        f'<p class="muted">Fingerprint <code>{codebook.fingerprint}</code></p>',
    ]
    text = pages.document(f"Codebook {name}", lead, sections)
    files.publish(path, text.encode())


class _Examples:
    """Which photos are shown, which patches stand for an id, and the pixels of both."""

    def __init__(self, appraisal: Appraisal, tokenizer: PatchTokenizer) -> None:
        num_images = len(appraisal.rows)
        self.shown = np.linspace(0, num_images - 1, min(_MAX_PHOTOS, num_images)).astype(int)
        counts = appraisal.counts[0]
        order = np.argsort(-counts, kind="stable")[:_MAX_IDS]
        self.ids = [int(token_id) for token_id in order if counts[token_id]]
        wanted = {int(index) for index in self.shown}
        self.places: dict[int, list[tuple[int, int, int]]] = {}  # image, row, col
        if not tokenizer.codebook.has_pixel_centroids:
            self.places = {i: _places(appraisal.token_ids, i) for i in self.ids}
            wanted |= {image for places in self.places.values() for image, _, _ in places}
        keys = frozenset(appraisal.rows[index].key for index in wanted)
        index_of_key = {row.key: index for index, row in enumerate(appraisal.rows)}
        self.pixels: dict[int, pictures.Pixels] = {}
        for row, view in appraisal.picked.views(tokenizer, keys):
            if isinstance(view, ImageError):
                raise SourceError(
                    f"{row.source} was measured and has changed since: {view}. Run the command "
                    "again."
                )
            self.pixels[index_of_key[row.key]] = pictures.channels_last(view)


def _places(token_ids: NDArray[np.uint16], token_id: int) -> list[tuple[int, int, int]]:
    """Return patches of one id, each of another image as long as there are images enough."""
    found = np.argwhere(token_ids == token_id)
    of_image: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for image, row, col in found.tolist():
        of_image[image].append((image, row, col))
    middle = [places[len(places) // 2] for places in of_image.values()]
    picks = np.linspace(0, len(middle) - 1, min(_EXAMPLES_PER_ID, len(middle))).astype(int)
    chosen = [middle[pick] for pick in picks]
    rest = [(i, r, c) for i, r, c in found.tolist() if (i, r, c) not in chosen]
    return chosen + rest[: _EXAMPLES_PER_ID - len(chosen)]


def _table_section(appraisal: Appraisal) -> str:
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in warnings(appraisal))
    return (
        pages.measure_table(measures(appraisal))
        + (f"<ul>{notes}</ul>" if notes else "")
        + '<p class="muted">Compare two codebooks at equal K, equal grid and equal numbers of '
        "images only: all measures of use and of labels drift with them.</p>"
    )


def _photos_section(appraisal: Appraisal, tokenizer: PatchTokenizer, examples: _Examples) -> str:
    size = tokenizer.pixel_rule.size
    figures = []
    for index in examples.shown.tolist():
        pixels = examples.pixels[index]
        colours = pictures.token_map(appraisal.token_ids[index], size)
        last = (
            (_reconstruction(tokenizer, pixels), "what the ids stand for")
            if tokenizer.decodes_to_pixels
            else (pictures.blended(pixels, colours), "both, one over the other")
        )
        row = appraisal.rows[index]
        shown = (
            ("photo", pixels, row.key),
            ("", colours, "its token ids as colours"),
            ("", *last),
        )
        cells = pages.picture_row((kind, pictures.png(image), text) for kind, image, text in shown)
        figures.append(
            f"<figure>{cells}<figcaption>{html.escape(row.key)}, "
            f"{len(np.unique(appraisal.token_ids[index]))} different ids</figcaption></figure>"
        )
    third = (
        "and the pixels that those ids stand for"
        if tokenizer.decodes_to_pixels
        else "and the two over one another"
    )
    return (
        "<h2>Photos and their tokens</h2><p>The centred square, its token ids (one colour per id, "
        f"the same in all pictures), {third}.</p>"
        f'<div class="images">{"".join(figures)}</div>'
    )


def _reconstruction(tokenizer: PatchTokenizer, pixels: pictures.Pixels) -> pictures.Pixels:
    """Tokenise a view again, with all stages, and return what its ids stand for."""
    view = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return pictures.channels_last(tokenizer.decode(tokenizer.encode(view))[0])


def _usage_section(appraisal: Appraisal) -> str:
    charts = "".join(
        (f"<h3>Stage {number}</h3>" if len(appraisal.counts) > 1 else "")
        + pictures.usage_curve(counts)
        for number, counts in enumerate(appraisal.counts, 1)
    )
    return (
        "<h2>Use of the ids</h2><p>Tokens per id, most frequent first, on a logarithmic scale; the "
        f"dashed line is the even share.</p>{charts}"
    )


def _centroids_section(appraisal: Appraisal, tokenizer: PatchTokenizer) -> str:
    counts = appraisal.counts[0]
    order = np.argsort(-counts, kind="stable")[:_MAX_CENTROIDS]
    sheet = pictures.centroid_sheet(tokenizer, order.tolist(), _SHEET_COLUMNS)
    uri = pictures.png(sheet, scale=math.ceil(_SHEET_PIXELS / sheet.shape[1]))
    some = "The" if len(order) < len(counts) else "All"
    stage = " of the first stage" if len(appraisal.counts) > 1 else ""
    return (
        f"<h2>Centroids</h2><p>{some} {len(order):,} centroids{stage}, most frequent first.</p>"
        f'<img class="sheet" alt="centroids, most frequent first" src="{uri}">'
    )


def _examples_section(appraisal: Appraisal, tokenizer: PatchTokenizer, examples: _Examples) -> str:
    patch_size = tokenizer.pixel_rule.patch_size
    counts = appraisal.counts[0]
    figures = []
    for token_id in examples.ids:
        cells = "".join(
            f'<img alt="a patch of {html.escape(appraisal.rows[image].key)}" src="{uri}">'
            for image, uri in (
                (
                    image,
                    pictures.png(
                        pictures.patch_in_its_place(examples.pixels[image], row, col, patch_size)
                    ),
                )
                for image, row, col in examples.places[token_id]
            )
        )
        figures.append(
            f'<figure><div class="patches">{cells}</div><figcaption>id {token_id}, '
            f"{int(counts[token_id]):,} tokens ({counts[token_id] / counts.sum():.2%})"
            "</figcaption></figure>"
        )
    return (
        "<h2>What the ids stand for</h2><p>These centroids are not pictures. Of the "
        f"{len(examples.ids)} most frequent ids, some patches that carry them, framed in white, "
        "with what lies around; from different photos where there are enough.</p>"
        f'<div class="images">{"".join(figures)}</div>'
    )
