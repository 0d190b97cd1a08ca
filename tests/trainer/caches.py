"""Small caches and settings to train on."""

from pathlib import Path

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
