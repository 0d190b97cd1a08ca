"""The ViT with a classifier on its mean patch token, as it is fine-tuned."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cache_builder.errors import ConfigError
from trainer.backbones import Backbone
from trainer.finetune_config import FinetuneConfig


def build_classifier(
    backbone: Backbone, num_classes: int, config: FinetuneConfig
) -> VisionTransformer:
    """Return the ViT with a fresh norm and a linear classifier on its mean patch token.

    Raises:
        ConfigError: It is no plain ViT.
    """
    model = backbone.build(
        trained=config.model.weights == "trained",
        drop_path=config.model.drop_path,
        **classifier_arguments(num_classes),
    )
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{backbone.origin} is no plain Vision Transformer of timm; name one to fine-tune."
        )
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        model.head.weight.mul_(config.model.head_scale)
    return model


def classifier_arguments(num_classes: int) -> dict[str, Any]:
    """Return what makes timm's ViT a classifier of its mean patch token."""
    return {"num_classes": num_classes, "global_pool": "avg"}
