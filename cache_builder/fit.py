"""`patchcache fit`: fit a codebook to the patches of a source.

A sample of patch features is drawn (`sampling.py`) and kept on disk until the codebook is written,
so a fit that was stopped goes on with what it has. Then the stages are fitted, one to what the
ones before it leave over (`kmeans.py`), and measured on images that were held out.

Which images and patches are sampled depends on the seed and the sample keys alone, and the fit on
the sample, so a codebook does not depend on the number of workers. Every sampled image is cut to
its largest centred square, as CCViT and MaPeT do.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from cache_builder import __version__
from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.codebook import MAX_VOCAB_SIZE, Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, Metric
from cache_builder.kmeans import Fit, fit_centroids
from cache_builder.point_shards import RemoteShard, ShardedPoints, pieces
from cache_builder.points import PointSet
from cache_builder.quality import Usage, psnr, usage
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_groups import actor_group
from cache_builder.reporting import Progress
from cache_builder.sampling import Sample, SampleDtype, SampleOptions, draw_sample
from cache_builder.sources import Listing, open_source
from cache_builder.targets import fidelity
from cache_builder.tokenizers.features import FeatureExtractor, FeatureOptions, make_extractor
from cache_builder.tokenizers.quantizer import ResidualQuantizer
from cache_builder.tokenizers.tokenizer import choose_device

logger = logging.getLogger(__name__)

POINTS_PER_CENTROID = 256  # of the default sample
_ROWS_PER_BLOCK = 4096


class FitOptions(NamedTuple):
    """What a user may say about a fit."""

    images: str
    out: Path
    k: int
    features: FeatureOptions
    metric: Metric = "l2"
    stages: int = 1
    sample: int | Literal["all"] | None = None  # patches; None: 256 per centroid
    images_per_class: int | None = None
    patches_per_image: int | None = None
    sample_dir: Path | None = None
    sample_dtype: SampleDtype = "float16"
    iterations: int = 20
    restarts: int = 1
    batch_size: int | None = None
    warm_start: Path | None = None
    seed: int = 0
    device: str = "auto"
    cluster: ClusterOptions = ClusterOptions()
    fit_workers: int | None = None  # None: fit in this process


class StageQuality(NamedTuple):
    """How well the stages up to one stand for held-out patches, on average."""

    mse: float  # squared error per feature value
    cosine: float  # between a feature and what its ids stand for
    relative_error: float  # |f - f'| / |f|


class FitSummary(NamedTuple):
    """What a fit did."""

    codebook: Codebook
    usage: Usage  # of the points of the fit, first stage
    held_out: list[StageQuality]  # per stage; empty without held-out images
    held_out_psnr: float | None  # dB, of pixel codebooks
    num_skipped: int
    sample_dir: Path | None  # where the sample was kept


class FitReports(NamedTuple):
    """Whom to tell: of sampled images (done, all), of iterations (number, objective)."""

    sampled: Progress
    iterated: Callable[[int, float], None]


def run(options: FitOptions, progress: FitReports | None = None) -> FitSummary:
    """Sample patches, fit the centroids, measure them and write the codebook.

    Raises:
        ConfigError: A setting is wrong, or there are too few distinct patches.
        SourceError: The images cannot be listed or read, or none can be decoded.
    """
    _check(options)
    device = choose_device(options.device)
    extractor = make_extractor(options.features, device)
    warm_start = _warm_start(options, extractor.spec)
    listing = open_source(options.images).scan(None)
    with _sample_store(options) as store:
        sample = draw_sample(
            listing,
            extractor,
            _sample_options(options),
            store,
            replace=options.sample_dir is None,
            progress=progress.sampled if progress else None,
        )
        if sample.num_units_kept:
            logger.info("%d units of the sample were there already", sample.num_units_kept)
        if not len(sample.points):
            raise SourceError(f"Not one image of {options.images} could be decoded.")
        if isinstance(options.sample, int) and len(sample.points) < options.sample:
            logger.warning(
                "the images have only %s of the %s patches that were asked for",
                f"{len(sample.points):,}", f"{options.sample:,}",
            )  # fmt: skip
        fits = _fit_stages(options, sample.points, device, warm_start, progress)
        return _summarise(options, extractor, listing, sample, fits)


def _check(options: FitOptions) -> None:
    if not 0 < options.k <= MAX_VOCAB_SIZE:
        raise ConfigError(f"-k must be 1 to {MAX_VOCAB_SIZE:,}, not {options.k:,}.")
    if options.iterations < 1 or options.restarts < 1 or options.stages < 1:
        raise ConfigError("--iterations, --restarts and --stages must be 1 or more.")
    if options.images_per_class is not None and isinstance(options.sample, int):
        raise ConfigError(
            "--sample and --images-per-class exclude each other: --images-per-class takes every "
            "patch of so many images per class, or --patches-per-image of them."
        )


def _sample_options(options: FitOptions) -> SampleOptions:
    unlimited = options.sample == "all" or options.images_per_class is not None
    budget = options.sample if isinstance(options.sample, int) else None
    if budget is None and not unlimited:
        budget = POINTS_PER_CENTROID * options.k
    return SampleOptions(
        budget=budget,
        images_per_class=options.images_per_class,
        patches_per_image=options.patches_per_image,
        dtype=options.sample_dtype,
        seed=options.seed,
        device=options.device,
        cluster=options.cluster,
    )


@contextlib.contextmanager
def _sample_store(options: FitOptions) -> Iterator[Path]:
    """Yield where the sample goes.

    Without --sample-dir that is a hidden folder beside the codebook, removed when the codebook is
    written: after an interruption it is still there, and the same command goes on with it.
    """
    if options.sample_dir is not None:
        yield options.sample_dir
        return
    store = options.out.with_name(f".{options.out.name}.sample")
    yield store
    shutil.rmtree(store, ignore_errors=True)


def _warm_start(options: FitOptions, extractor: ExtractorSpec) -> Tensor | None:
    """Return the centroids (M, K, D) to start from.

    Other weights of the same model may be what somebody wants; another model is a mistake, even
    where its features have as many values.

    Raises:
        ConfigError: They are of another model or layer, or not as many as this fit makes.
    """
    if options.warm_start is None:
        return None
    codebook = Codebook.load(options.warm_start)
    known = codebook.extractor
    if (known.id, known.layer) != (extractor.id, extractor.layer):
        raise ConfigError(
            f"{options.warm_start} has centroids of {_named(known)}, but this fit is of "
            f"{_named(extractor)}. Pass a codebook of the same features, or leave --warm-start out."
        )
    shape = (codebook.num_stages, codebook.vocab_size)
    if shape != (options.stages, options.k):
        raise ConfigError(
            f"{options.warm_start} has {shape[0]} stages of {shape[1]:,} centroids, but this fit "
            f"makes {options.stages} of {options.k:,}. Use its --stages and -k."
        )
    return torch.from_numpy(codebook.centroids)


def _named(extractor: ExtractorSpec) -> str:
    return f"{extractor.id}, {extractor.layer}" if extractor.layer else extractor.id


def _fit_stages(
    options: FitOptions,
    points: PointSet,
    device: torch.device,
    warm_start: Tensor | None,
    progress: FitReports | None,
) -> list[Fit]:
    fits: list[Fit] = []
    with _sharded(options, points, device) as shards:
        for stage in range(options.stages):
            if fits:
                shards.quantise(fits[-1].centroids)
            fits.append(
                fit_centroids(
                    shards,
                    options.k,
                    metric=options.metric,
                    spherical=options.metric == "cosine" and stage == 0,
                    iterations=options.iterations,
                    restarts=options.restarts,
                    batch_size=options.batch_size,
                    warm_start=None if warm_start is None else warm_start[stage],
                    seed=options.seed,
                    progress=progress.iterated if progress else None,
                )
            )
    return fits


@contextlib.contextmanager
def _sharded(
    options: FitOptions, points: PointSet, device: torch.device
) -> Iterator[ShardedPoints]:
    """Yield the points in this process, or spread over Ray actors."""
    if options.fit_workers is None:
        yield ShardedPoints.local(points, options.metric, device)
        return
    parts = pieces(points, options.fit_workers)
    sizes = [size for size, _ in parts]
    makers = [
        partial(RemoteShard, sum(sizes[:number]), options.metric, options.device)
        for number in range(len(sizes))
    ]
    with actor_group(makers, options.cluster) as group:
        for number, (_, arrays) in enumerate(parts):
            for array in arrays:
                group.call_one(number, "load", array)

        def call(method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
            return group.call("call", [(method, *args) for args in arguments])

        yield ShardedPoints(sizes, call)


def _summarise(
    options: FitOptions,
    extractor: FeatureExtractor,
    listing: Listing,
    sample: Sample,
    fits: list[Fit],
) -> FitSummary:
    centroids = torch.stack([fit.centroids.to(_common_type(fits)) for fit in fits])
    usages = [usage(fit.counts.numpy()) for fit in fits]
    dim = sample.points.dim
    held_out = _measure(sample.held_out, centroids, options.metric)
    quality: dict[str, JsonValue] = {
        "mse": fits[-1].objective[-1] / dim,
        "perplexity": usages[0].perplexity,
        "num_used": usages[0].num_used,
        "stages": [
            {"mse": fit.objective[-1] / dim, "perplexity": found.perplexity,
             "num_used": found.num_used, "objective": list(fit.objective)}
            for fit, found in zip(fits, usages, strict=True)
        ],
    }  # fmt: skip
    held_out_psnr = None
    if held_out:
        last = held_out[-1]
        quality |= {
            "held_out_mse": last.mse,
            "held_out_patches": len(sample.held_out),
            "held_out_stages": [stage._asdict() for stage in held_out],
        }
        if extractor.spec.id == "pixel" and options.metric == "l2":
            held_out_psnr = psnr(last.mse)
            quality["held_out_psnr_db"] = held_out_psnr if last.mse else None
    codebook = Codebook(
        centroids.numpy(),
        np.stack([fit.counts.numpy() for fit in fits]),
        metric=options.metric,
        pixel_rule=extractor.pixel_rule,
        extractor=extractor.spec,
        num_points=len(sample.points),
        num_images=sample.num_images,
        objective=tuple(fits[0].objective),
        fit=_settings(options, listing),
        quality=quality,
        versions={
            "patchcache": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )
    codebook.save(options.out)
    return FitSummary(
        codebook, usages[0], held_out, held_out_psnr, sample.num_skipped, options.sample_dir
    )


def _common_type(fits: list[Fit]) -> torch.dtype:
    """Return the type that holds the centroids of all stages: int16 for residuals of pixels."""
    return fits[-1].centroids.dtype


def _settings(options: FitOptions, listing: Listing) -> dict[str, JsonValue]:
    """Return the settings that decide what the centroids are."""
    return {
        "images": listing.info.location,
        "iterations": options.iterations,
        "restarts": options.restarts,
        "seed": options.seed,
        "sample": options.sample,
        "images_per_class": options.images_per_class,
        "patches_per_image": options.patches_per_image,
        "stages": options.stages,
        "batch_size": options.batch_size,
        "warm_start": str(options.warm_start) if options.warm_start else None,
    }


def _measure(held_out: PointSet, centroids: Tensor, metric: Metric) -> list[StageQuality]:
    """Measure the stages, from the first alone to all together, on held-out patches."""
    if not len(held_out):
        return []
    quantizer = ResidualQuantizer(centroids)
    totals = np.zeros((len(centroids), 3))
    for _, block in held_out.blocks(_ROWS_PER_BLOCK):
        points = block.float()
        if metric == "cosine":
            points = torch.nn.functional.normalize(points, dim=1)
        ids = quantizer.encode(block if metric == "l2" else points)
        again = torch.zeros_like(points)
        for stage, column in enumerate(ids.unbind(1)):
            again += centroids[stage][column].float()
            cosines, errors = fidelity(points.numpy(), again.numpy())
            error2 = (points - again).double().square().sum()
            totals[stage] += float(error2) / held_out.dim, cosines.sum(), errors.sum()
    return [StageQuality(*stage) for stage in (totals / len(held_out)).tolist()]
