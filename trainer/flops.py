"""How much of the device's arithmetic a run uses: model FLOPs utilisation (MFU).

The forward pass of the method is counted once, by torch, on two samples: matrix products and
attention, with two operations per multiplication and addition. A step costs three times that,
because the backward pass multiplies once for the inputs and once for the weights; what activation
checkpointing computes again does not count as useful work (PaLM, arXiv:2204.02311, appendix B).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 of the makers' data sheets, float16 where a card has no bfloat16, per second. The
# first pattern that occurs in torch's name of the device counts.
_PEAKS: Final = (
    (r"B200", 2250e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H200|H800|GH200", 989e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"L4\b", 121e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"A30\b", 165e12),
    (r"RTX A6000", 155e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
    (r"V100", 125e12),
    (r"T4\b", 65e12),
)


class Utilisation(NamedTuple):
    """What an image costs, and what a device can do."""

    flops_per_image: float  # forward and backward
    peak_flops: float  # of one device, per second

    def mfu(self, images_per_s: float, num_devices: int = 1) -> float:
        """Return the share of the devices' peak that a speed of all of them together is."""
        return self.flops_per_image * images_per_s / (self.peak_flops * num_devices)


def peak_flops(device: torch.device) -> float | None:
    """Return the operations per second that a device is sold for; None where that is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak of a card that torch calls `name`, or None."""
    return next((peak for pattern, peak in _PEAKS if re.search(rf"\b(?:{pattern})", name)), None)


def training_flops(module: nn.Module, forward: Callable[[], object], num_images: int) -> float:
    """Return the operations of a training step per image.

    Args:
        module: The method, not compiled. Nothing about it has changed afterwards.
        forward: Calls it on `num_images` samples.
        num_images: Few are enough.
    """
    # Fused attention kernels are opaque to the counter; the plain one is two matrix products.
    with undisturbed(module), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
        forward()
    return 3.0 * float(found.get_total_flops()) / num_images


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Look at a module in evaluation mode, without gradients, and leave no trace.

    Its buffers, the mode of every part of it and the state of torch's generators are afterwards
    what they were.
    """
    modes = {part: part.training for part in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    cards = {tensor.device for tensor in module.parameters() if tensor.device.type == "cuda"}
    try:
        # Compiled parts hide their operations, and would be compiled again for another batch size.
        stance = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(list(cards)), torch.no_grad(), stance:
            module.eval()
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
