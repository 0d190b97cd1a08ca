"""Small objectives of every method, and batches to call them with."""

import torch

from cache_builder.formats import TokenCache
from tests.trainer.caches import tiny_config
from trainer.data import BatchOrder, CachedViews, Pick
from trainer.distributed import Ranks
from trainer.draws import SampleGenerator
from trainer.model import build_objective
from trainer.objectives.interface import Targets
from trainer.step import Stepper

GRID, NUM_PATCHES, PATCH, SIZE, VOCAB = (4, 4), 16, 4, 16, 6

# Settings with which a method runs on the tiny cache of `tiny_cache`.
# A grid of 4 x 4 has nothing around the middle 7/9, so `zoomed_in` zooms more.
SETTINGS = [
    ("beit", {}),
    ("beit", {"masked_tokens": "drop"}),
    ("beit", {"aggregation_blocks": 2, "aggregation_layer": 1}),
    ("beit", {"masked_tokens": "drop", "aggregation_blocks": 1, "aggregation_layer": 1}),
    ("mcbeit", {}),
    ("mcbeit", {"masked_tokens": "drop"}),
    ("mcbeit", {"similarity_weight": 0}),
    ("dmjd", {}),
    ("dmjd", {"masked_tokens": "drop"}),
    ("dmjd", {"mask_kind": "block", "visible_weight": 0}),
    ("mapet", {}),
    ("mapet", {"mask_kind": "block", "predict_ratio": 0.25}),
    ("mapet", {"masked_tokens": "drop", "decoder_dim": 16}),
    ("ccvit", {}),
    ("ccvit", {"replace_ratio": 0, "head_layers": 1}),
    ("ccvit", {"masked_tokens": "drop", "decoder_dim": 16}),
    ("beyond", {"zoom": 2.0}),
    ("beyond", {"zoom": 2.0, "masked_tokens": "keep"}),
    ("beyond", {"targets": "pixels"}),
    *[
        ("beyond", {"degradation": degradation, "mask_ratio": 0.0, "targets": targets})
        for degradation in ("zoomed_out", "distorted", "blurred", "decolorised")
        for targets in ("tokens", "pixels")
    ],
    ("beyond", {"degradation": "zoomed_out", "predict_all": True}),
    ("dtm", {}),
    ("dtm", {"masked_tokens": "drop", "loss": "negcosine", "target_dim": 5}),
    ("dtm", {"loss": "l1", "normalize_target": True, "protect_first": True}),
]


def make_objective(cache_path, method, *, seed=0, model=None, **settings):
    """Return an objective for a cache, with a ViT of two blocks, in training mode."""
    config = tiny_config(objective={"method": method, **settings}, model=model or {})
    torch.manual_seed(seed)
    with TokenCache.open(cache_path) as cache:
        return build_objective(config, cache.manifest, cache.codebook)


def make_stepper(cache_path, device="cpu", **sections):
    """Return a stepper of `tiny_config`."""
    with TokenCache.open(cache_path) as cache:
        config = tiny_config(**sections)
        return Stepper(config, cache.manifest, cache.codebook, Ranks(), torch.device(device))


def read_batches(cache_path, count):
    """Return the first batches of eight of a run."""
    with TokenCache.open(cache_path) as cache:
        order = BatchOrder([shard.num_samples for shard in cache.manifest.shards], 8, seed=0)
    dataset = CachedViews(cache_path, image_size=SIZE)
    read = [dataset.read(order.picks(step)) for step in range(count)]
    dataset.close()
    return read


def read_first(cache_path, objective, num_samples=4):
    """Return the batch of the first samples of a cache, with what the objective reads."""
    dataset = CachedViews(cache_path, image_size=objective.image_size, payloads=objective.payloads)
    batch = dataset.read([Pick(0, 0, row) for row in range(num_samples)])
    dataset.close()
    return batch


def read_batch(cache_path, objective, num_samples=4):
    """Return the images and targets of the first samples of a cache, as the loop hands them on."""
    targets = read_first(cache_path, objective, num_samples).targets(torch.device("cpu"))
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
