"""Small caches and settings to train on."""

from pathlib import Path

import numpy as np

from cache_builder.formats import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from tests import factories
from trainer.config import parse_config

TINY = {
    "data": {"batch_size": 8},
    "model": {"name": "vit_tiny_patch16_224", "embed_dim": 32, "depth": 2, "num_heads": 2},
    "objective": {"mask_ratio": 0.5, "mask_kind": "random"},
    "optim": {"lr": 2e-3, "warmup_steps": 2},
    "run": {"steps": 12, "precision": "fp32", "device": "cpu", "log_every": 1},
}


def tiny_config(**sections):
    """Return settings for a model of two blocks; each section may be overridden in part."""
    tree = {name: {**values, **sections.get(name, {})} for name, values in TINY.items()}
    return parse_config(tree)


def make_cache(root: Path, *, num_images=24, layout="webdataset", views=2, **settings) -> Path:
    """Build a cache of drawn patches in known colours, half of them in class a, half in b."""
    images = factories.write_folder(root / "images", factories.patch_images(num_images))
    # Two colours are one to three times the named mean squared distance apart.
    distance = 255**2 * factories.PATCH**2
    codebook = factories.write_codebook(root / "codebook.safetensors", objective=(distance,))
    factories.build_cache(
        images=str(images), codebook=codebook, out=root / "cache", num_views=views,
        layout=layout, unit_size=10, **settings,
    )  # fmt: skip
    return root / "cache"


def make_residual_cache(root: Path) -> Path:
    """Build a cache of pixels in two stages: six colours at half strength, and what is left."""
    colours = factories.COLOURS.astype(np.int16)
    stages = np.stack([colours // 2, colours - colours // 2])
    codebook = Codebook(
        np.repeat(stages, factories.PATCH**2, axis=2),
        np.ones((2, 6), np.int64),
        metric="l2",
        pixel_rule=PixelRule(size=factories.SIZE, patch_size=factories.PATCH),
        extractor=ExtractorSpec(id="pixel"),
    )
    return build_small(root, codebook, factories.patch_images(4))


def build_small(root: Path, codebook: Codebook, images: dict[str, bytes], **settings) -> Path:
    """Build a cache of two views of each of a few encoded images."""
    codebook.save(root / "codebook.safetensors")
    factories.build_cache(
        images=str(factories.write_folder(root / "images", images)),
        codebook=root / "codebook.safetensors", out=root / "cache", num_views=2, **settings,
    )  # fmt: skip
    return root / "cache"
