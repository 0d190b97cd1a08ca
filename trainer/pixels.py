"""From uint8 pictures to what a method is called with, on the device and for a whole batch at once.

Colour is the only augmentation that is drawn anew every epoch: whatever moves pixels about belongs
to a view, because the token ids do. The ids stay those of the unchanged colours.
"""

from functools import cache

import torch
from torch import Tensor

from trainer.draws import SampleGenerator

# ITU-R BT.601 luma, as torchvision's and Pillow's greyscale weigh the channels.
_LUMA = (0.299, 0.587, 0.114)


def to_unit_range(pixels: Tensor, device: torch.device) -> Tensor:
    """Move uint8 pictures to the device and return them as float32 in [0, 1]."""
    # As bytes over the bus: a quarter of the traffic of float32.
    return pixels.to(device, non_blocking=True).float().div_(255)


def jitter_colour(images: Tensor, strength: float, generator: SampleGenerator) -> Tensor:
    """Change brightness, then contrast, then saturation, each by a factor per picture.

    The factors are uniform in [1 - strength, 1 + strength]. torchvision's `ColorJitter` does the
    same in random order, and draws one factor for a whole batch.

    Args:
        images: (B, 3, S, S) in [0, 1].
        strength: At least 0 and below 1.
        generator: Of these pictures.

    Returns:
        (B, 3, S, S) in [0, 1].
    """
    factors = generator.uniform(3, 1, 1, 1, low=1 - strength, high=1 + strength)
    brightness, contrast, saturation = factors.unbind(1)
    images = (images * brightness).clamp_(0, 1)
    images = _blend(images, _grey(images).mean((-2, -1), keepdim=True), contrast)
    return _blend(images, _grey(images), saturation)


def _grey(images: Tensor) -> Tensor:
    luma = _luma(images.device)
    return (images * luma).sum(1, keepdim=True)


@cache
def _luma(device: torch.device) -> Tensor:
    # Kept: a copy from memory that is not pinned makes the host wait for the device.
    return torch.tensor(_LUMA, device=device).reshape(3, 1, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, factor).clamp_(0, 1)
