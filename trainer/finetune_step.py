"""One step of fine-tuning: mix, forward, backward, AdamW with layer-wise decay, average.

As in pre-training, everything random is a function of the step, so that a run that was stopped
repeats the losses of an undisturbed one.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.backbones import Backbone
from trainer.classifier import build_classifier
from trainer.draws import derived_seed
from trainer.finetune_config import FinetuneConfig
from trainer.finetune_data import AugmentedBatch
from trainer.model import uses_bf16

_SEED_BITS = 32  # of numpy's generator


class FinetuneState(NamedTuple):
    """Everything that steps change."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] | None  # of the model, by its own names


class FinetuneStepper:
    """A classifier, its optimizer and its average, on a device."""

    def __init__(
        self,
        config: FinetuneConfig,
        backbone: Backbone,
        *,
        num_classes: int,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        """Build everything, freshly initialised from the run's seed.

        Raises:
            ConfigError: The settings do not go with the model.
        """
        self._config, self._device = config, device
        self._is_bf16 = uses_bf16(config.run.precision, device)
        self._num_steps = config.run.epochs * steps_per_epoch
        self._num_warm = round(config.optim.warmup_epochs * steps_per_epoch)
        torch.manual_seed(config.run.seed)
        self.model = build_classifier(backbone, num_classes, config).to(device)
        self.optimizer = torch.optim.AdamW(
            param_groups_layer_decay(
                self.model,
                config.optim.weight_decay,
                no_weight_decay_list=self.model.no_weight_decay(),
                layer_decay=config.optim.layer_decay,
            ),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
        self._average: AveragedModel | None = None
        if config.model.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.model.ema_decay)
            self._average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self._mixup = _make_mixup(config, num_classes)

    @property
    def tested(self) -> nn.Module:
        """The model that is tested: the average where there is one."""
        return self.model if self._average is None else self._average.module

    def take(self, step: int, batch: AugmentedBatch) -> Tensor:
        """Take a step, counted from 0; return its loss."""
        config = self._config
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        images = batch.images.to(self._device, non_blocking=True)
        labels = batch.labels.to(self._device, non_blocking=True)
        np.random.seed(derived_seed(config.run.seed, step, "mix") % (1 << _SEED_BITS))  # noqa: NPY002
        torch.manual_seed(derived_seed(config.run.seed, step, "model"))
        if self._mixup is not None:
            images, labels = self._mixup(images, labels)
        self.model.train()
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(images).float()
        if self._mixup is not None:
            loss = SoftTargetCrossEntropy()(logits, labels)
        else:
            loss = cross_entropy(logits, labels, label_smoothing=config.data.label_smoothing)
        loss.backward()
        if config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        detached: Tensor = loss.detach()
        return detached

    def learning_rate(self, step: int) -> float:
        """Return the rate of the last layer: linear warm-up from 0, then half a cosine."""
        optim = self._config.optim
        if step < self._num_warm:
            return optim.lr * step / self._num_warm
        share = (step - self._num_warm) / max(1, self._num_steps - self._num_warm)
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * share)) / 2

    def autocast(self) -> Any:
        """Return the context in which the model computes."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16)

    def state(self) -> FinetuneState:
        """Return what steps change."""
        average = None if self._average is None else self._average.module.state_dict()
        return FinetuneState(self.model.state_dict(), self.optimizer.state_dict(), average)

    def load(self, state: FinetuneState, num_steps: int) -> None:
        """Take the state after so many steps."""
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        if self._average is not None and state.average is not None:
            self._average.module.load_state_dict(state.average)
            self._average.n_averaged.fill_(num_steps)


def _make_mixup(config: FinetuneConfig, num_classes: int) -> Mixup | None:
    data = config.data
    if not data.is_mixed:
        return None
    return Mixup(
        mixup_alpha=data.mixup,
        cutmix_alpha=data.cutmix,
        prob=data.mix_probability,
        label_smoothing=data.label_smoothing,
        num_classes=num_classes,
    )
