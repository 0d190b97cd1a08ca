"""Permuted and masked prediction: hidden patches are predicted one after another, in random order.

MaPeT (arXiv:2306.07346). Of every picture some patches are visible at once, the context; the others
follow in a random order, and each is predicted from the context and the patches before it, whose
contents it sees, and from the positions of all patches that it does not see. Two streams with the
same weights do that in one pass: the *content* of a patch, which may know itself, and the *query*
of a patch that is predicted, which may not. A *positional* token stands for every patch whose
content cannot be seen. `visibility` is the whole rule.

Attention does not care about the order of its tokens. So the tokens of a picture are sorted by the
order of prediction, and one mask, made once, serves every picture of the run on the unmodified
blocks of timm. MaPeT's code makes masks for every picture and blocks of its own; the logits are the
same. The content stream is the ViT itself.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cache_builder.errors import ConfigError
from trainer.draws import SampleGenerator
from trainer.objectives.hiding import (
    Decoder,
    HidingConfig,
    Masks,
    MaskSampler,
    encode,
    init_linears,
    init_weight,
    make_head,
    take,
    visible_tokens,
)
from trainer.objectives.interface import Parts, Preview, Targets, require_one_stage


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `mapet`."""

    method: Literal["mapet"] = "mapet"
    mask_ratio: float = Field(
        0.75,
        gt=0,
        lt=1,
        description="share of patches outside of the context; MaPeT: 147 of 196, its `least` of 50 "
        "counts the class token",
    )
    mask_kind: Literal["block", "random"] = Field(
        "random", description="which patches those are; their order is random either way"
    )
    predict_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of patches predicted, the first ones of the order; the contents of the "
        "others are never seen. None: all that are masked, as in MaPeT. 0.38 costs two thirds",
    )
    masked_tokens: Literal["keep", "drop"] = Field(
        "keep",
        description="keep: both streams run through the encoder (MaPeT); drop, ours: the encoder "
        "sees the context only, and a decoder runs both streams over its output",
    )

    @model_validator(mode="after")
    def _check_predicted(self) -> Self:
        if self.predict_ratio is not None and self.predict_ratio >= self.mask_ratio:
            raise ValueError(
                f"predict_ratio {self.predict_ratio:g} is not below mask_ratio "
                f"{self.mask_ratio:g}; leave it out to predict every masked patch"
            )
        return self


