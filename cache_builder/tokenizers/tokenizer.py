"""The tokenizer, one for builder, service and `verify`: resized views in, token ids out."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook, PixelRule
from cache_builder.imaging import unpatchify
from cache_builder.tokenizers.features import (
    FeatureExtractor,
    extract_features,
    load_extractor,
)
from cache_builder.tokenizers.quantizer import ResidualQuantizer

_VIEWS_PER_BATCH = 64


class PatchTokenizer:
    """A feature extractor and a codebook that belong together."""

    def __init__(
        self, codebook: Codebook, extractor: FeatureExtractor, device: torch.device
    ) -> None:
        """Join the two; `load` makes them from a codebook file."""
        self.codebook = codebook
        self.device = device
        self.extractor = extractor
        centroids = torch.from_numpy(codebook.centroids).to(device)
        self.quantizer = ResidualQuantizer(centroids)

    @classmethod
    def load(
        cls,
        codebook: str | Path | Codebook,
        device: str | torch.device = "cpu",
        weights: str | None = None,
    ) -> Self:
        """Load a tokenizer.

        Args:
            codebook: A codebook, or the path of one.
            device: `cpu`, `cuda`, ..., or `auto`: the GPU where there is one.
            weights: Weights file of the feature model, if it is not where the codebook says.

        Raises:
            ArtifactError: The codebook is damaged.
            TokenizerMismatchError: The weights are not those that it was fitted with.
        """
        if not isinstance(codebook, Codebook):
            codebook = Codebook.load(codebook)
        chosen = choose_device(device)
        extractor = load_extractor(codebook.extractor, codebook.pixel_rule, chosen, weights)
        return cls(codebook, extractor, chosen)

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer, SHA-256 in hexadecimal."""
        return self.codebook.fingerprint

    @property
    def pixel_rule(self) -> PixelRule:
        """Size, patch size and interpolation of the views that `encode` takes."""
        return self.codebook.pixel_rule

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of token ids."""
        return self.codebook.pixel_rule.grid

    @property
    def vocab_size(self) -> int:
        """K."""
        return self.codebook.vocab_size

    @property
    def decodes_to_pixels(self) -> bool:
        """Whether centroids are pictures, so that `decode` works."""
        return self.codebook.decodes_to_pixels

    def features(self, pixels: Tensor) -> Tensor:
        """Return what is quantised: (B, N, D), of unit length for a cosine codebook.

        Raises:
            ValueError: `pixels` is not (B, 3, S, S) uint8 of this tokenizer's size.
        """
        size = self.pixel_rule.size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixels must be (B, 3, {size}, {size}) uint8, "
                f"not {tuple(pixels.shape)} {pixels.dtype}"
            )
        features = extract_features(self.extractor, pixels.to(self.device))
        if self.codebook.metric == "cosine":
            return torch.nn.functional.normalize(features.float(), dim=-1)
        return features

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the token ids of resized views.

        Args:
            pixels: (B, 3, S, S) uint8, S the size of the pixel rule.

        Returns:
            (B, rows, cols) int64 on the CPU, or (B, rows, cols, M) with M > 1 stages; the patches
            in row-major order.

        Raises:
            ValueError: `pixels` has another shape or type.
        """
        ids = [self._encode_batch(batch) for batch in pixels.split(_VIEWS_PER_BATCH)]
        if not ids:
            ids = [torch.empty(0, self.codebook.num_stages, dtype=torch.int64)]
        return torch.cat(ids).view(len(pixels), *self.codebook.ids_shape)

    def decode(self, token_ids: Tensor) -> Tensor:
        """Return the pictures that token ids stand for.

        Args:
            token_ids: (B, rows, cols) or, with M > 1 stages, (B, rows, cols, M); any integer type.

        Returns:
            (B, 3, S, S) uint8: every patch is the pixels of its centroid.

        Raises:
            ConfigError: Centroids of this codebook are not pixels, or an id is out of range.
            ValueError: `token_ids` has another shape.
        """
        if not self.decodes_to_pixels:
            raise ConfigError(
                f"Centroids of {self.codebook.extractor.id} with metric {self.codebook.metric} "
                "are not pixels; only l2 codebooks of pixels can be decoded to pictures."
            )
        shape = self.codebook.ids_shape
        if token_ids.shape[1:] != shape:
            raise ValueError(f"token ids must be (B, *{shape}), not {tuple(token_ids.shape)}")
        num_patches = self.grid[0] * self.grid[1]
        ids = token_ids.to(self.device, torch.int64)
        ids = ids.reshape(-1, num_patches, self.codebook.num_stages)
        patches = self.quantizer.decode(ids).round().clamp(0, 255).to(torch.uint8)
        return unpatchify(patches, self.grid, self.pixel_rule.patch_size).cpu()

    def _encode_batch(self, pixels: Tensor) -> Tensor:
        features = self.features(pixels)
        return self.quantizer.encode(features.reshape(-1, features.shape[-1])).cpu()


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`; `auto` is the GPU where there is one, else the CPU.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"Unknown device {name!r}. Use auto, cpu, cuda or cuda:N.") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Device {name} was asked for, but torch sees no GPU. Use --device cpu.")
    return device
