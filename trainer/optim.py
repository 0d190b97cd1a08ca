"""AdamW, its schedule and the average of the weights.

The learning rate is a function of the step: no state to save. A gradient that is not finite
changes nothing: neither weights nor moments nor the count of steps.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import OptimConfig, TrainConfig
from trainer.distributed import local_part, spread_like

_POSITIONS_AND_PREFIX = ("pos_embed", "cls_token", "reg_token")
_STEM = ("patch_embed", "norm_pre", *_POSITIONS_AND_PREFIX)


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters of a module."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay, config.layer_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split parameters into those with and those without weight decay, and by layer.

    No decay on vectors (biases, norms, LayerScale), position embeddings and prefix tokens; the mask
    token is decayed, as in the code of BEiT (arXiv:2106.08254), whose layer-wise learning rates
    these are too: the last layer, which is everything after the blocks, has `lr_scale` 1, each one
    before it `layer_decay` times that of its successor, and the embedding the smallest.

    Args:
        module: A ViT, or a module with a ViT in its attribute `vit`.
        weight_decay: Of the group that is decayed.
        layer_decay: None: one learning rate.
    """
    vit = getattr(module, "vit", module)
    prefix = "" if vit is module else "vit."
    num_layers = len(vit.blocks) + 2 if layer_decay is not None else 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {
        (layer, is_plain): [] for layer in range(num_layers) for is_plain in (False, True)
    }
    for name, parameter in module.named_parameters():
        is_plain = parameter.ndim <= 1 or name.endswith(_POSITIONS_AND_PREFIX)
        layer = num_layers - 1
        if layer_decay is not None and name.startswith(prefix):
            layer = _layer_of(name.removeprefix(prefix), num_layers)
        groups[layer, is_plain].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_plain else weight_decay,
            "lr_scale": (layer_decay or 1.0) ** (num_layers - 1 - layer),
        }
        for (layer, is_plain), parameters in groups.items()
        if parameters
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
    """Set the learning rate of every parameter group, times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to a largest norm, None being no limit; return the norm they had.

    The norm is that of the whole model, the same on every rank.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return norm


def step_if_finite(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """Take a step, or none at all where the gradient's norm is not finite; no rank is asked.

    The decision is made on the device, by the flag that torch's GradScaler hands to fused
    optimizers: the host need not wait for the norm.
    """
    optimizer.grad_scale = None
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state whose tensors are whole into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: spread_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


class WeightAverage:
    """An exponential moving average of the parameters of a module, begun with what they are."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Copy the parameters; `decay` is the weight of the average against the newest value."""
        self._parameters = dict(module.named_parameters())
        self._decay = decay
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        average = [local_part(self._average[name]) for name in self._parameters]
        current = [local_part(p.detach()) for p in self._parameters.values()]
        torch._foreach_lerp_(average, current, 1 - self._decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by the parameters' names."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take an average whose tensors are whole."""
        for name, average in self._average.items():
            average.copy_(spread_like(state[name], average))


def _layer_of(name: str, num_layers: int) -> int:
    """Return the layer of a ViT's parameter: the embedding is 0, block i is i + 1."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(_STEM) else num_layers - 1
