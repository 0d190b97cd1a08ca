"""From uint8 pictures to the model's input, on the device and for a whole batch at once.

Colour is the only augmentation that is drawn anew every epoch: whatever moves pixels about belongs
to a view, because the token ids do. The ids stay those of the unchanged colours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# ITU-R BT.601 luma, as torchvision's and Pillow's greyscale weigh the channels.
_LUMA = (0.299, 0.587, 0.114)


def to_unit_range(pixels: Tensor, device: torch.device) -> Tensor:
    """Move uint8 pictures to the device and return them as float32 in [0, 1]."""
    # As bytes over the bus: a quarter of the traffic of float32.
    return pixels.to(device, non_blocking=True).float().div_(255)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std, channel by channel; `images` (B, 3, S, S) in [0, 1]."""
    shift = torch.tensor(mean, device=images.device).reshape(3, 1, 1)
    scale = torch.tensor(std, device=images.device).reshape(3, 1, 1)
    return (images - shift) / scale


def jitter_colour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, then contrast, then saturation, each by a factor per picture.

    The factors are uniform in [1 - strength, 1 + strength]. torchvision's `ColorJitter` does the
    same in random order, and draws one factor for a whole batch.

    Args:
        images: (B, 3, S, S) in [0, 1].
        strength: At least 0 and below 1.
        generator: A CPU generator, so that every device draws the same factors.

    Returns:
        (B, 3, S, S) in [0, 1].
    """
    drawn = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    brightness, contrast, saturation = (1 + strength * (2 * drawn - 1)).to(images.device)
    images = (images * brightness).clamp_(0, 1)
    images = _blend(images, _grey(images).mean((-2, -1), keepdim=True), contrast)
    return _blend(images, _grey(images), saturation)


def _grey(images: Tensor) -> Tensor:
    luma = torch.tensor(_LUMA, device=images.device).reshape(3, 1, 1)
    return (images * luma).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, factor).clamp_(0, 1)
