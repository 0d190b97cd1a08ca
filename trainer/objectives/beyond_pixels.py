"""Pixels as targets, in the manner of Beyond Masking's code (arXiv:2203.14313).

Every patch of the clean picture is standardised channel by channel, (x - mean) / (std + 1e-6) with
the unbiased variance, and compared by squared error. Patches are flattened row, column, channel.
Where a picture is zoomed, prediction and target are brought to what they share first: the part that
was visible and the strips around it, or the canvas on which the picture was tiled. Pictures change
size by area.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.degrading import Degraded, Degrader, centre, tile

_STD_EPS = 1e-6


def pixel_loss(
    predicted: Tensor,  # (B, N, 3 p p)
    clean: Tensor,  # (B, 3, clean size, clean size) in [0, 1]
    counted: Tensor,  # (B, N) bool, patches of the encoder's input that count
    degraded: Degraded,
    degrader: Degrader,
    ring_weight: float,
) -> Tensor:
    """Return the loss of each sample, (B,).

    Args:
        predicted: On the grid of the clean picture.
        clean: What the encoder was given a degraded form of.
        counted: At least one per sample.
        degraded: That form.
        degrader: What made it.
        ring_weight: Of what lies around the visible part of `zoomed_in`.
    """
    patch = _patch_size(predicted)
    size = degrader.size
    if degrader.kind == "zoomed_in":
        whole = _resize(unpatchify(predicted, size), degrader.clean_size)
        seen = patchify(centre(whole, size), patch)
        inner = _masked_mse(seen, standardised_patches(centre(clean, size), patch), counted)
        wanted = unpatchify(standardised_patches(_resize(clean, size), patch), size)
        ring = _strips_mse(whole, _resize(wanted, degrader.clean_size), size)
        return (1 - ring_weight) * inner + ring_weight * ring
    if degrader.kind == "zoomed_out":
        wanted = standardised_patches(_resize(clean, size), patch)
        predicted, wanted = (
            patchify(
                tile(_resize(unpatchify(rows, size), degrader.clean_size), size, degraded.offset),
                patch,
            )
            for rows in (predicted, wanted)
        )
        return _masked_mse(predicted, wanted, counted)
    return _masked_mse(predicted, standardised_patches(clean, patch), counted)


def standardised_patches(images: Tensor, patch_size: int) -> Tensor:
    """Return the patches of (B, 3, S, S), each channel of each standardised, (B, N, 3 p p)."""
    patches = patchify(images, patch_size).unflatten(-1, (patch_size**2, images.shape[1]))
    centred = patches - patches.mean(2, keepdim=True)
    return (centred / (patches.std(2, keepdim=True) + _STD_EPS)).flatten(2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, S, S) into patches, (B, N, p p C) in raster order; row, column, channel."""
    batch, channels, size, _ = images.shape
    count = size // patch_size
    cut = images.reshape(batch, channels, count, patch_size, count, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, count**2, -1)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """Put patches of `patchify` together again, to three channels, (B, 3, size, size)."""
    patch_size = _patch_size(patches)
    count = size // patch_size
    cut = patches.reshape(len(patches), count, count, patch_size, patch_size, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, size, size)


def _patch_size(patches: Tensor) -> int:
    return math.isqrt(patches.shape[-1] // 3)


def _resize(images: Tensor, size: int) -> Tensor:
    return interpolate(images, size=size, mode="area")


def _masked_mse(predicted: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    errors = (predicted - wanted).square().mean(-1)
    return (errors * counted).sum(1) / counted.sum(1)


def _strips_mse(predicted: Tensor, wanted: Tensor, inner_size: int) -> Tensor:
    """Return the sum of the errors of the four strips around the middle, corners in two, (B,)."""
    width = (predicted.shape[-1] - inner_size) // 2
    errors = (predicted - wanted).square()
    strips = (
        errors[:, :, :width],
        errors[:, :, -width:],
        errors[..., :width],
        errors[..., -width:],
    )
    return torch.stack([strip.mean((1, 2, 3)) for strip in strips]).sum(0)
