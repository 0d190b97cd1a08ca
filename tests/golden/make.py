"""Makes the artifacts of format version 1 that every later version must read to the same values.

    python -m tests.golden.make tests/golden/v1

The pictures are drawn once and kept beside the artifacts, so that making them again does not
depend on an encoder. Files that are there already are never replaced: a change of the bytes on
disk is a new format version, with a folder of its own.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from cache_builder.formats import Codebook, ExtractorSpec, PixelRule, TokenCache
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.kmeans import fit_centroids
from cache_builder.sources import open_source
from tests import factories

LOCATION = "/golden/images"  # in place of where they lie, which differs from machine to machine
RULE = PixelRule(size=16, patch_size=4)
LAYOUTS = ("webdataset", "zarr")


def draw_images(folder: Path) -> None:
    """Draw four pictures in two classes, and one file that is none."""
    exif = factories.Image.Exif()
    exif[0x0112] = 6
    photo = [factories.draw_photo(seed, 24, 32) for seed in range(4)]
    factories.write_folder(
        folder,
        {
            "cat/1.5 left.jpg": factories.encode(photo[0], "JPEG", quality=90),
            "cat/up.jpg": factories.encode(photo[1], "JPEG", quality=90, exif=exif),
            "dog/grey.png": factories.encode(photo[2][..., 0]),
            "dog/none.jpg": b"not an image",
            "dog/plain.png": factories.encode(photo[3]),
        },
    )


def make_codebook(images: Path) -> Codebook:
    """Fit eight centroids to every patch of the pictures."""
    patches = []
    for name in ("cat/1.5 left.jpg", "cat/up.jpg", "dog/grey.png", "dog/plain.png"):
        pixels = decode((images / name).read_bytes())
        view = centre_square((int(pixels.shape[-2]), int(pixels.shape[-1])))
        patches.append(patchify(apply_view(pixels, view, RULE.size)[None], RULE.patch_size)[0])
    fit = fit_centroids(torch.cat(patches), 8, iterations=5)
    return Codebook(
        fit.centroids.numpy()[None],
        fit.counts.numpy()[None],
        metric="l2",
        pixel_rule=RULE,
        extractor=ExtractorSpec(id="pixel"),
        num_points=64,
        num_images=4,
        objective=tuple(fit.objective),
        fit={"seed": 0},
    )


def make_cache(images: Path, codebook: Path, out: Path, layout: str) -> None:
    """Build a cache of two units with three views of every picture."""
    listing = open_source(str(images)).scan(3)
    info = listing.info.model_copy(update={"location": LOCATION})
    factories.build_cache(
        listing._replace(info=info),
        images=str(images),
        codebook=codebook,
        out=out,
        layout=layout,
        num_views=3,
        seed=7,
    )


def describe(cache_dir: Path) -> dict[str, object]:
    """Return what a reader must find in a cache."""
    with TokenCache.open(cache_dir) as cache:
        return {
            "fingerprint": cache.manifest.fingerprint,
            "codebook_digest": cache.codebook.header.digest,
            "vocab_size": cache.manifest.vocab_size,
            "grid": list(cache.manifest.grid),
            "class_names": list(cache.manifest.spec.class_names),
            "num_skipped": cache.manifest.num_skipped,
            "samples": [
                {
                    "key": sample.key,
                    "label": sample.label,
                    "image_sha256": hashlib.sha256(sample.image or b"").hexdigest(),
                    "views": sample.views.tolist(),
                    "token_ids": np.asarray(sample.token_ids).tolist(),
                }
                for sample in cache
            ],
        }


def make(folder: Path, images: Path) -> None:
    """Write the codebook and both caches into `folder`."""
    codebook = folder / "codebook.safetensors"
    make_codebook(images).save(codebook)
    for layout in LAYOUTS:
        make_cache(images, codebook, folder / layout, layout)


def main(folder: Path) -> None:
    """Make everything from nothing."""
    folder.mkdir()
    draw_images(folder / "images")
    make(folder, folder / "images")
    expected = describe(folder / "webdataset")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
