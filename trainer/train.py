"""The training loop.

Everything random about a step is drawn from generators seeded by (seed, step): weights and
optimizer state are all there is to resume from, and a resumed run repeats the losses of an
undisturbed one, on a CPU to the last bit. The device is asked for numbers at log points and
checkpoints only. That is also where a loss or gradient that is not finite is noticed, and no
checkpoint is written before that check.
"""

import contextlib
import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch

from cache_builder import files
from cache_builder.errors import ConfigError, NotFiniteError
from cache_builder.formats import CacheManifest, Codebook, TokenCache
from trainer import checkpoint as checkpoints
from trainer import flops
from trainer.checkpoint import CacheIdentity, Checkpoint, Header, Progress
from trainer.config import TrainConfig
from trainer.data import Batch, BatchOrder, CachedViews, read_batches
from trainer.draws import derived_seed
from trainer.model import VitSpec, build_objective, pick_device, uses_bf16, vit_spec
from trainer.optim import build_optimizer, learning_rate, set_learning_rate
from trainer.run_log import LogRow, RunLog
from trainer.session import Stopwatch, stop_request
from trainer.viewer import Viewer, step_inputs

logger = logging.getLogger(__name__)

_NUM_KEYS_NAMED = 5


class TrainSummary(NamedTuple):
    """What a run came to."""

    steps: int  # done in all
    first_loss: float  # of step 1
    final_loss: float  # mean of the last logged interval
    images_per_s: float  # in this session; 0 if it had nothing to do
    seconds: float  # of this session's steps
    data_wait_share: float  # of those seconds
    checkpoint: Path
    finished: bool  # False: it was asked to leave early, and resumes


