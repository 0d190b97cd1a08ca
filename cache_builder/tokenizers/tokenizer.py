"""The tokenizer, one for builder, service and `verify`: resized views in, token ids out."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import PixelRule
from cache_builder.imaging import unpatchify
from cache_builder.tokenizers.features import (
    FeatureExtractor,
    extract_features,
    load_extractor,
    run_in_halves,
)
from cache_builder.tokenizers.plugins import PluginTokenizer
from cache_builder.tokenizers.quantizer import ResidualQuantizer, check_ids

_VIEWS_PER_BATCH = 64


class PatchTokenizer:
    """A feature extractor and a codebook that belong together.

    In the place of the extractor may stand a learned tokenizer of a plugin, whose ids are its own.
    `has_near_ties`, `decodes_to_pixels` and the codebook's `is_fitted` and `has_centroids` say what
    can be asked of it.
    """

    def __init__(
        self, codebook: Codebook, extractor: FeatureExtractor, device: torch.device
    ) -> None:
        """Join the two; `load` makes them from a codebook file.

        Raises:
            TokenizerMismatchError: A plugin has another vocabulary than the codebook says.
        """
        self.codebook = codebook
        self.device = device
        self.extractor = extractor
        self._plugin = extractor if isinstance(extractor, PluginTokenizer) else None
        if self._plugin is not None:
            theirs = (self._plugin.num_stages, self._plugin.vocab_size)
            ours = (codebook.num_stages, codebook.vocab_size)
            if theirs != ours:
                raise TokenizerMismatchError(
                    f"The codebook was written for {extractor.spec.id} with M, K = {ours}, but the "
                    f"one installed here has {theirs}. Install the same version."
                )
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
            ConfigError: Its token ids were imported: the tokenizer is not known.
            TokenizerMismatchError: The weights are not those that it was fitted with.
            MissingDependencyError: The library of its model, or its plugin, is not installed.
        """
        if not isinstance(codebook, Codebook):
            codebook = Codebook.load(codebook)
        if codebook.is_foreign:
            raise ConfigError(
                f"The token ids of {codebook.extractor.id} were imported: the tokenizer that made "
                "them is not here. Fit a codebook with `patchcache fit`, or ask the other tool."
            )
        chosen = choose_device(device)
        extractor = load_extractor(
            codebook.extractor, codebook.pixel_rule, chosen, weights, codebook.plugin
        )
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
        """Whether ids can be turned into pictures, so that `decode` works."""
        return self.codebook.decodes_to_pixels

    @property
    def has_near_ties(self) -> bool:
        """Whether ids may differ by rounding, and `features` and centroids tell when they do."""
        codebook = self.codebook
        has_features = self._plugin is None or self._plugin.has_features
        is_exact = codebook.has_pixel_centroids
        return has_features and codebook.has_centroids and codebook.num_stages == 1 and not is_exact

    def features(self, pixels: Tensor) -> Tensor:
        """Return what is quantised: (B, N, D), of unit length for a cosine codebook.

        Raises:
            ValueError: `pixels` is not (B, 3, S, S) uint8 of this tokenizer's size.
            ConfigError: They are not finite, or a plugin shows none.
        """
        self._check(pixels)
        features = extract_features(self.extractor, pixels.to(self.device))
        if features.is_floating_point() and not features.isfinite().all():
            raise ConfigError("The features hold NaN or infinity. Check the model and its weights.")
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
            PluginError: A plugin gives no ids of its vocabulary.
        """
        return torch.cat([self._encode_batch(batch) for batch in pixels.split(_VIEWS_PER_BATCH)])

    def quantize(self, features: Tensor) -> Tensor:
        """Return the token ids, as `encode` does, of `features` (B, N, D) of a fitted codebook."""
        ids = self.quantizer.encode(features.flatten(0, 1)).cpu()
        return ids.view(len(features), *self.codebook.ids_shape)

    def decode(self, token_ids: Tensor) -> Tensor:
        """Return the pictures that token ids stand for.

        Args:
            token_ids: (B, rows, cols) or, with M > 1 stages, (B, rows, cols, M); any integer type.

        Returns:
            (B, 3, S, S) uint8: every patch is the pixels of its centroid, or what a plugin makes
            of the ids.

        Raises:
            ConfigError: Ids of this codebook stand for no pixels, or an id is out of range.
            ValueError: `token_ids` has another shape.
        """
        if not self.decodes_to_pixels:
            raise ConfigError(why_not_decodable(self.codebook))
        shape = self.codebook.ids_shape
        if token_ids.shape[1:] != shape:
            raise ValueError(f"token ids must be (B, *{shape}), not {tuple(token_ids.shape)}")
        num_patches = self.grid[0] * self.grid[1]
        ids = token_ids.to(self.device, torch.int64)
        if self._plugin is not None:
            check_ids(ids, self.vocab_size)
            return self._plugin.decode(ids).cpu()
        ids = ids.reshape(-1, num_patches, self.codebook.num_stages)
        patches = self.quantizer.decode(ids).round().clamp(0, 255).to(torch.uint8)
        return unpatchify(patches, self.grid, self.pixel_rule.patch_size).cpu()

    def _check(self, pixels: Tensor) -> None:
        size = self.pixel_rule.size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixels must be (B, 3, {size}, {size}) uint8, "
                f"not {tuple(pixels.shape)} {pixels.dtype}"
            )

    def _encode_batch(self, pixels: Tensor) -> Tensor:
        if self._plugin is None:
            return self.quantize(self.features(pixels))
        self._check(pixels)
        name = self.codebook.extractor.id
        return run_in_halves(self._plugin.encode, pixels.to(self.device), name).cpu()


def why_not_decodable(codebook: Codebook) -> str:
    """Say why ids of a codebook cannot be turned into pictures."""
    return (
        f"Ids of {codebook.extractor.id} with metric {codebook.metric} are not pixels; only those "
        "of l2 codebooks of pixels, and of plugins that say how, can be decoded to pictures."
    )


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
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"Device {name} was asked for, and the last GPU that torch sees is cuda:{count - 1}. "
            "Use that or a lower number."
        )
    return device
