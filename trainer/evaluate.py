"""How good the features are, against those of the same model before training.

Frozen features: the mean of the patch tokens after the final norm, of the largest centred square of
each picture, each dimension standardised by the training part. Two readings of them, k-NN and a
linear probe, the same procedure for both models. Fine-tuning ranks models differently; a masked
model in particular is worth more fine-tuned than its frozen features say.
"""

import logging
from pathlib import Path
from typing import NamedTuple, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from cache_builder.errors import ConfigError
from trainer import pixels
from trainer.backbones import Backbone, freshly_initialised, load_backbone
from trainer.labelled import (
    CentreSquares,
    LabelledImages,
    choose,
    class_mapping,
    is_test_key,
    open_labelled,
)
from trainer.model import pick_device
from trainer.objectives.interface import Normalise
from trainer.workers import load_ahead

logger = logging.getLogger(__name__)

WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)

_BATCH_SIZE = 256
_SEED = 0  # of the freshly initialised model
_TEMPERATURE = 0.07  # of the votes
_LBFGS_STEPS = 100
_NUM_QUERIES = 1024


class Accuracy(NamedTuple):
    """Shares of the test part."""

    top1: float  # named right
    top5: float  # among the five classes named first; 1 where there are no more than five


class ProbeResult(NamedTuple):
    """Accuracies on the test part, as shares."""

    knn: float
    knn_random: float  # of the same model, freshly initialised
    linear: float
    linear_random: float
    knn_top5: float
    knn_top5_random: float
    linear_top5: float
    linear_top5_random: float
    chance: float  # of always naming the class that is most frequent in the training part
    num_train: int
    num_test: int
    num_classes: int


class Part(NamedTuple):
    """Labelled samples, as the features of one ViT."""

    features: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64


class _Labelled(NamedTuple):
    """Labelled samples of one cache, as the features of several ViTs."""

    features: list[Tensor]  # one (n, D) per ViT
    labels: Tensor  # (n,)
    is_test: Tensor  # (n,) bool, by key

    def part(self, vit: int, chosen: Tensor) -> Part:
        return Part(self.features[vit][chosen], self.labels[chosen])


def probe(
    model: str | Path,
    *,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    images: str | None = None,
    max_samples: int = 10_000,
    k: int = 20,
    num_workers: int = 0,
    device: str = "auto",
) -> ProbeResult:
    """Measure a model's features by k-NN and by a linear probe.

    Args:
        model: What `load_backbone` takes: a checkpoint or the directory of a run, an exported
            file, or a model of timm.
        data: Labelled images: a cache, of any tokenizer, or any source of images; None is the
            cache that the checkpoint was trained from.
        test_data: Such images to test on; None keeps a fifth of `data`, chosen by key, for it.
        images: Where the images lie, for a cache that holds none.
        max_samples: Most samples read of each place, chosen by key.
        k: Neighbours that vote.
        num_workers: Processes that decode; 0 is fastest for pictures of a few kilobytes.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ArtifactError: The model or a cache is missing or damaged.
        SourceError: There are no images at a place.
        ConfigError: The samples have no labels, are of one class, or are too few.
    """
    if max_samples < 1 or k < 1:
        raise ConfigError(f"max_samples {max_samples} and k {k} must both be at least 1.")
    backbone = load_backbone(model).without_classifier()
    target = pick_device(device)
    trained = backbone.build()
    models = [trained, freshly_initialised(backbone, _SEED)]
    models = [each.to(target).eval() for each in models]

    place = data or backbone.cache
    if place is None:
        raise ConfigError(
            f"{model} does not say what it was trained on. Pass labelled images with --data."
        )
    # The one that it was trained from may have been read with images from elsewhere.
    labelled = open_labelled(place, images if data or images else backbone.images)
    samples = _read(models, labelled, backbone, max_samples, num_workers, target)
    if test_data is None:
        train = [samples.part(each, ~samples.is_test) for each in range(2)]
        test = [samples.part(each, samples.is_test) for each in range(2)]
    else:
        tested = open_labelled(test_data)
        mapping = class_mapping(labelled, tested)
        others = _read(models, tested, backbone, max_samples, num_workers, target)
        if mapping is not None:
            others = others._replace(labels=torch.tensor(mapping)[others.labels])
        train = [samples.part(each, samples.labels >= 0) for each in range(2)]
        test = [others.part(each, others.labels >= 0) for each in range(2)]
    num_classes = _count_classes(train[0], test[0], place, k)
    knn, linear = [], []
    for each in range(2):
        parts = _standardise(train[each], test[each])
        knn.append(knn_accuracy(*parts, num_classes, k))
        linear.append(_linear_accuracy(*parts, num_classes))
    commonest = train[0].labels.bincount().argmax()
    return ProbeResult(
        knn=knn[0].top1,
        knn_random=knn[1].top1,
        linear=linear[0].top1,
        linear_random=linear[1].top1,
        knn_top5=knn[0].top5,
        knn_top5_random=knn[1].top5,
        linear_top5=linear[0].top5,
        linear_top5_random=linear[1].top5,
        chance=_share(test[0].labels == commonest),
        num_train=len(train[0].labels),
        num_test=len(test[0].labels),
        num_classes=num_classes,
    )