def run(
    config: TrainConfig,
    cache_path: str | Path,
    out_dir: str | Path,
    *,
    resume: bool = True,
    stop_after: int | None = None,
) -> TrainSummary:
    """Train from a cache until `run.steps`, or until asked to leave.

    SIGTERM and Ctrl-C let the current step finish, write a checkpoint and return; a second one
    acts at once.

    Args:
        config: The settings.
        cache_path: A finished cache.
        out_dir: Checkpoints, log and TensorBoard files; created if need be.
        resume: Go on from the newest checkpoint in `out_dir`, if there is one.
        stop_after: Leave after this step of the run, as on SIGTERM; the schedule does not change.

    Raises:
        ConfigError: Settings that do not go with the cache, or differ from those resumed.
        ArtifactError: The cache or the newest checkpoint is damaged or unfinished.
        TokenizerMismatchError: The checkpoint was trained on another tokenizer's tokens.
        NotFiniteError: The loss or the gradient is no longer a number.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after counts steps from 1; it cannot be {stop_after}.")
    out_dir = Path(out_dir)
    with TokenCache.open(cache_path, config.data.tokenizer) as cache:
        manifest = cache.manifest
        codebook = cache.codebook
    identity = CacheIdentity.of(cache_path, manifest)
    trainer = Trainer(config, manifest, codebook, identity, out_dir)
    newest = checkpoints.latest(out_dir)
    if newest is not None:
        if not resume:
            raise ConfigError(
                f"{out_dir} holds a run already ({newest.name}). Resume it, or pass another --out."
            )
        trainer.restore(newest)
    return trainer.train(cache_path, min(config.run.steps, stop_after or config.run.steps))


class Trainer:
    """One run: a model, its optimizer, and how far they are."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: CacheManifest,
        codebook: Codebook,
        cache: CacheIdentity,
        out_dir: Path,
    ) -> None:
        """Build model and optimizer, freshly initialised from the run's seed.

        Raises:
            ConfigError: The settings do not go with the cache.
        """
        self.config = config
        self.device = pick_device(config.run.device)
        self._is_bf16 = uses_bf16(config.run.precision, self.device)
        self._cache = cache
        self._out_dir = out_dir
        self._spec: VitSpec = vit_spec(config.model, manifest, config.data.image_size)
        sizes = [shard.num_samples for shard in manifest.shards]
        self._order = BatchOrder(sizes, config.data.batch_size, seed=config.run.seed)
        torch.manual_seed(config.run.seed)
        self.objective = build_objective(config, manifest, codebook).to(self.device)
        self._optimizer = build_optimizer(self.objective, config.optim)
        self._viewer = Viewer(self.objective, config, codebook, manifest.grid, out_dir, self.device)
        self._utilisation: flops.Utilisation | None = None
        self.step = 0  # done
        self._losses: tuple[float, float] | None = None  # first and last
        self._last_saved: Path | None = None
        self._metrics: list[dict[str, float]] = []  # of the steps since the last row, checked
        self._unchecked: list[tuple[int, list[str], dict[str, torch.Tensor]]] = []

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ArtifactError: It is damaged.
            TokenizerMismatchError: It was trained on another tokenizer's tokens.
            ConfigError: Samples or settings differ.
        """
        loaded = checkpoints.load(path)
        checkpoints.check_resume(path, loaded, self.config, self._cache)
        self.objective.load_state_dict(loaded.model)
        self._optimizer.load_state_dict(loaded.optimizer)
        progress = loaded.header.progress
        self.step = progress.step
        self._losses = progress.first_loss, progress.last_loss
        self._metrics = list(progress.unlogged)
        self._last_saved = path
        logger.info("resuming from %s", path)

    def train(self, cache_path: str | Path, last_step: int) -> TrainSummary:
        """Take steps until `last_step` are done or a signal asks to leave."""
        config = self.config
        files.sweep(self._out_dir)
        dataset = CachedViews(
            cache_path,
            image_size=self.objective.image_size,
            images=config.data.images,
            tokenizer=config.data.tokenizer,
            payloads=self.objective.payloads,
        )
        batches = read_batches(
            dataset,
            map(self._order.picks, range(self.step, last_step)),
            num_workers=config.data.num_workers,
            device=self.device,
        )
        self.objective.train()
        first_step, log_every = self.step, config.run.log_every
        watch = Stopwatch()
        with (
            RunLog(
                self._out_dir,
                resumed_step=self.step,
                wandb_project=config.run.wandb_project,
                settings=config.model_dump(mode="json"),
            ) as log,
            contextlib.closing(batches),
            contextlib.closing(dataset),
            stop_request() as stop,
        ):
            while self.step < last_step:
                with watch.waiting():
                    batch = next(batches)
                if self.step == first_step:
                    self._utilisation = self._viewer.utilisation(batch, self.step)
                self._take_step(batch)
                leaving = self.step == last_step or stop.is_set()
                is_row_due = self.step in (1, config.run.steps) or self.step % log_every == 0
                is_save_due = leaving or self.step % config.run.checkpoint_every == 0
                if is_row_due or is_save_due:
                    self._check()
                if is_row_due:
                    self._log(log, watch)
                if self._viewer.is_picture_due(self.step):
                    self._viewer.draw(log, batch, self.step)
                if is_save_due:
                    self._save()
                if leaving:
                    break
        finished = self.step >= config.run.steps
        if not finished:
            logger.info("left after step %d; the same command goes on from there", self.step)
        assert self._losses is not None
        assert self._last_saved is not None
        num_images = (self.step - first_step) * config.data.batch_size
        return TrainSummary(
            steps=self.step,
            first_loss=self._losses[0],
            final_loss=self._losses[1],
            images_per_s=num_images / watch.total_s if num_images else 0.0,
            seconds=watch.total_s,
            data_wait_share=watch.total_waited_s / watch.total_s if num_images else 0.0,
            checkpoint=self._last_saved,
            finished=finished,
        )

    def _take_step(self, batch: Batch) -> None:
        config, step = self.config, self.step
        torch.manual_seed(derived_seed(config.run.seed, step, "model"))
        set_learning_rate(self._optimizer, learning_rate(step, config))
        self._optimizer.zero_grad()
        size = config.data.micro_batch_size or config.data.batch_size
        total: dict[str, torch.Tensor] = {}
        for first in range(0, config.data.batch_size, size):
            part = batch.part(first, first + size)
            for name, value in self._add_gradients(part, first).items():
                total[name] = total[name] + value if name in total else value
        norm = torch.nn.utils.clip_grad_norm_(
            self.objective.parameters(), config.optim.clip_norm or math.inf
        )
        self._optimizer.step()
        self.step += 1
        self._unchecked.append((self.step, batch.keys, {**total, "gradient_norm": norm}))

    def _add_gradients(self, batch: Batch, first: int) -> dict[str, torch.Tensor]:
        """Add a micro-batch's share to the gradients; return its share of loss and metrics."""
        images, targets, generator = step_inputs(batch, self.config, self.step, self.device, first)
        share = len(batch.keys) / self.config.data.batch_size
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16):
            result = self.objective(images, targets, generator)
        (result["loss"] * share).backward()
        return {name: value.detach() * share for name, value in result.items()}

    def _check(self) -> None:
        """Fetch the metrics of the last steps and see that they are numbers.

        Raises:
            NotFiniteError: They are not.
        """
        if not self._unchecked:
            return
        rows = torch.stack([torch.stack(list(found.values())) for _, _, found in self._unchecked])
        for (step, keys, found), row in zip(self._unchecked, rows.tolist(), strict=True):
            values = dict(zip(found, row, strict=True))
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                raise NotFiniteError(_not_finite_message(step, keys, values))
            self._metrics.append(values)
        self._unchecked.clear()
        if self._losses is None:
            self._losses = self._metrics[0]["loss"], self._metrics[0]["loss"]

    def _log(self, log: RunLog, watch: "Stopwatch") -> None:
        means = {
            name: sum(values[name] for values in self._metrics) / len(self._metrics)
            for name in self._metrics[0]
        }
        assert self._losses is not None
        self._losses = self._losses[0], means["loss"]
        elapsed_s, waited_s, num_steps = watch.lap()
        images_per_s = num_steps * self.config.data.batch_size / elapsed_s
        row = LogRow(
            step=self.step,
            epoch=(self.step - 1) // self._order.steps_per_epoch,
            metrics=means,
            learning_rate=learning_rate(self.step - 1, self.config),
            images_per_s=images_per_s,
            data_wait=waited_s / elapsed_s,
            mfu=None if self._utilisation is None else self._utilisation.mfu(images_per_s),
        )
        self._metrics.clear()
        log.write(row, remaining_s=(self.config.run.steps - self.step) * elapsed_s / num_steps)

    def _save(self) -> None:
        assert self._losses is not None
        progress = Progress(
            step=self.step,
            first_loss=self._losses[0],
            last_loss=self._losses[1],
            unlogged=tuple(self._metrics),
        )
        header = Header(
            progress=progress,
            cache=self._cache,
            model_name=self._spec.name,
            model_arguments=self._spec.arguments,
            config=self.config.model_dump(mode="json"),
        )
        content = Checkpoint(header, self.objective.state_dict(), self._optimizer.state_dict())
        keep = self.config.run.keep_checkpoints
        self._last_saved = checkpoints.save(self._out_dir, content, keep=keep)
        logger.info("wrote %s", self._last_saved)


def _not_finite_message(step: int, keys: list[str], values: dict[str, float]) -> str:
    named = ", ".join(keys[:_NUM_KEYS_NAMED])
    more = f" and {len(keys) - _NUM_KEYS_NAMED} more" if len(keys) > _NUM_KEYS_NAMED else ""
    return (
        f"Step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}. "
        f"Its batch: {named}{more} ({len(keys)} samples). Start a new run with a lower optim.lr, "
        "more optim.warmup_steps or run.precision=fp32; if that stops at the same samples, look at "
        "their images."
    )
