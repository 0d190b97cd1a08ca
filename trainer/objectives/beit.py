"""Masked token prediction: hide some patches, predict their token ids, nothing else.

BEiT (arXiv:2106.08254), with its mask tokens in the encoder or, as MAE does, with masked patches
dropped (`hiding`). Against BEiT's code: absolute positions as in timm's ViT, not relative ones;
query, key and value all have biases.

With `aggregation_blocks` BEiT v2's patch aggregation (arXiv:2208.06366): extra blocks see the class
token of the last block and the patch tokens of an early one, and what they return is predicted from
as well, through the same norm and head; the two losses are added. With `drop` the extra blocks see
the class token and the early tokens of the visible patches. Their output goes the way of the
encoder's: norm, then the same decoder, which adds the mask tokens, then the head.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from trainer.draws import SampleGenerator
from trainer.objectives.hiding import (
    ClassTokenHead,
    Hiding,
    HidingConfig,
    Masks,
    MaskSampler,
    encode,
    encode_with_early,
    make_head,
    take,
    token_loss,
)
from trainer.objectives.interface import Parts, Preview, Targets, require_one_stage


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `beit`."""

    method: Literal["beit"] = "beit"
    aggregation_blocks: int | None = Field(
        None,
        gt=0,
        description="blocks over the last class token and early patch tokens that predict a second "
        "time; BEiT v2 has 2; none: one prediction, as BEiT",
    )
    aggregation_layer: int | None = Field(
        None,
        gt=0,
        description="block, from 1, whose patch tokens those see; BEiT v2: 9 of 12, 21 of 24",
    )

    @model_validator(mode="after")
    def _check_aggregation(self) -> Self:
        if (self.aggregation_blocks is None) != (self.aggregation_layer is None):
            raise ValueError("aggregation_blocks and aggregation_layer go together; set both")
        return self


def build(config: Config, parts: Parts) -> "MaskedTokens":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache or the ViT.
    """
    require_one_stage(parts.manifest, config.method)
    return MaskedTokens(config, parts)


class MaskedTokens(nn.Module):
    """Cross-entropy of the token ids of masked patches.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The mask token and, with `drop`, the decoder.
        head: Linear, to K logits per masked patch.
        aggregation: The blocks of the second prediction, if there is one.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add mask token, head and what the settings ask for to a ViT."""
        super().__init__()
        self.payloads = ()
        self.image_size = parts.vit.patch_embed.img_size[0]
        self.vit = parts.vit
        self.normalise = parts.normalise
        self.masks = MaskSampler(parts.manifest.grid, config)
        self.hiding = Hiding(parts.vit, parts.vit.patch_embed.num_patches, config)
        self.head = make_head(self.hiding.width, parts.manifest.vocab_size)
        self.aggregation: ClassTokenHead | None = None
        if config.aggregation_blocks and config.aggregation_layer:
            self._layer = config.aggregation_layer
            self.aggregation = ClassTokenHead(parts.vit, config.aggregation_blocks, self._layer)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw masks and predict what they hide.

        Returns:
            `loss`, mean cross-entropy over the masked patches, and `accuracy`, the share of them
            whose likeliest id is the right one. With aggregation `loss` is the sum of both
            predictions', `cross_entropy` and `accuracy` are those of the encoder's own, and
            `aggregation_cross_entropy` is the other's.
        """
        masks = self.masks.draw(generator)
        wanted = targets.token_ids.gather(1, masks.masked_at)
        logits, *aggregated = self.predictions(images, masks)
        loss, accuracy = token_loss(logits, wanted)
        metrics = {"cross_entropy": loss.detach(), "accuracy": accuracy}
        for other in aggregated:
            other_loss, _ = token_loss(other, wanted)
            metrics["aggregation_cross_entropy"] = other_loss.detach()
            loss = loss + other_loss
        return {"loss": loss, **metrics}

    def predictions(self, images: Tensor, masks: Masks) -> list[Tensor]:
        """Return the logits of the masked patches, (B, m, K), once or with aggregation twice."""
        vit = self.vit
        patches = vit.patch_embed(self.normalise(images))
        tokens = self.hiding.tokens(vit, patches, masks)
        if self.aggregation is None:
            outputs = [encode(vit, tokens)]
        else:
            last, early = encode_with_early(vit, tokens, self._layer)
            outputs = [vit.norm(last), vit.norm(self.aggregation(last, early))]
        rows = [self.hiding.rows(vit, output, masks) for output in outputs]
        return [self.head(take(each, masks.masked_at)) for each in rows]

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """Return the encoder's own logits of the masked patches, (B, m, K)."""
        return self.predictions(images, masks)[0]

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples."""
        masks = self.masks.draw(generator)
        predicted = self.predict(images, masks).argmax(-1)
        token_ids = targets.token_ids.scatter(1, masks.masked_at, predicted)
        return Preview(images, masks.hidden, masks.hidden, token_ids)