def knn_accuracy(train: Part, test: Part, num_classes: int, k: int) -> Accuracy:
    """Return how often the k nearest training samples, by cosine, name a test sample's class.

    Each votes with weight exp(cosine / 0.07), as in the k-NN protocol of DINO (arXiv:2104.14294).
    Ties go to the lower class.
    """
    keys = normalize(train.features, dim=1)
    classes = one_hot(train.labels, num_classes).float()
    named = []
    queries = normalize(test.features, dim=1).split(_NUM_QUERIES)
    for block in queries:
        cosine, nearest = (block @ keys.T).topk(k, dim=1)
        # Subtracting the largest cosine scales all votes of a query alike and cannot overflow.
        weights = ((cosine - cosine[:, :1]) / _TEMPERATURE).exp()
        votes = (weights[..., None] * classes[nearest]).sum(1)
        named.append(five_best(votes))
    return accuracy_of(torch.cat(named), test.labels)


def _linear_accuracy(train: Part, test: Part, num_classes: int) -> Accuracy:
    """Return the accuracy of multinomial logistic regression on the test part.

    The weight decay is the one of `WEIGHT_DECAYS` that does best on every fifth training sample,
    having been fitted to the others; then all of the training part is fitted.
    """
    held_out = torch.arange(len(train.labels)) % 5 == 0
    fitted = Part(train.features[~held_out], train.labels[~held_out])
    tuned = Part(train.features[held_out], train.labels[held_out])

    def accuracy(fit: Part, score: Part, weight_decay: float) -> Accuracy:
        weight, bias = _fit_logistic(fit, num_classes, weight_decay)
        return accuracy_of(five_best(score.features @ weight + bias), score.labels)

    best = max(WEIGHT_DECAYS, key=lambda decay: accuracy(fitted, tuned, decay).top1)
    return accuracy(train, test, best)


def _fit_logistic(part: Part, num_classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Fit weight (D, C) and bias (C,) by L-BFGS, from zero.

    Minimises mean cross-entropy + weight_decay / 2 * |weight|^2.
    """
    weight = torch.zeros(part.features.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(part.features @ weight + bias, part.labels)
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def _pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what is measured of images: (B, 3, S, S) float to (B, D) float32.

    Of a ViT the mean patch token after the final norm; of other models of timm what their
    classifier is given.
    """
    found = model.forward_features(images)
    if isinstance(model, VisionTransformer):
        return cast(Tensor, found[:, model.num_prefix_tokens :].mean(1).float())
    return cast(Tensor, model.forward_head(found, pre_logits=True).float())


def accuracy_of(named: Tensor, labels: Tensor) -> Accuracy:
    """Compare classes (n, up to 5), the likeliest first, with labels (n,)."""
    right = named == labels[:, None]
    return Accuracy(_share(right[:, 0]), _share(right.any(1)))


def _read(
    models: list[nn.Module],
    images: LabelledImages,
    backbone: Backbone,
    max_samples: int,
    num_workers: int,
    device: torch.device,
) -> _Labelled:
    places = choose(images.places(), max_samples)
    blocks = (places[at : at + _BATCH_SIZE] for at in range(0, len(places), _BATCH_SIZE))
    features: list[list[Tensor]] = [[] for _ in models]
    labels: list[Tensor] = []
    is_test: list[bool] = []
    refused: list[str] = []
    normalise_input = Normalise(backbone.mean, backbone.std).to(device)
    dataset = CentreSquares(images, backbone.image_size)
    for batch in load_ahead(dataset, blocks, num_workers=num_workers, device=device):
        refused += batch.refused
        if batch.pixels is None:
            continue
        inputs = normalise_input(pixels.to_unit_range(batch.pixels, device))
        with torch.inference_mode():
            for rows, model in zip(features, models, strict=True):
                rows.append(_pooled_features(model, inputs).cpu())
        labels.append(batch.labels)
        is_test.extend(is_test_key(key) for key in batch.keys)
    images.close()
    if refused:
        logger.warning(
            "%s: %d images are left out, as %s", images.location, len(refused), refused[0]
        )
    if not labels:
        raise ConfigError(
            f"{images.location} has no labels: a probe needs some. Name a folder with one "
            "subfolder per class, tars with .cls members, or a cache of such images."
        )
    return _Labelled(
        [torch.cat(rows) for rows in features], torch.cat(labels), torch.tensor(is_test)
    )


def _count_classes(train: Part, test: Part, place: str | Path, k: int) -> int:
    num_classes = len(train.labels.unique())
    if num_classes < 2:
        raise ConfigError(
            f"The labelled samples of {place} are of {num_classes} class; a probe needs two or "
            "more. Name images of more classes."
        )
    if len(train.labels) <= k or len(test.labels) == 0:
        raise ConfigError(
            f"{len(train.labels)} samples to train on and {len(test.labels)} to test on are too "
            f"few for k = {k} neighbours. Raise max_samples, lower k or name more images."
        )
    return int(torch.cat([train.labels, test.labels]).max()) + 1


def _standardise(train: Part, test: Part) -> tuple[Part, Part]:
    std, mean = torch.std_mean(train.features, dim=0)
    std = std.clamp_min(1e-6)
    return tuple(part._replace(features=(part.features - mean) / std) for part in (train, test))  # type: ignore[return-value]


def five_best(scores: Tensor) -> Tensor:
    """Return the classes of the highest scores, (n, C) to (n, 5); equal ones in their order."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :5]


def _share(right: Tensor) -> float:
    return float(right.float().mean())
