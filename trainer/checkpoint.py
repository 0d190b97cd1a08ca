"""What a run leaves behind: checkpoints to resume from.

A checkpoint is one file, `OUT/checkpoints/step_00000200.pt`, published whole. It holds the weights,
the optimizer's state, the average of the ViT's weights if there is one, and a header in JSON; all
tensors are whole, however many processes trained them. No state of random generators or of the data
order is in it, because both are functions of the step. Only tensors and plain values are read back
(`weights_only`), and the checksum of every member is verified first.

A checkpoint belongs to one cache. Resuming on tokens of another tokenizer, on other samples or
with other settings is refused with the difference. A damaged checkpoint is named with the reason,
and the newest good one before it is taken.
"""

import logging
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, Field, JsonValue

from cache_builder import files
from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    FormatVersionError,
    TokenizerMismatchError,
)
from cache_builder.formats import CacheManifest
from cache_builder.stores import absolute_location
from trainer.config import TrainConfig, differences, parse_config
from trainer.model import VitSpec
from trainer.saved import read_saved, write_saved

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

# Settings that say how long, how often and where, and nothing about what is learned at a step.
FREE_ON_RESUME: Final = frozenset(
    {
        "run.steps",
        "run.device",
        "run.compile",
        "run.sharding",
        "run.log_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.picture_every",
        "run.peak_flops",
        "run.wandb_project",
        "data.num_workers",
        "data.micro_batch_size",
        "data.images",
        "model.activation_checkpointing",
    }
)

_FOLDER = "checkpoints"
_PATTERN = "step_*.pt"
_VIT_PREFIX = "vit."
_WAY_OUT = "Delete it to go on from the checkpoint before it."


class Progress(BaseModel, frozen=True, extra="forbid"):
    """How far a run is."""

    step: int = Field(ge=0, description="optimiser steps done")
    first_loss: float = Field(description="of step 1")
    last_loss: float = Field(description="mean of the last logged interval")
    unlogged: tuple[dict[str, float], ...] = Field(
        (), description="metrics of the steps since the last logged one"
    )


class CacheIdentity(BaseModel, frozen=True, extra="forbid"):
    """Which cache a run is trained from."""

    path: str
    fingerprint: str = Field(description="of the tokenizer")
    content: str = Field(description="SHA-256 over the digests of the shards")
    num_samples: int = Field(gt=0)
    grid: tuple[int, int]
    vocab_size: int = Field(gt=0)

    @classmethod
    def of(cls, path: str | Path, manifest: CacheManifest) -> "CacheIdentity":
        """Identify a cache; moving it changes nothing but the path."""
        shards = [[shard.num_samples, shard.sha256] for shard in manifest.shards]
        return cls(
            path=absolute_location(path),
            fingerprint=manifest.fingerprint,
            content=files.sha256_bytes(files.canonical_json(shards)),
            num_samples=manifest.num_samples,
            grid=manifest.grid,
            vocab_size=manifest.vocab_size,
        )


class Header(BaseModel, frozen=True, extra="forbid"):
    """Everything in a checkpoint but the tensors."""

    format_version: int = FORMAT_VERSION
    progress: Progress
    cache: CacheIdentity
    model_name: str = Field(description="of timm")
    model_arguments: dict[str, JsonValue] = Field(description="of timm.create_model")
    config: dict[str, JsonValue] = Field(description="the resolved settings")

    @property
    def vit_spec(self) -> VitSpec:
        """The ViT's shape."""
        model = self.config["model"]
        init: Any = model.get("init", "beit") if isinstance(model, dict) else "beit"
        return VitSpec(self.model_name, dict(self.model_arguments), init)


class Checkpoint(NamedTuple):
    """A checkpoint in memory; tensors are on the CPU after `load`."""

    header: Header
    model: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] | None = None  # of the ViT's weights, by its own names

    @property
    def config(self) -> TrainConfig:
        """The settings of the run.

        Raises:
            ConfigError: They are not ones that this version knows.
        """
        return parse_config(self.header.config)

    @property
    def vit_state(self) -> dict[str, Any]:
        """The ViT's weights by timm's names: their average, where the run kept one."""
        if self.average is not None:
            return self.average
        return {
            name.removeprefix(_VIT_PREFIX): tensor
            for name, tensor in self.model.items()
            if name.startswith(_VIT_PREFIX)
        }


