"""Trained models as evaluation takes them, wherever they come from.

What a user may name:

    run/  or  run/checkpoints/step_00001000.pt      what `patchcache train` wrote
    tuned/  or  tuned/checkpoints/finetune_....pt   what `patchcache finetune` wrote
    vit.safetensors                                 what `patchcache export` wrote
    timm:NAME                                       a model of timm with its published weights
    timm:NAME@weights.safetensors                   the same with the weights of a file
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import BaseModel, ValidationError, model_validator
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats.headers import first_problem, shorten
from trainer import checkpoint as checkpoints
from trainer import finetune_checkpoint
from trainer.config import Init
from trainer.model import VitSpec, build_vit

Rgb = tuple[float, float, float]

METADATA_KEY: Final = "patchcache"  # of an exported file: a JSON text

_TIMM = "timm:"
_MAX_SIZE = 1 << 14  # of an image, pixels
_LOADING_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, EOFError,
    pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip


class _Exported(BaseModel, extra="allow"):
    """What an exported file says of its weights; what else it says is where they come from."""

    model: str
    arguments: dict[str, Any]
    init: Init | None
    mean: Rgb
    std: Rgb
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = self.image_size
        if not isinstance(size, int) or not 0 < size <= _MAX_SIZE:
            raise ValueError(f"img_size is {size!r}, not a number of pixels")
        return self

    @property
    def image_size(self) -> Any:
        """Side of the input, pixels; models of timm's own size are exported without saying it."""
        if "img_size" in self.arguments or not timm.is_model(self.model):
            return self.arguments.get("img_size")
        try:
            config = timm.get_pretrained_cfg(self.model)
        except RuntimeError:  # timm knows the model, and not which weights of it are meant
            return None
        return None if config is None else config.input_size[-1]


class Backbone(NamedTuple):
    """A model of timm with weights."""

    origin: str  # as the user named it
    name: str  # of timm
    arguments: dict[str, Any]  # of timm.create_model
    state: Mapping[str, Tensor]  # its parameters and buffers, by timm's names
    image_size: int
    mean: Rgb  # of the input in [0, 1]
    std: Rgb
    init: Init | None  # of the trainer, where it is initialised anew; None: timm's own
    provenance: Mapping[str, Any]  # where the weights come from, for an export
    cache: str | None = None  # that it was trained from
    images: str | None = None  # where those of the cache lie, if not in it
    class_names: tuple[str, ...] = ()  # of a classifier

    def build(self, *, trained: bool = True, drop_path: float = 0.0, **changes: Any) -> nn.Module:
        """Return the model, with its weights or freshly initialised.

        Args:
            trained: Whether it has its weights; otherwise torch's default generator draws some.
            drop_path: Of the last block; only ViTs have one.
            changes: Of the arguments. A classifier that is left out, and one that is new, are the
                only parts whose weights may be missing here or there.

        Raises:
            ArtifactError: The weights are not those of the model.
        """
        try:
            model = self._create({**self.arguments, **changes}, drop_path)
            found = model.load_state_dict(self.state, strict=False) if trained else None
        except (*_LOADING_ERRORS, ConfigError) as exc:
            raise ArtifactError(
                f"{self.origin} does not hold the weights of {shorten(self.name)}: "
                f"{shorten(str(exc).rstrip('.'))}. Name the model that they belong to."
            ) from exc
        if found is not None:
            new = ("head.", "fc_norm.") if "num_classes" in changes else ()
            left_out = ("head.", "norm.", "fc_norm.") if "num_classes" in changes else ()
            missing = [name for name in found.missing_keys if not name.startswith(new)]
            surplus = [name for name in found.unexpected_keys if not name.startswith(left_out)]
            _require_all(self.origin, self.name, missing, surplus)
        return model

    def _create(self, arguments: dict[str, Any], drop_path: float) -> nn.Module:
        if self.init is not None:
            return build_vit(VitSpec(self.name, arguments, self.init), drop_path)
        changes = {"drop_path_rate": drop_path} if drop_path else {}
        model: nn.Module = timm.create_model(self.name, **arguments, **changes)
        return model

    def without_classifier(self) -> "Backbone":
        """Return the same model without its classifier."""
        arguments = {**self.arguments, "num_classes": 0}
        state = {name: t for name, t in self.state.items() if not name.startswith("head.")}
        return self._replace(arguments=arguments, state=state, class_names=())


def load_backbone(name: str | Path) -> Backbone:
    """Load what a user names.

    Raises:
        ArtifactError: It is missing, damaged or no model.
        ConfigError: timm does not know it, or its weights cannot be had.
    """
    text = str(name)
    if text.startswith(_TIMM):
        return _of_timm(text)
    path = Path(text)
    if path.suffix == ".safetensors":
        return _of_export(path)
    if finetune_checkpoint.is_finetuned(path):
        return _of_finetuning(path)
    return _of_training(path)


