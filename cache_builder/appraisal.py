"""`patchcache inspect --images`: what a codebook is worth on images that it was not fitted to.

If the images are those of the fit, only the ones that the fit held out are used; the codebook
records its source and seed, so they are known again. Of another source all images may be used. An
image whose files lie in both, under two names, cannot be told apart: the source is all we compare.

Every image is cut to its largest centred square, as for the fit. Features are dropped batch by
batch; token ids of the first stage are kept, two bytes per patch, and the rest is sums.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.errors import ConfigError, ImageError, SourceError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.plan import PlanRow
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode
from cache_builder.label_quality import LabelQuality, label_quality
from cache_builder.quality import (
    Agreement,
    Idle,
    Usage,
    idle,
    near_ties,
    neighbour_agreement,
    psnr,
    usage,
)
from cache_builder.reporting import Progress
from cache_builder.sampling import held_out_keys, smallest
from cache_builder.sources import Listing, Source, image_bytes, open_source
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.quantizer import residual

_SEED = 0  # of the choice of images and of the shuffles
_IMAGES_PER_BATCH = 16
_MOST_FOR_ALL_TIES = 1024  # centroids
_TIE_STRIDE = 11


class AppraisalOptions(NamedTuple):
    """What a user may say about an appraisal."""

    codebook: Path
    images: str
    max_images: int = 1000
    device: str = "auto"
    weights: str | None = None


class Skipped(NamedTuple):
    """An image that was left out."""

    source: str
    reason: str


class Picked(NamedTuple):
    """The images to look at."""

    source: Source
    listing: Listing
    keys: frozenset[str]
    num_eligible: int  # of which `keys` are the smallest by hash
    note: str  # why these

    def views(
        self, tokenizer: PatchTokenizer, keys: frozenset[str] | None = None
    ) -> Iterator[tuple[PlanRow, Tensor | ImageError]]:
        """Yield the images, or those of `keys`, in the order of the source.

        Each comes as its centred square (3, S, S) uint8, or as what is wrong with it.
        """
        wanted = self.keys if keys is None else keys
        rule = tokenizer.pixel_rule
        for unit in self.listing.units:
            rows = tuple(row for row in unit.rows if row.key in wanted)
            if not rows:
                continue
            for row, data in self.source.read(unit.model_copy(update={"rows": rows})):
                try:
                    pixels = decode(image_bytes(data))
                except ImageError as exc:
                    yield row, exc
                    continue
                view = centre_square((int(pixels.shape[-2]), int(pixels.shape[-1])))
                yield row, apply_view(pixels, view, rule.size, rule.interpolation)


class StageUse(NamedTuple):
    """How one stage is used, and how it was in the fit (None where no fit is recorded)."""

    usage: Usage
    idle: Idle
    usage_in_fit: Usage | None
    idle_in_fit: Idle | None


class Appraisal(NamedTuple):
    """A codebook, measured."""

    tokenizer: PatchTokenizer
    picked: Picked
    rows: list[PlanRow]  # of the images that were tokenised
    token_ids: NDArray[np.uint16]  # (B, rows, cols), of the first stage
    counts: NDArray[np.int64]  # (M, K), how often each id occurs
    skipped: list[Skipped]
    stages: list[StageUse]
    objective: float | None  # mean squared distance of a patch, all stages; None without a fit
    mse: float | None  # the same per value
    psnr_db: float | None  # of all pixels together; None where centroids are not pixels
    mean_image_psnr_db: float | None
    num_tie_patches: int  # whose second nearest centroid was looked for, in the first stage
    near_tie_share: float | None  # of those; None with one centroid
    exact_tie_share: float | None  # of pixels
    agreement: Agreement
    labels: LabelQuality | None
    labels_note: str  # why there are none

    @property
    def codebook(self) -> Codebook:
        """What was measured."""
        return self.tokenizer.codebook


def run(options: AppraisalOptions, progress: Progress | None = None) -> Appraisal:
    """Tokenise held-out images and measure.

    Raises:
        ArtifactError: The codebook is damaged.
        ConfigError: The fit held out nothing of these images.
        SourceError: The images cannot be listed or read, or none can be decoded.
    """
    tokenizer = PatchTokenizer.load(options.codebook, options.device, options.weights)
    picked = _pick_images(tokenizer.codebook, options.images, options.max_images)
    sums = _Sums(tokenizer)
    rows: list[PlanRow] = []
    skipped: list[Skipped] = []
    batch: list[Tensor] = []
    for row, view in picked.views(tokenizer):
        if isinstance(view, ImageError):
            skipped.append(Skipped(row.source, str(view)))
        else:
            rows.append(row)
            batch.append(view)
        if len(batch) == _IMAGES_PER_BATCH:
            sums.add(torch.stack(batch))
            batch = []
        if progress:
            progress(len(rows) + len(skipped), len(picked.keys))
    if batch:
        sums.add(torch.stack(batch))
    if not rows:
        raise SourceError(
            f"Not one of {len(skipped):,} images of {options.images} could be decoded; the first, "
            f"{skipped[0].source}: {skipped[0].reason}."
        )
    return _conclude(tokenizer, picked, rows, skipped, sums)


def _pick_images(codebook: Codebook, images: str, max_images: int) -> Picked:
    """Choose images that the fit has not learned from, at most `max_images`, by hash of the key.

    Raises:
        ConfigError: The fit held out nothing of these images.
        SourceError: The images cannot be listed.
    """
    source = open_source(images)
    listing = source.scan(None)
    keys = [row.key for unit in listing.units for row in unit.rows]
    fit = codebook.header.fit
    recorded, seed = fit.get("images"), fit.get("seed")
    if not isinstance(recorded, str) or not isinstance(seed, int):
        eligible, note = keys, "the codebook does not say what it was fitted to"
    elif Path(recorded).resolve() == Path(listing.info.location).resolve():
        eligible = sorted(held_out_keys(keys, seed))
        note = "held out by the fit, whose source this is"
    else:
        eligible, note = keys, "of another source than that of the fit"
    if not eligible:
        raise ConfigError(
            f"The codebook was fitted to {images}, and of {len(keys):,} images the fit held out "
            "none. Pass --images that it has not seen."
        )
    chosen = frozenset(smallest(eligible, min(max_images, len(eligible)), _SEED))
    return Picked(source, listing, chosen, len(eligible), note)


class _Sums:
    """What is kept of the images seen so far."""

    def __init__(self, tokenizer: PatchTokenizer) -> None:
        codebook = tokenizer.codebook
        self._tokenizer = tokenizer
        self.token_ids: list[NDArray[np.uint16]] = []
        self.counts = np.zeros((codebook.num_stages, codebook.vocab_size), np.int64)
        self.squared_distance = 0.0
        self.num_near_ties = 0
        self.num_exact_ties = 0
        self.num_tie_patches = 0
        self.image_mses: list[float] = []

    def add(self, pixels: Tensor) -> None:
        """Tokenise views (B, 3, S, S) uint8."""
        tokenizer = self._tokenizer
        if not tokenizer.codebook.is_fitted:
            self._add_ids(pixels, tokenizer.encode(pixels))
            return
        features = tokenizer.features(pixels)
        left = features.reshape(-1, features.shape[-1])
        columns = []
        stages = tokenizer.quantizer.stages
        self._add_ties(left)
        for number, stage in enumerate(stages):
            ids, nearest = stage.assign(left)
            columns.append(ids.cpu())
            if number + 1 < len(stages):
                left = residual(left, stage.centroids, ids)
        self.squared_distance += float(nearest.double().sum())
        shape = (len(pixels), *tokenizer.codebook.ids_shape)
        self._add_ids(pixels, torch.stack(columns, 1).view(shape))

    def _add_ids(self, pixels: Tensor, token_ids: Tensor) -> None:
        """Count the ids (B, rows, cols[, M]) of views, and measure what they decode to."""
        tokenizer, codebook = self._tokenizer, self._tokenizer.codebook
        by_stage = token_ids.reshape(-1, codebook.num_stages).numpy()
        for number, ids in enumerate(by_stage.T):
            self.counts[number] += np.bincount(ids, minlength=codebook.vocab_size)
        grid = (len(pixels), *tokenizer.grid)
        self.token_ids.append(by_stage[:, 0].reshape(grid).astype(np.uint16))
        if tokenizer.decodes_to_pixels:
            again = tokenizer.decode(token_ids)
            errors = (pixels.double() - again.double()).square().mean((1, 2, 3))
            self.image_mses += errors.tolist()

    def _add_ties(self, features: Tensor) -> None:
        """Find the second nearest centroids of the first stage.

        All centroids must be measured for that, many times the work of `assign` on real patches,
        so with a large codebook it is done of one patch in eleven: few grids have that period.
        """
        first = self._tokenizer.quantizer.stages[0]
        num_centroids = len(first.centroids)
        if num_centroids == 1:
            return
        some = features[:: 1 if num_centroids <= _MOST_FOR_ALL_TIES else _TIE_STRIDE]
        _, distances = first.top_k(some, 2)
        near, exact = near_ties(distances[:, 0].cpu().numpy(), distances[:, 1].cpu().numpy())
        self.num_near_ties += near
        self.num_exact_ties += exact
        self.num_tie_patches += len(some)


def _conclude(
    tokenizer: PatchTokenizer,
    picked: Picked,
    rows: list[PlanRow],
    skipped: list[Skipped],
    sums: _Sums,
) -> Appraisal:
    codebook = tokenizer.codebook
    token_ids = np.concatenate(sums.token_ids)
    num_tokens = token_ids.size
    objective = sums.squared_distance / num_tokens if codebook.is_fitted else None
    num_tied = sums.num_tie_patches
    exact = num_tied and codebook.centroids.dtype != np.float32
    labels, labels_note = _labels(codebook, rows, token_ids)
    return Appraisal(
        tokenizer=tokenizer,
        picked=picked,
        rows=rows,
        token_ids=token_ids,
        counts=sums.counts,
        skipped=skipped,
        stages=[_stage_use(codebook, stage, counts) for stage, counts in enumerate(sums.counts)],
        objective=objective,
        mse=None if objective is None else objective / codebook.dim,
        psnr_db=psnr(float(np.mean(sums.image_mses))) if sums.image_mses else None,
        mean_image_psnr_db=_mean_psnr(sums.image_mses),
        num_tie_patches=num_tied,
        near_tie_share=sums.num_near_ties / num_tied if num_tied else None,
        exact_tie_share=sums.num_exact_ties / num_tied if exact else None,
        agreement=neighbour_agreement(token_ids),
        labels=labels,
        labels_note=labels_note,
    )


def _stage_use(codebook: Codebook, stage: int, counts: NDArray[np.int64]) -> StageUse:
    if not codebook.header.num_points:
        return StageUse(usage(counts), idle(counts), None, None)
    before = codebook.counts[stage]
    return StageUse(usage(counts), idle(counts), usage(before), idle(before))


def _mean_psnr(image_mses: Sequence[float]) -> float | None:
    """Return the mean over images whose reconstruction has an error; infinity if none has one."""
    if not image_mses:
        return None
    values = [psnr(mse) for mse in image_mses if mse]
    return math.fsum(values) / len(values) if values else math.inf


def _labels(
    codebook: Codebook, rows: list[PlanRow], token_ids: NDArray[np.uint16]
) -> tuple[LabelQuality | None, str]:
    labelled = [index for index, row in enumerate(rows) if row.label is not None]
    labels = np.array([rows[index].label for index in labelled], np.int64)
    if not labelled:
        return None, "the images have no labels"
    if len(set(labels.tolist())) < 2:
        return None, "all labelled images are of one class"
    ids = token_ids[labelled].reshape(len(labelled), -1)
    return label_quality(ids, labels, codebook.vocab_size, _SEED), ""
