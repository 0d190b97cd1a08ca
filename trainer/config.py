"""What a training run is told: one frozen tree of settings, read from a recipe and overrides.

A recipe is a TOML file; `--set a.b=v` replaces single values. Unknown keys are errors that name the
nearest known one. What belongs to the cache (grid, patch size, K, number of views) is read from its
manifest and is never a setting. The learning rate is absolute: no batch size is folded into it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from cache_builder.errors import ConfigError
from trainer import settings
from trainer.objectives import METHOD_NAMES, load_method
from trainer.objectives.interface import MethodConfig

logger = logging.getLogger(__name__)

Init = Literal["beit", "mae"]

RECIPES = Path(__file__).parent / "recipes"


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """How samples come out of the cache and onto the device."""

    batch_size: int = Field(gt=0, description="images per optimiser step, of all devices together")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="images per forward pass on one device; gradients add up to the whole batch; "
        "none: all of a device's share at once. Stochastic depth alone depends on it",
    )
    num_workers: int = Field(
        0,
        ge=0,
        description="processes that decode, of each training process; 0 is fastest for pictures of "
        "a few kilobytes",
    )
    image_size: int | None = Field(
        None, gt=0, description="side of the model's input, pixels; none: that of the cache's views"
    )
    color_jitter: float = Field(
        0.0, ge=0, lt=1, description="brightness, contrast, saturation drawn from 1 - x .. 1 + x"
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406),
        description="subtracted from RGB in [0, 1]; the default is ImageNet's",
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="divides RGB in [0, 1]; the default is ImageNet's"
    )
    images: str | None = Field(
        None, description="where the images lie, for a cache built with --images-in-cache none"
    )
    tokenizer: str | None = Field(
        None,
        description="fingerprint, or how it begins, of one of several tokenizers of the cache",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """Which timm ViT is trained. Image and patch size follow from the cache."""

    name: str = Field("vit_tiny_patch16_224", description="a ViT of timm")
    embed_dim: int | None = Field(None, gt=0, description="D; none: as the name says")
    depth: int | None = Field(None, gt=0, description="number of blocks; none: as the name says")
    num_heads: int | None = Field(None, gt=0, description="must divide D; none: as the name says")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")
    init: Init = Field(
        "beit",
        description="beit: normal with 0.02, as the BEiT family; mae: scaled by the width, with "
        "positions that start as sines, as MAE: for narrow models and short runs",
    )
    layer_scale: float | None = Field(None, gt=0, description="initial LayerScale; none: no scale")
    activation_checkpointing: bool = Field(
        False,
        description="compute the ViT's blocks again in the backward pass instead of keeping what "
        "they computed: less memory, about a third more time",
    )


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW, linear warm-up from 0, cosine to `min_lr`."""

    lr: float = Field(gt=0, description="after warm-up; absolute")
    min_lr: float = Field(1e-5, ge=0, description="at the last step")
    weight_decay: float = Field(0.05, ge=0, description="constant; none on vectors and positions")
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(3.0, gt=0, description="largest gradient norm; none: no limit")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of a layer against that of the next one; none, as papers "
        "pre-train: one rate for all",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per step of a moving average of the ViT's weights, as in 0.9999; where "
        "there is one, it is what is probed and exported",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        settings.check_rates(self.lr, self.min_lr, self.betas)
        return self


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """How long, from which seed, in which precision, and what is written when."""

    steps: int = Field(gt=0, description="optimiser steps of the whole run")
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="bf16: autocast over float32 weights; auto: bf16 where the device computes in "
        "it, fp32 elsewhere (a CPU that emulates bf16 is three times slower with it)",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: CUDA where there is one"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of every block; auto: on CUDA, where it pays"
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="how several processes hold weights and optimizer: each the whole (DDP), or "
        "each a part (FSDP2), which spares memory for ViT-L and larger",
    )
    log_every: int = Field(50, gt=0, description="steps")
    checkpoint_every: int = Field(1000, gt=0, description="steps; the last step always writes one")
    keep_checkpoints: int = Field(2, gt=0, description="older ones are removed")
    picture_every: int = Field(
        0,
        ge=0,
        description="steps between pictures of input, mask, targets and predictions; 0: none",
    )
    peak_flops: float | None = Field(
        None,
        gt=0,
        description="operations per second of one device, for MFU; none: as its data sheet says, "
        "where the device is known",
    )
    wandb_project: str | None = Field(
        None, min_length=1, description="project of Weights & Biases to log to; none: do not"
    )


