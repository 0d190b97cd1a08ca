"""One optimiser step: forward and backward over micro-batches, clip, AdamW, average.

All that is random about a step is drawn from generators seeded by (seed, step, place in the batch),
so weights, moments and the average are all there is to save. Nothing here asks the device for a
number. The state that goes in and out is whole: how many processes there are, and whether they
share the weights out, is not visible in it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache_builder.formats import CacheManifest, Codebook
from trainer import distributed, pixels
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.distributed import Ranks
from trainer.draws import SampleGenerator, derived_seed
from trainer.model import build_objective, uses_bf16
from trainer.objectives.interface import Targets
from trainer.optim import (
    WeightAverage,
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer,
    set_learning_rate,
    step_if_finite,
)

# Blocks differ by their rate of stochastic depth, and each rate is a graph of its own.
_MOST_GRAPHS = 128


class State(NamedTuple):
    """Everything that steps change; tensors are whole."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] | None  # of the ViT's weights, by its own names


def step_inputs(
    batch: Batch, config: TrainConfig, step: int, device: torch.device, first: int = 0
) -> tuple[Tensor, Targets, SampleGenerator]:
    """Return what the method is called with on a batch.

    Args:
        batch: Samples of the global batch of `step`, or some of them.
        config: Of the run.
        step: Counted from 0.
        device: Of the method.
        first: Place of the first sample in the global batch.
    """
    seed, count = config.run.seed, len(batch.keys)
    generator = SampleGenerator(seed, step, first=first, count=count, device=device)
    targets = batch.targets(device)
    images = targets.clean
    if config.data.color_jitter:
        images = pixels.jitter_colour(images, config.data.color_jitter, generator)
    return images, targets, generator


class Stepper:
    """A model and its optimizer on this process's device.

    Attributes:
        objective: The module of the method, with the names and the forward pass that it has without
            ranks; its parameters are sharded under FSDP.
        share: How many images of a batch this rank takes, `share * rank` being its first.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: CacheManifest,
        codebook: Codebook,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        """Build everything, freshly initialised from the run's seed, alike on every rank.

        Raises:
            ConfigError: The settings do not go with the cache or the number of ranks.
        """
        self._config, self._ranks, self._device = config, ranks, device
        self._is_bf16 = uses_bf16(config.run.precision, device)
        data = config.data
        self.share, self._micro = distributed.split_batch(
            data.batch_size, data.micro_batch_size, ranks.size
        )
        torch.manual_seed(config.run.seed)
        self.objective = build_objective(config, manifest, codebook).to(device)
        if config.model.activation_checkpointing:
            _recompute_blocks(self.objective.vit.blocks)
        if config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda"):
            _compile_blocks(self.objective)
        self._call = self.objective
        if ranks.size > 1 and config.run.sharding == "fsdp":
            distributed.shard(self.objective, self.objective.vit.blocks, ranks, device)
        elif ranks.size > 1:
            self._call = distributed.replicate(self.objective, device)
        self._optimizer = build_optimizer(self.objective, config.optim)
        self._average = None
        if config.optim.ema is not None:
            self._average = WeightAverage(self.objective.vit, config.optim.ema)

    def take(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Take a step, counted from 0, on this rank's part of the batch.

        Returns:
            This rank's share of loss and metrics, which add up over the ranks, and
            `gradient_norm`, which is the whole batch's on every rank.
        """
        set_learning_rate(self._optimizer, learning_rate(step, self._config))
        self._optimizer.zero_grad()
        total: dict[str, Tensor] = {}
        for start in range(0, self.share, self._micro):
            stop = start + self._micro
            with distributed.last_of_step(self._call, is_last=stop == self.share):
                found = self._add_gradients(step, batch.part(start, stop), start)
            for name, value in found.items():
                total[name] = total[name] + value if name in total else value
        norm = clip_gradients(self.objective.parameters(), self._config.optim.clip_norm)
        step_if_finite(self._optimizer, norm)
        if self._average is not None:
            self._average.update()
        return {**total, "gradient_norm": norm}

    def state(self) -> State | None:
        """Return the state on the first rank, None on others; every rank must call it."""
        state = State(
            self.objective.state_dict(),
            self._optimizer.state_dict(),
            None if self._average is None else self._average.state_dict(),
        )
        is_first = self._ranks.is_first
        whole = State(*(distributed.whole(part, is_wanted=is_first) for part in state))
        return whole if is_first else None

    def load(self, state: State) -> None:
        """Take a state, whatever number of ranks it was saved by."""
        own = self.objective.state_dict()
        self.objective.load_state_dict(
            {
                name: distributed.spread_like(value, own[name]) if name in own else value
                for name, value in state.model.items()
            }
        )
        load_optimizer(self._optimizer, state.optimizer)
        if self._average is not None and state.average is not None:
            self._average.load_state_dict(state.average)

    def _add_gradients(self, step: int, batch: Batch, start: int) -> dict[str, Tensor]:
        """Add a micro-batch's share to the gradients; return its share of loss and metrics."""
        config, device = self._config, self._device
        first = self._ranks.rank * self.share + start
        # timm's stochastic depth draws from torch's own generator.
        torch.manual_seed(derived_seed(config.run.seed, step, f"model {first}"))
        share = len(batch.keys) / config.data.batch_size
        images, targets, generator = step_inputs(batch, config, step, device, first)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._is_bf16):
            result = self._call(images, targets, generator)
        # The exchange takes the mean over ranks; the batch's gradient is their sum.
        (result["loss"] * (share * self._ranks.size)).backward()
        return {name: value.detach() * share for name, value in result.items()}


def _recompute_blocks(blocks: nn.Module) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again."""
    for block in blocks.children():
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function of this file: the compiler passes over frames that are torch's own.
    @functools.wraps(forward)
    def recomputed(*arguments: Any, **options: Any) -> Tensor:
        result: Tensor = checkpoint(forward, *arguments, use_reentrant=False, **options)
        return result

    return recomputed


def _compile_blocks(objective: nn.Module) -> None:
    """Compile every block where it stands, which leaves the names of its parameters alone."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
    for module in objective.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)
