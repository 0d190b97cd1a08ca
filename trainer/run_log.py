"""What a run says while it runs: a line to read, a row for scripts, a point of the curve.

`log.jsonl` has one row per interval; TensorBoard and, where a project is named, Weights & Biases
have the same values. After a resume all go on from the checkpoint's step: rows of steps that are
trained again are taken away first. Weights & Biases keeps those that it has, which are the same.
"""

import json
import logging
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cache_builder import files
from cache_builder.errors import MissingDependencyError

logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"

WANDB_ID_NAME = "wandb_id"

_LARGEST_EXPONENT = 700.0  # of what a float holds
_SHOWN = (
    ("loss", "loss", ".4g"), ("accuracy", "acc", ".3f"), ("perplexity", "ppl", ".4g"),
    ("top1", "top1", ".3f"), ("top5", "top5", ".3f"),
)  # fmt: skip


class LogRow(NamedTuple):
    """The means over one interval of steps, and how fast it was."""

    step: int  # optimiser steps done
    epoch: int
    metrics: dict[str, float]  # loss, gradient_norm and those of the method, by name
    learning_rate: float
    images_per_s: float
    data_wait: float  # share of the time spent waiting for a batch
    mfu: float | None = None  # share of the device's peak; None where that is not known

    def values(self) -> dict[str, float]:
        """Return everything by name, in one level; `perplexity` follows from `cross_entropy`."""
        values = {**self._asdict(), **self.metrics}
        del values["metrics"]
        if self.mfu is None:
            del values["mfu"]
        if "cross_entropy" in values:
            values["perplexity"] = math.exp(min(values["cross_entropy"], _LARGEST_EXPONENT))
        return values


class RunLog:
    """Writes rows to `log.jsonl`, to TensorBoard where it is installed, and to the logger."""

    def __init__(
        self,
        out_dir: Path,
        *,
        resumed_step: int,
        wandb_project: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log of a run, with rows up to and including `resumed_step`.

        Args:
            out_dir: Of the run.
            resumed_step: 0 for a new one.
            wandb_project: Of Weights & Biases, to log to that too.
            settings: Of the run, for Weights & Biases to show.

        Raises:
            MissingDependencyError: A project is named, and Weights & Biases is not installed.
        """
        self._wandb = _join_wandb(wandb_project, out_dir, settings) if wandb_project else None
        path = out_dir / LOG_NAME
        files.publish(path, _rows_up_to(path, resumed_step))
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("TensorBoard is not installed; %s alone has the curves", LOG_NAME)
        else:
            board = out_dir / "tensorboard"
            self._board = SummaryWriter(str(board), purge_step=resumed_step + 1)

    def write(self, row: LogRow, *, remaining_s: float) -> None:
        """Write one row; `remaining_s` is the time that the rest of the run will take."""
        values = row.values()
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, row.step)
        if self._wandb is not None:
            self._wandb.log(values, step=row.step)
        shown = [f"{label} {values[name]:{form}}" for name, label, form in _SHOWN if name in values]
        logger.info(
            "step %d %s img/s %.0f%s wait %.0f%% eta %s",
            row.step,
            " ".join(shown),
            row.images_per_s,
            "" if row.mfu is None else f" mfu {row.mfu:.1%}",
            100 * row.data_wait,
            _format_duration(remaining_s),
        )

    def write_picture(self, pixels: NDArray[np.uint8], step: int) -> None:
        """Give a picture (H, W, 3) to TensorBoard and Weights & Biases."""
        if self._board is not None:
            self._board.add_image("preview", pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"preview": wandb.Image(pixels)}, step=step)

    def __enter__(self) -> Self:
        """Return the log."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if exc_info[0] is None else 1)


def _format_duration(seconds: float) -> str:
    """Return a time as 45s, 1m20s or 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _join_wandb(project: str, out_dir: Path, settings: Mapping[str, Any] | None) -> Any:
    """Begin a run of Weights & Biases, or go on with the one that this directory's belongs to."""
    try:
        import wandb
    except ImportError as exc:
        raise MissingDependencyError(
            f"run.wandb_project is {project!r}, and Weights & Biases is not installed. "
            "Run: pip install wandb. Or leave run.wandb_project out: "
            f"{LOG_NAME} and TensorBoard have the same values."
        ) from exc
    path = out_dir / WANDB_ID_NAME
    if not path.is_file():
        files.publish(path, uuid.uuid4().hex.encode())
    return wandb.init(
        project=project,
        id=path.read_text(encoding="ascii"),
        resume="allow",
        dir=str(out_dir),
        name=out_dir.name,
        config=dict(settings or {}),
    )


def _rows_up_to(path: Path, step: int) -> bytes:
    kept = b""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            row_step = json.loads(line)["step"]
            is_later = row_step > step
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # the writer was killed inside this line
        if is_later or not line.endswith(b"\n"):
            break
        kept += line
    return kept
