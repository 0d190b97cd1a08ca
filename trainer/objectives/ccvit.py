"""Masked patches and patches replaced by centroids: predict their token ids and their pixels.

CCViT (arXiv:2303.04664). A replaced patch shows the pixels of the centroid that it is nearest to.
Of masked and of replaced patches the ViT predicts the token ids. The pixels, standardised patch by
patch, are regressed from extra blocks that see the class token of the last block and the patch
tokens of an early one, as BEiT v2's patch aggregation does; they are no part of the encoder. Both
losses count the same.

With `drop` the extra blocks are a second decoder: it sees the class token, the early tokens of the
visible patches and mask tokens.

Against CCViT's code: absolute positions as in timm's ViT, not one shared table of relative ones;
query, key and value all have biases. The code has no colour jitter; where a run has one, it comes
before the centroids, which keep their colours, and the pixels to regress are the unchanged ones.
"""

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from cache_builder.errors import ConfigError
from cache_builder.formats import Codebook
from cache_builder.imaging import patchify, unpatchify
from trainer.draws import SampleGenerator
from trainer.objectives.hiding import (
    ClassTokenHead,
    Decoder,
    Hiding,
    HidingConfig,
    Masks,
    MaskSampler,
    encode_with_early,
    make_head,
    take,
    token_loss,
)
from trainer.objectives.interface import Parts, Preview, Targets, require_one_stage

_EPS = 1e-6  # added to the variance of a patch, of pixels in [0, 1]
_LATE_BLOCKS = 3  # block 9 of 12 and 21 of 24 are the early ones of CCViT


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `ccvit`."""

    method: Literal["ccvit"] = "ccvit"
    replace_ratio: float = Field(
        20 / 196,
        ge=0,
        lt=1,
        description="share of patches replaced by their centroids, none of them masked; CCViT "
        "replaces 20 of 196",
    )
    early_layers: int | None = Field(
        None,
        gt=0,
        description="block, from 1, whose patch tokens the pixels are regressed from; CCViT: 9 of "
        "12, 21 of 24. None: three before the last, as there, or else the first",
    )
    head_layers: int = Field(
        2, gt=0, description="blocks that regress pixels, beside the encoder; CCViT: 2"
    )


class Corruption(NamedTuple):
    """What is hidden and what is replaced in a batch."""

    masks: Masks
    replaced: Tensor  # (B, N) bool, none of them masked
    predicted_at: Tensor  # (B, m + r) int64, masked or replaced, ascending


def build(config: Config, parts: Parts) -> "CentroidReplacement":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache or the ViT.
    """
    require_one_stage(parts.manifest, config.method)
    return CentroidReplacement(config, parts)


