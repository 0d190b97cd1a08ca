"""The report of the demo: one HTML page that needs nothing but itself."""

import base64
import html
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_builder import cache_survey, pages, pictures
from cache_builder.formats.cache import TokenCache
from cache_builder.measures import decibel_text
from cache_builder.quality import psnr, usage
from cache_builder.tokenizers import PatchTokenizer

_MAX_IMAGES = 8
_MAX_VIEWS = 3
_SHEET_COLUMNS = 32


class Route(NamedTuple):
    """A set of images with its codebook and its cache."""

    title: str
    codebook: Path
    cache: Path


class Material(NamedTuple):
    """What the demo made, and what it measured."""

    routes: list[Route]  # the first is described at length, the last is trained on
    log: Path  # of the training
    probe: dict[str, Any] | None  # None where there are no labels
    probe_note: str
    curl: str
    answer: dict[str, Any]  # of the service
    commands: list[str]
    elapsed_s: float


def write(path: Path, material: Material) -> None:
    """Write the page."""
    sections = [_route_sections(route) for route in material.routes]
    sections += [
        _training_section(material),
        _service_section(material),
        _commands_section(material),
    ]
    lead = f"Made in {material.elapsed_s:.0f} s."
    path.write_text(pages.document("patchcache demo", lead, sections), encoding="utf-8")


def _route_sections(route: Route) -> str:
    tokenizer = PatchTokenizer.load(route.codebook)
    with TokenCache.open(route.cache) as cache:
        spec = cache.manifest.view_spec
        return (
            f"<h2>{html.escape(route.title)}</h2>"
            f"<p>{cache.manifest.num_samples:,} images, {spec.num_views} views each of "
            f"{spec.size} x {spec.size} pixels, {tokenizer.grid[0]} x {tokenizer.grid[1]} token "
            f"ids per view, K = {tokenizer.vocab_size:,}.</p>"
            + _images_section(cache, tokenizer)
            + _codebook_section(cache, tokenizer)
        )


def _images_section(cache: TokenCache, tokenizer: PatchTokenizer) -> str:
    figures = []
    size = cache.manifest.view_spec.size
    for index in np.linspace(0, len(cache) - 1, min(_MAX_IMAGES, len(cache))).astype(int):
        sample = cache[int(index)]
        rows, errors = [], []
        for view in range(min(_MAX_VIEWS, len(sample.views))):
            pixels = pictures.view_pixels(cache, sample, view)
            again = pictures.reconstruction(tokenizer, sample.token_ids[view])
            errors.append(float(np.square(pixels.astype(float) - again).mean()))
            shown = (
                ("photo", pixels, f"view {view} of {sample.key}"),
                ("", pictures.token_map(sample.token_ids[view], size), "its token ids as colours"),
                ("", again, "the centroids that the ids stand for"),
            )
            rows.append(
                pages.picture_row(
                    (kind, pictures.png(picture), text) for kind, picture, text in shown
                )
            )
        figures.append(
            f"<figure>{''.join(rows)}<figcaption>{html.escape(sample.key)}, "
            f"reconstruction {decibel_text(psnr(float(np.mean(errors))), 1)}</figcaption></figure>"
        )
    return (
        "<h3>Views, token maps, reconstructions</h3><p>Each row is one cached view: its pixels, "
        "its token ids (one colour per id), and the pixels of the centroids that those ids name. "
        "The first row is the centred square, the others are random crops.</p>"
        f'<div class="images">{"".join(figures)}</div>'
    )


def _codebook_section(cache: TokenCache, tokenizer: PatchTokenizer) -> str:
    counts = cache_survey.run(cache).counts[0]
    measured = usage(counts)
    order = np.argsort(-counts, kind="stable")
    sheet = pictures.centroid_sheet(tokenizer, order[:256].tolist(), _SHEET_COLUMNS)
    return (
        "<h3>The codebook</h3>"
        f"<p>{measured.num_used:,} of {measured.vocab_size:,} ids occur in the cache's "
        f"{measured.num_tokens:,} tokens; entropy {measured.entropy_bits:.2f} bits, perplexity "
        f"{measured.perplexity:,.0f}; the most frequent id takes {measured.max_share:.1%}.</p>"
        f"<p>Tokens per id, most frequent first:</p>"
        f"{pictures.bars(counts[order].tolist(), 'tokens per id')}"
        f"<p>The {min(256, len(order))} most frequent centroids:</p>"
        f'<img class="sheet" alt="centroids" src="{pictures.png(sheet, scale=2)}">'
    )


def _training_section(material: Material) -> str:
    rows = [json.loads(line) for line in material.log.read_text().splitlines()]
    points = [(float(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    drawn = pictures.curve(points, "step", "loss on masked patches, nats")
    if material.probe is None:
        table = f"<p>No probe: {html.escape(material.probe_note)}</p>"
    else:
        result = material.probe
        lines = "".join(
            f'<tr><td>{name}</td><td class="number">{result[f"{key}_random"]:.1%}</td>'
            f'<td class="number"><b>{result[key]:.1%}</b></td></tr>'
            for name, key in (("k-NN", "knn"), ("linear probe", "linear"))
        )
        table = (
            '<table><tr><th>frozen features</th><th class="number">random initialisation</th>'
            f'<th class="number">pre-trained</th></tr>{lines}</table>'
            f'<p class="muted">{html.escape(material.probe_note)}</p>'
        )
    title = html.escape(material.routes[-1].title)
    predicted = max(material.log.parent.glob("pictures/step_*.png"))
    uri = "data:image/png;base64," + base64.b64encode(predicted.read_bytes()).decode()
    return (
        f"<h2>Training from the cache: {title}</h2>{drawn}"
        "<p>What the ViT was given late in the run, and the tokens that it predicted:</p>"
        f'<img class="sheet" alt="input, visible patches, target and predicted tokens" src="{uri}">'
        f"<h3>What the ViT has learned</h3>{table}"
    )


def _service_section(material: Material) -> str:
    answer = dict(material.answer)
    answer["token_ids"] = [*answer["token_ids"][:8], "..."]
    return (
        "<h2>The service</h2><p>The same tokens over HTTP:</p>"
        f"<pre>{html.escape(material.curl)}\n{html.escape(json.dumps(answer))}</pre>"
    )


def _commands_section(material: Material) -> str:
    commands = "\n".join(html.escape(command) for command in material.commands)
    return f"<h2>The commands</h2><p>Everything above was made by:</p><pre>{commands}</pre>"
