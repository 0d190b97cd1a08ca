"""Tokenizers that were learned elsewhere, from installed distributions.

A distribution offers a tokenizer as an entry point of the group `patchcache.tokenizers`: a callable
that returns a torch module with the attributes of `LearnedTokenizer`. `adopt` asks it what it is
and writes that down as a codebook file, with the digest of its weights in the fingerprint; from
then on builder, service, `verify` and trainer take the file as any other.

Only what is installed is ever imported: a codebook file holds the name of an entry point, never
that of a module or of a file with code.
"""

import importlib.metadata
import inspect
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError
from torch import Tensor, nn

from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    MissingDependencyError,
    PluginError,
    TokenizerMismatchError,
)
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import (
    PLUGIN_PREFIX,
    ExtractorSpec,
    PixelRule,
    PluginSpec,
)
from cache_builder.formats.headers import first_problem
from cache_builder.tokenizers.models import weights_digest

GROUP = "patchcache.tokenizers"

_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# What a factory raises when its arguments or its weights are wrong.
_REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError)


class LearnedTokenizer(Protocol):
    """What the callable of an entry point returns; a `torch.nn.Module` beside that.

    Everything that decides its ids lies in its parameters and buffers, which the fingerprint
    covers, or follows from the arguments of the callable. The same pictures give the same ids in
    every process on the same kind of device.

    It may also have

    * `interpolation`, "bicubic" (the default) or "bilinear": how a view is resized;
    * `num_stages`, 1 by default: M ids per patch;
    * `decode(ids) -> pixels`: (B, 3, S, S) of (B, rows, cols[, M]) int64, 0..255, any type;
    * `centroids`, (K, D) or (M, K, D) floats: what ids stand for, for methods that regress it;
    * `metric`, "l2" (the default) or "cosine": how centroids are compared;
    * `features(pixels) -> (B, N, D)`: what `encode` compares with the centroids of its one stage,
      so that `verify` tells near ties from damage.
    """

    image_size: int  # S, side of the views that it takes, pixels
    patch_size: int  # side of what one id stands for; S / patch_size rows and columns
    vocab_size: int  # K

    def encode(self, pixels: Tensor) -> Tensor:
        """Return ids (B, rows, cols[, M]), whole numbers in [0, K), of (B, 3, S, S) uint8 pixels.

        Pixels come on the device of the parameters, in inference mode.
        """


