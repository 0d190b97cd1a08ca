"""Patch features: what a tokenizer quantises.

    pixel               raw RGB values of a patch in (c, row, col) order, uint8 (CCViT's, times 255)
    open_clip:MODEL     CLIP towers: patch tokens of ViTs after ln_post, with or without the
                        projection; the map before attention pooling of ResNets (k-CLIP is
                        open_clip:RN50x64 at 448); any timm trunk inside open_clip
    timm:MODEL          patch tokens of ViTs, any stage of convolutional networks

Weights come from a pretrained tag or a local file. Whatever the source, their digest is part of
the tokenizer's fingerprint, and loading other weights under the same name is refused.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from cache_builder.errors import ConfigError, MissingDependencyError, TokenizerMismatchError
from cache_builder.formats.codebook import ExtractorSpec, PixelRule
from cache_builder.formats.views import Interpolation
from cache_builder.imaging import patchify

DEFAULT_IMAGE_SIZE = 224
DEFAULT_PATCH_SIZE = 16

Library = Literal["open_clip", "timm"]


class FeatureExtractor(Protocol):
    """Turns resized views into one feature per patch."""

    spec: ExtractorSpec
    pixel_rule: PixelRule

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features (B, N, D) of (B, 3, S, S) uint8 pixels, patches in row-major order."""


class FeatureOptions(NamedTuple):
    """What a user may say about features; None means the model's own value."""

    features: str
    image_size: int | None = None
    patch_size: int | None = None
    layer: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    model_args: dict[str, JsonValue] | None = None
    random_weights_seed: int | None = None


class PixelPatches:
    """Raw pixels, uint8, not normalised."""

    def __init__(self, pixel_rule: PixelRule) -> None:
        """Cut patches as the rule says."""
        self.spec = ExtractorSpec(id="pixel")
        self.pixel_rule = pixel_rule

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (B, N, 3 * p * p) uint8."""
        return patchify(pixels, self.pixel_rule.patch_size)


class ModelFeatures:
    """One map of a pretrained image model, float32."""

    def __init__(
        self, model: nn.Module, spec: ExtractorSpec, pixel_rule: PixelRule, device: torch.device
    ) -> None:
        """Take an open_clip visual tower or a timm model.

        Raises:
            ConfigError: The model has no such layer, or its map does not fit the pixel rule.
        """
        self.spec = spec
        self.pixel_rule = pixel_rule
        self._model = model.to(device).eval()
        self._mean = torch.tensor(pixel_rule.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(pixel_rule.std, device=device).view(3, 1, 1)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (B, N, D) float32 on the model's device."""
        x = pixels.to(self._device).float() / 255
        maps = _feature_map(self._model, (x - self._mean) / self._std, self.spec.layer)
        return maps.flatten(2).transpose(1, 2).float().contiguous()


def make_extractor(options: FeatureOptions, device: torch.device) -> FeatureExtractor:
    """Build the extractor that a user asked for.

    Raises:
        ConfigError: An unknown name, a size that does not fit, or weights that cannot be loaded.
        MissingDependencyError: The model's library is not installed.
    """
    if options.features == "pixel":
        return PixelPatches(_pixel_rule(options))
    library, name, source = _parse(options.features)
    if options.random_weights_seed is not None:
        if source:
            raise ConfigError(f"--weights random and the weights {source!r} exclude each other.")
        weights = f"random:{options.random_weights_seed}"
    else:
        weights = _weights_source(library, name, source)
    args = dict(options.model_args or {})
    model = _create(library, name, weights, args, options.image_size)
    native = _native_rule(library, model)
    layer = options.layer or _default_layer(model)
    size = options.image_size or native.size
    rule = _fitting_rule(model, layer, size, options, native)
    spec = ExtractorSpec(
        id=f"{library}:{name}",
        layer=layer,
        args=args,
        weights_digest=_weights_digest(model),
        weights=weights,
    )
    return ModelFeatures(model, spec, rule, device)


def load_extractor(
    spec: ExtractorSpec, pixel_rule: PixelRule, device: torch.device, weights: str | None = None
) -> FeatureExtractor:
    """Build the extractor that a codebook names.

    Args:
        spec: From the codebook.
        pixel_rule: From the codebook.
        device: Where the model runs.
        weights: A weights file to use in place of the recorded source, for another machine.

    Raises:
        TokenizerMismatchError: The weights found are not those that the codebook was fitted with.
        ConfigError: They cannot be loaded.
    """
    if spec.id == "pixel":
        return PixelPatches(pixel_rule)
    library, name, _ = _parse(spec.id)
    source = f"file:{weights}" if weights else spec.weights
    model = _create(library, name, source, dict(spec.args), pixel_rule.size)
    digest = _weights_digest(model)
    if digest != spec.weights_digest:
        raise TokenizerMismatchError(
            f"The codebook was fitted to features of {spec.id} with weights "
            f"{spec.weights_digest}, but {source} holds {digest}. "
            "Pass the file that it was fitted with as --weights."
        )
    return ModelFeatures(model, spec, pixel_rule, device)