def corrupt(
    pixels: Tensor,  # (B, 3, S, S)
    token_ids: Tensor,  # (B, N) int64
    centroids: Tensor,  # (K, 3 * p * p)
    masked: Tensor,  # (B, N) bool
    replaced: Tensor,  # (B, N) bool
) -> Tensor:
    """Give replaced patches the pixels of their centroids.

    CCViT (arXiv:2303.04664). A masked patch keeps its pixels, also where it is marked as replaced:
    the mask token takes its place behind the patch embedding.

    Args:
        pixels: In [0, 1], not normalised.
        token_ids: Of the unchanged pictures.
        centroids: In [0, 1], or uint8 in 0 .. 255; values of a patch in (c, row, col) order.
        masked: Which patches a mask token stands for.
        replaced: Which patches to replace.

    Returns:
        (B, 3, S, S), in the type of `pixels`.
    """
    patch_size = math.isqrt(centroids.shape[1] // 3)
    grid = pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size
    shown = centroids[token_ids].to(pixels.dtype)
    if centroids.dtype == torch.uint8:
        shown = shown / 255
    chosen = (replaced & ~masked)[..., None]
    return unpatchify(torch.where(chosen, shown, patchify(pixels, patch_size)), grid, patch_size)


def pixel_targets(pixels: Tensor, patch_size: int) -> Tensor:
    """Return the standardised pixels of all patches.

    (x - mean) / sqrt(var + 1e-6), with mean and unbiased variance of all values of a patch.

    Args:
        pixels: (B, 3, S, S) in [0, 1], not normalised.
        patch_size: p, pixels.

    Returns:
        (B, N, 3 * p * p), values of a patch in (c, row, col) order.
    """
    return _standardise(patchify(pixels, patch_size))


def joint_loss(
    logits: Tensor,  # (B, n, K)
    regressed: Tensor,  # (B, n, 3 * p * p)
    token_ids: Tensor,  # (B, n) int64
    wanted: Tensor,  # (B, n, 3 * p * p)
) -> dict[str, Tensor]:
    """Return loss and metrics of n predicted patches per picture.

    Returns:
        `loss`, the sum of `cross_entropy` of the token ids and `pixel_error`, the mean squared
        error of the standardised pixels; `accuracy` of the token ids.
    """
    entropy, accuracy = token_loss(logits, token_ids)
    error = (regressed.float() - wanted).square().mean()
    return {
        "loss": entropy + error,
        "cross_entropy": entropy.detach(),
        "accuracy": accuracy,
        "pixel_error": error.detach(),
    }


class CentroidReplacement(nn.Module):
    """Token ids and pixels of masked and of replaced patches.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The mask token and, with `drop`, the decoder of the token ids.
        head: Linear, to K logits per patch.
        pixel_blocks: The extra blocks, over the class token and early patch tokens.
        pixel_head: Linear, to the 3 * p * p values of a patch.
        centroids: (K, 3 * p * p) uint8; None where nothing is replaced.
    """

    centroids: Tensor | None

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add mask token, heads and extra blocks to a ViT.

        Raises:
            ConfigError: The settings do not go with the cache or the ViT.
        """
        super().__init__()
        vit, num_patches = parts.vit, parts.vit.patch_embed.num_patches
        self.payloads = ()
        self.image_size = vit.patch_embed.img_size[0]
        self.vit = vit
        self.normalise = parts.normalise
        self.patch_size = vit.patch_embed.patch_size[0]
        self.masks = MaskSampler(parts.manifest.grid, config)
        self.num_replaced = _count_replaced(config, num_patches, self.masks.num_masked)
        centroids = None
        if self.num_replaced:
            centroids = _centroid_pixels(parts.codebook, self.patch_size)
        self.register_buffer("centroids", centroids, persistent=False)
        self.early_layers = _early_layers(config, parts)
        self.hiding = Hiding(vit, num_patches, config)
        width = self.hiding.width
        self.head = make_head(width, parts.manifest.vocab_size)
        self.pixel_blocks: PixelBlocks | Decoder
        if config.masked_tokens == "drop":
            self.pixel_blocks = Decoder(vit.embed_dim, width, config.head_layers, num_patches)
        else:
            self.pixel_blocks = PixelBlocks(parts, config.head_layers, self.early_layers)
        self.pixel_head = make_head(width, 3 * self.patch_size**2)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw what is masked and what is replaced, and predict both.

        Returns:
            What `joint_loss` does, over masked and replaced patches.
        """
        corruption = self.draw(generator)
        at = corruption.predicted_at
        logits, regressed = self.predict(
            self.corrupted(images, targets.token_ids, corruption), corruption
        )
        wanted = _standardise(take(patchify(targets.clean, self.patch_size), at))
        return joint_loss(logits, regressed, targets.token_ids.gather(1, at), wanted)

    def draw(self, generator: SampleGenerator) -> Corruption:
        """Return masks, and replaced patches drawn uniformly from those that are not masked."""
        masks = self.masks.draw(generator)
        order = generator.permutations(masks.visible_at.shape[1])
        replaced_at = masks.visible_at.gather(1, order[:, : self.num_replaced])
        replaced = torch.zeros_like(masks.hidden).scatter(1, replaced_at, True)
        predicted = Masks.of(masks.hidden | replaced, self.masks.num_masked + self.num_replaced)
        return Corruption(masks, replaced, predicted.masked_at)

    def corrupted(self, images: Tensor, token_ids: Tensor, corruption: Corruption) -> Tensor:
        """Return the pictures with their replaced patches, (B, 3, S, S) in [0, 1]."""
        if self.centroids is None:
            return images
        hidden, replaced = corruption.masks.hidden, corruption.replaced
        return corrupt(images, token_ids, self.centroids, hidden, replaced)

    def predict(self, corrupted: Tensor, corruption: Corruption) -> tuple[Tensor, Tensor]:
        """Return logits (B, m + r, K) and pixels (B, m + r, 3 * p * p) of the predicted patches."""
        vit, masks, at = self.vit, corruption.masks, corruption.predicted_at
        patches = vit.patch_embed(self.normalise(corrupted))
        tokens = self.hiding.tokens(vit, patches, masks)
        last, early = encode_with_early(vit, tokens, self.early_layers)
        rows = self.hiding.rows(vit, vit.norm(last), masks)
        if isinstance(self.pixel_blocks, Decoder):
            prefix = vit.num_prefix_tokens
            joined = torch.cat([last[:, :prefix], early[:, prefix:]], dim=1)
            pixel_rows = self.pixel_blocks(joined, self.hiding.mask_token, masks)
        else:
            pixel_rows = self.pixel_blocks(last, early)
        return self.head(take(rows, at)), self.pixel_head(take(pixel_rows, at))

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples."""
        corruption = self.draw(generator)
        shown = self.corrupted(images, targets.token_ids, corruption)
        logits, _ = self.predict(shown, corruption)
        token_ids = targets.token_ids.scatter(1, corruption.predicted_at, logits.argmax(-1))
        hidden = corruption.masks.hidden
        return Preview(shown, hidden, hidden | corruption.replaced, token_ids)


class PixelBlocks(nn.Module):
    """The extra blocks and a norm of their own."""

    def __init__(self, parts: Parts, num_blocks: int, early_layers: int) -> None:
        """Make blocks in the shape of the ViT's."""
        super().__init__()
        self.blocks = ClassTokenHead(parts.vit, num_blocks, early_layers)
        self.norm = nn.LayerNorm(parts.vit.embed_dim, eps=1e-6)
        self._num_prefix = parts.vit.num_prefix_tokens

    def forward(self, last: Tensor, early: Tensor) -> Tensor:
        """Return the rows of all patches, (B, N, D)."""
        return self.norm(self.blocks(last, early)[:, self._num_prefix :])


def _standardise(patches: Tensor) -> Tensor:
    mean = patches.mean(-1, keepdim=True)
    return (patches - mean) / (patches.var(-1, keepdim=True) + _EPS).sqrt()


def _count_replaced(config: Config, num_patches: int, num_masked: int) -> int:
    num_replaced = round(config.replace_ratio * num_patches)
    if num_replaced > num_patches - num_masked:
        raise ConfigError(
            f"objective.replace_ratio {config.replace_ratio:g} replaces {num_replaced} of "
            f"{num_patches} patches, but {num_masked} are masked. Lower it or mask_ratio."
        )
    if config.replace_ratio and not num_replaced:
        raise ConfigError(
            f"objective.replace_ratio {config.replace_ratio:g} replaces none of the {num_patches} "
            "patches of the cache. Raise it, or set it to 0."
        )
    return num_replaced


def _centroid_pixels(codebook: Codebook, patch_size: int) -> Tensor:
    """Return the centroids as patches of pixels, (K, 3 * p * p) uint8."""
    extractor, theirs = codebook.extractor.id, codebook.pixel_rule.patch_size
    if extractor != "pixel" or codebook.metric != "l2":
        raise ConfigError(
            f"Method 'ccvit' shows the pixels of centroids, and those of {extractor} with metric "
            f"{codebook.metric} are not pixels. Use a cache of `patchcache fit --features pixel` "
            "with metric l2, or set objective.replace_ratio to 0."
        )
    if theirs != patch_size:
        raise ConfigError(
            f"Method 'ccvit' shows centroids of {theirs} x {theirs} pixels, but the ViT has "
            f"patches of {patch_size} x {patch_size}. Leave out data.image_size, or set "
            "objective.replace_ratio to 0."
        )
    return torch.from_numpy(codebook.centroids[0])


def _early_layers(config: Config, parts: Parts) -> int:
    depth = len(parts.vit.blocks)
    layers = config.early_layers or max(1, depth - _LATE_BLOCKS)
    if layers >= depth:
        raise ConfigError(
            f"Block {layers} is no early block of a ViT of {depth}. Set objective.early_layers to "
            f"less than {depth}, or model.depth to more."
        )
    if not parts.vit.has_class_token:
        raise ConfigError(
            "Method 'ccvit' regresses pixels from a class token, and this ViT has none. Pick a "
            "model.name with one, as vit_base_patch16_224."
        )
    return layers
