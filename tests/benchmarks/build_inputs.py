"""What is built: photographs, codebooks, and what all routes share."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.formats.views import View
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.kmeans import fit_centroids
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from tests import factories
from tests.places import DATA

NUM_VIEWS = 4


class Settings(NamedTuple):
    """What all routes share."""

    codebook: Path
    num_processes: int
    device: str


def write_images(folder: Path, num_images: int) -> Path:
    """Write photographs, or drawn ones where there are none, again and again under new names."""
    paths = sorted((DATA / "photos").glob("*.JPEG"))
    found = [path.read_bytes() for path in paths] or [
        factories.encode(factories.draw_photo(seed, 375, 500), "JPEG", quality=90)
        for seed in range(100)
    ]
    content = {f"{n:06d}.jpg": found[n % len(found)] for n in range(num_images)}
    return factories.write_folder(folder, content)


def pixel_codebook(images: Path, work: Path, k: int = 8192) -> Path:
    """Fit K centroids to patches of the images: two iterations are enough to time a tokenizer."""
    parts = []
    for path in sorted(images.iterdir())[:250]:
        picture = decode(path.read_bytes())
        parts.append(patchify(apply_view(picture, centre(picture), 224)[None], 16)[0])
    centroids = fit_centroids(torch.cat(parts), k, iterations=2).centroids.numpy()
    rule = PixelRule(size=224, patch_size=16)
    return save_codebook(centroids, rule, ExtractorSpec(id="pixel"), work / "pixels.safetensors")


def model_codebook(model: str, images: Path, work: Path, k: int = 8192) -> Path:
    """Take features of a model of random weights as centroids: enough to time it."""
    options = FeatureOptions(model, image_size=224, random_weights_seed=0)
    extractor = make_extractor(options, torch.device("cpu"))
    side = extractor.pixel_rule.size
    num_images = -(-k // (extractor.pixel_rule.grid[0] * extractor.pixel_rule.grid[1]))
    pictures = [decode(path.read_bytes()) for path in sorted(images.iterdir())[:num_images]]
    pixels = [apply_view(picture, centre(picture), side) for picture in pictures]
    features = torch.cat([extractor(pixel[None])[0] for pixel in pixels])
    return save_codebook(
        features.numpy()[:k], extractor.pixel_rule, extractor.spec, work / "model.safetensors"
    )


def save_codebook(
    centroids: Any, pixel_rule: PixelRule, extractor: ExtractorSpec, path: Path
) -> Path:
    """Write (K, D) centroids as a codebook."""
    counts = np.ones((1, len(centroids)), np.int64)
    Codebook(centroids[None], counts, metric="l2", pixel_rule=pixel_rule, extractor=extractor).save(
        path
    )
    return path


def centre(picture: torch.Tensor) -> View:
    """Return a square in the picture."""
    side = min(picture.shape[-2:])
    return View(0, 0, side, side, False)
