"""Fine-tuning: the ViT and a linear classifier on its mean patch token, trained on labels.

The recipe of the BEiT family (arXiv:2106.08254, its code for ImageNet): layer-wise decay of the
learning rate, stochastic depth, Mixup, CutMix, RandAugment, random erasing and label smoothing, all
of them timm's. The final norm of pre-training makes way for a fresh one after pooling. A step is in
`finetune_step`; this is the loop around it: what is read, tested, logged and saved when.
"""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache_builder import files
from cache_builder.errors import ConfigError, NotFiniteError
from trainer import finetune_checkpoint as checkpoints
from trainer import pixels, settings
from trainer.backbones import Backbone, load_backbone
from trainer.checkpoint import latest as latest_of_training
from trainer.classifier import classifier_arguments
from trainer.evaluate import accuracy_of, five_best
from trainer.finetune_checkpoint import Finetuned, Header, Progress
from trainer.finetune_config import FREE_ON_RESUME, FinetuneConfig
from trainer.finetune_data import AugmentedBatch, AugmentedImages, batches
from trainer.finetune_step import FinetuneState, FinetuneStepper
from trainer.labelled import CentreSquares
from trainer.model import pick_device
from trainer.objectives.interface import Normalise
from trainer.run_log import LogRow, RunLog
from trainer.session import Stopwatch, stop_request
from trainer.split import Split, open_split
from trainer.workers import load_ahead

logger = logging.getLogger(__name__)

_TEST_BATCH = 256


class FinetuneSummary(NamedTuple):
    """What fine-tuning came to."""

    steps: int  # done in all
    top1: float  # on the test part
    top5: float
    chance: float  # of always naming the class that is most frequent in the training part
    num_train: int
    num_test: int
    num_classes: int
    images_per_s: float  # in this session; 0 if it had nothing to do
    seconds: float
    checkpoint: Path
    finished: bool  # False: it was asked to leave early, and resumes


