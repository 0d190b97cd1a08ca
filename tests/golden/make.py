"""Makes the golden files of the present format version: python -m tests.golden.make FOLDER.

They are committed once per format version and never changed: every later version reads them, or
refuses them by name.
"""

import json
import sys
from pathlib import Path

import numpy as np

from cache_builder import files
from cache_builder.formats import CachedSample, TokenCache
from cache_builder.formats.codebook import Codebook
from tests import factories

LAYOUTS = ("webdataset", "zarr")
PAYLOAD_CACHES = (("webdataset", "int8"), ("zarr", "float16"))
NUM_IMAGES = 4


def make(folder: Path) -> None:
    """Write a codebook, a cache of each layout and what a reader must find in them."""
    codebook_path = folder / "codebook.safetensors"
    factories.colour_codebook(
        num_points=6,
        num_images=1,
        objective=(1.5, 0.0),
        fit={"seed": 0},
        quality={"mse": 0.0},
        versions={"patchcache": "0.1.0"},
    ).save(codebook_path)
    images = factories.write_folder(folder / "images", _images())
    for layout in LAYOUTS:
        factories.build_cache(
            images=str(images), codebook=codebook_path, out=folder / layout, num_views=3,
            layout=layout, unit_size=2, seed=7,
        )  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(_expected(folder), indent=1) + "\n")


def make_payloads(folder: Path) -> None:
    """Write a cache of each layout with soft targets and features, and what a reader must find.

    Other versions of torch may give features that differ in their last digits, so these are read
    and not made again.
    """
    codebook_path = folder / "codebook.safetensors"
    codebook = factories.feature_codebook(layer="4", num_centroids=4)
    codebook.save(codebook_path)
    images = factories.write_folder(folder / "images", factories.photo_images(3))
    for layout, dtype in PAYLOAD_CACHES:
        factories.build_cache(
            images=str(images), codebook=codebook_path, out=folder / layout, num_views=2,
            layout=layout, unit_size=2, seed=7, images_in_cache="none", soft_top_k=3,
            soft_temperature=0.5, store_features=dtype,
        )  # fmt: skip
        with TokenCache.open(folder / layout) as cache:
            samples = [payloads_of(sample) for sample in cache]
        (folder / f"{layout}.json").write_text(json.dumps(samples, indent=1) + "\n")


def payloads_of(sample: CachedSample) -> dict[str, object]:
    """Return the soft targets and features of a sample as JSON; of features, a digest."""
    features = sample.float_features().astype("<f4")
    return {
        "key": sample.key,
        "token_ids": sample.token_ids.tolist(),
        "soft_ids": sample.soft_ids.tolist(),
        "soft_probs": sample.soft_probs.tolist(),
        "features_shape": list(features.shape),
        "features_first": features[..., :2].tolist(),
        "features_sha256": files.sha256_bytes(features.tobytes()),
    }


def _images() -> dict[str, bytes]:
    images = factories.patch_images(NUM_IMAGES - 1)
    return images | {"b/not an image.jpg": b"text", "a/with.dot.png": factories.encode(
        factories.draw_patches(factories.random_ids(99, 5, 7))
    )}  # fmt: skip


def _expected(folder: Path) -> dict[str, object]:
    codebook = Codebook.load(folder / "codebook.safetensors")
    with TokenCache.open(folder / "webdataset") as cache:
        samples = [cache[i] for i in range(len(cache))]
        skipped = cache.manifest.num_skipped
    return {
        "fingerprint": codebook.fingerprint,
        "digest": codebook.header.digest,
        "centroid_sum": int(codebook.centroids.astype(np.int64).sum()),
        "num_skipped": skipped,
        "samples": [
            {
                "key": sample.key,
                "label": sample.label,
                "image_bytes": len(sample.image or b""),
                "views": sample.views.tolist(),
                "token_ids": sample.token_ids.tolist(),
            }
            for sample in samples
        ],
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    make_payloads(Path(sys.argv[1]) / "payloads")