def save(out_dir: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and keep the newest `keep` up to it; remove every other.

    What there is of later steps was damaged, or this one would have been resumed from it.
    """
    path = path_of(out_dir, checkpoint.header.progress.step)
    parts = {
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
        "average": checkpoint.average,
    }
    write_saved(path, checkpoint.header, parts)
    found = sorted(path.parent.glob(_PATTERN))
    kept = [other for other in found if other <= path][-keep:]
    for other in set(found).difference(kept):
        other.unlink()
    return path


def path_of(out_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run's directory."""
    return out_dir / _FOLDER / f"step_{step:08d}.pt"


def latest(out_dir: Path) -> Path | None:
    """Return the checkpoint of the highest step in a run's directory, good or not, or None."""
    return max((out_dir / _FOLDER).glob(_PATTERN), default=None)


def newest_good(out_dir: Path) -> tuple[Path, Checkpoint] | None:
    """Read the newest checkpoint of a run that is whole; None if the run has none at all.

    Damaged ones are named in a warning with the reason.

    Raises:
        FormatVersionError: One was written by a newer version.
        ArtifactError: All are damaged.
    """
    reasons = []
    for path in sorted((out_dir / _FOLDER).glob(_PATTERN), reverse=True):
        try:
            loaded = load(path)
        except FormatVersionError:
            raise
        except ArtifactError as exc:
            reasons.append(str(exc))
            continue
        for reason in reasons:
            logger.warning("%s Going on from %s instead.", reason, path.name)
        return path, loaded
    if not reasons:
        return None
    raise ArtifactError(
        f"{' '.join(reasons)} No good checkpoint is left in {out_dir / _FOLDER}: "
        "delete that folder to begin again, or pass another --out."
    )


def load(path: str | Path, content: bytes | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: The file, or the directory of a run, whose newest good checkpoint is meant.
        content: Of the file, where another host has it.

    Raises:
        FormatVersionError: It was written by a newer version.
        ArtifactError: It is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        newest = newest_good(path)
        if newest is None:
            raise ArtifactError(
                f"{path} holds no checkpoint. Pass the --out of `patchcache train`."
            )
        return newest[1]
    if content is None and not path.is_file():
        raise ArtifactError(
            f"There is no checkpoint at {path}. Pass the --out of `patchcache train`."
        )

    saved = read_saved(path, FORMAT_VERSION, way_out=_WAY_OUT, content=content)
    header = saved.parse_header(Header)
    saved.require("model", "optimizer")
    average = saved.parts.get("average")
    return Checkpoint(header, saved.parts["model"], saved.parts["optimizer"], average)


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a person asks of a checkpoint, as plain values."""
    loaded = load(path)
    header, vit = loaded.header, loaded.vit_state
    return {
        "step": header.progress.step,
        "steps": header.config["run"]["steps"],  # type: ignore[index, call-overload]
        "loss": header.progress.last_loss,
        "model": header.model_name,
        "model_arguments": header.model_arguments,
        "vit_parameters": sum(tensor.numel() for tensor in vit.values()),
        "cache": header.cache.model_dump(mode="json"),
        "config": header.config,
        "format_version": header.format_version,
    }


def check_resume(
    path: Path, checkpoint: Checkpoint, config: TrainConfig, cache: CacheIdentity
) -> None:
    """Refuse to go on with a run under other circumstances than it began with.

    Raises:
        TokenizerMismatchError: The cache holds tokens of another tokenizer.
        ConfigError: The cache holds other samples, or a setting has changed.
    """
    trained = checkpoint.header.cache
    if trained.fingerprint != cache.fingerprint:
        raise TokenizerMismatchError(
            f"{path} was trained on tokens from {trained.fingerprint}, but {cache.path} holds "
            f"tokens from {cache.fingerprint}. Pass the cache it was trained on, or another --out."
        )
    if trained.content != cache.content:
        raise ConfigError(
            f"{path} was trained on {trained.num_samples:,} samples in {trained.path}; "
            f"{cache.path} has {cache.num_samples:,} and not the same shards. "
            "Pass that cache, or another --out."
        )
    changed = {
        key: values
        for key, values in differences(checkpoint.config, config).items()
        if key not in FREE_ON_RESUME
    }
    if changed:
        listed = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"{path} was trained with other settings: {listed}. "
            "Go back to those, or start a new run with another --out."
        )
