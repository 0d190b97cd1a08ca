"""Beyond Masking: restore what a picture was before it was zoomed, distorted, blurred or greyed.

Beyond Masking (arXiv:2203.14313) predicts pixels. Here the token ids of the clean picture are the
targets, and its pixels are an option. Patches may be masked too: `zoomed_in` with 75 % masked is
the paper's best. `zoomed_in` wants a cache whose views are the wide pictures, as any view is: the
encoder sees the middle 7/9 of it.

Against its code: degradations are drawn per sample; learned positions, a class token, three
channels when colours are taken away. With masks, every task counts masked patches alone unless
`predict_all` is set, where the code counts all of distorted pictures.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cache_builder.errors import ConfigError
from trainer.degrading import ZOOM_IN, Degradation, Degraded, Degrader
from trainer.draws import SampleGenerator
from trainer.objectives.beyond_pixels import pixel_loss
from trainer.objectives.hiding import Hiding, HidingConfig, Masks, MaskSampler, make_head
from trainer.objectives.interface import Parts, Preview, Targets, require_one_stage

_RING_WEIGHT = 0.2


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `beyond`."""

    method: Literal["beyond"] = "beyond"
    degradation: Degradation = Field("zoomed_in", description="what is done to the picture")
    targets: Literal["tokens", "pixels"] = Field(
        "tokens",
        description="token ids of the clean picture, or its pixels as in the paper's code",
    )
    mask_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of patches masked as well; 0: none; the paper's best: 0.75, zoomed_in",
    )
    mask_kind: Literal["block", "random"] = "random"
    masked_tokens: Literal["keep", "drop"] = Field(
        "drop",
        description="drop: a decoder predicts, and the encoder sees visible patches only (the "
        "paper's code); keep: no decoder, mask tokens in the encoder",
    )
    predict_all: bool = Field(
        False, description="with masks, visible patches count as well as masked ones"
    )
    zoom: float | None = Field(
        None,
        gt=1,
        description="of zoomed_in, side of the whole picture over the part that is shown; "
        "none: 9/7 as in the paper's code",
    )
    ring_weight: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of zoomed_in, share of the loss of patches that are not shown; none: 0.2 as "
        "in the paper's code",
    )

    @model_validator(mode="after")
    def _check_degradation(self) -> Self:
        if self.degradation != "zoomed_in":
            for key in ("zoom", "ring_weight"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} belongs to degradation = 'zoomed_in'; {self.degradation!r} has none"
                    )
        if self.mask_ratio == 0 and (self.predict_all or self.mask_kind == "block"):
            raise ValueError(
                "predict_all and mask_kind = 'block' say something about masks; "
                "with mask_ratio = 0 there are none and all patches are predicted"
            )
        return self