def _parse(features: str) -> tuple[Library, str, str]:
    """Split `library:MODEL@SOURCE`; the source may be empty."""
    library, _, rest = features.partition(":")
    name, _, source = rest.partition("@")
    if library not in ("open_clip", "timm") or not name:
        raise ConfigError(
            f"Unknown features {features!r}. Use pixel, open_clip:MODEL[@PRETRAINED|PATH] or "
            "timm:MODEL[@PATH]."
        )
    return cast(Library, library), name, source


def _weights_source(library: Library, name: str, source: str) -> str:
    if source and Path(source).is_file():
        return f"file:{Path(source).resolve()}"
    if library == "timm":
        if source:
            raise ConfigError(f"There is no weights file {source}. Pass timm:{name}@PATH.")
        return "pretrained:"
    tags = _import_open_clip().list_pretrained_tags_by_model(name)
    tag = source or ("openai" if "openai" in tags else "")
    if tag not in tags:
        raise ConfigError(
            f"open_clip:{name} has no pretrained weights {source!r}, and there is no such file. "
            f"Use open_clip:{name}@PATH or one of: {', '.join(tags) or 'none known'}."
        )
    return f"pretrained:{tag}"


def _create(
    library: Library,
    name: str,
    weights: str,
    args: dict[str, JsonValue],
    image_size: int | None,
) -> nn.Module:
    kind, _, source = weights.partition(":")
    if kind == "random":
        torch.manual_seed(int(source))
    elif kind == "file" and not Path(source).is_file():
        raise ConfigError(
            f"The weights file {source} of {library}:{name} is not there. "
            "Pass its new place as --weights."
        )
    create = _create_open_clip if library == "open_clip" else _create_timm
    try:
        model = create(name, kind, source, args, image_size)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as exc:
        raise ConfigError(
            f"{library}:{name} cannot be created with {args or 'no arguments'} from {weights}: "
            f"{str(exc).strip()[:500]}"
        ) from exc
    return model.eval().requires_grad_(requires_grad=False)


def _create_open_clip(
    name: str, kind: str, source: str, args: dict[str, JsonValue], image_size: int | None
) -> nn.Module:
    model = _import_open_clip().create_model(
        name,
        pretrained=source if kind != "random" else None,
        load_weights=kind != "random",
        force_image_size=image_size,
        **args,
    )
    visual: nn.Module = model.visual
    return visual


def _create_timm(
    name: str, kind: str, source: str, args: dict[str, JsonValue], image_size: int | None
) -> nn.Module:
    timm = _import_timm()
    options: dict[str, Any] = dict(args)
    if kind == "pretrained":
        options["pretrained"] = True
    elif kind == "file":
        options["checkpoint_path"] = source
    if image_size is not None and "img_size" not in options and _takes_image_size(name):
        options["img_size"] = image_size
    return cast(nn.Module, timm.create_model(name, **options))


def _takes_image_size(name: str) -> bool:
    import inspect

    entry = _import_timm().model_entrypoint(name)
    module = inspect.getmodule(entry)
    return module is not None and module.__name__.rsplit(".", 1)[-1] in {
        "vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos",
    }  # fmt: skip


