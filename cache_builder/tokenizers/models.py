"""Image models by name: their weights, their maps and the digest that tells one from another.

The only `import open_clip` of the project. A model is named `open_clip:MODEL` or `timm:MODEL`; its
weights are found once, as `pretrained:TAG`, `file:PATH` or `random:SEED`, and that text is kept in
the codebook, so that the same model can be made again.
"""

import hashlib
import inspect
import json
import pickle
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from torch import Tensor, nn

from cache_builder.errors import ConfigError, MissingDependencyError
from cache_builder.formats.codebook_header import PixelRule
from cache_builder.formats.views import Interpolation

DEFAULT_IMAGE_SIZE = 224

Library = Literal["open_clip", "timm"]

# What the libraries raise of names, of arguments and of damaged weights.
_LOADING_ERRORS = (
    RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError, EOFError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip

# Families of timm whose constructor takes `img_size`.
_SIZED_FAMILIES = frozenset(
    {"vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos"}
)


def parse_features(features: str) -> tuple[Library, str, str]:
    """Split `library:MODEL@SOURCE`; the source may be empty."""
    library, _, rest = features.partition(":")
    name, _, source = rest.partition("@")
    if library not in ("open_clip", "timm") or not name:
        raise ConfigError(
            f"Unknown features {features!r}. Use pixel, open_clip:MODEL[@PRETRAINED|PATH] or "
            "timm:MODEL[@PATH]."
        )
    return cast(Library, library), name, source


def find_weights(library: Library, name: str, source: str) -> str:
    """Say where a model's weights are: `file:PATH` or `pretrained:TAG`.

    Raises:
        ConfigError: `source` is neither a file nor a tag of this model.
    """
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


def tag_args(library: Library, name: str, weights: str) -> dict[str, JsonValue]:
    """Return the model arguments that pretrained weights need and the model's name does not bring.

    OpenAI's CLIP was trained with QuickGELU, and open_clip only warns when a model has another.
    """
    kind, _, tag = weights.partition(":")
    if library != "open_clip" or kind != "pretrained":
        return {}
    open_clip = _import_open_clip()
    asked = open_clip.get_model_config(name) or {}
    trained = open_clip.get_pretrained_cfg(name, tag)
    needs_quick_gelu = trained.get("quick_gelu", False) and not asked.get("quick_gelu", False)
    return {"force_quick_gelu": True} if needs_quick_gelu else {}


def create_model(
    library: Library,
    name: str,
    weights: str,
    args: dict[str, JsonValue],
    image_size: int | None,
) -> nn.Module:
    """Create a model in evaluation mode; of open_clip, the visual tower.

    Raises:
        ConfigError: The library cannot create it, or its weights are not there.
        MissingDependencyError: The library is not installed.
    """
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
    except _LOADING_ERRORS as exc:
        raise ConfigError(
            f"{library}:{name} cannot be created with {args or 'no arguments'} from {weights}: "
            f"{str(exc).strip()[:500] or type(exc).__name__}"
        ) from exc
    return model.eval().requires_grad_(requires_grad=False)


def native_rule(library: Library, model: nn.Module) -> PixelRule:
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


def default_layer(model: nn.Module) -> str:
    """Return the name of the map that is taken when none is asked for."""
    if type(model).__module__.startswith("open_clip"):
        if hasattr(model, "layer4"):
            return "layer4"
        if hasattr(model, "ln_post"):
            return "ln_post"
    return "last"


def feature_map(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    """Return one map (B, D, rows, cols) of an open_clip tower or a timm model."""
    if type(model).__module__.startswith("open_clip"):
        return _open_clip_map(model, x, layer)
    return _timm_map(model, x, layer)


def map_stride(model: nn.Module, layer: str) -> int:
    """Return by how many pixels two neighbours in a map lie apart.

    A map of 2 x 2 at a stride of 16 covers 32 pixels, whatever the size of the picture.
    """
    visual: Any = model
    if type(model).__module__.startswith("open_clip"):
        if hasattr(model, "layer4"):
            return {"layer2": 8, "layer3": 16, "layer4": 32}.get(layer, 4)
        if not hasattr(model, "trunk"):
            return int(visual.patch_size[0])
        visual = visual.trunk
    return int(visual.feature_info[-1 if layer == "last" else int(layer)]["reduction"])


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(header).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    entry = _import_timm().model_entrypoint(name)
    module = inspect.getmodule(entry)
    return module is not None and module.__name__.rpartition(".")[2] in _SIZED_FAMILIES


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
