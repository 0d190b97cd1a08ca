"""AdamW and its schedule. The learning rate is a function of the step: no state to save."""

import math
from typing import Any

import torch
from torch import nn

from trainer.config import OptimConfig, TrainConfig

_POSITIONS_AND_PREFIX = ("pos_embed", "cls_token", "reg_token")


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters of a module."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those with and those without weight decay.

    None on vectors (biases, norms, LayerScale), position embeddings and prefix tokens; the mask
    token is decayed, as in the code of BEiT (arXiv:2106.08254).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_plain = parameter.ndim <= 1 or name.endswith(_POSITIONS_AND_PREFIX)
        (plain if is_plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Linear from 0 over the warm-up, then half a cosine down to `min_lr` at the end of the run.
    """
    optim, num_steps = config.optim, config.run.steps
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