def run(
    config: FinetuneConfig,
    model: str | Path,
    data: str | Path,
    out_dir: str | Path,
    *,
    test_data: str | Path | None = None,
    images: str | None = None,
    stop_after: int | None = None,
) -> FinetuneSummary:
    """Fine-tune until `run.epochs`, or until asked to leave, and test.

    SIGTERM and Ctrl-C let the current step finish, write a checkpoint and return.

    Args:
        config: The settings.
        model: What `load_backbone` takes.
        data: Labelled images: a cache, or any source of images.
        out_dir: Checkpoints, log and TensorBoard files; a run that lies there is continued.
        test_data: Such images to test on; None keeps a fifth of `data`, chosen by key, for it.
        images: Where the images lie, for a cache that holds none.
        stop_after: Leave after this step of the run, as on SIGTERM.

    Raises:
        ArtifactError: The model, a cache or the newest checkpoint is damaged.
        SourceError: There are no images at a place.
        ConfigError: The model is no plain ViT, the images have no labels or are too few, or
            settings differ from those resumed.
        NotFiniteError: The loss is no longer a number.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after counts steps from 1; it cannot be {stop_after}.")
    out_dir = Path(out_dir)
    if (trained := latest_of_training(out_dir)) is not None:
        raise ConfigError(
            f"{out_dir} holds a run of pre-training ({trained.name}), whose log would be lost. "
            "Pass another --out."
        )
    split = open_split(data, test_data, images)
    tuner = Finetuner(config, load_backbone(model).without_classifier(), split, out_dir)
    return tuner.train(stop_after)


class Finetuner:
    """One run: a classifier, its optimizer, and how far they are."""

    def __init__(
        self, config: FinetuneConfig, backbone: Backbone, split: Split, out_dir: Path
    ) -> None:
        """Build the classifier, or take it from the newest checkpoint in `out_dir`.

        Raises:
            ConfigError: The settings do not go with the model, the data or that checkpoint.
        """
        self.config = config
        self.device = pick_device(config.run.device)
        self._backbone = backbone
        self._split = split
        self._out_dir = out_dir
        batch_size = config.data.batch_size
        if len(split.places) < batch_size:
            raise ConfigError(
                f"{split.train.location} has {len(split.places)} labelled images to train on, "
                f"fewer than one batch of {batch_size}. Pass `--set data.batch_size=N`."
            )
        self._steps_per_epoch = len(split.places) // batch_size
        self._num_steps = config.run.epochs * self._steps_per_epoch
        self._stepper = FinetuneStepper(
            config, backbone, num_classes=split.num_classes, steps_per_epoch=self._steps_per_epoch,
            device=self.device,
        )  # fmt: skip
        self._data = AugmentedImages(split.train, backbone, config.data, config.run.seed)
        self.step = 0  # done
        self._losses: list[float] = []  # of the steps since the last row, checked
        self._unchecked: list[tuple[int, list[str], Tensor]] = []
        self._best_top1 = 0.0
        self._last_saved: Path | None = None
        self._samples = split.digest()
        newest = checkpoints.latest(out_dir)
        if newest is not None:
            self._restore(newest)

    def train(self, stop_after: int | None = None) -> FinetuneSummary:
        """Take steps until all are done or a signal asks to leave, then test."""
        config, split = self.config, self._split
        files.sweep(self._out_dir)
        last_step = min(self._num_steps, stop_after or self._num_steps)
        first_step = self.step
        steps = batches(
            split.places,
            split.labels,
            config.data.batch_size,
            seed=config.run.seed,
            steps=range(self.step, last_step),
        )
        loader = load_ahead(
            self._data, steps, num_workers=config.data.num_workers, device=self.device
        )
        watch, tested, accuracy = Stopwatch(), -1, (0.0, 0.0)
        with (
            RunLog(
                self._out_dir,
                resumed_step=self.step,
                wandb_project=config.run.wandb_project,
                settings=config.model_dump(mode="json"),
            ) as log,
            contextlib.closing(loader),
            stop_request() as stop,
        ):
            while self.step < last_step:
                with watch.waiting():
                    batch = next(loader)
                self._take_step(batch)
                leaving = self.step == last_step or stop.is_set()
                epoch, into = divmod(self.step, self._steps_per_epoch)
                is_test_due = into == 0 and epoch % config.run.test_every == 0
                is_test_due = is_test_due or self.step == self._num_steps
                is_save_due = leaving or self.step % config.run.checkpoint_every == 0
                is_row_due = self.step == 1 or self.step % config.run.log_every == 0 or is_test_due
                if is_row_due or is_save_due:
                    self._check()
                if is_test_due:
                    accuracy, tested = self.test(), self.step
                    self._best_top1 = max(self._best_top1, accuracy[0])
                if is_row_due:
                    self._log(log, watch, accuracy if is_test_due else None)
                if is_save_due:
                    self._save()
                if leaving:
                    break
        seconds = watch.total_s
        if tested != self.step:
            accuracy = self.test()
        split.train.close()
        split.test.close()
        finished = self.step >= self._num_steps
        if not finished:
            logger.info("left after step %d; the same command goes on from there", self.step)
        assert self._last_saved is not None
        num_images = (self.step - first_step) * config.data.batch_size
        return FinetuneSummary(
            steps=self.step,
            top1=accuracy[0],
            top5=accuracy[1],
            chance=split.chance(),
            num_train=len(split.places),
            num_test=len(split.test_places),
            num_classes=split.num_classes,
            images_per_s=num_images / seconds if num_images else 0.0,
            seconds=seconds,
            checkpoint=self._last_saved,
            finished=finished,
        )

    def test(self) -> tuple[float, float]:
        """Return top-1 and top-5 accuracy on the test part."""
        model = self._stepper.tested
        model.eval()
        normalise = Normalise(self._backbone.mean, self._backbone.std).to(self.device)
        squares = CentreSquares(
            self._split.test, self._backbone.image_size, self.config.data.test_crop
        )
        places = self._split.test_places
        blocks = (places[at : at + _TEST_BATCH] for at in range(0, len(places), _TEST_BATCH))
        wanted = {
            place.key: label for place, label in zip(places, self._split.test_labels, strict=True)
        }
        named, labels, refused = [], [], []
        workers = self.config.data.num_workers
        for batch in load_ahead(squares, blocks, num_workers=workers, device=self.device):
            refused += batch.refused
            if batch.pixels is None:
                continue
            images = normalise(pixels.to_unit_range(batch.pixels, self.device))
            with torch.inference_mode(), self._stepper.autocast():
                named.append(five_best(model(images)).cpu())
            labels += [wanted[key] for key in batch.keys]
        if refused:
            logger.warning("%d test images are left out, as %s", len(refused), refused[0])
        if not named:
            raise ConfigError(f"{self._split.test.location} has no images to test on.")
        return accuracy_of(torch.cat(named), torch.tensor(labels))

    def _take_step(self, batch: AugmentedBatch) -> None:
        step = self.step
        if batch.refused:
            logger.warning(
                "step %d: %d images cannot be decoded, as %s; others of the batch stand for them",
                step + 1, len(batch.refused), batch.refused[0],
            )  # fmt: skip
        loss = self._stepper.take(step, batch)
        self.step += 1
        self._unchecked.append((self.step, batch.keys, loss))

    def _check(self) -> None:
        for step, keys, loss in self._unchecked:
            value = float(loss)
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"Step {step}: loss {value}. Its batch begins with {', '.join(keys[:5])}. "
                    "Start a new run with a lower optim.lr, more optim.warmup_epochs, an "
                    "optim.clip_norm or run.precision=fp32."
                )
            self._losses.append(value)
        self._unchecked.clear()

    def _log(self, log: RunLog, watch: Stopwatch, accuracy: tuple[float, float] | None) -> None:
        elapsed_s, waited_s, num_steps = watch.lap()
        metrics = {"loss": sum(self._losses) / len(self._losses)}
        if accuracy is not None:
            metrics |= {"top1": accuracy[0], "top5": accuracy[1]}
        self._losses.clear()
        row = LogRow(
            step=self.step,
            epoch=(self.step - 1) // self._steps_per_epoch,
            metrics=metrics,
            learning_rate=self._stepper.learning_rate(self.step - 1),
            images_per_s=num_steps * self.config.data.batch_size / elapsed_s,
            data_wait=waited_s / elapsed_s,
        )
        log.write(row, remaining_s=(self._num_steps - self.step) * elapsed_s / num_steps)

    def _save(self) -> None:
        backbone = self._backbone
        progress = Progress(step=self.step, unlogged=tuple(self._losses), best_top1=self._best_top1)
        header = Header(
            progress=progress,
            model_name=backbone.name,
            model_arguments={**backbone.arguments, **classifier_arguments(self._split.num_classes)},
            init=backbone.init,
            image_size=backbone.image_size,
            mean=backbone.mean,
            std=backbone.std,
            class_names=self._split.class_names,
            provenance=dict(backbone.provenance),
            samples=self._samples,
            config=self.config.model_dump(mode="json"),
        )
        content = Finetuned(header, *self._stepper.state())
        keep = self.config.run.keep_checkpoints
        self._last_saved = checkpoints.save(self._out_dir, content, keep=keep)
        logger.info("wrote %s", self._last_saved)

    def _restore(self, path: Path) -> None:
        loaded = checkpoints.load(path)
        header = loaded.header
        now = self.config.model_dump(mode="json") | {
            "samples": self._samples,
            "begun_with": files.canonical_json(dict(self._backbone.provenance)).decode(),
        }
        then: dict[str, Any] = dict(header.config) | {
            "samples": header.samples,
            "begun_with": files.canonical_json(header.provenance).decode(),
        }
        changed = {
            key: values
            for key, values in settings.changed(then, now).items()
            if key not in FREE_ON_RESUME
        }
        if changed:
            listed = ", ".join(
                f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items()
            )
            raise ConfigError(
                f"{path} was fine-tuned otherwise: {listed}. Go back to that, or start a new run "
                "with another --out."
            )
        state = FinetuneState(loaded.model, loaded.optimizer, loaded.ema)
        self._stepper.load(state, header.progress.step)
        self.step = header.progress.step
        self._losses = list(header.progress.unlogged)
        self._best_top1 = header.progress.best_top1
        self._last_saved = path
        logger.info("resuming from %s", path)
