"""The pictures of docs/concepts.md, from what `make demo` left: see `main` for the command."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cache_builder import pictures
from cache_builder.formats import TokenCache
from cache_builder.imaging import decode
from cache_builder.tokenizers import PatchTokenizer

OUT = Path(__file__).parents[2] / "docs" / "pictures"
KEY = "china"
GAP = 6  # pixels between two pictures
NUM_COLOURS = 256  # of a PNG: a third of the bytes
STYLE = (
    "<style>svg{background:#fff}text{font:12px sans-serif;fill:#333}.boxes text{font:bold 26px "
    "sans-serif;fill:#000}.grid{stroke:#ddd}.line{fill:none;stroke:#3b5bdb;stroke-width:2}</style>"
)


def draw(demo, out):
    """Write the four pictures."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = PatchTokenizer.load(demo / "photos.codebook.safetensors")
    with TokenCache.open(demo / "photos.cache") as cache:
        sample = next(cache[index] for index in range(len(cache)) if cache[index].key == KEY)
        size = cache.manifest.view_spec.size
        whole = pictures.channels_last(decode(sample.image))
        label = f"{len(sample.views)} views of one image as boxes"
        boxes = pictures.boxes(
            sample.views, whole.shape[:2], pictures.jpeg(whole, max_side=480), label
        )
        _write_svg(out / "concept-views.svg", boxes)
        rows = [
            [
                pictures.view_pixels(cache, sample, view),
                pictures.token_map(sample.token_ids[view], size),
                pictures.reconstruction(tokenizer, sample.token_ids[view]),
            ]
            for view in range(2)
        ]
    _write_png(out / "concept-tokens.png", _sheet(rows))
    order = np.argsort(-tokenizer.codebook.counts[0], kind="stable").tolist()
    centroids = pictures.centroid_sheet(tokenizer, order, 32)
    _write_png(out / "concept-centroids.png", np.kron(centroids, np.ones((2, 2, 1), np.uint8)))
    log = [json.loads(line) for line in (demo / "run" / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    _write_svg(out / "concept-loss.svg", pictures.curve(losses, "step", "loss"))


def _sheet(rows):
    height, width = rows[0][0].shape[:2]
    down, across = len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP
    sheet = np.full((down, across, 3), 255, np.uint8)
    for row, cells in enumerate(rows):
        for col, cell in enumerate(cells):
            top, left = row * (height + GAP), col * (width + GAP)
            sheet[top : top + height, left : left + width] = cell
    return sheet


def _write_svg(path, svg):
    path.write_text(
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            ">", f">{STYLE}", 1
        )
    )


def _write_png(path, pixels):
    Image.fromarray(pixels).quantize(NUM_COLOURS).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.documents.concept_pictures")
    parser.add_argument("demo", type=Path, help="the folder that `make demo` made")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    draw(args.demo, args.out)


if __name__ == "__main__":
    main()
