"""Dynamic token morphing: predict the targets' features, averaged over groups of similar patches.

DTM (arXiv:2401.00254) merges the patches of a picture by the similarity of their targets, as token
merging (ToMe, arXiv:2210.09461) does, a random number of patches in a random number of rounds; the
prediction and the targets are averaged over every group and compared. Its code runs CLIP for the
targets in every step; here a cache holds them, as ids of centroids or as stored features. Against
that code: absolute positions, biases for query, key and value, the decoder where masked patches
are dropped, and targets that colour jitter does not change.
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, l1_loss, mse_loss, normalize, smooth_l1_loss

from cache_builder.errors import ConfigError
from trainer.draws import SampleGenerator
from trainer.objectives.feature_targets import FeatureTargets, TargetSource, standardise
from trainer.objectives.hiding import Hiding, HidingConfig, Masks, MaskSampler, make_head
from trainer.objectives.interface import Parts, Preview, Targets

_DEFAULT_BETA = 2.0
_COSINE_EPS = 1e-6
_COUNT_EPS = 1e-6


class Config(HidingConfig, frozen=True, extra="forbid"):
    """Settings of `dtm`."""

    method: Literal["dtm"] = "dtm"
    source: TargetSource = Field(
        "centroids",
        description="what a patch's target is: the centroid of its token id; residual: the sum of "
        "the centroids of its M > 1 ids; features: what `--store-features` put into the cache",
    )
    target_dim: int | None = Field(
        None,
        gt=0,
        description="project targets to so many values, by principal components of the centroids; "
        "none: their own D",
    )
    num_schedules: int = Field(2, gt=0, description="mergings per step, averaged; DTM: 2")
    max_merged: int | None = Field(
        None, gt=0, description="most patches that a merging takes away; none: all, as DTM's code"
    )
    max_iterations: int = Field(14, gt=0, description="most rounds of a merging; DTM: 14")
    loss: Literal["smoothl1", "negcosine", "l1", "l2"] = "smoothl1"
    beta: float | None = Field(
        None, gt=0, description="where smoothl1 turns from square to straight; none: 2, as DTM"
    )
    normalize_target: bool = Field(
        False, description="give every target, after merging, mean 0 and variance 1 over its values"
    )
    protect_first: bool = Field(
        False,
        description="never merge the top left patch, as DTM's code, which takes it for a class "
        "token",
    )

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.beta is not None and self.loss != "smoothl1":
            raise ValueError(f"beta belongs to loss = 'smoothl1'; {self.loss!r} has none")
        return self


def build(config: Config, parts: Parts) -> "DynamicTokenMorphing":
    """Return the method's module.

    Raises:
        ConfigError: The settings do not go with the cache.
    """
    return DynamicTokenMorphing(config, parts)


class DynamicTokenMorphing(nn.Module):
    """Distance of predicted and cached features, both averaged over groups of similar patches.

    All patches count, masked and visible alike, so a group of n patches counts n times.

    Attributes:
        vit: The encoder, as timm made it.
        hiding: The mask token and, with `drop`, the decoder.
        targets: Makes features of what the cache holds.
        head: Linear, to one feature per patch.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        """Add mask token, targets, head and, with `drop`, a decoder to a ViT."""
        super().__init__()
        num_patches = parts.vit.patch_embed.num_patches
        if (config.max_merged or 0) > num_patches:
            raise ConfigError(
                f"objective.max_merged {config.max_merged} is more than the {num_patches} patches "
                "of the cache. Lower it, or leave it out for all."
            )
        self.payloads = ("features",) if config.source == "features" else ()
        self.image_size = parts.vit.patch_embed.img_size[0]
        self.config = config
        self.max_merged = config.max_merged or num_patches
        self.vit = parts.vit
        self.normalise = parts.normalise
        self.masks = MaskSampler(parts.manifest.grid, config)
        self.hiding = Hiding(parts.vit, num_patches, config)
        self.targets = FeatureTargets(parts, config.source, config.target_dim)
        self.head = make_head(self.hiding.width, self.targets.dim)

    def forward(
        self, images: Tensor, targets: Targets, generator: SampleGenerator
    ) -> dict[str, Tensor]:
        """Draw masks and mergings, and compare the merged features.

        Returns:
            `loss`, the mean over the mergings, and `cosine`, the mean cosine of a patch's
            prediction and its target before they are merged.
        """
        wanted = self.targets(targets)
        predicted = self.predict(images, self.masks.draw(generator)).float()
        # Half precision would merge other patches, and lose the last digits of sums.
        with torch.autocast(images.device.type, enabled=False):
            losses = []
            for _ in range(self.config.num_schedules):
                schedule = draw_schedule(
                    generator.shared, self.max_merged, self.config.max_iterations
                )
                labels = merge_labels(wanted, *schedule, self.config.protect_first)
                losses.append(self._loss(predicted, wanted, labels))
            if self.config.normalize_target:
                wanted = standardise(wanted)
            cosine = cosine_similarity(predicted.detach(), wanted, dim=-1).mean()
        return {"loss": torch.stack(losses).mean(), "cosine": cosine}

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """Return a feature of every patch, (B, N, d)."""
        patches = self.vit.patch_embed(self.normalise(images))
        return self.head(self.hiding(self.vit, patches, masks))

    def preview(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Preview:
        """Return what the method sees of these samples, and the centroids nearest to its answers.

        Of several stages, the ids are those of the first.
        """
        masks = self.masks.draw(generator)
        predicted = self.predict(images, masks).float()
        token_ids = self.targets.nearest(predicted, self.config.normalize_target)
        return Preview(images, masks.hidden, torch.ones_like(masks.hidden), token_ids)

    def _loss(self, predicted: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        predicted, wanted = group_means(predicted, labels), group_means(wanted, labels)
        if config.normalize_target:
            wanted = standardise(wanted)
        match config.loss:
            case "smoothl1":
                return smooth_l1_loss(predicted, wanted, beta=config.beta or _DEFAULT_BETA)
            case "negcosine":
                cosine = cosine_similarity(predicted, wanted, dim=-1, eps=_COSINE_EPS)
                return 1 - cosine.mean()
            case "l1":
                return l1_loss(predicted, wanted)
            case "l2":
                return mse_loss(predicted, wanted)


def draw_schedule(
    generator: torch.Generator, max_merged: int, max_iterations: int
) -> tuple[int, int]:
    """Draw how many patches to merge per round, and in how many rounds.

    As DTM's code: n uniform in 0 .. `max_merged`, k in 1 .. `max_iterations`, and n / k patches a
    round, rounded up, or down if that came to more than `max_merged` in all. The paper draws how
    many are left.

    Args:
        generator: A CPU generator.
        max_merged: Most patches merged in all rounds.
        max_iterations: Most rounds.

    Returns:
        r and k, as `merge_labels` takes them. r can be 0: nothing is merged.
    """
    num_merged = int(torch.randint(max_merged + 1, (), generator=generator))
    iterations = 1 + int(torch.randint(max_iterations, (), generator=generator))
    r = math.ceil(num_merged / iterations)
    return (num_merged // iterations if r * iterations > max_merged else r), iterations


@torch.no_grad()
def merge_labels(features: Tensor, r: int, iterations: int, protect_first: bool = False) -> Tensor:
    """Group similar tokens, by rounds of token merging.

    A round (ToMe, arXiv:2210.09461, Sec. 3) splits t tokens into A, at even positions, and B, at
    odd ones. The r tokens of A with the highest cosine to a token of B join the one they are
    closest to; several may join the same. r is lowered to (t - 1) // 2 where it is more. Then come
    the rest of A, in order, and all of B; a merged token's feature is the mean of its members'.
    Ties go to the lower position.

    ToMe protects the class token, at position 0. DTM (arXiv:2401.00254) has none at that point, but
    its code protects position 0 too, so the top left patch stays alone; `protect_first` does
    that.

    Args:
        features: (B, t, d), float32 for the result to be the same everywhere.
        r: Tokens merged per round.
        iterations: Rounds.
        protect_first: Never merge token 0.

    Returns:
        (B, t) int64 in [0, t'), where t' tokens are left, the same number in every sample: the
        group of each token, numbered by its position after the last round.

    Raises:
        ValueError: `r` or `iterations` is negative.
    """
    if r < 0 or iterations < 0:
        raise ValueError(f"r and iterations are 0 or more, not {r} and {iterations}")
    batch, num_tokens, dim = features.shape
    labels = torch.arange(num_tokens, device=features.device).expand(batch, -1)
    # Of direction alone, so the sums of groups do as well as their means.
    sums = features
    for _ in range(iterations):
        count = min(r, (sums.shape[1] - 1) // 2)
        if count <= 0:
            break
        moves_to = _merge_once(sums, count, protect_first)
        shape = (batch, sums.shape[1] - count, dim)
        at = moves_to[..., None].expand(-1, -1, dim)
        sums = sums.new_zeros(shape).scatter_add(1, at, sums)
        labels = moves_to.gather(1, labels)
    return labels.contiguous()


def _merge_once(tokens: Tensor, count: int, protect_first: bool) -> Tensor:
    """Return where every token of (B, t, d) is after a round that merges `count`, (B, t)."""
    directions = normalize(tokens, dim=-1)
    cosines = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    highest, closest = cosines.max(-1)  # of equals, the first
    if protect_first:
        highest[:, 0] = -math.inf
    order = highest.argsort(dim=1, descending=True, stable=True)
    is_merged = torch.zeros_like(closest, dtype=torch.bool)
    is_merged.scatter_(1, order[:, :count], True)
    num_left = closest.shape[1] - count
    moves_to = closest.new_empty(tokens.shape[:2])
    moves_to[:, ::2] = torch.where(is_merged, num_left + closest, (~is_merged).long().cumsum(1) - 1)
    moves_to[:, 1::2] = num_left + torch.arange(tokens.shape[1] // 2, device=tokens.device)
    return moves_to


def group_means(rows: Tensor, labels: Tensor) -> Tensor:
    """Replace every row by the mean of its group.

    Args:
        rows: (B, N, d).
        labels: (B, N) int64 in [0, N), rows of equal label make a group.

    Returns:
        (B, N, d).
    """
    at = labels[..., None].expand(-1, -1, rows.shape[-1])
    sums = torch.zeros_like(rows).scatter_add(1, at, rows)
    counts = torch.zeros_like(rows[..., 0]).scatter_add(1, labels, torch.ones_like(rows[..., 0]))
    # As DTM's code.
    means = sums / (counts[..., None] + _COUNT_EPS)
    return means.gather(1, at)
