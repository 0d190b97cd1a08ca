"""The training loop.

A step is a function of the settings, the cache and the state that the step before it left
(`step`), so a resumed run repeats the losses of an undisturbed one, on a CPU to the last bit. The
device is asked for numbers at log points and checkpoints only. That is also where a loss or
gradient that is not finite is noticed: its step changed no weight, and no checkpoint is written
after it. Under `torchrun` every process runs this loop on its part of each batch, and the first
one writes.
"""

import contextlib
import logging
import math
import socket
import threading
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from cache_builder import files
from cache_builder.errors import ConfigError, NotFiniteError
from cache_builder.formats import CacheManifest, Codebook, TokenCache
from trainer import checkpoint as checkpoints
from trainer import distributed, finetune_checkpoint, flops
from trainer.checkpoint import CacheIdentity, Checkpoint, Header, Progress
from trainer.config import TrainConfig
from trainer.data import BatchOrder, CachedViews
from trainer.distributed import Ranks
from trainer.model import VitSpec, pick_device, vit_spec
from trainer.optim import learning_rate
from trainer.run_log import LogRow, RunLog
from trainer.session import Stopwatch, rare_collections, stop_request
from trainer.step import State, Stepper
from trainer.viewer import Viewer
from trainer.workers import load_ahead

logger = logging.getLogger(__name__)

