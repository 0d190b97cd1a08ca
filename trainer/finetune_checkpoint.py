"""What fine-tuning leaves behind to go on from: one file, published whole.

`OUT/checkpoints/finetune_00000200.pt` holds the classifier's weights, their moving average where
one is kept, the optimizer's state and a header in JSON. As in pre-training, nothing of random
generators or of the data order is in it: both are functions of the step. Members are checked
against their checksums, and only tensors and plain values are read back.
"""

from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, Field, JsonValue

from cache_builder.errors import ArtifactError
from trainer.config import Init
from trainer.saved import read_saved, write_saved

FORMAT_VERSION: Final = 1

_FOLDER = "checkpoints"
_PATTERN = "finetune_*.pt"


class Progress(BaseModel, frozen=True, extra="forbid"):
    """How far fine-tuning is."""

    step: int = Field(ge=0, description="optimiser steps done")
    unlogged: tuple[float, ...] = Field((), description="losses since the last row of the log")
    best_top1: float = Field(0.0, description="on the test part, so far")


class Header(BaseModel, frozen=True, extra="forbid"):
    """Everything in a checkpoint but the tensors."""

    format_version: int = FORMAT_VERSION
    progress: Progress
    model_name: str = Field(description="of timm")
    model_arguments: dict[str, JsonValue] = Field(description="of timm.create_model")
    init: Init | None = Field(description="of the trainer, that belongs to the model; none: timm's")
    image_size: int = Field(gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    provenance: dict[str, JsonValue] = Field(description="of the weights it began with")
    samples: str = Field(description="digest of the keys and labels trained on")
    config: dict[str, JsonValue] = Field(description="the resolved settings")


class Finetuned(NamedTuple):
    """A checkpoint in memory; tensors are on the CPU after `load`."""

    header: Header
    model: dict[str, Any]
    optimizer: dict[str, Any]
    ema: dict[str, Any] | None

    @property
    def best_state(self) -> dict[str, Any]:
        """The weights to use: the moving average where one is kept."""
        return self.model if self.ema is None else self.ema


def save(out_dir: Path, checkpoint: Finetuned, *, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`."""
    path = out_dir / _FOLDER / f"finetune_{checkpoint.header.progress.step:08d}.pt"
    parts = checkpoint._asdict()
    write_saved(path, parts.pop("header"), parts)
    for old in sorted(path.parent.glob(_PATTERN))[:-keep]:
        old.unlink()
    return path


def latest(out_dir: Path) -> Path | None:
    """Return the checkpoint of the highest step in a directory, or None."""
    return max((out_dir / _FOLDER).glob(_PATTERN), default=None)


def describe(path: Path) -> dict[str, Any]:
    """Return what a person asks of a checkpoint, as plain values."""
    loaded = load(path)
    header = loaded.header
    return {
        "step": header.progress.step,
        "best_top1": header.progress.best_top1,
        "model": header.model_name,
        "model_arguments": header.model_arguments,
        "begun_with": header.provenance,
        "num_classes": len(loaded.model["head.bias"]),
        "has_moving_average": loaded.ema is not None,
        "config": header.config,
        "format_version": header.format_version,
    }


def is_finetuned(path: Path) -> bool:
    """Say whether a file, or what lies in a directory, is a checkpoint of fine-tuning."""
    return latest(path) is not None if path.is_dir() else path.match(_PATTERN)


def load(path: Path) -> Finetuned:
    """Read a checkpoint.

    Args:
        path: The file, or the directory of a run, whose newest checkpoint is meant.

    Raises:
        FormatVersionError: It was written by a newer version.
        ArtifactError: It is missing or damaged.
    """
    path = (latest(path) or path) if path.is_dir() else path
    way_out = f"Delete {path.name} to go on from the checkpoint before it."
    if not path.is_file():
        raise ArtifactError(
            f"There is no checkpoint at {path}. Pass the --out of `patchcache finetune`."
        )
    saved = read_saved(path, FORMAT_VERSION, way_out=way_out)
    header = saved.parse_header(Header)
    saved.require("model", "optimizer")
    return Finetuned(header, saved.parts["model"], saved.parts["optimizer"], saved.parts.get("ema"))
