"""`patchcache inspect`: what a codebook, a cache or a shard holds, as plain values.

`describe` returns nested dictionaries that print as JSON; the CLI draws them as tables.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cache_builder.errors import ArtifactError
from cache_builder.formats.cache import TokenCache
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.payloads import PAYLOAD_OF_ARRAY
from cache_builder.formats.shards import read_shard
from cache_builder.quality import Usage, idle, usage

Description = dict[str, JsonValue]


def describe(path: Path) -> Description:
    """Say what `path` is and what it holds.

    Raises:
        ArtifactError: It is nothing of ours, or it is damaged.
    """
    if path.is_dir():
        return describe_cache(TokenCache.open(path))
    if not path.is_file():
        raise ArtifactError(f"There is nothing at {path}.")
    if path.suffix == ".safetensors":
        return describe_codebook(Codebook.load(path))
    if path.suffix == ".tar":
        return describe_shard(path)
    raise ArtifactError(
        f"{path} is not a codebook (.safetensors), a cache (directory), a shard (.tar) or a "
        "checkpoint (.pt)."
    )


def describe_codebook(codebook: Codebook) -> Description:
    """Describe a codebook and how it was fitted."""
    header = codebook.header
    return {
        "kind": "codebook",
        "fingerprint": header.fingerprint,
        "extractor": header.extractor.model_dump(mode="json"),
        "pixel_rule": header.pixel_rule.model_dump(mode="json"),
        "metric": header.metric,
        "vocab_size": codebook.vocab_size,
        "dim": codebook.dim,
        "num_stages": codebook.num_stages,
        "dtype": str(codebook.centroids.dtype),
        "grid": list(header.pixel_rule.grid),
        "num_points": header.num_points,
        "num_images": header.num_images,
        "usage_in_fit": _usage_in_fit(codebook.counts[0]),
        "usage_in_fit_of_later_stages": [_usage_in_fit(counts) for counts in codebook.counts[1:]],
        "quality": dict(header.quality),
        "fit": dict(header.fit),
        "objective": list(header.objective),
        "versions": dict(header.versions),
    }


def describe_cache(cache: TokenCache) -> Description:
    """Describe a cache; its token histogram is taken over every shard."""
    manifest = cache.manifest
    spec = manifest.spec
    counts, labels = survey(cache)
    return {
        "kind": "cache",
        "fingerprint": manifest.fingerprint,
        "layout": spec.layout,
        "num_samples": manifest.num_samples,
        "num_skipped": manifest.num_skipped,
        "num_shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "bytes_per_sample": round(manifest.bytes / manifest.num_samples, 1),
        "payloads": list(manifest.payloads),
        **manifest.payload_totals(),
        "images_in_cache": spec.images_in_cache,
        "views": spec.view_spec.model_dump(mode="json"),
        "grid": list(manifest.grid),
        "vocab_size": manifest.vocab_size,
        "num_stages": spec.num_stages,
        "usage": _usage(usage(counts)),
        "labels": {_class_name(spec.class_names, label): n for label, n in labels.items()},
        "source": spec.source.model_dump(mode="json"),
    }


def describe_shard(path: Path) -> Description:
    """Describe one tar by walking it."""
    num_samples, num_bytes, first = 0, 0, None
    for sample in read_shard(path):
        first = first or sample
        num_samples += 1
        num_bytes += len(sample.image or b"")
    if first is None:
        raise ArtifactError(f"{path} holds no samples.")
    return {
        "kind": "shard",
        "num_samples": num_samples,
        "bytes": path.stat().st_size,
        "image_bytes": num_bytes,
        "first": {
            "key": first.key,
            "label": first.label,
            "views": first.views.tolist(),
            "token_ids_shape": list(first.token_ids.shape),
            **{
                f"{name}_shape": list(array.shape)
                for name in PAYLOAD_OF_ARRAY
                if (array := getattr(first, name)) is not None
            },
        },
    }


def survey(cache: TokenCache) -> tuple[NDArray[np.int64], dict[int, int]]:
    """Read every sample once.

    Returns:
        How often each id of the first stage occurs, (K,) int64, and how many samples have each
        label, empty without labels.
    """
    counts = np.zeros(cache.manifest.vocab_size, np.int64)
    labels: Counter[int] = Counter()
    for shard in range(len(cache.manifest.shards)):
        for sample in cache.read_shard(shard, payloads=()):
            ids = sample.token_ids
            if cache.manifest.spec.num_stages > 1:
                ids = ids[..., 0]
            counts += np.bincount(ids.ravel(), minlength=len(counts))
            if sample.label is not None:
                labels[sample.label] += 1
    return counts, dict(sorted(labels.items()))


def _class_name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _usage_in_fit(counts: NDArray[np.int64]) -> Description:
    return {**_usage(usage(counts)), **idle(counts)._asdict()}


def _usage(value: Usage) -> Description:
    return {
        "num_tokens": value.num_tokens,
        "num_used": value.num_used,
        "perplexity": round(value.perplexity, 2),
        "entropy_bits": round(value.entropy_bits, 4),
        "max_share": round(value.max_share, 6),
    }
