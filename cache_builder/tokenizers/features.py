"""Patch features: what a tokenizer quantises.

    pixel               raw RGB values of a patch in (c, row, col) order, uint8 (CCViT's, times 255)
    open_clip:MODEL     CLIP towers: patch tokens of ViTs after ln_post, with or without the
                        projection; the map before attention pooling of ResNets (k-CLIP is
                        open_clip:RN50x64 at 448); any timm trunk inside open_clip
    timm:MODEL          patch tokens of ViTs, any stage of convolutional networks
    plugin:NAME         an installed tokenizer, whose ids are its own (`plugins.py`)

Weights come from a pretrained tag or a local file. Whatever the source, their digest is part of
the tokenizer's fingerprint, and loading other weights under the same name is refused.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor, nn

from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats.codebook_header import (
    PLUGIN_PREFIX,
    ExtractorSpec,
    PixelRule,
    PluginSpec,
)
from cache_builder.formats.headers import first_problem
from cache_builder.imaging import patchify
from cache_builder.tokenizers import models
from cache_builder.tokenizers.models import DEFAULT_IMAGE_SIZE
from cache_builder.tokenizers.plugins import PluginTokenizer

logger = logging.getLogger(__name__)

DEFAULT_PATCH_SIZE = 16


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
        maps = models.feature_map(self._model, (x - self._mean) / self._std, self.spec.layer)
        return maps.flatten(2).transpose(1, 2).float().contiguous()


def extract_features(extractor: FeatureExtractor, pixels: Tensor) -> Tensor:
    """Return features (B, N, D) of (B, 3, S, S) uint8 pixels, in halves where memory is short.

    Raises:
        ConfigError: The GPU has not the memory for a single picture.
    """
    return run_in_halves(extractor, pixels, extractor.spec.id)


def run_in_halves(run: Callable[[Tensor], Tensor], pixels: Tensor, name: str) -> Tensor:
    """Return what a model called `name` says of (B, 3, S, S) pixels; in halves as above.

    Raises:
        ConfigError: The GPU has not the memory for a single picture.
    """
    try:
        return run(pixels)
    except torch.OutOfMemoryError as exc:
        if len(pixels) == 1:
            raise ConfigError(
                f"Not even one picture of {pixels.shape[-1]} pixels fits into the GPU's memory "
                f"with {name}. Use a smaller model, or --device cpu."
            ) from exc
    half = len(pixels) // 2
    logger.warning("out of GPU memory: %s takes %d pictures at a time", name, half)
    torch.cuda.empty_cache()
    return torch.cat([run_in_halves(run, part, name) for part in pixels.split(half)])


def make_extractor(options: FeatureOptions, device: torch.device) -> FeatureExtractor:
    """Build the extractor that a user asked for.

    Raises:
        ConfigError: An unknown name, a size that does not fit, or weights that cannot be loaded.
        MissingDependencyError: The model's library is not installed.
    """
    if options.features == "pixel":
        return PixelPatches(_pixel_rule(options))
    library, name, source = models.parse_features(options.features)
    if options.random_weights_seed is not None:
        if source:
            raise ConfigError(f"--weights random and the weights {source!r} exclude each other.")
        weights = f"random:{options.random_weights_seed}"
    else:
        weights = models.find_weights(library, name, source)
    args = models.tag_args(library, name, weights) | (options.model_args or {})
    model = models.create_model(library, name, weights, args, options.image_size)
    native = models.native_rule(library, model)
    layer = options.layer or models.default_layer(model)
    size = options.image_size or native.size
    rule = _fitting_rule(model, layer, size, options, native)
    spec = ExtractorSpec(
        id=f"{library}:{name}",
        layer=layer,
        args=args,
        weights_digest=models.weights_digest(model),
        weights=weights,
    )
    return ModelFeatures(model, spec, rule, device)


def load_extractor(
    spec: ExtractorSpec,
    pixel_rule: PixelRule,
    device: torch.device,
    weights: str | None = None,
    plugin: PluginSpec | None = None,
) -> FeatureExtractor:
    """Build the extractor that a codebook names.

    Args:
        spec: From the codebook.
        pixel_rule: From the codebook.
        device: Where the model runs.
        weights: A weights file to use in place of the recorded source, for another machine.
        plugin: From the codebook, to say what to install where it is not.

    Raises:
        TokenizerMismatchError: The weights found are not those that the codebook was fitted with.
        ConfigError: They cannot be loaded.
        MissingDependencyError: The model's library, or the plugin, is not installed.
    """
    if spec.id == "pixel":
        return PixelPatches(pixel_rule)
    if spec.id.startswith(PLUGIN_PREFIX):
        return PluginTokenizer.load(spec, pixel_rule, device, weights, plugin)
    library, name, _ = models.parse_features(spec.id)
    source = f"file:{weights}" if weights else spec.weights
    model = models.create_model(library, name, source, dict(spec.args), pixel_rule.size)
    digest = models.weights_digest(model)
    if digest != spec.weights_digest:
        raise TokenizerMismatchError(
            f"The codebook was fitted to features of {spec.id} with weights "
            f"{spec.weights_digest}, but {source} holds {digest}. "
            "Pass the file that it was fitted with as --weights."
        )
    return ModelFeatures(model, spec, pixel_rule, device)


def _pixel_rule(options: FeatureOptions) -> PixelRule:
    for name, value in (
        ("--layer", options.layer),
        ("--features-arg", options.model_args),
        ("--mean", options.mean),
        ("--std", options.std),
        ("--weights random", options.random_weights_seed),
    ):
        if value not in (None, {}):
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
            maps = models.feature_map(model, torch.zeros(1, 3, size, size), layer)
    except (RuntimeError, ValueError, AssertionError, IndexError) as exc:
        raise ConfigError(
            f"{options.features} does not take pictures of {size} x {size}: "
            f"{str(exc).strip()[:300]} Its own size is {native.size}."
        ) from exc
    rows, cols = maps.shape[-2:]
    patch_size = models.map_stride(model, layer)
    if rows != cols or rows * patch_size != size:
        raise ConfigError(
            f"{options.features} layer {layer} gives a map of {rows} x {cols} patches of "
            f"{patch_size} pixels for {size} x {size}, which they do not cover exactly. "
            "Choose another --image-size or --layer."
        )
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
    except ValidationError as exc:
        raise ConfigError(f"{first_problem(exc)}.") from exc
