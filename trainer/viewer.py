"""Looks at a run from outside: what a step costs, and what the method predicts now.

Neither changes the run: its losses are the same to the last bit with and without.
"""

import logging
from pathlib import Path

import torch
from torch import nn

from cache_builder.formats import Codebook
from trainer import flops, pictures
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.model import uses_bf16
from trainer.run_log import RunLog
from trainer.step import step_inputs

logger = logging.getLogger(__name__)

_SAMPLES_COUNTED = 2


class Viewer:
    """Measures and draws one run."""

    def __init__(
        self,
        objective: nn.Module,
        config: TrainConfig,
        codebook: Codebook,
        grid: tuple[int, int],
        out_dir: Path,
        device: torch.device,
    ) -> None:
        """Take the method, neither compiled nor wrapped."""
        self._objective = objective
        self._config = config
        self._codebook = codebook
        self._grid = grid
        self._out_dir = out_dir
        self._device = device
        self._colours: pictures.TokenColours | None = None  # made for the first picture

    def utilisation(self, batch: Batch, step: int) -> flops.Utilisation | None:
        """Return what a step costs per image, and the device's peak; None if that is not known."""
        peak = self._config.run.peak_flops or flops.peak_flops(self._device)
        if peak is None:
            return None
        few = batch.part(0, min(_SAMPLES_COUNTED, len(batch.keys)))

        def forward() -> None:
            self._objective(*step_inputs(few, self._config, step, self._device))

        per_image = flops.training_flops(self._objective, forward, len(few.keys))
        logger.info("%.3g FLOPs per image; the device's peak is %.3g/s", per_image, peak)
        return flops.Utilisation(per_image, peak)

    def is_picture_due(self, steps_done: int) -> bool:
        """Say whether `run.picture_every` asks for a picture now."""
        every = self._config.run.picture_every
        return every > 0 and steps_done % every == 0

    def draw(self, log: RunLog, batch: Batch, steps_done: int) -> Path:
        """Write a picture of what is predicted now, under the masks of the step just done."""
        if self._colours is None:
            self._colours = pictures.TokenColours(self._codebook, self._grid)
        few = batch.part(0, min(pictures.NUM_SAMPLES, len(batch.keys)))
        is_bf16 = uses_bf16(self._config.run.precision, self._device)
        with (
            flops.undisturbed(self._objective),
            torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16),
        ):
            inputs = step_inputs(few, self._config, steps_done - 1, self._device)
            preview = self._objective.preview(*inputs)
        images, targets, _ = inputs
        title = f"{self._config.objective.method}, step {steps_done:,}"
        picture = pictures.draw_preview(
            images, targets.token_ids, preview, self._colours, self._grid, title
        )
        path = pictures.write_png(self._out_dir, steps_done, picture)
        log.write_picture(picture, steps_done)
        logger.info("drew %s", path)
        return path
