"""Small objectives of every method, and batches to call them with."""

import torch

from cache_builder.formats import TokenCache
from tests.trainer.caches import tiny_config
from trainer.data import CachedViews, Pick
from trainer.draws import SampleGenerator
from trainer.model import build_objective
from trainer.objectives.interface import Targets

GRID, NUM_PATCHES, PATCH, SIZE, VOCAB = (4, 4), 16, 4, 16, 6


def make_objective(cache_path, method, *, seed=0, model=None, **settings):
    """Return an objective for a cache, with a ViT of two blocks, in training mode."""
    config = tiny_config(objective={"method": method, **settings}, model=model or {})
    torch.manual_seed(seed)
    with TokenCache.open(cache_path) as cache:
        return build_objective(config, cache.manifest, cache.codebook)


def read_batch(cache_path, objective, num_samples=4):
    """Return the images and targets of the first samples of a cache, as the loop hands them on."""
    dataset = CachedViews(cache_path, image_size=objective.image_size, payloads=objective.payloads)
    batch = dataset.read([Pick(0, 0, row) for row in range(num_samples)])
    dataset.close()
    targets = batch.targets(torch.device("cpu"))
    return targets.clean, targets


def drawn_batch(num_samples=4, seed=0, **targets):
    """Return noise and random token ids."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_samples, 3, SIZE, SIZE, generator=generator)
    token_ids = torch.randint(0, VOCAB, (num_samples, NUM_PATCHES), generator=generator)
    return images, Targets(token_ids, images, **targets)


def draws(num_samples=4, step=0, first=0):
    return SampleGenerator(0, step, first=first, count=num_samples, device="cpu")


def paint(images, patches, colour):
    """Give some patches, bool (B, N), a colour."""
    painted = images.clone()
    for image, chosen in zip(painted, patches, strict=True):
        for patch in chosen.nonzero().flatten().tolist():
            row, col = (PATCH * at for at in divmod(patch, GRID[1]))
            image[:, row : row + PATCH, col : col + PATCH] = colour
    return painted