def _native_rule(library: Library, model: nn.Module) -> PixelRule:
    """Return the model's own size and normalisation; its patch size is not known yet."""
    if library == "open_clip":
        config = dict(getattr(model, "preprocess_cfg", {}) or {})
        size = getattr(model, "image_size", None) or config.get("size", DEFAULT_IMAGE_SIZE)
        constants = _import_open_clip()
        mean = config.get("mean", constants.OPENAI_DATASET_MEAN)
        std = config.get("std", constants.OPENAI_DATASET_STD)
    else:
        config = dict(model.pretrained_cfg)
        size, mean, std = config["input_size"][-1], config["mean"], config["std"]
    side = int(size[0] if isinstance(size, tuple | list) else size)
    interpolation: Interpolation = (
        "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    )
    return PixelRule(
        size=side, patch_size=side, interpolation=interpolation, mean=tuple(mean), std=tuple(std)
    )


def _pixel_rule(options: FeatureOptions) -> PixelRule:
    for name, value in (
        ("--layer", options.layer),
        ("--features-arg", options.model_args),
        ("--mean", options.mean),
        ("--std", options.std),
        ("--weights random", options.random_weights_seed),
    ):
        if value:
            raise ConfigError(f"{name} has no meaning for --features pixel. Leave it out.")
    return _rule(
        size=options.image_size or DEFAULT_IMAGE_SIZE,
        patch_size=options.patch_size or DEFAULT_PATCH_SIZE,
    )


def _fitting_rule(
    model: nn.Module, layer: str, size: int, options: FeatureOptions, native: PixelRule
) -> PixelRule:
    """Find the grid of a model's map by running it once on nothing."""
    try:
        with torch.inference_mode():
            maps = _feature_map(model, torch.zeros(1, 3, size, size), layer)
    except (RuntimeError, ValueError, AssertionError, IndexError) as exc:
        raise ConfigError(
            f"{options.features} does not take pictures of {size} x {size}: "
            f"{str(exc).strip()[:300]} Its own size is {native.size}."
        ) from exc
    rows, cols = maps.shape[-2:]
    if rows != cols or size % rows:
        raise ConfigError(
            f"{options.features} layer {layer} gives a map of {rows} x {cols} for {size} pixels; "
            "patches of whole pixels need a square map that divides the size. "
            "Choose another --image-size or --layer."
        )
    patch_size = size // rows
    if options.patch_size not in (None, patch_size):
        raise ConfigError(
            f"{options.features} layer {layer} has patches of {patch_size} pixels, not "
            f"{options.patch_size}. Leave --patch-size out, or choose another --layer."
        )
    return _rule(
        size=size,
        patch_size=patch_size,
        interpolation=native.interpolation,
        mean=options.mean or native.mean,
        std=options.std or native.std,
    )


def _rule(**fields: Any) -> PixelRule:
    try:
        return PixelRule(**fields)
    except ValueError as exc:
        raise ConfigError(f"{exc}") from exc


def _default_layer(model: nn.Module) -> str:
    if type(model).__module__.startswith("open_clip"):
        if hasattr(model, "layer4"):
            return "layer4"
        if hasattr(model, "ln_post"):
            return "ln_post"
    return "last"


def _feature_map(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    """Return one map (B, D, rows, cols) of an open_clip tower or a timm model."""
    if type(model).__module__.startswith("open_clip"):
        return _open_clip_map(model, x, layer)
    return _timm_map(model, x, layer)


def _open_clip_map(visual: Any, x: Tensor, layer: str) -> Tensor:
    if hasattr(visual, "trunk"):
        return _timm_map(visual.trunk, x, layer)
    if hasattr(visual, "layer4"):
        stages = ["stem", "layer1", "layer2", "layer3", "layer4"]
        index = _index(layer, stages)
        found = visual.forward_intermediates(x, indices=[index], intermediates_only=True)
        return cast(Tensor, found["image_intermediates"][0])
    _index(layer, ["ln_post", "proj"])
    found = visual.forward_intermediates(
        x, indices=1, normalize_intermediates=True, intermediates_only=True
    )
    maps: Tensor = found["image_intermediates"][0]
    if layer == "proj":
        maps = torch.einsum("bchw,cd->bdhw", maps, visual.proj)
    return maps


def _timm_map(model: Any, x: Tensor, layer: str) -> Tensor:
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"timm's {type(model).__name__} cannot return its intermediate maps. "
            "Choose a model with forward_intermediates."
        )
    if layer == "last":
        # The final norm belongs to a ViT's last tokens; convolutional networks ignore it.
        maps = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    elif layer.isdecimal():
        maps = model.forward_intermediates(x, indices=[int(layer)], intermediates_only=True)
    else:
        raise ConfigError(f"--layer of a timm model is `last` or a number from 0, not {layer!r}.")
    return cast(Tensor, maps[0])


def _index(layer: str, names: list[str]) -> int:
    if layer not in names:
        raise ConfigError(f"--layer of this model is one of {', '.join(names)}, not {layer!r}.")
    return names.index(layer)


def _weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(header).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as exc:
        raise MissingDependencyError(
            "open_clip features need 'open_clip_torch', which is not installed. "
            "Run: pip install 'patchcache[tokens]'"
        ) from exc
    return open_clip


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as exc:
        raise MissingDependencyError(
            "timm features need 'timm', which is not installed. "
            "Run: pip install 'patchcache[tokens]'"
        ) from exc
    return timm