def build(config: Config, parts: Parts) -> "BeyondMasking":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache.
    """
    if config.targets == "tokens":
        require_one_stage(parts.manifest, config.method)
    return BeyondMasking(config, parts)


class BeyondMasking(nn.Module):
    """Predicts token ids, or pixels, of clean pictures from degraded ones.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The decoder and, with masks, the mask token.
        head: Linear, to K logits or 3 p p pixels per patch.
        degrader: Makes the encoder's input of clean pictures of side `image_size`.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add head and, with `drop`, a decoder to a ViT."""
        super().__init__()
        size = parts.vit.patch_embed.img_size[0]
        num_cells = parts.manifest.grid[0]
        self.payloads = ()
        self.degrader = Degrader(config.degradation, size, num_cells, config.zoom or ZOOM_IN)
        self.image_size = self.degrader.clean_size
        self.config = config
        self.vit = parts.vit
        self.normalise = parts.normalise
        self.masks = MaskSampler(parts.manifest.grid, config)
        self.hiding = Hiding(parts.vit, parts.vit.patch_embed.num_patches, config)
        self._ring_weight = config.ring_weight or _RING_WEIGHT
        if config.targets == "tokens":
            self._require_ring()
            num_outputs = parts.manifest.vocab_size
        else:
            patch_size = size // num_cells
            if config.degradation == "zoomed_in" and self.image_size == size:
                raise ConfigError(
                    f"With objective.zoom {config.zoom or ZOOM_IN:.4g}, no pixel around the {size} "
                    f"x {size} that are shown is left to predict. Raise objective.zoom."
                )
            if patch_size < 2:
                raise ConfigError(
                    "Pixel targets are standardised within a patch, and patches of this cache are "
                    "single pixels. Set objective.targets=tokens."
                )
            num_outputs = 3 * patch_size**2
        self.head = make_head(self.hiding.width, num_outputs)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Degrade and mask, and predict what was there.

        Returns:
            `loss`; of token ids also `cross_entropy` and `accuracy`, means over the patches that
            count, those that are not shown among them.
        """
        degraded, masks = self._draw(images, generator)
        rows = self.predict(degraded.images, masks)
        # Rounded to bfloat16, the logits of a large vocabulary lose the loss's last digits.
        with torch.autocast(images.device.type, enabled=False):
            if self.config.targets == "tokens":
                return self._token_loss(rows.float(), targets.token_ids, degraded, masks)
            return {"loss": self._pixel_loss(rows.float(), targets.clean, degraded, masks)}

    def predict(self, degraded: Tensor, masks: Masks) -> Tensor:
        """Return logits or pixels of every cell of the clean picture's grid, (B, N, n)."""
        return self.head(self.hiding(self.vit, self.vit.patch_embed(degraded), masks))

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples.

        Ids are those of the clean picture's grid. Predicted pixels have no ids.
        """
        degraded, masks = self._draw(images, generator)
        shown = degraded.images * self.normalise.std + self.normalise.mean
        is_predicted = torch.full_like(masks.hidden, self.config.targets == "tokens")
        token_ids = torch.zeros_like(degraded.seen_at)
        if self.config.targets == "tokens":
            token_ids = self.predict(degraded.images, masks).argmax(-1)
        return Preview(shown.clamp(0, 1), masks.hidden, is_predicted, token_ids)

    def weights(self, degraded: Degraded, masks: Masks) -> Tensor:
        """Return what each cell's token id counts, (B, N), every sample adding up to 1."""
        is_shown = degraded.seen_at >= 0
        counted = self._counted(masks).gather(1, degraded.seen_at.clamp(min=0)) & is_shown
        # By chance, on a small grid, no masked patch shows a cell's centre.
        counted = torch.where(counted.any(1, keepdim=True), counted, is_shown)
        weights = _shares(counted)
        if self.degrader.kind != "zoomed_in":
            return weights
        return (1 - self._ring_weight) * weights + self._ring_weight * _shares(~is_shown)

    def _draw(self, images: Tensor, generator: SampleGenerator) -> tuple[Degraded, Masks]:
        degraded = self.degrader(self.normalise(images), generator)
        return degraded, self.masks.draw(generator)

    def _counted(self, masks: Masks) -> Tensor:
        """Return which patches of the encoder's input count, bool (B, N)."""
        if self.config.mask_ratio == 0 or self.config.predict_all:
            return torch.ones_like(masks.hidden)
        return masks.hidden

    def _token_loss(
        self, logits: Tensor, token_ids: Tensor, degraded: Degraded, masks: Masks
    ) -> dict[str, Tensor]:
        weights = self.weights(degraded, masks)
        nats = cross_entropy(logits.flatten(0, 1), token_ids.flatten(), reduction="none")
        nats = nats.view_as(token_ids)
        is_right = logits.detach().argmax(-1) == token_ids
        evenly = _shares(weights > 0)
        return {
            "loss": (nats * weights).sum(1).mean(),
            "cross_entropy": (nats.detach() * evenly).sum(1).mean(),
            "accuracy": (is_right * evenly).sum(1).mean(),
        }

    def _pixel_loss(
        self, predicted: Tensor, clean: Tensor, degraded: Degraded, masks: Masks
    ) -> Tensor:
        counted = self._counted(masks)
        return pixel_loss(
            predicted, clean, counted, degraded, self.degrader, self._ring_weight
        ).mean()

    def _require_ring(self) -> None:
        at_centre = torch.tensor([[(self.vit.patch_embed.img_size[0] - self.image_size) // 2] * 2])
        is_shown = self.degrader.seen_at(at_centre) >= 0
        if self.degrader.kind == "zoomed_in" and (is_shown.all() or not is_shown.any()):
            raise ConfigError(
                f"With objective.zoom {self.config.zoom or ZOOM_IN:.3g}, {int(is_shown.sum())} of "
                f"the {is_shown.numel()} patches of the cache are shown; some must be and some "
                "must not. Change objective.zoom."
            )


def _shares(counted: Tensor) -> Tensor:
    """Return weights of the patches (B, N) that count, equal and adding up to 1."""
    return counted / counted.sum(1, keepdim=True)
