"""Augmented images for fine-tuning, every one a function of (seed, epoch, key).

Here images have no token ids, so geometry is free: timm's transforms draw crops, mirror, apply
RandAugment and erase. They draw from the generators of Python, numpy and torch, which are seeded
anew for every image; so an image looks the same in any worker, and a run resumes exactly.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor

from cache_builder import imaging
from cache_builder.errors import ConfigError, ImageError, SourceError
from cache_builder.sources import image_bytes
from trainer.backbones import Backbone
from trainer.draws import derived_seed
from trainer.finetune_config import FinetuneDataConfig
from trainer.labelled import LabelledImages, Place

_SEED_BITS = 32  # of numpy's generator


class Sample(NamedTuple):
    """One image in one epoch."""

    epoch: int
    place: Place
    label: int


class AugmentedBatch(NamedTuple):
    """What a step of fine-tuning reads."""

    images: Tensor  # (B, 3, S, S) float32, normalised
    labels: Tensor  # (B,) int64
    keys: list[str]
    refused: list[str]  # images that could not be decoded; another of the batch stands for each


class AugmentedImages:
    """Reads batches of augmented images."""

    def __init__(
        self, images: LabelledImages, backbone: Backbone, config: FinetuneDataConfig, seed: int
    ) -> None:
        """Say what to read and how to change it.

        Raises:
            ConfigError: timm does not know the policy of RandAugment.
        """
        self._images = images
        self._seed = seed
        self._size = backbone.image_size
        policy = None if config.auto_augment == "off" else config.auto_augment
        try:
            self._transform: Any = create_transform(
                self._size,
                is_training=True,
                scale=config.crop_scale,
                ratio=config.crop_ratio,
                hflip=config.hflip,
                color_jitter=0.0,
                auto_augment=policy,
                interpolation="bicubic",
                mean=backbone.mean,
                std=backbone.std,
                re_prob=config.random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, ValueError, KeyError, IndexError) as exc:
            raise ConfigError(
                f"timm makes no transform of data.auto_augment {config.auto_augment!r}: {exc}. "
                "The default is rand-m9-mstd0.5-inc1; `off` is none."
            ) from exc
        for part in self._transform.transforms:
            for operation in getattr(part, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize

    def read(self, samples: Sequence[Sample]) -> AugmentedBatch:
        """Return the batch of these samples.

        Raises:
            PatchCacheError: An image is not there any more, its file or cache is damaged, or none
                of the batch can be decoded.
        """
        found, refused = [], []
        images = self._images.read([sample.place for sample in samples])
        for sample, image in zip(samples, images, strict=True):
            try:
                picture = imaging.decode(image_bytes(image.image))
            except ImageError as exc:
                refused.append(f"{sample.place.key}: {exc}")
                continue
            found.append((self._augment(picture, sample), sample))
        if not found:
            raise SourceError(
                f"{self._images.location}: no image of a whole batch can be decoded, as "
                f"{refused[0]}. Mend the images."
            )
        # Batches keep their size, which the mixing of pairs and static shapes ask for.
        whole = [found[index % len(found)] for index in range(len(samples))]
        return AugmentedBatch(
            torch.stack([image for image, _ in whole]),
            torch.tensor([sample.label for _, sample in whole]),
            [sample.place.key for _, sample in whole],
            refused,
        )

    def _augment(self, picture: Tensor, sample: Sample) -> Tensor:
        seed = derived_seed(self._seed, sample.epoch, f"augment {sample.place.key}")
        random.seed(seed)
        np.random.seed(seed % (1 << _SEED_BITS))  # noqa: NPY002 (timm draws from it)
        torch.manual_seed(seed)
        image: Tensor = self._transform(Image.fromarray(picture.permute(1, 2, 0).numpy()))
        return image


def _posterize(image: Image.Image, num_bits: int, **options: object) -> Image.Image:
    # At the highest level RandAugment keeps no bit, which Pillow made black and now refuses.
    if num_bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, num_bits) if num_bits < 8 else image


def batches(
    places: Sequence[Place],
    labels: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    steps: range,
) -> Iterator[list[Sample]]:
    """Yield the samples of every step: epochs are permutations, of which the tail is not used."""
    steps_per_epoch = len(places) // batch_size
    order, current = np.empty(0, np.int64), -1
    for step in steps:
        epoch, index = divmod(step, steps_per_epoch)
        if epoch != current:
            order = np.random.default_rng([seed, epoch]).permutation(len(places))
            current = epoch
        chosen = order[index * batch_size : (index + 1) * batch_size].tolist()
        # Neighbours are read together.
        yield [Sample(epoch, places[at], labels[at]) for at in sorted(chosen)]
