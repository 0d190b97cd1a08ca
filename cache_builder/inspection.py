"""`patchcache inspect`: what a codebook, a cache or a shard holds, as plain values.

`describe` returns nested dictionaries that print as JSON; the CLI draws them as tables.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cache_builder import cache_survey
from cache_builder.cache_table import survey_result
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
        with TokenCache.open(path) as cache:
            return survey_result(cache_survey.run(cache))
    if not path.is_file():
        raise ArtifactError(f"There is nothing at {path}.")
    if path.suffix == ".safetensors":
        return describe_codebook(Codebook.load(path))
    if path.suffix == ".tar":
        return _describe_shard(path)
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
        **({"plugin": header.plugin.model_dump(mode="json")} if header.plugin else {}),
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


def _describe_shard(path: Path) -> Description:
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
