"""Optional payloads of a cache: soft targets, and the features that were quantised.

    soft        soft_ids        (V, rows, cols, k) uint16   the k nearest centroids, nearest first
                soft_probs      (V, rows, cols, k) float16  their probabilities, which add up to 1
    features    features        (V, rows, cols, D) float16 or int8
                feature_scales  (V, rows, cols) float32     with int8 only

The first soft id of a patch is its token id. Its probabilities are softmax(-d^2 / (T s)) over its
k nearest centroids: d^2 is the squared distance, T the temperature, and s the mean squared distance
of the codebook's fit, so that one T suits codebooks of any number and size of centroids. What the
other K - k centroids would hold is left out and the k are renormalised.

An int8 feature is `values * scale` with one scale per patch, its largest absolute value over 127.
Scales are float32: float16 loses its precision below 6e-5, where unit vectors of a few thousand
values begin, and the two bytes it would save are a thousandth of what they scale.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from cache_builder.errors import ConfigError

PayloadName = Literal["image", "soft", "features"]
"""What a reader may leave out; key, label, views and token ids always come."""

FeatureType = Literal["float16", "int8"]

# Fields of `CachedSample`, members of a tar and arrays of a Zarr store, by payload.
ARRAYS_OF_PAYLOAD: dict[PayloadName, tuple[str, ...]] = {
    "soft": ("soft_ids", "soft_probs"),
    "features": ("features", "feature_scales"),
}
PAYLOAD_OF_ARRAY = {name: payload for payload, names in ARRAYS_OF_PAYLOAD.items() for name in names}

_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_LARGEST_INT8 = 127


class SoftSpec(BaseModel, frozen=True, extra="forbid"):
    """How soft targets are made."""

    top_k: int = Field(ge=2, description="centroids per patch")
    temperature: float = Field(gt=0, allow_inf_nan=False, description="T, in units of `scale`")
    scale: float = Field(
        gt=0, allow_inf_nan=False, description="s, mean squared distance of the codebook's fit"
    )

    @property
    def bandwidth(self) -> float:
        """T s, what squared distances are divided by."""
        return self.temperature * self.scale


class FeatureSpec(BaseModel, frozen=True, extra="forbid"):
    """How features are stored."""

    dtype: FeatureType
    dim: int = Field(gt=0, description="D, values of a feature")


class SoftTotals(BaseModel, frozen=True, extra="forbid"):
    """What the soft targets of a unit or of a cache came to."""

    bytes: int = Field(ge=0, description="that they take on disk")
    num_patches: int = Field(gt=0)
    perplexity: float = Field(description="of a patch's k probabilities, mean")
    mass: float = Field(
        description="share of the softmax over all K that the k hold, mean of one patch in 61"
    )


class FeatureTotals(BaseModel, frozen=True, extra="forbid"):
    """How well the stored features of a unit or of a cache stand for the float32 ones."""

    bytes: int = Field(ge=0, description="that they take on disk")
    num_patches: int = Field(gt=0)
    cosine: float = Field(description="between stored and float32 feature, mean")
    relative_error: float = Field(description="|f - stored| / |f|, mean")


class PayloadArray(NamedTuple):
    """One array of an optional payload, as every sample has it."""

    payload: PayloadName
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int  # of rows that hold no sample
    dimensions: tuple[str, ...]


def payload_arrays(
    patches_shape: tuple[int, ...],  # (V, rows, cols)
    soft: SoftSpec | None,
    features: FeatureSpec | None,
) -> dict[str, PayloadArray]:
    """Return the arrays that a sample has beside views and token ids, by name."""
    arrays = {}
    axes = ("view", "row", "column")
    if soft:
        shape = (*patches_shape, soft.top_k)
        ranked = (*axes, "rank")
        # 65,535 is no id, as in token arrays.
        arrays["soft_ids"] = PayloadArray("soft", shape, np.dtype(np.uint16), 65_535, ranked)
        arrays["soft_probs"] = PayloadArray("soft", shape, np.dtype(np.float16), 0, ranked)
    if features:
        shape = (*patches_shape, features.dim)
        dtype = np.dtype(features.dtype)
        arrays["features"] = PayloadArray("features", shape, dtype, 0, (*axes, "value"))
        if features.dtype == "int8":
            scale = np.dtype(np.float32)
            arrays["feature_scales"] = PayloadArray("features", patches_shape, scale, 0, axes)
    return arrays


def pack_features(
    features: NDArray[np.float32],  # (n, ..., D), D > 0
    dtype: FeatureType,
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Return features as a cache stores them.

    Returns:
        Values (..., D) of `dtype`, and the scales (...) of int8, or None.

    Raises:
        ConfigError: A value is not finite, or too large for float16.
    """
    largest = np.maximum(features.max(-1), -features.min(-1))
    if not np.isfinite(largest).all():
        raise ConfigError("The features hold NaN or infinity. Check the model and its weights.")
    if dtype == "float16":
        if largest.size and largest.max() > _LARGEST_FLOAT16:
            raise ConfigError(
                f"A feature value is {largest.max():.6g} in size, and float16 ends at "
                f"{_LARGEST_FLOAT16:,.0f}. Use --store-features int8."
            )
        return features.astype(np.float16), None
    scales = (largest / np.float32(_LARGEST_INT8)).astype(np.float32)
    values = np.empty(features.shape, np.int8)
    divisors = np.where(scales > 0, scales, 1)[..., None]  # a patch of zeros has scale 0
    for into, part, divisor in zip(values, features, divisors, strict=True):
        quotients = np.rint(part / divisor)
        # Among the tiniest floats a quotient may pass 127.
        into[...] = quotients.clip(-_LARGEST_INT8, _LARGEST_INT8, out=quotients)
    return values, scales


def restore_features(
    values: NDArray[Any],  # (..., D) float16 or int8
    scales: NDArray[np.float32] | None = None,  # (...), of int8
) -> NDArray[np.float32]:
    """Return stored features as float32, (..., D).

    Raises:
        ValueError: int8 without its scales, or float16 with scales.
    """
    if (values.dtype == np.int8) != (scales is not None):
        raise ValueError(
            f"features of type {values.dtype} {'without' if scales is None else 'with'} scales"
        )
    restored = values.astype(np.float32)
    return restored if scales is None else restored * scales[..., None]


def sum_soft(parts: Iterable[SoftTotals]) -> SoftTotals | None:
    """Return the totals of several units, None of none."""
    units = list(parts)
    if not units:
        return None
    counts = [unit.num_patches for unit in units]
    return SoftTotals(
        bytes=sum(unit.bytes for unit in units),
        num_patches=sum(counts),
        perplexity=_mean([unit.perplexity for unit in units], counts),
        mass=_mean([unit.mass for unit in units], counts),
    )


def sum_features(parts: Iterable[FeatureTotals]) -> FeatureTotals | None:
    """Return the totals of several units, None of none."""
    units = list(parts)
    if not units:
        return None
    counts = [unit.num_patches for unit in units]
    return FeatureTotals(
        bytes=sum(unit.bytes for unit in units),
        num_patches=sum(counts),
        cosine=_mean([unit.cosine for unit in units], counts),
        relative_error=_mean([unit.relative_error for unit in units], counts),
    )


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return round(sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts), 9)