_NUM_KEYS_NAMED = 5
_AGREE_EVERY = 10  # steps between questions whether any rank was asked to leave, on CUDA


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
    stop_after: int | None = None,
) -> TrainSummary:
    """Train from a cache until `run.steps`, or until asked to leave.

    A run that has a checkpoint in `out_dir` goes on from the newest.

    SIGTERM and Ctrl-C let the current step finish, write a checkpoint and return; a second one
    acts at once. Ranks, if there are several, leave after the same step.

    Args:
        config: The settings.
        cache_path: A finished cache.
        out_dir: Checkpoints, log and TensorBoard files; created if need be.
        stop_after: Leave after this step of the run, as on SIGTERM; the schedule does not change.

    Raises:
        ConfigError: Settings that do not go with the cache, or differ from those resumed.
        ArtifactError: The cache is damaged or unfinished, or every checkpoint is damaged.
        TokenizerMismatchError: The checkpoint was trained on another tokenizer's tokens.
        NotFiniteError: The loss or the gradient is no longer a number.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after counts steps from 1; it cannot be {stop_after}.")
    out_dir = Path(out_dir)
    if finetune_checkpoint.is_finetuned(out_dir):
        raise ConfigError(
            f"{out_dir} holds a run of fine-tuning, whose log would be lost. Pass another --out."
        )
    with TokenCache.open(cache_path, config.data.tokenizer) as cache:
        manifest = cache.manifest
        codebook = cache.codebook
    identity = CacheIdentity.of(cache_path, manifest)
    device = distributed.local_device(pick_device(config.run.device))
    with distributed.join(device) as ranks:
        trainer = Trainer(config, manifest, codebook, identity, out_dir, ranks, device)
        found = _newest(out_dir, ranks)
        if found is not None:
            trainer.restore(*found)
        return trainer.train(cache_path, min(config.run.steps, stop_after or config.run.steps))


def _newest(out_dir: Path, ranks: Ranks) -> tuple[Path, Checkpoint] | None:
    """Return the checkpoint to go on from, the same one on every rank.

    It is the first rank's, which has written it. A host that has no such file is sent it.

    Raises:
        ConfigError: Another host alone has one.
        ArtifactError: Every checkpoint is damaged.
    """
    read: dict[Path, Checkpoint] = {}

    def find() -> tuple[Path, str] | None:
        found = checkpoints.newest_good(out_dir)
        if found is None:
            return None
        read.update([found])
        return found[0], files.sha256_file(found[0]) if ranks.size > 1 else ""

    first = ranks.from_first(find)
    if first is None:
        _check_nobody_has_one(out_dir, ranks)
        return None
    path, digest = first
    is_missing = path not in read and not (path.is_file() and files.sha256_file(path) == digest)
    content = ranks.from_first(path.read_bytes) if ranks.max(is_missing) else None
    return path, read.get(path) or checkpoints.load(path, content if is_missing else None)


def _check_nobody_has_one(out_dir: Path, ranks: Ranks) -> None:
    """Refuse to begin a run anew of which another host than the first has checkpoints.

    Raises:
        ConfigError: One has.
    """
    found = ranks.gather((socket.gethostname(), checkpoints.latest(out_dir)))
    for host, newest in found:
        if newest is not None:
            raise ConfigError(
                f"{host} has {newest}, and {found[0][0]}, where this run's first process is, has "
                f"no checkpoint. Start {host} with --node-rank 0, put --out on a disk that all "
                "hosts share, or pass another --out."
            )


class Trainer:
    """One run: a model, its optimizer, and how far they are."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: CacheManifest,
        codebook: Codebook,
        cache: CacheIdentity,
        out_dir: Path,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        """Build model and optimizer, freshly initialised from the run's seed.

        Raises:
            ConfigError: The settings do not go with the cache or the number of ranks.
        """
        self.config = config
        self._ranks = ranks
        self._device = device
        self._cache = cache
        self._out_dir = out_dir
        self._spec: VitSpec = vit_spec(config.model, manifest, config.data.image_size)
        self._stepper = Stepper(config, manifest, codebook, ranks, device)
        self.objective = self._stepper.objective
        self._viewer = Viewer(self.objective, config, codebook, manifest.grid, out_dir, device)
        self._utilisation: flops.Utilisation | None = None
        share = self._stepper.share
        self._order = BatchOrder(
            [shard.num_samples for shard in manifest.shards],
            config.data.batch_size,
            seed=config.run.seed,
            first=ranks.rank * share,
            count=share,
        )
        self.step = 0  # done
        self._losses: tuple[float, float] | None = None  # first and last
        self._last_saved: Path | None = None
        self._metrics: list[dict[str, float]] = []  # of the steps since the last row, checked
        # Step, keys and shares of the metrics of this rank.
        self._unchecked: list[tuple[int, list[str], dict[str, Tensor]]] = []

    def restore(self, path: Path, loaded: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            TokenizerMismatchError: It was trained on another tokenizer's tokens.
            ConfigError: Samples or settings differ.
        """
        checkpoints.check_resume(path, loaded, self.config, self._cache)
        self._stepper.load(State(loaded.model, loaded.optimizer, loaded.average))
        progress = loaded.header.progress
        self.step = progress.step
        self._losses = progress.first_loss, progress.last_loss
        self._metrics = list(progress.unlogged)
        self._last_saved = path
        self._say("resuming from %s", path)

    def train(self, cache_path: str | Path, last_step: int) -> TrainSummary:
        """Take steps until `last_step` are done or a signal asks to leave."""
        config = self.config
        if self._ranks.is_first:
            files.sweep(self._out_dir)
        dataset = CachedViews(
            cache_path,
            image_size=self.objective.image_size,
            images=config.data.images,
            tokenizer=config.data.tokenizer,
            payloads=self.objective.payloads,
        )
        batches = load_ahead(
            dataset,
            map(self._order.picks, range(self.step, last_step)),
            num_workers=config.data.num_workers,
            device=self._device,
        )
        self.objective.train()
        first_step, log_every = self.step, config.run.log_every
        watch = Stopwatch()
        with (
            self._open_log() as log,
            contextlib.closing(batches),
            contextlib.closing(dataset),
            rare_collections() as step_done,
            stop_request() as stop,
        ):
            while self.step < last_step:
                with watch.waiting():
                    batch = next(batches)
                if self.step == first_step:
                    self._utilisation = self._viewer.utilisation(batch, self.step)
                found = self._stepper.take(self.step, batch)
                self.step += 1
                self._unchecked.append((self.step, batch.keys, found))
                step_done(self.step)
                leaving = self.step == last_step or self._is_asked_to_leave(stop)
                is_row_due = self.step in (1, config.run.steps) or self.step % log_every == 0
                is_save_due = leaving or self.step % config.run.checkpoint_every == 0
                if is_row_due or is_save_due:
                    self._check()
                if is_row_due:
                    self._log(log, watch)
                if log is not None and self._viewer.is_picture_due(self.step):
                    self._viewer.draw(log, batch, self.step)
                if is_save_due:
                    self._save()
                if leaving:
                    break
        finished = self.step >= config.run.steps
        if not finished:
            self._say("left after step %d; the same command goes on from there", self.step)
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

    def _is_asked_to_leave(self, stop: threading.Event) -> bool:
        """Say whether any rank was; all ranks get the same answer for a step."""
        ranks = self._ranks
        if ranks.size > 1 and self._device.type == "cuda" and self.step % _AGREE_EVERY:
            return False
        return bool(ranks.max(stop.is_set()))

    def _check(self) -> None:
        """Fetch the metrics of the last steps and see that they are numbers.

        Raises:
            NotFiniteError: They are not.
        """
        if not self._unchecked:
            return
        rows = torch.stack([torch.stack(list(found.values())) for *_, found in self._unchecked])
        own = rows.cpu()
        total = self._ranks.sum(own)
        total[:, -1] = own[:, -1]  # the norm of the gradient is the whole batch's already
        for (step, keys, found), row, part in zip(
            self._unchecked, total.tolist(), own.tolist(), strict=True
        ):
            values = dict(zip(found, row, strict=True))
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                is_guilty = not math.isfinite(dict(zip(found, part, strict=True))["loss"])
                self._stop_at(step, keys, values, is_guilty=is_guilty)
            self._metrics.append(values)
        self._unchecked.clear()
        if self._losses is None:
            self._losses = self._metrics[0]["loss"], self._metrics[0]["loss"]

    def _stop_at(
        self, step: int, keys: list[str], values: dict[str, float], *, is_guilty: bool
    ) -> NoReturn:
        """Name the samples of the ranks whose loss is not finite, or of all if none is."""
        parts = self._ranks.gather((is_guilty, keys))
        guilty = [part for part in parts if part[0]] or parts
        named = [key for _, part in guilty for key in part]
        raise NotFiniteError(_not_finite_message(step, named, values))

    def _log(self, log: RunLog | None, watch: Stopwatch) -> None:
        means = {
            name: sum(values[name] for values in self._metrics) / len(self._metrics)
            for name in self._metrics[0]
        }
        assert self._losses is not None
        self._losses = self._losses[0], means["loss"]
        elapsed_s, waited_s, num_steps = watch.lap()
        waited_s = self._ranks.max(waited_s)  # the others wait for that rank
        images_per_s = num_steps * self.config.data.batch_size / elapsed_s
        mfu = None
        if self._utilisation is not None:
            mfu = self._utilisation.mfu(images_per_s, self._ranks.size)
        row = LogRow(
            step=self.step,
            epoch=(self.step - 1) // self._order.steps_per_epoch,
            metrics=means,
            learning_rate=learning_rate(self.step - 1, self.config),
            images_per_s=images_per_s,
            data_wait=waited_s / elapsed_s,
            mfu=mfu,
        )
        self._metrics.clear()
        if log is not None:
            log.write(row, remaining_s=(self.config.run.steps - self.step) * elapsed_s / num_steps)

    def _open_log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        if self._ranks.is_first:
            return RunLog(
                self._out_dir,
                resumed_step=self.step,
                wandb_project=self.config.run.wandb_project,
                settings=self.config.model_dump(mode="json"),
            )
        return contextlib.nullcontext()

    def _say(self, message: str, *values: object) -> None:
        if self._ranks.is_first:
            logger.info(message, *values)

    def _save(self) -> None:
        self._last_saved = checkpoints.path_of(self._out_dir, self.step)
        state = self._stepper.state()
        if state is None:
            return
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
        content = Checkpoint(header, state.model, state.optimizer, state.average)
        checkpoints.save(self._out_dir, content, keep=self.config.run.keep_checkpoints)
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
