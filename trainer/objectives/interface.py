"""What a method is to the training loop.

A method is one module of this package. It has two names: `Config`, its settings with `method` as
their tag, and `build`, which makes an `nn.Module` of settings and `Parts`. That module keeps
timm's ViT unmodified in its attribute `vit`, so that an export is the ViT's own state dict, says
in `payloads` what it reads of a sample beside its token ids, and in `image_size` how large a
picture it wants. It is called with

    images      (B, 3, S, S) float32 in [0, 1]: colours jittered, not yet normalised, because some
                methods change pixels first
    targets     what the cache holds of them
    generator   the random numbers of these samples

and returns 0-dimensional tensors by name: `loss`, the mean over the samples, with a gradient, and
metrics, means too, without one. `cross_entropy` (of token ids, nats) and `accuracy` have the same
meaning everywhere; a method without token ids has none. Its `preview`, called with the same three,
returns the `Preview` of these samples.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import BaseModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cache_builder.errors import ConfigError
from cache_builder.formats import CacheManifest, Codebook, PayloadName


class Targets(NamedTuple):
    """What a cache says about a batch, on the device; None where the method does not read it."""

    token_ids: Tensor  # (B, N) int64 in [0, K), or (B, N, M) in M > 1 stages
    clean: Tensor  # (B, 3, S, S) float32 in [0, 1], the pictures before the colour jitter
    soft_ids: Tensor | None = None  # (B, N, k) int64, nearest first
    soft_probs: Tensor | None = None  # (B, N, k) float32, adding up to 1
    features: Tensor | None = None  # (B, N, D) float32


class Preview(NamedTuple):
    """What a method saw and predicted, for a picture."""

    shown: Tensor  # (B, 3, S, S) in [0, 1], what the encoder was given
    hidden: Tensor  # (B, N) bool, patches that it was not given
    predicted: Tensor  # (B, N) bool, patches with a prediction
    token_ids: Tensor  # (B, N) int64, the likeliest id of those; anything elsewhere


class Parts(NamedTuple):
    """What a method is built of."""

    vit: VisionTransformer
    manifest: CacheManifest
    codebook: Codebook
    normalise: "Normalise"


class MethodConfig(BaseModel, frozen=True, extra="forbid"):
    """What the settings of every method have in common."""

    method: str


class Method(Protocol):
    """A module of this package."""

    Config: ClassVar[type[MethodConfig]]

    def build(self, config: Any, parts: Parts) -> nn.Module:
        """Return the method's module, freshly initialised from torch's default generator."""


class Normalise(nn.Module):
    """(images - mean) / std, channel by channel."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        """Take what the ViT's input is normalised by, of RGB in [0, 1]."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Take and return (B, 3, S, S)."""
        return (images - self.mean) / self.std


def require_one_stage(manifest: CacheManifest, method: str) -> None:
    """Refuse a cache with several token ids per patch.

    Raises:
        ConfigError: It is one.
    """
    if manifest.spec.num_stages > 1:
        raise ConfigError(
            f"The cache holds {manifest.spec.num_stages} token ids per patch; method {method!r} "
            "predicts one. Build a cache with a codebook of one stage, or train with `dtm`."
        )


def require_payload(manifest: CacheManifest, payload: PayloadName, method: str, flag: str) -> None:
    """Refuse a cache without an optional payload.

    Raises:
        ConfigError: It lacks it.
    """
    if payload not in manifest.payloads:
        raise ConfigError(
            f"Method {method!r} reads the payload {payload!r}, which the cache does not have. "
            f"Build it with `patchcache build {flag}`."
        )