class PluginTokenizer:
    """A learned tokenizer, and what a codebook says of it.

    Called, it gives the features (B, N, D) of pixels, as an extractor does.
    """

    def __init__(self, module: Any, spec: ExtractorSpec, pixel_rule: PixelRule) -> None:
        """Take a module that `_make` has looked at."""
        self.spec = spec
        self.pixel_rule = pixel_rule
        self.vocab_size = int(module.vocab_size)
        self.num_stages = int(getattr(module, "num_stages", 1))
        self.has_features = hasattr(module, "features")
        self._module = module

    @classmethod
    def load(
        cls,
        spec: ExtractorSpec,
        pixel_rule: PixelRule,
        device: torch.device,
        weights: str | None = None,
        plugin: PluginSpec | None = None,
    ) -> Self:
        """Make the tokenizer that a codebook names.

        Args:
            spec: From the codebook.
            pixel_rule: From the codebook.
            device: Where it runs.
            weights: Weights to use in place of the recorded ones, for another machine.
            plugin: From the codebook, to say what to install.

        Raises:
            MissingDependencyError: It is not installed here.
            TokenizerMismatchError: It is installed, but it is another one.
        """
        source = weights or spec.weights.removeprefix("file:") or None
        name = spec.id.removeprefix(PLUGIN_PREFIX)
        module = _make(name, source, spec.args, plugin).module
        for what, recorded, found in (
            ("weights", spec.weights_digest, weights_digest(module)),
            ("a pixel rule", pixel_rule, _pixel_rule(spec.id, module)),
        ):
            if recorded != found:
                raise TokenizerMismatchError(
                    f"The codebook was written for {spec.id} with {what} {recorded}, but the one "
                    f"installed here, from {source or 'its own weights'}, has {found}. Pass the "
                    "file that it was written with as --weights, or install the same version."
                )
        return cls(module.to(device), spec, pixel_rule)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features (B, N, D) float32.

        Raises:
            ConfigError: The plugin shows none.
        """
        if not self.has_features:
            raise ConfigError(f"{self.spec.id} does not say what it quantises: it has no features.")
        features: Tensor = self._module.features(pixels)
        return features.float()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return ids (B, rows, cols[, M]) int64 of (B, 3, S, S) uint8 pixels on its device.

        Raises:
            PluginError: What it gives are no ids of its own vocabulary, one per patch and stage.
        """
        ids: Tensor = self._module.encode(pixels)
        rows, cols = self.pixel_rule.grid
        stages = (self.num_stages,) if self.num_stages > 1 else ()
        wanted = (len(pixels), rows, cols, *stages)
        if tuple(ids.shape) != wanted or ids.dtype not in _WHOLE_NUMBERS:
            raise PluginError(
                f"{self.spec.id} must give ids {wanted} of an integer type, and gave "
                f"{tuple(ids.shape)} {ids.dtype}. Ask those who wrote it."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise PluginError(
                f"{self.spec.id} gave ids {int(ids.min())}..{int(ids.max())}, which do not lie in "
                f"[0, {self.vocab_size}). Ask those who wrote it."
            )
        return ids.to(torch.int64)

    @torch.inference_mode()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Return (B, 3, S, S) uint8 of (B, rows, cols[, M]) int64 ids in range.

        Raises:
            PluginError: What it gives are no pictures of the size that it takes.
        """
        pixels: Tensor = self._module.decode(token_ids)
        wanted = (len(token_ids), 3, self.pixel_rule.size, self.pixel_rule.size)
        if tuple(pixels.shape) != wanted:
            raise PluginError(
                f"{self.spec.id} must decode to pixels {wanted}, and gave {tuple(pixels.shape)}. "
                "Ask those who wrote it."
            )
        if pixels.is_floating_point():
            pixels = pixels.round()
        return pixels.clamp(0, 255).to(torch.uint8)


class Installed(NamedTuple):
    """A tokenizer that some distribution offers."""

    name: str
    distribution: str
    version: str


def installed() -> list[Installed]:
    """Return what is installed, by name; nothing is imported for it."""
    return sorted(_described(entry) for entry in importlib.metadata.entry_points(group=GROUP))


def adopt(name: str, weights: str | None, args: Mapping[str, JsonValue]) -> Codebook:
    """Write down what an installed tokenizer is, after trying it.

    Args:
        name: Of the entry point.
        weights: Path that its callable gets.
        args: Further keyword arguments of the callable.

    Raises:
        MissingDependencyError: It is not installed.
        ConfigError: Its callable refuses the arguments or the weights.
        PluginError: It does not do what `LearnedTokenizer` says.
    """
    if weights is not None:
        weights = str(Path(weights).resolve())
    module, found = _make(name, weights, args)
    spec = ExtractorSpec(
        id=PLUGIN_PREFIX + name,
        args=dict(args),
        weights_digest=weights_digest(module),
        weights=f"file:{weights}" if weights else "",
    )
    tokenizer = PluginTokenizer(module, spec, _pixel_rule(spec.id, module))
    centroids = _centroids(tokenizer, module)
    decodes = hasattr(module, "decode")
    _try(tokenizer, decodes=decodes)
    try:
        return Codebook(
            centroids,
            np.zeros(centroids.shape[:2], np.int64),
            metric=getattr(module, "metric", "l2"),
            pixel_rule=tokenizer.pixel_rule,
            extractor=spec,
            plugin=PluginSpec(
                distribution=found.distribution, version=found.version, decodes_to_pixels=decodes
            ),
            versions={found.distribution: found.version, "torch": str(torch.__version__)},
        )
    except ArtifactError as exc:
        raise PluginError(f"{spec.id}: {exc}") from exc
    except ValidationError as exc:
        raise PluginError(f"{spec.id}: {first_problem(exc)}") from exc


class _Made(NamedTuple):
    module: Any
    installed: Installed


def _make(
    name: str,
    weights: str | None,
    args: Mapping[str, JsonValue],
    plugin: PluginSpec | None = None,
) -> _Made:
    """Call an entry point, and look at what it returns."""
    entry = _find(name, plugin)
    found = _described(entry)
    try:
        factory = cast(Callable[..., Any], entry.load())
    except ImportError as exc:
        raise MissingDependencyError(
            f"Tokenizer {name!r} of {found.distribution} cannot be imported: {exc}. "
            f"Install what it needs: pip install {found.distribution}"
        ) from exc
    except AttributeError as exc:
        raise PluginError(f"{found.distribution} has no {entry.value}: {exc}.") from exc
    path = None if weights is None else Path(weights)
    if path is not None and not path.exists():
        raise ConfigError(
            f"The weights {path} of {PLUGIN_PREFIX}{name} are not there. "
            "Pass their place as --weights."
        )
    try:
        inspect.signature(factory).bind(path, **args)
    except TypeError as exc:
        raise ConfigError(f"{found.distribution}'s tokenizer {name!r} says: {exc}.") from exc
    try:
        module = factory(path, **args)
    except _REFUSALS as exc:
        raise ConfigError(
            f"Tokenizer {name!r} of {found.distribution} cannot be made with {dict(args)} from "
            f"{path or 'its own weights'}: {str(exc).strip()[:500]}"
        ) from exc
    if not isinstance(module, nn.Module):
        raise PluginError(f"{entry.value} must return a torch.nn.Module, not {type(module)}.")
    lacking = [
        attribute
        for attribute in ("image_size", "patch_size", "vocab_size", "encode")
        if not hasattr(module, attribute)
    ]
    if lacking:
        raise PluginError(f"What {entry.value} returns has no {', '.join(lacking)}.")
    return _Made(module.eval().requires_grad_(requires_grad=False), found)


def _find(name: str, plugin: PluginSpec | None) -> importlib.metadata.EntryPoint:
    """Return the entry point of a name; `plugin` says who offered it when a file was written.

    Raises:
        MissingDependencyError: There is none.
        PluginError: Two distributions offer it.
    """
    entries = list(importlib.metadata.entry_points(group=GROUP, name=name))
    if not entries:
        known = ", ".join(each.name for each in installed()) or "none"
        what = "the distribution that offers it"
        if plugin is not None:
            what = f"{plugin.distribution} (it was written with {plugin.version or 'no version'})"
        raise MissingDependencyError(
            f"There is no tokenizer {name!r} among those installed on {socket.gethostname()} "
            f"({known}). Install {what}, on every machine that tokenises."
        )
    if len(entries) > 1:
        names = ", ".join(sorted(_described(entry).distribution for entry in entries))
        raise PluginError(f"{names} all offer a tokenizer {name!r}. Uninstall all but one.")
    return entries[0]


def _described(entry: importlib.metadata.EntryPoint) -> Installed:
    distribution = entry.dist
    if distribution is None:
        return Installed(entry.name, entry.module, "")
    return Installed(entry.name, distribution.name, distribution.version)


def _pixel_rule(name: str, module: Any) -> PixelRule:
    try:
        return PixelRule(
            size=module.image_size,
            patch_size=module.patch_size,
            interpolation=getattr(module, "interpolation", "bicubic"),
        )
    except ValidationError as exc:
        raise PluginError(f"{name}: {first_problem(exc)}.") from exc


def _centroids(tokenizer: PluginTokenizer, module: Any) -> NDArray[np.float32]:
    """Return (M, K, D) float32, D = 0 where the tokenizer names none."""
    sizes = (tokenizer.num_stages, tokenizer.vocab_size)
    given = getattr(module, "centroids", None)
    if given is None:
        return np.zeros((*sizes, 0), np.float32)
    table = torch.as_tensor(given).detach().float().cpu()
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3 or tuple(table.shape[:2]) != sizes or not table.shape[2]:
        raise PluginError(
            f"{tokenizer.spec.id} must have centroids (M, K, D) with M, K = {sizes}, "
            f"not {tuple(table.shape)}."
        )
    centroids: NDArray[np.float32] = table.contiguous().numpy()
    return centroids


def _try(tokenizer: PluginTokenizer, *, decodes: bool) -> None:
    """Encode and decode pictures of noise, twice.

    Raises:
        PluginError: It fails, or answers differently the second time.
    """
    size = tokenizer.pixel_rule.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    try:
        ids, again = tokenizer.encode(pixels), tokenizer.encode(pixels)
        if decodes:
            tokenizer.decode(ids)
    except _REFUSALS as exc:
        raise PluginError(
            f"{tokenizer.spec.id} fails on pictures of noise: {type(exc).__name__}: "
            f"{str(exc).strip()[:500]}"
        ) from exc
    if not torch.equal(ids, again):
        raise PluginError(
            f"{tokenizer.spec.id} gives {int((ids != again).sum())} of {ids.numel()} ids "
            "differently when the same pictures come again. Tokens must not depend on chance."
        )
