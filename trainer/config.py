"""What a training run is told: one frozen tree of settings, read from a recipe and overrides.

A recipe is a TOML file; `--set a.b=v` replaces single values. Unknown keys are errors that name the
nearest known one. What belongs to the cache (grid, patch size, K, number of views) is read from its
manifest and is never a setting. The learning rate is absolute: no batch size is folded into it.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from cache_builder.errors import ConfigError
from trainer.objectives import METHOD_NAMES, load_method
from trainer.objectives.interface import MethodConfig

RECIPES = Path(__file__).parent / "recipes"


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """How samples come out of the cache and onto the device."""

    batch_size: int = Field(gt=0, description="images per optimiser step, of all devices together")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="images per forward pass on one device; gradients add up to the whole batch; "
        "none: all of a device's share at once",
    )
    num_workers: int = Field(
        0, ge=0, description="processes that decode; 0 is fastest for pictures of a few kilobytes"
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
    layer_scale: float | None = Field(None, gt=0, description="initial LayerScale; none: no scale")


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW, linear warm-up from 0, cosine to `min_lr`."""

    lr: float = Field(gt=0, description="after warm-up; absolute")
    min_lr: float = Field(1e-5, ge=0, description="at the last step")
    weight_decay: float = Field(0.05, ge=0, description="constant; none on vectors and positions")
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(3.0, gt=0, description="largest gradient norm; none: no limit")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
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
        return self


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and replace single values.

    Args:
        recipe: Path of a TOML file, or the name of one in `trainer/recipes`, as in `beit`.
        overrides: Texts like `optim.lr=1e-3`. The value is TOML; a bare word is a string, and
            `none` takes the key away, so that its default holds.

    Raises:
        ConfigError: No such recipe, a key that does not exist or is missing, or a wrong value.
    """
    path = _recipe_path(recipe)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"The recipe {path} cannot be read: {exc}.") from exc
    for text in overrides:
        _override(tree, text)
    return parse_config(tree)


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
        settings = load_method(method).Config
        try:
            tree["objective"] = settings.model_validate({**objective, "method": method})
        except ValidationError as exc:
            errors += [{**error, "loc": ("objective", *error["loc"])} for error in exc.errors()]
            del tree["objective"]
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as exc:
        others = [{**error} for error in exc.errors()]
        errors += [error for error in others if not (errors and error["loc"] == ("objective",))]
    if errors:
        raise ConfigError(" ".join(_explain(error, method) for error in errors))
    return config


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with patchcache."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ: key -> (old value, new value)."""
    before, after = (dict(_flatten(config.model_dump(mode="json"))) for config in (old, new))
    keys = dict.fromkeys((*before, *after))  # another method has other keys
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _recipe_path(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    named = RECIPES / f"{recipe}.toml"
    if isinstance(recipe, str) and recipe in recipe_names():
        return named
    raise ConfigError(
        f"There is no recipe {recipe}: it is neither a file nor one of {', '.join(recipe_names())}."
    )


def _override(tree: dict[str, Any], text: str) -> None:
    key, separator, value_text = text.partition("=")
    *parents, name = parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set takes key=value, as in optim.lr=1e-3, not {text!r}.")
    method = _method_of(tree)
    for depth, parent in enumerate(parents, start=1):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"Unknown key '{key.strip()}': '{'.'.join(parts[:depth])}' is a value, not a table."
            )
    value = _parse_value(value_text.strip())
    if value is None:
        tree.pop(name, None)
        # A key that does not exist is refused whatever its value.
        _require_key(parts, method)
    else:
        tree[name] = value


def _parse_value(text: str) -> object:
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _require_key(parts: Sequence[str], method: str) -> None:
    *parents, name = parts
    if name not in _keys_at(parents, method):
        raise ConfigError(_unknown_key(parts, method))


def _method_of(tree: Mapping[str, Any]) -> str:
    """Return the method that a tree of settings names, BEiT's where it names none.

    Raises:
        ConfigError: There is no such method.
    """
    objective = tree.get("objective")
    method = objective.get("method", "beit") if isinstance(objective, Mapping) else "beit"
    if method not in METHOD_NAMES:
        raise ConfigError(
            f"There is no method {method!r}. Set objective.method to one of: "
            f"{', '.join(METHOD_NAMES)}."
        )
    return str(method)


def _explain(error: Mapping[str, Any], method: str) -> str:
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    if error["type"] == "extra_forbidden":
        return _unknown_key(parts, method)
    if error["type"] == "missing":
        return f"Missing key '{key}'."
    reason = error["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:] if reason.startswith("Input") else reason
    if error["type"] == "value_error":
        return f"Wrong setting in '{key}': {reason}." if key else f"Wrong settings: {reason}."
    return f"Wrong value {error['input']!r} for '{key}': {reason}."


def _unknown_key(parts: Sequence[str], method: str) -> str:
    *parents, name = parts
    known = _keys_at(parents, method)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}."
    )
    return f"Unknown key '{'.'.join(parts)}'; {hint}"


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


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