def _of_training(path: Path) -> Backbone:
    loaded = checkpoints.load(path)
    header, data = loaded.header, loaded.config.data
    return Backbone(
        origin=str(path),
        name=header.model_name,
        arguments=dict(header.model_arguments),
        state=loaded.vit_state,
        image_size=header.vit_spec.image_size,
        mean=data.mean,
        std=data.std,
        init=header.vit_spec.init,
        provenance={"fingerprint": header.cache.fingerprint, "step": header.progress.step},
        cache=header.cache.path,
        images=data.images,
    )


def _of_finetuning(path: Path) -> Backbone:
    loaded = finetune_checkpoint.load(path)
    header = loaded.header
    return Backbone(
        origin=str(path),
        name=header.model_name,
        arguments=dict(header.model_arguments),
        state=loaded.best_state,
        image_size=header.image_size,
        mean=header.mean,
        std=header.std,
        init=header.init,
        provenance={**header.provenance, "finetune_step": header.progress.step},
        class_names=header.class_names,
    )


def _of_export(path: Path) -> Backbone:
    way_out = "Write it again with `patchcache export`."
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        state = safetensors.torch.load_file(path)
    except FileNotFoundError as exc:
        raise ArtifactError(f"There is no file {path}. {way_out}") from exc
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as exc:
        raise ArtifactError(
            f"{path} is damaged or no safetensors file: {shorten(str(exc).rstrip('.'))}. {way_out}"
        ) from exc
    if text is None:
        raise ArtifactError(
            f"{path} does not say which model its weights belong to: `patchcache export` did not "
            f"write it. Name the model: timm:NAME@{path}."
        )
    try:
        exported = _Exported.model_validate_json(text)
    except ValidationError as exc:
        raise ArtifactError(
            f"{path} does not say which model its weights belong to: {first_problem(exc)}. "
            f"{way_out}"
        ) from exc
    return Backbone(
        origin=str(path),
        name=exported.model,
        arguments=exported.arguments,
        state=state,
        image_size=exported.image_size,
        mean=exported.mean,
        std=exported.std,
        init=exported.init,
        provenance=exported.model_extra or {},
        class_names=exported.class_names,
    )


def _of_timm(text: str) -> Backbone:
    name, at, weights = text.removeprefix(_TIMM).partition("@")
    if not timm.is_model(name):
        raise ConfigError(
            f"timm knows no model {name!r}. `timm.list_models()` lists them; a file of weights "
            "follows an @, as in timm:vit_base_patch16_224@weights.safetensors."
        )
    if at and not Path(weights).is_file():
        raise ArtifactError(f"There is no file {weights}.")
    try:
        model = timm.create_model(name, pretrained=not at, num_classes=0)
        found = timm.models.load_checkpoint(model, weights, strict=False) if at else None
    except _LOADING_ERRORS as exc:
        place = weights if at else "its published place"
        way_out = "Copy the file again, or name another."
        if not at:
            way_out = f"Download them elsewhere and pass {text}@FILE."
        reason = shorten(str(exc).strip().rstrip(".")) or type(exc).__name__
        raise ConfigError(
            f"The weights of {name} cannot be loaded from {place}: {reason}. {way_out}"
        ) from exc
    if found is not None:
        classifier = model.pretrained_cfg.get("classifier") or "head"
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        surplus = [key for key in found.unexpected_keys if not key.startswith(heads)]
        _require_all(weights, name, found.missing_keys, surplus)
    rule = resolve_model_data_config(model)
    return Backbone(
        origin=text,
        name=name,
        arguments={"num_classes": 0},
        state=model.state_dict(),
        image_size=int(rule["input_size"][-1]),
        mean=_rgb(rule["mean"]),
        std=_rgb(rule["std"]),
        init=None,
        provenance={"weights": text},
    )


def freshly_initialised(backbone: Backbone, seed: int) -> nn.Module:
    """Return the same model before any training, drawn from a seed."""
    torch.manual_seed(seed)
    return backbone.build(trained=False)


def _require_all(origin: str, name: str, missing: list[str], surplus: list[str]) -> None:
    if missing or surplus:
        raise ArtifactError(
            f"{origin} does not hold the weights of {name}: {len(missing)} are missing and "
            f"{len(surplus)} unknown, as {(missing + surplus)[0]}. "
            "Name the model that they belong to."
        )


def _rgb(values: Sequence[float]) -> Rgb:
    red, green, blue = values
    return red, green, blue