class TrainConfig(BaseModel, frozen=True, extra="forbid"):
    """Everything that a run is told."""

    data: DataConfig
    model: ModelConfig = ModelConfig.model_validate({})
    objective: SerializeAsAny[MethodConfig] = Field(description="settings of one method")
    optim: OptimConfig
    run: RunConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optim.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} leaves nothing of "
                f"run.steps {self.run.steps}; lower the first or raise the second"
            )
        if self.run.sharding == "fsdp" and self.run.picture_every:
            raise ValueError(
                "run.picture_every draws what one process predicts, and with run.sharding fsdp no "
                "process has the whole model; set one of them to its default"
            )
        return self


def load_config(
    recipe: str | Path | None = None, overrides: Sequence[str] = (), *, method: str | None = None
) -> TrainConfig:
    """Read a recipe and replace single values.

    Args:
        recipe: Path of a TOML file, or the name of one in `trainer/recipes`, as in `beit`; None is
            the recipe with the name of the method.
        overrides: Texts like `optim.lr=1e-3`. The value is TOML; a bare word is a string, and
            `none` takes the key away, so that its default holds.
        method: Takes the place of the recipe's. Of the recipe's settings of its own method, those
            that this one has too are kept.

    Raises:
        ConfigError: No such recipe or method, neither of them, a key that does not exist or is
            missing, or a wrong value.
    """
    chosen = recipe or method
    if chosen is None:
        raise ConfigError(
            "Name a recipe or a method (--method). "
            f"Recipes: {', '.join(recipe_names())}. Methods: {', '.join(METHOD_NAMES)}."
        )
    if method is not None:
        _require_method(method, "Pass --method with")
    tree = settings.read_toml(settings.recipe_path(chosen, RECIPES))
    if method is not None:
        _replace_method(tree, method, chosen)
    for text in overrides:
        # Which keys there are depends on the method, which may have been replaced just now.
        settings.override(tree, text, partial(_keys_at, method=_method_of(tree)))
    config = parse_config(tree)
    if method is not None and config.objective.method != method:
        raise ConfigError(
            f"--method {method} and --set objective.method={config.objective.method} contradict "
            "each other. Leave one of them out."
        )
    return config


def parse_config(tree: Mapping[str, Any]) -> TrainConfig:
    """Check a tree of settings.

    Raises:
        ConfigError: A key that does not exist or is missing, or a wrong value.
    """
    tree = dict(tree)
    errors: list[dict[str, Any]] = []
    objective = tree.setdefault("objective", {})
    method = _method_of(tree)
    if isinstance(objective, Mapping):
        # Checked by itself, because which settings there are depends on the method.
        method_config = load_method(method).Config
        try:
            tree["objective"] = method_config.model_validate({**objective, "method": method})
        except ValidationError as exc:
            errors += [{**error, "loc": ("objective", *error["loc"])} for error in exc.errors()]
            del tree["objective"]
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as exc:
        others = [{**error} for error in exc.errors()]
        errors += [error for error in others if not (errors and error["loc"] == ("objective",))]
    if errors:
        keys_at = partial(_keys_at, method=method)
        raise ConfigError(" ".join(settings.explain(error, keys_at) for error in errors))
    return config


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with patchcache."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ: key -> (old value, new value)."""
    return settings.changed(old.model_dump(mode="json"), new.model_dump(mode="json"))


def _replace_method(tree: dict[str, Any], method: str, recipe: str | Path) -> None:
    objective = tree.get("objective", {})
    if not isinstance(objective, Mapping):
        return  # refused with everything else that is wrong
    known = load_method(method).Config.model_fields
    if dropped := [key for key in objective if key not in known]:
        logger.info("of %s, %s has no %s; left out", recipe, method, ", ".join(dropped))
    kept = {key: value for key, value in objective.items() if key in known}
    tree["objective"] = {**kept, "method": method}


def _method_of(tree: Mapping[str, Any]) -> str:
    """Return the method that a tree of settings names, BEiT's where it names none.

    Raises:
        ConfigError: There is no such method.
    """
    objective = tree.get("objective")
    method = objective.get("method", "beit") if isinstance(objective, Mapping) else "beit"
    _require_method(method, "Set objective.method to")
    return str(method)


def _require_method(method: object, what_to_do: str) -> None:
    if method not in METHOD_NAMES:
        raise ConfigError(
            f"There is no method {method!r}. {what_to_do} one of: {', '.join(METHOD_NAMES)}."
        )


def _keys_at(parents: Iterable[str], method: str) -> list[str]:
    model: Any = TrainConfig
    for parent in parents:
        field = getattr(model, "model_fields", {}).get(parent)
        model = None if field is None else field.annotation
        if isinstance(model, type) and issubclass(model, MethodConfig):
            model = load_method(method).Config
        if isinstance(model, UnionType):
            model = get_args(model)[0]
    return list(getattr(model, "model_fields", {}))
