"""Trained models for other programs: one file for timm, or a folder as the Hugging Face hub has it.

Both hold timm's own state dict, bit for bit as it was trained, and say of what and on which tokens.
The folder has what `timm.models.save_for_hf` writes: `timm.create_model("local-dir:...")` loads it,
and so does transformers through its `timm_wrapper`. The input rule that goes with it is that of our
probe: the largest centred square, resized.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm

from cache_builder import files
from cache_builder.errors import ConfigError
from trainer.backbones import METADATA_KEY, Backbone, load_backbone

Layout = Literal["timm", "huggingface"]


def export(model: str | Path, out: str | Path, layout: Layout = "timm") -> str:
    """Write a trained model.

    The same checkpoint gives the same bytes. The metadata entry `patchcache` of the file, or the
    entry of that name in the folder's config.json, holds the model and its arguments, where its
    weights come from (the tokenizer's fingerprint, the step), and mean and std of the input.

    Args:
        model: A checkpoint, or the directory of a run, whose newest checkpoint is meant; or
            anything else that `load_backbone` takes.
        out: The `.safetensors` file, or the folder; replaced if it exists.
        layout: `timm` is one file, `huggingface` a folder.

    Returns:
        The Python expression that loads it: `timm.create_model(...)`.

    Raises:
        ArtifactError: The checkpoint is missing or damaged.
        ConfigError: `out` is no name for that layout.
    """
    out = Path(out)
    if layout == "timm" and out.suffix != ".safetensors":
        raise ConfigError(
            f"{out} must end in .safetensors: timm knows the format by it. For a folder in the "
            "manner of the Hugging Face hub pass --layout huggingface."
        )
    if layout == "huggingface" and (out.suffix == ".safetensors" or out.is_file()):
        raise ConfigError(f"--layout huggingface writes a folder; {out} is the name of a file.")
    backbone = load_backbone(model)
    description = {
        "model": backbone.name,
        "arguments": backbone.arguments,
        "init": backbone.init,
        "mean": backbone.mean,
        "std": backbone.std,
        **({"class_names": backbone.class_names} if backbone.class_names else {}),
        **backbone.provenance,
    }
    if layout == "huggingface":
        return _write_folder(backbone, description, out)
    state = {name: tensor.contiguous() for name, tensor in backbone.state.items()}
    text = files.canonical_json(description).decode()
    files.publish(out, safetensors.torch.save(state, metadata={METADATA_KEY: text}))
    arguments = {**backbone.arguments, "checkpoint_path": str(out)}
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({backbone.name!r}, {listed})"


def _write_folder(backbone: Backbone, description: dict[str, Any], out: Path) -> str:
    size = backbone.image_size
    rule = {
        "mean": backbone.mean,
        "std": backbone.std,
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    # What timm says of the training of its own weights would be untrue of these.
    config: dict[str, Any] = {
        "pretrained_cfg": {**rule, "tag": "patchcache"},
        METADATA_KEY: description,
    }
    if backbone.class_names:
        config["label_names"] = list(backbone.class_names)
    vit = backbone.build().eval()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
        timm.models.save_for_hf(
            vit,
            made,
            model_config=config,
            model_args=dict(backbone.arguments),
            safe_serialization=True,
        )
        _leave_out_second_count(Path(made) / "config.json")
        # The config is what makes the folder a model, so it comes last.
        for path in sorted(Path(made).iterdir(), key=lambda path: path.suffix == ".json"):
            files.publish(out / path.name, path.read_bytes())
    return f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"


def _leave_out_second_count(config_path: Path) -> None:
    """Keep the number of classes at the top alone: transformers passes that itself."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
