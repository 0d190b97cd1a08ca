"""Tokens of pixels and of a real encoder on photographs, scored by coarse classes.

The photographs are dealt to two halves; a codebook is fitted to the one and measured on the other,
and the other way round.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cache_builder import appraisal, kmeans
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers.features import FeatureOptions, extract_features, make_extractor

CLASSES = tomllib.loads((Path(__file__).parent / "photo_classes.toml").read_text())
SIZE, PATCH_SIZE = 224, 16  # 14 x 14 ids


class Scores(NamedTuple):
    """Means over the two halves; each value, then the one for shuffled labels."""

    mutual_information: tuple[float, float]
    normalised: tuple[float, float]
    purity: tuple[float, float]
    tcas_reconstructed: tuple[float, float]
    accuracy: tuple[float, float]
    mean_recall: tuple[float, float]
    perplexity: float
    num_tokens: int  # of one half


def link_halves(photos: Path, root: Path) -> list[Path]:
    """Link the photographs into two folders with a subfolder per coarse class."""
    halves = [root / "one", root / "other"]
    paths = {path.stem.split("_", 1)[1]: path for path in photos.glob("*.JPEG")}
    for label, names in CLASSES.items():
        for rank, name in enumerate(names):
            link = halves[rank % 2] / label / paths[name].name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(paths[name].resolve())
    return halves


def pixel_options() -> FeatureOptions:
    return FeatureOptions("pixel", image_size=SIZE, patch_size=PATCH_SIZE)


def mobilenet_options(weights: Path) -> FeatureOptions:
    """Return the map of stride 16 and 96 channels."""
    return FeatureOptions(
        f"timm:mobilenetv2_100@{weights}",
        image_size=SIZE,
        layer="3",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        model_args={"pad_type": "same"},
    )


def fit_codebook(
    options: FeatureOptions, folder: Path, k: int, out: Path, *, metric: str = "l2", seed: int = 0
) -> Codebook:
    """Fit a codebook to every patch of a folder, in this process."""
    extractor = make_extractor(options, torch.device("cpu"))
    rule = extractor.pixel_rule
    found = []
    for path in sorted(folder.rglob("*.JPEG")):
        pixels = decode(path.read_bytes())
        view = centre_square((pixels.shape[-2], pixels.shape[-1]))
        view = apply_view(pixels, view, rule.size, rule.interpolation)
        found.append(extract_features(extractor, view[None])[0])
    points = torch.cat(found)
    fit = kmeans.fit_centroids(points, k, metric=metric, iterations=20, seed=seed)
    codebook = Codebook(
        fit.centroids[None].numpy(),
        fit.counts[None].numpy(),
        metric=metric,
        pixel_rule=rule,
        extractor=extractor.spec,
        num_points=len(points),
        num_images=len(found),
        objective=tuple(fit.objective),
        fit={"images": str(folder.resolve()), "seed": seed},
    )
    codebook.save(out)
    return codebook


def measure(
    options: FeatureOptions, halves: list[Path], k: int, out: Path, *, metric: str = "l2"
) -> Scores:
    """Fit to each half, measure on the other, and return the means."""
    results = []
    for fitted, measured in (halves, halves[::-1]):
        fit_codebook(options, fitted, k, out, metric=metric)
        results.append(appraisal.run(appraisal.AppraisalOptions(out, str(measured), device="cpu")))

    def mean(pick):
        return tuple(np.mean([pick(one.labels) for one in results], axis=0).tolist())

    return Scores(
        mutual_information=mean(lambda labels: labels.mutual_information),
        normalised=mean(lambda labels: labels.normalised),
        purity=mean(lambda labels: labels.purity),
        tcas_reconstructed=mean(lambda labels: labels.tcas_reconstructed),
        accuracy=mean(lambda labels: labels.probe.accuracy),
        mean_recall=mean(lambda labels: labels.probe.mean_recall),
        perplexity=float(np.mean([one.stages[0].usage.perplexity for one in results])),
        num_tokens=min(one.token_ids.size for one in results),
    )
