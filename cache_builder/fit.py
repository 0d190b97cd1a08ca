"""`patchcache fit`: fit a codebook to the patches of a source.

Which images and which of their patches are sampled depends on the seed and the sample keys alone,
so the codebook does not depend on the number of workers. Every sampled image is cut to its
largest centred square, as CCViT and MaPeT do. One image in twenty is held out of the fit, and the
quality that is reported is measured on those.
"""

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from cache_builder import __version__
from cache_builder.errors import ConfigError, ImageError, SourceError
from cache_builder.formats.codebook import (
    MAX_VOCAB_SIZE,
    Codebook,
    ExtractorSpec,
    Metric,
    PixelRule,
)
from cache_builder.formats.manifest import PlanRow, PlanUnit
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode
from cache_builder.kmeans import Fit, fit_centroids
from cache_builder.quality import Usage, psnr, usage
from cache_builder.ray_jobs import ClusterOptions, map_units
from cache_builder.sources import Listing, open_source
from cache_builder.tokenizers.features import (
    FeatureExtractor,
    FeatureOptions,
    load_extractor,
    make_extractor,
)
from cache_builder.tokenizers.quantizer import CentroidIndex
from cache_builder.tokenizers.tokenizer import choose_device

logger = logging.getLogger(__name__)

POINTS_PER_CENTROID = 256  # of the default sample
_MIN_PATCHES_PER_IMAGE = 16  # diversity comes from images, not from their patches
_HELD_OUT_SHARE = 20  # one image in this many
_IMAGES_PER_BATCH = 16


class FitOptions(NamedTuple):
    """What a user may say about a fit."""

    images: str
    out: Path
    k: int
    features: FeatureOptions
    metric: Metric = "l2"
    sample: int | None = None  # patches; None: 256 per centroid
    iterations: int = 20
    restarts: int = 1
    seed: int = 0
    device: str = "auto"
    cluster: ClusterOptions = ClusterOptions()


class FitSummary(NamedTuple):
    """What a fit did."""

    codebook: Codebook
    usage: Usage  # of the points of the fit
    held_out_mse: float | None  # per feature value; None without held-out images
    held_out_psnr: float | None  # dB, of pixel codebooks
    num_skipped: int


class Progress(NamedTuple):
    """Whom to tell: of sampled images (done, all), of iterations (number, objective)."""

    sampled: Callable[[int, int], None]
    iterated: Callable[[int, float], None]


def run(options: FitOptions, progress: Progress | None = None) -> FitSummary:
    """Sample patches, fit the centroids, measure them and write the codebook.

    Raises:
        ConfigError: A setting is wrong, or there are too few distinct patches.
        SourceError: The images cannot be listed or read, or none can be decoded.
    """
    if not 0 < options.k <= MAX_VOCAB_SIZE:
        raise ConfigError(f"-k must be 1 to {MAX_VOCAB_SIZE:,}, not {options.k:,}.")
    if options.iterations < 1 or options.restarts < 1:
        raise ConfigError("--iterations and --restarts must be 1 or more.")
    device = choose_device(options.device)
    extractor = make_extractor(options.features, device)
    listing = open_source(options.images).scan(None)
    budget = options.sample or POINTS_PER_CENTROID * options.k
    draw = _plan_draw(listing, extractor.pixel_rule, budget, options.seed)
    sample = _collect(options, extractor, listing, draw, progress)
    points = _trim(sample.points, budget, options.seed)
    fit = fit_centroids(
        points.to(device),
        options.k,
        metric=options.metric,
        iterations=options.iterations,
        restarts=options.restarts,
        seed=options.seed,
        progress=progress.iterated if progress else None,
    )
    return _summarise(options, extractor, listing, sample, points, fit)


class _Draw(NamedTuple):
    """Which images are sampled, and how many patches of each."""

    fitted: frozenset[str]  # keys
    held_out: frozenset[str]
    patches_per_image: int
    seed: int


class _UnitSample(NamedTuple):
    """The sampled patches of one unit."""

    unit: int
    points: np.ndarray  # (n, D)
    held_out: np.ndarray
    num_images: int  # that the points come from
    num_seen: int  # with the held-out and the skipped ones
    num_skipped: int


class _Sample(NamedTuple):
    """The sampled patches of all units, in the order of the units."""

    points: Tensor
    held_out: Tensor
    num_images: int
    num_skipped: int


class SampleWorker:
    """Samples patch features of units, in a process of its own."""

    def __init__(
        self, images: str, spec: ExtractorSpec, rule: PixelRule, device: str, draw: _Draw
    ) -> None:
        """Load the feature model."""
        self._source = open_source(images)
        self._extractor = load_extractor(spec, rule, choose_device(device))
        self._draw = draw

    def run(self, unit: PlanUnit) -> _UnitSample:
        """Return the sampled features of one unit; an image that cannot be decoded is skipped."""
        rule = self._extractor.pixel_rule
        parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
        rows, views, num_skipped = [], [], 0
        for row, data in self._source.read(unit):
            try:
                pixels = decode(data)
            except ImageError as exc:
                logger.warning("left out %s: %s", row.source, exc)
                num_skipped += 1
                continue
            view = centre_square((int(pixels.shape[-2]), int(pixels.shape[-1])))
            views.append(apply_view(pixels, view, rule.size, rule.interpolation))
            rows.append(row)
            if len(rows) == _IMAGES_PER_BATCH:
                self._extract(rows, views, parts)
                rows, views = [], []
        self._extract(rows, views, parts)
        dim = 3 * rule.patch_size**2
        empty = np.empty((0, dim), np.uint8)
        return _UnitSample(
            unit=unit.unit,
            points=np.concatenate(parts[False]) if parts[False] else empty,
            held_out=np.concatenate(parts[True]) if parts[True] else empty,
            num_images=len(parts[False]),
            num_seen=len(unit.rows),
            num_skipped=num_skipped,
        )

    def _extract(
        self, rows: list[PlanRow], views: list[Tensor], parts: dict[bool, list[np.ndarray]]
    ) -> None:
        if not rows:
            return
        features = self._extractor(torch.stack(views)).cpu().numpy()
        for row, patches in zip(rows, features, strict=True):
            rng = random.Random(_priority(self._draw.seed, "patches", row.key))
            count = min(len(patches), self._draw.patches_per_image)
            chosen = sorted(rng.sample(range(len(patches)), count))
            parts[row.key in self._draw.held_out].append(patches[chosen])


