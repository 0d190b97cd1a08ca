"""What fine-tuning is told: one frozen tree of settings, as that of pre-training.

The defaults are what the fine-tuning recipes of BEiT, MaPeT, CCViT and DTM have in common; what
they differ in, and what depends on the data, is in a recipe.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from cache_builder.errors import ConfigError
from trainer import settings
from trainer.config import RECIPES

FINETUNE_RECIPES = RECIPES / "finetune"


class FinetuneDataConfig(BaseModel, frozen=True, extra="forbid"):
    """How images are cut and changed; timm's transforms and mixing do it."""

    batch_size: int = Field(gt=0, description="images per step; even where images are mixed")
    num_workers: int = Field(0, ge=0, description="processes that decode and augment")
    crop_scale: tuple[float, float] = Field(
        (0.08, 1.0), description="share of the image's area that a crop covers"
    )
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width / height of a crop")
    hflip: float = Field(0.5, ge=0, le=1, description="probability of mirroring")
    auto_augment: str = Field(
        "rand-m9-mstd0.5-inc1", description="policy by timm's name; off: no RandAugment"
    )
    random_erasing: float = Field(0.25, ge=0, le=1, description="probability, filled with noise")
    mixup: float = Field(0.8, ge=0, description="alpha of Mixup; 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix; 0: none")
    mix_probability: float = Field(1.0, ge=0, le=1, description="of mixing a batch at all")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    test_crop: float = Field(
        0.875, gt=0, le=1, description="side of the centred crop that is tested, share of the short"
    )

    @property
    def is_mixed(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_mixed and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images; batch_size {self.batch_size} is odd")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, not {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < low <= high, not {self.crop_ratio}")
        return self


class FinetuneModelConfig(BaseModel, frozen=True, extra="forbid"):
    """What is added to the ViT, and how it begins."""

    weights: Literal["trained", "random"] = Field(
        "trained", description="random: the same ViT from scratch, to compare with"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the last block")
    head_scale: float = Field(
        0.001, gt=0, description="the classifier's initial weights are multiplied by it, as BEiT's"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of a moving average of the weights, which is then tested",
    )


class FinetuneOptimConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW, linear warm-up from 0, cosine to `min_lr`, less for the lower layers."""

    lr: float = Field(gt=0, description="of the classifier, after warm-up; absolute")
    min_lr: float = Field(1e-6, ge=0, description="at the last step, of the classifier")
    layer_decay: float = Field(
        0.65, gt=0, le=1, description="each layer learns at this share of the next one's rate"
    )
    weight_decay: float = Field(0.05, ge=0, description="none on vectors, positions and tokens")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    warmup_epochs: float = Field(5.0, ge=0)
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; none: no limit")

    @model_validator(mode="after")
    def _check(self) -> Self:
        settings.check_rates(self.lr, self.min_lr, self.betas)
        return self


class FinetuneRunConfig(BaseModel, frozen=True, extra="forbid"):
    """How long, from which seed, in which precision, and what is written when."""

    epochs: int = Field(gt=0)
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the device computes in it, fp32 elsewhere"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: CUDA where there is one"
    )
    log_every: int = Field(50, gt=0, description="steps")
    test_every: int = Field(1, gt=0, description="epochs; the last is always tested")
    checkpoint_every: int = Field(1000, gt=0, description="steps; the last step always writes one")
    keep_checkpoints: int = Field(2, gt=0, description="older ones are removed")
    wandb_project: str | None = Field(
        None, min_length=1, description="project of Weights & Biases to log to; none: do not"
    )


class FinetuneConfig(BaseModel, frozen=True, extra="forbid"):
    """Everything that fine-tuning is told."""

    data: FinetuneDataConfig
    model: FinetuneModelConfig = FinetuneModelConfig.model_validate({})
    optim: FinetuneOptimConfig
    run: FinetuneRunConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optim.warmup_epochs >= self.run.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} leaves nothing of "
                f"run.epochs {self.run.epochs}; lower the first or raise the second"
            )
        return self


# Settings that say how often and where, and nothing about what is learned at a step.
FREE_ON_RESUME = frozenset(
    {
        "run.device",
        "run.log_every",
        "run.test_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.wandb_project",
        "data.num_workers",
        "data.test_crop",
    }
)


def load_finetune_config(recipe: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a recipe and replace single values.

    Args:
        recipe: Path of a TOML file, or the name of one in `trainer/recipes/finetune`.
        overrides: Texts like `optim.lr=1e-3`.

    Raises:
        ConfigError: No such recipe, a key that does not exist or is missing, or a wrong value.
    """
    tree = settings.read_toml(settings.recipe_path(recipe, FINETUNE_RECIPES))
    for text in overrides:
        settings.override(tree, text, _keys_at)
    return parse_finetune_config(tree)


def parse_finetune_config(tree: Mapping[str, Any]) -> FinetuneConfig:
    """Check a tree of settings.

    Raises:
        ConfigError: A key that does not exist or is missing, or a wrong value.
    """
    try:
        return FinetuneConfig.model_validate(tree)
    except ValidationError as exc:
        errors = ({**error} for error in exc.errors())
        raise ConfigError(" ".join(settings.explain(error, _keys_at) for error in errors)) from exc


def _keys_at(parents: Sequence[str]) -> list[str]:
    model: Any = FinetuneConfig
    for parent in parents:
        field = getattr(model, "model_fields", {}).get(parent)
        model = None if field is None else field.annotation
    return list(getattr(model, "model_fields", {}))
