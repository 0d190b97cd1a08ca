"""The table of methods: what a model predicts from a cache, one small module each.

An objective is an `nn.Module` that owns an unmodified timm `vit` and whatever it adds. Called with
images (B, 3, S, S) float, token_ids (B, N) int64 and a CPU generator, it returns a dictionary of
0-dimensional tensors: `loss`, which has a gradient, and metrics, which have none.
"""

from collections.abc import Callable
from typing import Final

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cache_builder.errors import ConfigError
from cache_builder.formats import CacheManifest
from trainer.config import ObjectiveConfig, TrainConfig
from trainer.model import build_vit, vit_spec
from trainer.objectives.beit import MaskedTokens

Builder = Callable[[ObjectiveConfig, VisionTransformer, CacheManifest], nn.Module]


def build_objective(config: TrainConfig, manifest: CacheManifest) -> nn.Module:
    """Return a freshly initialised objective for a cache, drawn from torch's default generator.

    Raises:
        ConfigError: The model or the method does not go with the cache.
    """
    spec = vit_spec(config.model, manifest, config.data.image_size)
    vit = build_vit(spec, config.model.drop_path)
    return METHODS[config.objective.method](config.objective, vit, manifest)


def _build_beit(
    config: ObjectiveConfig, vit: VisionTransformer, manifest: CacheManifest
) -> MaskedTokens:
    if manifest.spec.num_stages > 1:
        raise ConfigError(
            f"The cache holds {manifest.spec.num_stages} token ids per patch; method 'beit' "
            "predicts one. Build a cache with a codebook of one stage."
        )
    return MaskedTokens(
        vit,
        manifest.grid,
        vocab_size=manifest.vocab_size,
        mask_ratio=config.mask_ratio,
        mask_kind=config.mask_kind,
        masked_tokens=config.masked_tokens,
        decoder_depth=config.decoder_depth or 1,
        decoder_dim=config.decoder_dim or vit.embed_dim,
    )


METHODS: Final[dict[str, Builder]] = {"beit": _build_beit}
