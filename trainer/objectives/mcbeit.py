"""Soft targets: predict the several likely ids of a masked patch, and those of patches like it.

mc-BEiT (arXiv:2203.15371). The cache holds the k nearest ids of every patch and their probabilities
p, which are taken to add up to 1: what the other K - k ids would hold is left out. The target of
patch i mixes its own with those of all patches j that the student itself finds similar,

    q_i = w sum_j W_ij p_j + (1 - w) p_i,    W_i = softmax_j(cosine(z_i, z_j) / temperature),

where z are the rows of all patches that the head reads, of the encoder or with `drop` of the
decoder. As in the released code, gradients flow through W unless `detach_similarity`.

Targets of K values are never made. Every p_j adds up to 1 and so does every row of
A = w W + (1 - w) I, hence with logits l

    - sum_v q_iv log softmax(l_i)_v = logsumexp(l_i) - sum_j A_ij sum_v p_jv l_i[id_jv],

which takes the N k logits of a patch that any patch names. Against the paper: ids and probabilities
come from distances to centroids and were cut off at k (`patchcache build --soft-top-k`).
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.draws import SampleGenerator
from trainer.objectives.hiding import (
    Hiding,
    HidingConfig,
    Masks,
    MaskSampler,
    make_head,
    take,
    token_loss,
)
from trainer.objectives.interface import (
    Parts,
    Preview,
    Targets,
    require_one_stage,
    require_payload,
)


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `mcbeit`."""

    method: Literal["mcbeit"] = "mcbeit"
    mask_ratio: float = Field(
        0.75, gt=0, lt=1, description="share of patches masked; mc-BEiT masks 147 of 196"
    )
    mask_kind: Literal["block", "random"] = "random"
    similarity_weight: float = Field(
        0.2,
        ge=0,
        le=1,
        description="w, share of a target that comes from similar patches; mc-BEiT: 0.2",
    )
    similarity_temperature: float = Field(1.0, gt=0, description="divides the cosines; mc-BEiT: 1")
    detach_similarity: bool = Field(
        False, description="no gradient through W; mc-BEiT's code lets it flow"
    )

    @model_validator(mode="after")
    def _check_similarity(self) -> Self:
        if self.similarity_weight == 0:
            for key in ("similarity_temperature", "detach_similarity"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} does nothing with similarity_weight = 0")
        return self


def build(config: Config, parts: Parts) -> "SoftTokens":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache.
    """
    require_one_stage(parts.manifest, config.method)
    require_payload(parts.manifest, "soft", config.method, "--soft-top-k 8")
    return SoftTokens(config, parts)


class SoftTokens(nn.Module):
    """Cross-entropy of the soft targets of masked patches.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The mask token and, with `drop`, the decoder.
        head: Linear, to K logits per masked patch.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add mask token, head and, with `drop`, a decoder to a ViT."""
        super().__init__()
        self.payloads = ("soft",)
        self.image_size = parts.vit.patch_embed.img_size[0]
        self.vit = parts.vit
        self.normalise = parts.normalise
        self.masks = MaskSampler(parts.manifest.grid, config)
        self.hiding = Hiding(parts.vit, parts.vit.patch_embed.num_patches, config)
        self.head = make_head(self.hiding.width, parts.manifest.vocab_size)
        self._weight = config.similarity_weight
        self._temperature = config.similarity_temperature
        self._is_detached = config.detach_similarity

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw masks and predict the soft targets of what they hide.

        Returns:
            `loss`, mean soft cross-entropy over the masked patches; `cross_entropy` and `accuracy`
            of their token ids.
        """
        assert targets.soft_ids is not None
        assert targets.soft_probs is not None
        masks = self.masks.draw(generator)
        rows, logits = self.rows_and_logits(images, masks)
        # Sums over thousands of logits lose too much in bfloat16.
        with torch.autocast(images.device.type, enabled=False):
            logits = logits.float()
            similarity = None
            if self._weight:
                read = rows.detach() if self._is_detached else rows
                similarity = similarities(read.float(), masks.masked_at, self._temperature)
            losses = soft_cross_entropy(
                logits,
                targets.soft_ids,
                targets.soft_probs,
                masks.masked_at,
                similarity,
                self._weight,
            )
            wanted = targets.token_ids.gather(1, masks.masked_at)
            entropy, accuracy = token_loss(logits.detach(), wanted)
        return {"loss": losses.mean(), "cross_entropy": entropy, "accuracy": accuracy}

    def rows_and_logits(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Return the rows of all patches, (B, N, width), and the masked ones' logits, (B, m, K)."""
        patches = self.vit.patch_embed(self.normalise(images))
        rows = self.hiding(self.vit, patches, masks)
        return rows, self.head(take(rows, masks.masked_at))

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples."""
        masks = self.masks.draw(generator)
        _, logits = self.rows_and_logits(images, masks)
        token_ids = targets.token_ids.scatter(1, masks.masked_at, logits.argmax(-1))
        return Preview(images, masks.hidden, masks.hidden, token_ids)


def similarities(
    rows: Tensor,  # (B, N, D)
    masked_at: Tensor,  # (B, m)
    temperature: float,
) -> Tensor:
    """Return W of the masked patches to all patches, (B, m, N); every row adds up to 1."""
    units = normalize(rows, dim=-1)
    cosines = take(units, masked_at) @ units.mT
    return (cosines / temperature).softmax(-1)


def soft_cross_entropy(
    logits: Tensor,  # (B, m, K)
    soft_ids: Tensor,  # (B, N, k) int64
    soft_probs: Tensor,  # (B, N, k)
    masked_at: Tensor,  # (B, m)
    similarity: Tensor | None,  # (B, m, N), W; None: its weight is 0
    weight: float,
) -> Tensor:
    """Return the cross-entropy of every masked patch's target, (B, m).

    The module says how it comes to do without targets of K values.
    """
    probs = soft_probs / soft_probs.sum(-1, keepdim=True)
    own = logits.gather(2, take(soft_ids, masked_at))
    expected = (1 - weight) * (own * take(probs, masked_at)).sum(-1)
    if similarity is not None:
        batch, num_masked, num_patches = similarity.shape
        named = soft_ids.reshape(batch, 1, -1).expand(-1, num_masked, -1)
        of_all = logits.gather(2, named).reshape(batch, num_masked, num_patches, -1)
        expected = expected + weight * torch.einsum("bmn,bnk,bmnk->bm", similarity, probs, of_all)
    return logits.logsumexp(-1) - expected
