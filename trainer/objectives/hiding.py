"""How masked patches are kept from the encoder, for every method that masks.

Two ways. `keep`, BEiT (arXiv:2106.08254): a mask token takes the place of each masked patch's
embedding. `drop`, MAE (arXiv:2111.06377): the encoder sees the visible patches only, and a small
decoder sees its output and a mask token per masked patch. Dropping is two to three times faster
and learns more per minute.
"""

import copy
import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cache_builder.errors import ConfigError
from trainer.draws import SampleGenerator
from trainer.masking import block_mask, random_masks
from trainer.objectives.interface import MethodConfig

_INIT_STD = 0.02
_HEAD_DIM = 32  # of the decoder's attention, as in MAE: 512 wide, 16 heads


class HidingConfig(MethodConfig, frozen=True, extra="forbid"):
    """Which patches are masked, and how."""

    mask_ratio: float = Field(
        75 / 196, gt=0, lt=1, description="share of patches masked; BEiT v2 masks 75 of 196"
    )
    mask_kind: Literal["block", "random"] = "block"
    masked_tokens: Literal["keep", "drop"] = Field(
        "keep",
        description="keep: a mask token stands for each masked patch in the encoder (BEiT); "
        "drop: the encoder sees visible patches only and a decoder predicts (MAE)",
    )
    decoder_depth: int | None = Field(None, gt=0, description="blocks, with drop; none: 1")
    decoder_dim: int | None = Field(None, gt=0, description="width, with drop; none: the ViT's D")

    @model_validator(mode="after")
    def _check_decoder(self) -> Self:
        if self.masked_tokens == "keep":
            for key in ("decoder_depth", "decoder_dim"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} belongs to masked_tokens = 'drop'; with 'keep' there is no decoder"
                    )
        return self


class Masks(NamedTuple):
    """The masked patches of a batch, as many in every sample."""

    hidden: Tensor  # (B, N) bool
    masked_at: Tensor  # (B, m) int64, ascending
    visible_at: Tensor  # (B, N - m) int64, ascending

    @classmethod
    def of(cls, hidden: Tensor, num_masked: int) -> Self:
        """Take bool (B, N) with `num_masked` True in every row."""
        # A stable sort puts the masked positions first; unlike a boolean index its result has a
        # shape that does not depend on the data.
        order = hidden.byte().argsort(dim=1, descending=True, stable=True)
        return cls(hidden, order[:, :num_masked], order[:, num_masked:])


class MaskSampler:
    """Draws the masks that the settings ask for."""

    def __init__(self, grid: tuple[int, int], config: HidingConfig) -> None:
        """Take the grid of the cache.

        Raises:
            ConfigError: No patch, or every patch, would be masked.
        """
        num_patches = grid[0] * grid[1]
        self.grid = grid
        self.num_masked = round(config.mask_ratio * num_patches)
        self._kind = config.mask_kind
        if not 0 < self.num_masked < num_patches:
            raise ConfigError(
                f"objective.mask_ratio {config.mask_ratio:g} masks {self.num_masked} of the "
                f"{num_patches} patches of the cache; at least one must be masked and one visible."
            )

    def draw(self, generator: SampleGenerator) -> Masks:
        """Return the masks of a batch, on the generator's device."""
        if self._kind == "random":
            hidden = random_masks(self.grid, self.num_masked, generator)
        else:
            drawn = [block_mask(self.grid, self.num_masked, g) for g in generator.generators()]
            hidden = torch.stack(drawn).to(generator.device, non_blocking=True)
        return Masks.of(hidden.flatten(1), self.num_masked)


class Hiding(nn.Module):
    """Runs a ViT on patches of which some are hidden. It has the mask token and the decoder.

    Attributes:
        width: Of the rows returned: the ViT's, or the decoder's.
        mask_token: (1, 1, width) stands for a masked patch, in the encoder or in the decoder.
    """

    def __init__(self, vit: VisionTransformer, num_patches: int, config: HidingConfig) -> None:
        """Add a mask token and, with `drop`, a decoder to a ViT, which stays the caller's."""
        super().__init__()
        self.decoder: Decoder | None = None
        self.width = vit.embed_dim
        if config.masked_tokens == "drop":
            self.width = config.decoder_dim or vit.embed_dim
            depth = config.decoder_depth or 1
            self.decoder = Decoder(vit.embed_dim, self.width, depth, num_patches)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.width))
        init_weight(self.mask_token)

    def forward(self, vit: VisionTransformer, patches: Tensor, masks: Masks) -> Tensor:
        """Return the rows of all patches in raster order, (B, N, width).

        Args:
            vit: The encoder.
            patches: (B, N, D), what `vit.patch_embed` returned, or some change of it.
            masks: Which are hidden.
        """
        return self.rows(vit, encode(vit, self.tokens(vit, patches, masks)), masks)

    def tokens(self, vit: VisionTransformer, patches: Tensor, masks: Masks) -> Tensor:
        """Return what the encoder's blocks are given, with positions.

        Returns:
            (B, prefix + N, D), or with `drop` (B, prefix + N - m, D).
        """
        if self.decoder is not None:
            return visible_tokens(vit, patches, masks)
        hidden = masks.hidden[..., None]
        return vit._pos_embed(torch.where(hidden, self.mask_token.to(patches.dtype), patches))

    def rows(self, vit: VisionTransformer, encoded: Tensor, masks: Masks) -> Tensor:
        """Return the rows of all patches, (B, N, width), of what became of `tokens`."""
        if self.decoder is not None:
            return self.decoder(encoded, self.mask_token, masks)
        return encoded[:, vit.num_prefix_tokens :]

    def visible_rows(self, vit: VisionTransformer, encoded: Tensor, masks: Masks) -> Tensor:
        """Return the encoder's own output at the visible patches, (B, N - m, D)."""
        patches = encoded[:, vit.num_prefix_tokens :]
        return take(patches, masks.visible_at) if self.decoder is None else patches