def build(config: Config, parts: Parts) -> "PermutedTokens":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache.
    """
    require_one_stage(parts.manifest, config.method)
    return PermutedTokens(config, parts)


def visibility(
    ranks: Tensor,  # (B, N)
    least: int,
) -> tuple[Tensor, Tensor]:
    """Say which token sees which, from the order in which positions are visited.

    MaPeT (arXiv:2306.07346), as its code has it. A row has a threshold t. It sees the content of
    position j if rank(j) < t, and j's positional token if rank(j) >= t; so it sees every position
    exactly once. The threshold of the query of i is rank(i), of the content of i
    max(rank(i) + 1, least), of a positional token `least`.

    Args:
        ranks: A permutation of 0 .. N - 1 in every row; prefix tokens, as the class token, come
            first.
        least: Size of the context, prefix tokens included: positions of rank below it see each
            other and are not predicted.

    Returns:
        bool (B, P, N + P) of the queries and bool (B, N + P, N + P) of contents and positional
        tokens, P = N - least. Columns are N contents, then P positional tokens; predicted
        positions are in raster order.

    Raises:
        ValueError: `ranks` is no matrix, or `least` is not in 1 .. N.
    """
    if ranks.ndim != 2:
        raise ValueError(f"ranks must be (B, N), not {tuple(ranks.shape)}")
    num_positions = ranks.shape[1]
    if not 1 <= least <= num_positions:
        raise ValueError(f"least must lie in 1 .. {num_positions}, not {least}")
    # A stable sort puts the predicted positions first and leaves them in raster order.
    order = (ranks < least).byte().argsort(dim=1, stable=True)
    predicted = ranks.gather(1, order[:, : num_positions - least])

    def rows(thresholds: Tensor) -> Tensor:
        limit = thresholds[:, :, None]
        return torch.cat([ranks[:, None] < limit, predicted[:, None] >= limit], dim=2)

    contents = (ranks + 1).clamp(min=least)
    return rows(predicted), rows(torch.cat([contents, torch.full_like(predicted, least)], dim=1))


class PermutedTokens(nn.Module):
    """Cross-entropy of the token ids of patches that are predicted in a random order.

    Attributes:
        vit: The encoder, as timm made it.
        positional_token: (1, 1, width) starts positional tokens and queries, with a position.
        decoder: With `drop`, what runs the streams in the encoder's place.
        sees: bool (S, S), which token of the sorted sequence sees which.
        head: Linear, to K logits per predicted patch.
    """

    sees: Tensor

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add positional token, head and, with `drop`, a decoder to a ViT.

        Raises:
            ConfigError: No patch would be predicted.
        """
        super().__init__()
        vit, num_patches = parts.vit, parts.vit.patch_embed.num_patches
        self.payloads = ()
        self.image_size = vit.patch_embed.img_size[0]
        self.vit = vit
        self.normalise = parts.normalise
        self.masks = MaskSampler(parts.manifest.grid, config)
        num_masked = self.masks.num_masked
        self.num_predicted = num_masked
        if config.predict_ratio is not None:
            self.num_predicted = round(config.predict_ratio * num_patches)
            if not self.num_predicted:
                raise ConfigError(
                    f"objective.predict_ratio {config.predict_ratio:g} predicts none of the "
                    f"{num_patches} patches of the cache. Raise it, or leave it out."
                )
        self.decoder: TwoStreamDecoder | None = None
        width = vit.embed_dim
        if config.masked_tokens == "drop":
            width = config.decoder_dim or width
            depth = config.decoder_depth or 1
            self.decoder = TwoStreamDecoder(vit.embed_dim, width, depth, num_patches)
        self.positional_token = nn.Parameter(torch.zeros(1, 1, width))
        init_weight(self.positional_token)
        num_context = vit.num_prefix_tokens + num_patches - num_masked
        sees = _sorted_visibility(num_context, num_masked, self.num_predicted)
        self.register_buffer("sees", sees, persistent=False)
        self.head = make_head(width, parts.manifest.vocab_size)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw contexts and orders and predict along them.

        Returns:
            `loss`, mean cross-entropy over the predicted patches, and `accuracy`, the share of them
            whose likeliest id is the right one.
        """
        order = self.draw_order(generator)
        logits = self.predict(images, order)
        wanted = targets.token_ids.gather(1, self.predicted_at(order))
        loss = cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
        accuracy = (logits.detach().argmax(-1) == wanted).float().mean()
        return {"loss": loss, "cross_entropy": loss.detach(), "accuracy": accuracy}

    def draw_order(self, generator: SampleGenerator) -> Masks:
        """Return masks whose `masked_at` is in the order of prediction."""
        masks = self.masks.draw(generator)
        order = generator.permutations(self.masks.num_masked)
        return masks._replace(masked_at=masks.masked_at.gather(1, order))

    def predicted_at(self, order: Masks) -> Tensor:
        """Return where the predicted patches are, (B, P), in the order of prediction."""
        return order.masked_at[:, : self.num_predicted]

    def predict(self, images: Tensor, order: Masks) -> Tensor:
        """Return the logits of the predicted patches, (B, P, K), in the order of prediction."""
        patches = self.vit.patch_embed(self.normalise(images))
        if self.decoder is not None:
            encoded = encode(self.vit, visible_tokens(self.vit, patches, order))
            shown = take(patches, self.predicted_at(order))
            rows = self.decoder(encoded, shown, self.positional_token, order, self.sees)
        else:
            rows = self._encode_streams(patches, order)
        return self.head(rows)

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees and predicts of these samples; hidden is all but context."""
        order = self.draw_order(generator)
        at = self.predicted_at(order)
        token_ids = targets.token_ids.scatter(1, at, self.predict(images, order).argmax(-1))
        predicted = torch.zeros_like(order.hidden).scatter(1, at, True)
        return Preview(images, order.hidden, predicted, token_ids)

    def _encode_streams(self, patches: Tensor, order: Masks) -> Tensor:
        """Run both streams through the encoder and return the rows of the queries, (B, P, D)."""
        vit, num_prefix = self.vit, self.vit.num_prefix_tokens
        tokens = vit._pos_embed(patches)
        content_at = torch.cat([order.visible_at, self.predicted_at(order)], dim=1)
        content = [tokens[:, :num_prefix], take(tokens[:, num_prefix:], content_at)]
        positions = patch_positions(vit).expand(len(patches), -1, -1)
        placeholders = self.positional_token + take(positions, order.masked_at)
        queries = placeholders[:, : self.num_predicted]
        sequence = torch.cat([*content, placeholders, queries], dim=1)
        rows = run_blocks(vit.blocks, vit.norm_pre(sequence), self.sees)
        return vit.norm(rows[:, -self.num_predicted :])


