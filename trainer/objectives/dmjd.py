"""Two masked views of every picture in one step, which together hide as much of it as they can.

DMJD (arXiv:2301.00230), in token form. The second view masks patches that the first one shows; if
there are fewer of those than it must mask, all of them and some of the others. Both views have the
same pixels and the same cached targets and go through the network in one batch of 2 B. Of each, the
head predicts the ids of masked patches and, from the encoder's own output, a small network those of
visible ones. With block masks whole squares of 2 x 2 patches are masked together, drawn like single
ones.

Against DMJD: token ids instead of HOG features, so cross-entropy in both branches instead of L2 and
smooth L1.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cache_builder.errors import ConfigError
from trainer.draws import SampleGenerator
from trainer.objectives.hiding import (
    Hiding,
    HidingConfig,
    Masks,
    encode,
    init_linears,
    make_head,
    take,
    token_loss,
)
from trainer.objectives.interface import Parts, Preview, Targets, require_one_stage

_BLOCK_SIDE = 2  # patches


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `dmjd`."""

    method: Literal["dmjd"] = "dmjd"
    mask_ratio: float = Field(
        0.6,
        gt=0,
        lt=1,
        description="share of patches masked in each view; from a half on, the two views together "
        "mask every patch; DMJD: 0.6",
    )
    mask_kind: Literal["block", "random"] = Field(
        "block", description="block: squares of 2 x 2 patches; random: single patches"
    )
    visible_weight: float = Field(
        1.0, ge=0, description="of the visible patches' loss; DMJD: 1; 0: without that branch"
    )


def build(config: Config, parts: Parts) -> "DisjointMasks":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache.
    """
    require_one_stage(parts.manifest, config.method)
    return DisjointMasks(config, parts)


class DisjointSampler:
    """Draws two masks per sample that overlap as little as their size allows."""

    def __init__(self, grid: tuple[int, int], config: Config) -> None:
        """Take the grid of the cache.

        Raises:
            ConfigError: Every patch would be masked, or squares do not fill the grid.
        """
        rows, cols = grid
        self._side = _BLOCK_SIDE if config.mask_kind == "block" else 1
        if rows % self._side or cols % self._side:
            raise ConfigError(
                f"Squares of 2 x 2 patches do not fill a grid of {rows} x {cols}. "
                "Set objective.mask_kind to 'random', or use a cache with an even grid."
            )
        self._cells = rows // self._side, cols // self._side
        self._num_cells = self._cells[0] * self._cells[1]
        # Rounded up, as in DMJD's code: 30 of 49 squares at 0.6. 0.55 of 20 are 11.
        self._num_masked_cells = math.ceil(round(config.mask_ratio * self._num_cells, 6))
        self.num_masked = self._num_masked_cells * self._side**2
        if self._num_masked_cells == self._num_cells:
            raise ConfigError(
                f"objective.mask_ratio {config.mask_ratio:g} masks {self.num_masked} of the "
                f"{rows * cols} patches of the cache; at least one must be visible. Lower it."
            )

    def draw(self, generator: SampleGenerator) -> tuple[Masks, Masks]:
        """Return the masks of both views, on the generator's device."""
        # Of one random order, the first cells and the last ones: those that the first view shows
        # come last, and they are topped up, if need be, with cells that it masks.
        order = generator.permutations(self._num_cells)
        first = order < self._num_masked_cells
        second = order >= self._num_cells - self._num_masked_cells
        return self._masks(first), self._masks(second)

    def _masks(self, cells: Tensor) -> Masks:
        patches = cells.reshape(-1, *self._cells)
        patches = patches.repeat_interleave(self._side, 1).repeat_interleave(self._side, 2)
        return Masks.of(patches.flatten(1), self.num_masked)


class DisjointMasks(nn.Module):
    """Cross-entropy of the token ids of masked and of visible patches, in two views.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The mask token and, with `drop`, the decoder.
        head: Linear, to K logits per masked patch.
        visible_head: To K logits per visible patch; None with `visible_weight` 0.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add mask token, heads and, with `drop`, a decoder to a ViT."""
        super().__init__()
        self.payloads = ()
        self.image_size = parts.vit.patch_embed.img_size[0]
        self.vit = parts.vit
        self.normalise = parts.normalise
        self.masks = DisjointSampler(parts.manifest.grid, config)
        self.hiding = Hiding(parts.vit, parts.vit.patch_embed.num_patches, config)
        vocab_size, dim = parts.manifest.vocab_size, parts.vit.embed_dim
        self.head = make_head(self.hiding.width, vocab_size)
        self.visible_head: nn.Sequential | None = None
        self._visible_weight = config.visible_weight
        if config.visible_weight:
            self.visible_head = _make_visible_head(dim, self.hiding.width, vocab_size)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw two masks per sample and predict what they hide and what they show.

        Returns:
            `loss`, the weighted sum of both branches; `cross_entropy` and `accuracy` of the masked
            patches of both views; `visible_cross_entropy` of the visible ones.
        """
        masks = both(*self.masks.draw(generator))
        token_ids = targets.token_ids.repeat(2, 1)
        masked, visible = self.predict(images, masks)
        loss, accuracy = token_loss(masked, token_ids.gather(1, masks.masked_at))
        metrics = {"cross_entropy": loss.detach(), "accuracy": accuracy}
        if visible is not None:
            visible_loss, _ = token_loss(visible, token_ids.gather(1, masks.visible_at))
            metrics["visible_cross_entropy"] = visible_loss.detach()
            loss = loss + self._visible_weight * visible_loss
        return {"loss": loss, **metrics}

    def predict(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the masked and of the visible patches.

        Args:
            images: (B, 3, S, S).
            masks: Of 2 B samples: the first views of all pictures, then the second ones.

        Returns:
            (2 B, m, K), and (2 B, N - m, K) or None.
        """
        vit = self.vit
        # The patch embedding is the same for both views, so it is computed once.
        patches = vit.patch_embed(self.normalise(images)).repeat(2, 1, 1)
        encoded = encode(vit, self.hiding.tokens(vit, patches, masks))
        masked = self.head(take(self.hiding.rows(vit, encoded, masks), masks.masked_at))
        if self.visible_head is None:
            return masked, None
        return masked, self.visible_head(self.hiding.visible_rows(vit, encoded, masks))

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples in their first view."""
        first, second = self.masks.draw(generator)
        logits, _ = self.predict(images, both(first, second))
        predicted = logits[: len(images)].argmax(-1)
        token_ids = targets.token_ids.scatter(1, first.masked_at, predicted)
        return Preview(images, first.hidden, first.hidden, token_ids)


def _make_visible_head(input_dim: int, width: int, vocab_size: int) -> nn.Sequential:
    """Return DMJD's three layers, as wide as the decoder, and a linear one to the logits."""
    head = nn.Sequential(
        nn.Linear(input_dim, width),
        nn.LayerNorm(width, eps=1e-6),
        nn.GELU(),
        nn.Linear(width, width),
        nn.LayerNorm(width, eps=1e-6),
        nn.GELU(),
        nn.Linear(width, width),
        nn.LayerNorm(width, eps=1e-6, elementwise_affine=False),
        nn.Linear(width, vocab_size),
    )
    init_linears(head)
    return head


def both(first: Masks, second: Masks) -> Masks:
    """Return the masks of two views as one batch, the first views first."""
    return Masks(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
