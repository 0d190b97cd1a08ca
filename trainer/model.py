"""The ViT that is trained: one of timm's, unmodified, cut to the grid of the cache.

Objectives call its public parts (`patch_embed`, the position embedding, `blocks`, `norm`) and keep
what they add outside of it. So an export is `vit.state_dict()`, and timm loads it strictly.
"""

from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from cache_builder.errors import ConfigError
from cache_builder.formats import CacheManifest, Codebook
from trainer.config import Init, ModelConfig, TrainConfig
from trainer.initialise import init_as_mae
from trainer.objectives import load_method
from trainer.objectives.interface import Normalise, Parts


class VitSpec(NamedTuple):
    """A call of `timm.create_model`, without what does not change the parameters' shapes."""

    name: str
    arguments: dict[str, Any]
    init: Init = "beit"

    @property
    def image_size(self) -> int:
        """Side of the input, pixels."""
        return int(self.arguments["img_size"])


def vit_spec(
    config: ModelConfig, manifest: CacheManifest, image_size: int | None = None
) -> VitSpec:
    """Say which ViT belongs to a cache.

    Args:
        config: Name and overrides.
        manifest: The grid, and the size of the views.
        image_size: Side of the input, pixels; None is the size of the views. Another size keeps
            the grid and changes the patch size.

    Raises:
        ConfigError: The name is no ViT of timm, or a size does not divide.
    """
    _require_vit(config.name)
    rows, cols = manifest.grid
    size = image_size or manifest.view_spec.size
    if rows != cols or size % rows:
        raise ConfigError(
            f"An image of {size} x {size} pixels cannot be cut into {rows} x {cols} patches. "
            f"Set data.image_size to a multiple of {rows}, or leave it out."
        )
    arguments = {
        "img_size": size,
        "patch_size": size // rows,
        "num_classes": 0,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "init_values": config.layer_scale,
    }
    given = {key: value for key, value in arguments.items() if value is not None}
    return VitSpec(config.name, given, config.init)


def build_vit(spec: VitSpec, drop_path: float = 0.0) -> VisionTransformer:
    """Return a freshly initialised ViT, drawn from torch's default generator.

    `beit` is timm's initialisation, with the output projections of block i (from 1) divided by
    sqrt(2 i), as the code of BEiT (arXiv:2106.08254) does; `mae` is `initialise.init_as_mae`.

    Raises:
        ConfigError: timm cannot build it, or its blocks are not plain ones.
    """
    _require_vit(spec.name)
    try:
        vit = timm.create_model(spec.name, **spec.arguments, drop_path_rate=drop_path)
    except (ArithmeticError, AssertionError, TypeError, ValueError, RuntimeError) as exc:
        settings = ", ".join(f"{key}={value}" for key, value in spec.arguments.items())
        raise ConfigError(
            f"timm cannot build {spec.name} with {settings}: {exc}. "
            "Change model.embed_dim, model.num_heads or model.name."
        ) from exc
    if not all(type(block) is Block for block in vit.blocks):
        raise ConfigError(
            f"{spec.name} has blocks of its own kind; pick a plain ViT, as vit_base_patch16_224."
        )
    if spec.init == "mae":
        init_as_mae(vit, vit.patch_embed.grid_size)
    else:
        vit.fix_init_weight()
    return vit


def build_objective(config: TrainConfig, manifest: CacheManifest, codebook: Codebook) -> nn.Module:
    """Return the module of a method around a ViT, drawn from torch's default generator.

    Raises:
        ConfigError: The model or the method does not go with the cache.
    """
    spec = vit_spec(config.model, manifest, config.data.image_size)
    vit = build_vit(spec, config.model.drop_path)
    normalise = Normalise(config.data.mean, config.data.std)
    parts = Parts(vit, manifest, codebook, normalise)
    objective = load_method(config.objective.method).build(config.objective, parts)
    if spec.init == "mae":
        init_as_mae(objective, vit.patch_embed.grid_size)
    return objective


def pick_device(name: str) -> torch.device:
    """Return the device that `run.device` names.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"There is no device {name} here: torch sees {torch.cuda.device_count()} CUDA devices. "
            "Pass `--set run.device=cpu`, or leave it at auto."
        )
    return device


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Say whether `run.precision` means bfloat16 autocast on a device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def _require_vit(name: str) -> None:
    if not timm.is_model(name):
        raise ConfigError(
            f"timm knows no model {name!r}. `timm.list_models('vit_*')` lists the ViTs."
        )
    entry = timm.model_entrypoint(timm.models.get_arch_name(name))
    if entry.__module__ != VisionTransformer.__module__:
        raise ConfigError(
            f"{name} is not a plain Vision Transformer of timm, so it has no grid of patches to "
            "mask. Pick one of `timm.list_models(module='vision_transformer')`."
        )
