"""What `verify` asks of soft targets and features: of one sample, and of the same views made again.

A soft id, like a token id, may differ where two centroids are equally near; features and
probabilities may differ by rounding, and on another device by a little more. Those are no damage.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.formats.manifest import CacheSpec
from cache_builder.formats.payloads import restore_features
from cache_builder.formats.sample import CachedSample
from cache_builder.targets import Targets
from cache_builder.tokenizers import PatchTokenizer

# Two distances this close, relative to their size, count as a tie that rounding may turn.
_NEAR_TIE = 1e-4
# A plugin that measures by |x|^2 - 2 xc + |c|^2 in float32 has an error of these, however near x
# and c are: some half steps of (|x| + |c|)^2.
_DISTANCE_ERROR = 8 * 2.0**-24
# Probabilities of exact distances differ by float16 rounding alone.
_EXACT_PROBABILITY = 1e-3
_PROBABILITY = 0.02
# Of a feature's length; TF32 convolutions, for one, are a tenth of that away from float32 ones.
_FEATURE_ERROR = 0.01
_FLOAT16_HALF_STEP = 2.0**-11  # relative; of subnormal values it is absolute, 2**-25


def payload_problem(sample: CachedSample, spec: CacheSpec) -> str | None:
    """Say what is wrong with the optional payloads of a sample, or None; shapes are right."""
    problem = _soft_problem(sample, spec) if spec.soft else None
    if problem is None and spec.features:
        problem = _feature_problem(sample)
    return problem


def num_near_ties(
    centroids: NDArray[np.float32],  # (K, D)
    features: Tensor,  # (n, D), the patches that differ
    before: Tensor,  # (n,) ids
    after: Tensor,  # (n,) ids
) -> int:
    """Return how many patches are as near to the one centroid as to the other."""
    exact = features.double().cpu()
    places = torch.from_numpy(centroids).double()
    one, other = ((exact - places[ids]).square().sum(1) for ids in (before, after))
    lengths = exact.norm(dim=1) + places[after].norm(dim=1)
    allowed = _NEAR_TIE * other.clamp(min=1e-12) + _DISTANCE_ERROR * lengths.square()
    return int(((one - other).abs() <= allowed).sum())


def compare_soft(
    sample: CachedSample, again: Targets, tokenizer: PatchTokenizer, pixels: Tensor
) -> tuple[int, int, int, int]:
    """Compare soft targets with those of the same views made again.

    Returns:
        The numbers of soft ids, of those that differ by near ties, of those that differ for no
        such reason, and of probabilities of equal ids that differ.
    """
    assert sample.soft_ids is not None
    assert sample.soft_probs is not None
    assert again.soft_ids is not None
    assert again.soft_probs is not None
    different = sample.soft_ids != again.soft_ids
    num_different, num_ties = int(different.sum()), 0
    exact = tokenizer.codebook.has_pixel_centroids
    if num_different and not exact:
        features = tokenizer.features(pixels).flatten(0, 1)
        patches, ranks = different.reshape(len(features), -1).nonzero()
        before, after = (
            torch.from_numpy(ids.reshape(len(features), -1)[patches, ranks].astype(np.int64))
            for ids in (sample.soft_ids, again.soft_ids)
        )
        centroids = tokenizer.codebook.centroids[0]
        num_ties = num_near_ties(centroids, features[patches], before, after)
    errors = np.abs(sample.soft_probs.astype(np.float32) - again.soft_probs.astype(np.float32))
    far = errors > (_EXACT_PROBABILITY if exact else _PROBABILITY)
    num_far = int((far & ~different).sum())
    return different.size, num_ties, num_different - num_ties, num_far


def compare_features(sample: CachedSample, again: Targets) -> tuple[int, int]:
    """Return the numbers of features, and of those that differ by more than rounding."""
    assert again.features is not None
    stored = sample.float_features()
    made = restore_features(again.features, again.feature_scales)
    errors, lengths = np.linalg.norm(stored - made, axis=-1), np.linalg.norm(made, axis=-1)
    step = 2.0**-24 if sample.feature_scales is None else sample.feature_scales
    allowed = _FEATURE_ERROR * lengths + np.sqrt(stored.shape[-1]) * step
    return errors.size, int((errors > allowed).sum())


def _soft_problem(sample: CachedSample, spec: CacheSpec) -> str | None:
    assert sample.soft_ids is not None
    assert sample.soft_probs is not None
    ids, probabilities = sample.soft_ids, sample.soft_probs.astype(np.float64)
    if (largest := int(ids.max())) >= spec.vocab_size:
        return f"soft id {largest} is not below K={spec.vocab_size}"
    if (num := _count(ids[..., 0] != sample.token_ids)) > 0:
        return f"the first soft id of {num:,} patches is not their token id"
    ordered = np.sort(ids, -1)
    if (num := _count((ordered[..., 1:] == ordered[..., :-1]).any(-1))) > 0:
        return f"{num:,} patches have a soft id twice"
    if not np.isfinite(probabilities).all() or probabilities.min() < 0:
        return "soft probabilities are negative, infinite or NaN"
    if (num := _count((probabilities[..., 1:] > probabilities[..., :-1]).any(-1))) > 0:
        return f"soft probabilities of {num:,} patches increase"
    allowed = _FLOAT16_HALF_STEP + probabilities.shape[-1] * 2.0**-25
    sums = probabilities.sum(-1)
    if (num := _count(np.abs(sums - 1) > allowed)) > 0:
        worst = sums.flat[np.abs(sums - 1).argmax()]
        return f"soft probabilities of {num:,} patches do not add up to 1, one to {worst:.6g}"
    return None


def _feature_problem(sample: CachedSample) -> str | None:
    assert sample.features is not None
    scales = sample.feature_scales
    if scales is not None:
        if not np.isfinite(scales).all() or scales.min() < 0:
            return "feature scales are negative, infinite or NaN"
        if sample.features.min() < -127:
            return "a feature value is -128, which no feature is stored as"
    elif not np.isfinite(sample.features).all():
        return "features hold NaN or infinity"
    return None


def _count(flags: Any) -> int:
    return int(flags.sum())