class Decoder(nn.Module):
    """A few blocks over the encoder's output and one mask token per masked patch."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_patches: int) -> None:
        """Make blocks of width `dim`, with a position embedding of their own."""
        super().__init__()
        num_heads = max(h for h in range(1, max(1, dim // _HEAD_DIM) + 1) if dim % h == 0)
        self.embed = nn.Linear(encoder_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        init_linears(self)
        init_weight(self.pos_embed)

    def forward(
        self,
        encoded: Tensor,  # (B, prefix + N - m, encoder_dim)
        mask_token: Tensor,  # (1, 1, dim)
        masks: Masks,
    ) -> Tensor:
        """Return all patches in raster order, (B, N, dim)."""
        tokens = self.embed(encoded)
        num_prefix = tokens.shape[1] - masks.visible_at.shape[1]
        prefix, visible = tokens[:, :num_prefix], tokens[:, num_prefix:]
        batch, num_patches = masks.hidden.shape
        patches = mask_token.to(tokens.dtype).expand(batch, num_patches, -1)
        at = masks.visible_at[..., None].expand(-1, -1, tokens.shape[-1])
        patches = patches.scatter(1, at, visible) + self.pos_embed.to(tokens.dtype)
        decoded = self.blocks(torch.cat([prefix, patches], dim=1))
        return self.norm(decoded[:, num_prefix:])


def encode(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Run the blocks of a ViT and its final norm on tokens that have their positions."""
    return vit.norm(vit.blocks(vit.norm_pre(tokens)))


def encode_with_early(vit: VisionTransformer, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return the output of the last block and that of block `layer`, from 1, both before the norm.

    Args:
        vit: The encoder.
        tokens: (B, n, D), with positions.
        layer: At least 1.
    """
    early = vit.blocks[:layer](vit.norm_pre(tokens))
    return vit.blocks[layer:](early), early


class ClassTokenHead(nn.Module):
    """Extra blocks over the class token of the last block and the patches of an early one.

    Patch aggregation, BEiT v2 (arXiv:2208.06366). What the early patches lack, only the class token
    can bring, so it learns to hold what the whole picture shows. The blocks are no part of the
    encoder and not exported.
    """

    def __init__(self, vit: VisionTransformer, num_blocks: int, layer: int) -> None:
        """Make blocks in the shape of those that follow block `layer`, from 1, of a ViT.

        Their initialisation is the one that BEiT v2's code leaves them with: torch's default, wider
        than the encoder's, with output projections divided by sqrt(2 i) for block i.

        Raises:
            ConfigError: The ViT has no class token, or no blocks after that layer.
        """
        super().__init__()
        depth = len(vit.blocks)
        if not vit.has_class_token:
            raise ConfigError(
                "objective.aggregation_blocks needs a class token, and this ViT has none. Pick a "
                "model.name with one, as vit_base_patch16_224, or leave out both aggregation keys."
            )
        if not 1 <= layer < depth:
            raise ConfigError(
                f"objective.aggregation_layer {layer} is not an early block of a ViT of {depth}. "
                f"Set it to 1 .. {depth - 1}; BEiT v2 takes block 9 of 12 and 21 of 24."
            )
        blocks = []
        for i in range(layer, layer + num_blocks):
            block = copy.deepcopy(vit.blocks[min(i, depth - 1)])
            for part in block.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            with torch.no_grad():
                for projection in (block.attn.proj, block.mlp.fc2):
                    projection.weight.div_(math.sqrt(2 * (i + 1)))
            blocks.append(block)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, last: Tensor, early: Tensor) -> Tensor:
        """Return what the blocks make of it, (B, prefix + n, D), before a norm.

        Args:
            last: (B, prefix + n, D), output of the last block, its class token first.
            early: (B, prefix + n, D), output of the early block.
        """
        return self.blocks(torch.cat([last[:, :1], early[:, 1:]], dim=1))


def token_loss(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the share of patches whose likeliest id is the right one.

    Args:
        logits: (B, n, K).
        token_ids: (B, n) int64.
    """
    # Rounded to bfloat16, the logits of a large vocabulary lose the loss's last digits.
    loss = cross_entropy(logits.float().flatten(0, 1), token_ids.flatten())
    return loss, (logits.detach().argmax(-1) == token_ids).float().mean()


def visible_tokens(vit: VisionTransformer, patches: Tensor, masks: Masks) -> Tensor:
    """Return the prefix and the visible patches with their positions, (B, prefix + N - m, D)."""
    tokens = vit._pos_embed(patches)
    prefix, every = tokens[:, : vit.num_prefix_tokens], tokens[:, vit.num_prefix_tokens :]
    return torch.cat([prefix, take(every, masks.visible_at)], dim=1)


def take(rows: Tensor, positions: Tensor) -> Tensor:
    """Return the rows (B, n, D) of a (B, N, D) tensor at positions (B, n)."""
    return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))


def make_head(width: int, num_outputs: int) -> nn.Linear:
    """Return a linear head, initialised as in the BEiT family."""
    head = nn.Linear(width, num_outputs)
    init_linears(head)
    return head


def init_linears(module: nn.Module) -> None:
    """Initialise every linear layer in a module as in the BEiT family."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_weight(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_weight(weight: Tensor) -> None:
    """Fill a parameter with N(0, 0.02^2), cut off at one standard deviation.

    The BEiT family cuts off there, where timm cuts off at two.
    """
    nn.init.trunc_normal_(weight, std=_INIT_STD, a=-_INIT_STD, b=_INIT_STD)