def _plan_draw(listing: Listing, rule: PixelRule, budget: int, seed: int) -> _Draw:
    keys = [row.key for unit in listing.units for row in unit.rows]
    keys.sort(key=lambda key: _priority(seed, "image", key))
    num_patches = rule.grid[0] * rule.grid[1]
    per_image = min(num_patches, _MIN_PATCHES_PER_IMAGE)
    num_held_out = len(keys) // _HELD_OUT_SHARE
    num_fitted = min(len(keys) - num_held_out, -(-budget // per_image))
    num_held_out = min(num_held_out, -(-num_fitted // _HELD_OUT_SHARE))
    return _Draw(
        fitted=frozenset(keys[num_held_out : num_held_out + num_fitted]),
        held_out=frozenset(keys[:num_held_out]),
        patches_per_image=min(num_patches, -(-budget // num_fitted)),
        seed=seed,
    )


def _collect(
    options: FitOptions,
    extractor: FeatureExtractor,
    listing: Listing,
    draw: _Draw,
    progress: Progress | None,
) -> _Sample:
    worker = partial(
        SampleWorker,
        listing.info.location,
        extractor.spec,
        extractor.pixel_rule,
        options.device,
        draw,
    )
    num_wanted = len(draw.fitted) + len(draw.held_out)
    samples: list[_UnitSample] = []
    num_done = 0
    for sample in map_units(worker, _units_with(listing, draw), options.cluster):
        samples.append(sample)
        num_done += sample.num_seen
        if progress:
            progress.sampled(num_done, num_wanted)
    samples.sort(key=lambda sample: sample.unit)
    filled = [sample for sample in samples if len(sample.points)]
    if not filled:
        raise SourceError(f"Not one image of {options.images} could be decoded.")
    held_out = [sample.held_out for sample in samples if len(sample.held_out)]
    points = torch.from_numpy(np.concatenate([sample.points for sample in filled]))
    return _Sample(
        points=points,
        held_out=torch.from_numpy(np.concatenate(held_out)) if held_out else points[:0],
        num_images=sum(sample.num_images for sample in samples),
        num_skipped=sum(sample.num_skipped for sample in samples),
    )


def _units_with(listing: Listing, draw: _Draw) -> Iterator[PlanUnit]:
    for unit in listing.units:
        rows = tuple(r for r in unit.rows if r.key in draw.fitted or r.key in draw.held_out)
        if rows:
            yield unit.model_copy(update={"rows": rows})


def _trim(points: Tensor, budget: int, seed: int) -> Tensor:
    """Drop the few points by which whole images exceed the budget."""
    if len(points) <= budget:
        return points
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(points), generator=generator)[:budget]
    return points[kept.sort().values]


def _summarise(
    options: FitOptions,
    extractor: FeatureExtractor,
    listing: Listing,
    sample: _Sample,
    points: Tensor,
    fit: Fit,
) -> FitSummary:
    fitted_usage = usage(fit.counts.cpu().numpy())
    quality: dict[str, JsonValue] = {
        "mse": fit.objective[-1] / points.shape[1],
        "perplexity": fitted_usage.perplexity,
        "num_used": fitted_usage.num_used,
    }
    held_out_mse = _error(sample.held_out, fit, options.metric)
    held_out_psnr = None
    if held_out_mse is not None:
        quality |= {"held_out_mse": held_out_mse, "held_out_patches": len(sample.held_out)}
        if extractor.spec.id == "pixel":
            held_out_psnr = psnr(held_out_mse)
            quality["held_out_psnr_db"] = held_out_psnr if held_out_mse else None
    codebook = Codebook(
        fit.centroids.cpu().numpy()[None],
        fit.counts.cpu().numpy()[None],
        metric=options.metric,
        pixel_rule=extractor.pixel_rule,
        extractor=extractor.spec,
        num_points=len(points),
        num_images=sample.num_images,
        objective=tuple(fit.objective),
        fit={
            "images": listing.info.location,
            "iterations": options.iterations,
            "restarts": options.restarts,
            "seed": options.seed,
            "sample": options.sample,
        },
        quality=quality,
        versions={
            "patchcache": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )
    codebook.save(options.out)
    return FitSummary(codebook, fitted_usage, held_out_mse, held_out_psnr, sample.num_skipped)


def _error(held_out: Tensor, fit: Fit, metric: Metric) -> float | None:
    """Return the mean squared distance of held-out patches to their centroid, per value."""
    if not len(held_out):
        return None
    if metric == "cosine":
        held_out = torch.nn.functional.normalize(held_out.float(), dim=1)
    _, distances = CentroidIndex(fit.centroids).assign(held_out.to(fit.centroids.device))
    return float(distances.double().mean()) / int(held_out.shape[1])


def _priority(seed: int, purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()[:8])
