"""Masked token prediction: hide some patches, predict their token ids, nothing else.

BEiT (arXiv:2106.08254), with its mask tokens in the encoder or, as MAE does, with masked patches
dropped (`hiding`). Against BEiT's code: absolute positions as in timm's ViT, not relative ones;
query, key and value all have biases.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.draws import SampleGenerator
from trainer.objectives.hiding import Hiding, HidingConfig, Masks, MaskSampler, make_head
from trainer.objectives.interface import Parts, Preview, Targets, require_one_stage


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `beit`."""

    method: Literal["beit"] = "beit"


def build(config: Config, parts: Parts) -> "MaskedTokens":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache.
    """
    require_one_stage(parts.manifest, config.method)
    return MaskedTokens(config, parts)


class MaskedTokens(nn.Module):
    """Cross-entropy of the token ids of masked patches.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The mask token and, with `drop`, the decoder.
        head: Linear, to K logits per masked patch.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add mask token, head and, with `drop`, a decoder to a ViT."""
        super().__init__()
        self.payloads = ()
        self.image_size = parts.vit.patch_embed.img_size[0]
        self.vit = parts.vit
        self.normalise = parts.normalise
        self.masks = MaskSampler(parts.manifest.grid, config)
        self.hiding = Hiding(parts.vit, parts.vit.patch_embed.num_patches, config)
        self.head = make_head(self.hiding.width, parts.manifest.vocab_size)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw masks and predict what they hide.

        Returns:
            `loss`, mean cross-entropy over the masked patches, and `accuracy`, the share of them
            whose likeliest id is the right one.
        """
        masks = self.masks.draw(generator)
        logits = self.predict(images, masks)
        wanted = targets.token_ids.gather(1, masks.masked_at)
        # Rounded to bfloat16, the logits of a large vocabulary lose the loss's last digits.
        loss = cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
        accuracy = (logits.detach().argmax(-1) == wanted).float().mean()
        return {"loss": loss, "cross_entropy": loss.detach(), "accuracy": accuracy}

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """Return the logits of the masked patches, (B, m, K)."""
        patches = self.vit.patch_embed(self.normalise(images))
        return self.head(self.hiding.masked_rows(self.vit, patches, masks))

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples."""
        masks = self.masks.draw(generator)
        predicted = self.predict(images, masks).argmax(-1)
        token_ids = targets.token_ids.scatter(1, masks.masked_at, predicted)
        return Preview(images, masks.hidden, masks.hidden, token_ids)