class TwoStreamDecoder(nn.Module):
    """Runs both streams behind an encoder that has seen the context alone. Ours, not MaPeT's.

    As MAE (arXiv:2111.06377) does for masked prediction: the encoder's cost falls to that of the
    context. The decoder's tokens are the encoded context, the patch embeddings of the predicted
    patches, positional tokens and queries; they see each other by the same rule. The content of a
    predicted patch enters here and nowhere else, so nothing that is to be predicted leaks.
    """

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_patches: int) -> None:
        """Make blocks of width `dim`, with a position embedding of their own."""
        super().__init__()
        self.decoder = Decoder(encoder_dim, dim, depth, num_patches)
        self.embed_patches = nn.Linear(encoder_dim, dim)
        init_linears(self.embed_patches)

    def forward(
        self,
        encoded: Tensor,  # (B, prefix + N - m, encoder_dim)
        shown: Tensor,  # (B, P, encoder_dim)
        positional_token: Tensor,  # (1, 1, dim)
        order: Masks,
        sees: Tensor,  # (S, S) bool
    ) -> Tensor:
        """Return the rows of the queries in the order of prediction, (B, P, dim)."""
        num_predicted = shown.shape[1]
        num_prefix = encoded.shape[1] - order.visible_at.shape[1]
        positions = self.decoder.pos_embed.expand(len(encoded), -1, -1)
        context = self.decoder.embed(encoded)
        prefix, visible = context[:, :num_prefix], context[:, num_prefix:]
        placeholders = positional_token + take(positions, order.masked_at)
        queries = placeholders[:, :num_predicted]
        sequence = [
            prefix,
            visible + take(positions, order.visible_at),
            self.embed_patches(shown) + take(positions, order.masked_at[:, :num_predicted]),
            placeholders,
            queries,
        ]
        rows = run_blocks(self.decoder.blocks, torch.cat(sequence, dim=1), sees)
        return self.decoder.norm(rows[:, -num_predicted:])


def _sorted_visibility(num_context: int, num_masked: int, num_predicted: int) -> Tensor:
    """Return which token sees which, when tokens are sorted by rank.

    The sequence is: the contents of the context, those of the P predicted positions, a positional
    token for each of the m masked positions, P queries. Nothing sees a query. The contents of
    positions after the predicted ones are seen by none of these, so leaving them out changes
    nothing.

    Returns:
        bool (S, S), S = num_context + m + 2 P; rows see columns.
    """
    num_positions = num_context + num_masked
    query, content = visibility(torch.arange(num_positions)[None], num_context)
    stays = torch.ones(num_positions + num_masked, dtype=torch.bool)
    stays[num_context + num_predicted : num_positions] = False
    rows = torch.cat([content[0, stays], query[0, :num_predicted]])[:, stays]
    return torch.cat([rows, rows.new_zeros(len(rows), num_predicted)], dim=1)


def run_blocks(blocks: nn.Sequential, tokens: Tensor, sees: Tensor) -> Tensor:
    """Run timm's blocks with a mask, bool (S, S), over tokens (B, S, D)."""
    for block in blocks:
        tokens = block(tokens, attn_mask=sees)
    return tokens


def patch_positions(vit: VisionTransformer) -> Tensor:
    """Return a ViT's position embedding of patches, (1, N, D)."""
    # With or without an entry for the prefix tokens, which come first.
    return vit.pos_embed[:, -vit.patch_embed.num_patches :]
