"""How good the features are, against those of the same ViT before training.

Frozen features: the mean of the patch tokens after the final norm, view 0 of each picture, each
dimension standardised by the training part. Two readings of them, k-NN and a linear probe, the
same procedure for both ViTs. Fine-tuning ranks models differently; a masked model in particular is
worth more fine-tuned than its frozen features say.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from cache_builder.errors import ConfigError
from cache_builder.formats import TokenCache
from trainer import checkpoint as checkpoints
from trainer import pixels
from trainer.config import DataConfig
from trainer.data import CachedViews, Pick, read_batches, stable_hash
from trainer.model import build_vit, pick_device
from trainer.objectives.interface import Normalise

TEST_SHARE = 0.2
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)

_BATCH_SIZE = 256
_LBFGS_STEPS = 100
_NUM_QUERIES = 1024


class ProbeResult(NamedTuple):
    """Top-1 accuracies on the test part, as shares."""

    knn: float
    knn_random: float  # of the same ViT, freshly initialised
    linear: float
    linear_random: float
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
    checkpoint: str | Path,
    *,
    cache_path: str | Path | None = None,
    test_cache: str | Path | None = None,
    images: str | None = None,
    max_samples: int = 10_000,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    device: str = "auto",
) -> ProbeResult:
    """Measure a checkpoint's features by k-NN and by a linear probe.

    Args:
        checkpoint: The file, or the directory of a run, whose newest checkpoint is meant.
        cache_path: A cache with labels; None is the one that the checkpoint was trained from. Its
            token ids are not used, so it may be any tokenizer's.
        test_cache: A cache to test on; None keeps a fifth of `cache_path`, chosen by key, for it.
        images: Where the images lie, for a cache that holds none.
        max_samples: Most samples read of each cache, chosen by key.
        k: Neighbours that vote, each with weight exp(cosine / temperature).
        temperature: Of the votes; 0.07 as in the k-NN protocol of DINO (arXiv:2104.14294).
        seed: Of the freshly initialised ViT.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ArtifactError: The checkpoint or a cache is missing or damaged.
        ConfigError: The samples have no labels, are of one class, or are too few.
    """
    if max_samples < 1 or k < 1 or temperature <= 0:
        raise ConfigError("max_samples and k must be at least 1, and temperature above 0.")
    loaded = checkpoints.load(checkpoint)
    data = loaded.config.data
    if images is not None:
        data = data.model_copy(update={"images": images})
    target = pick_device(device)
    torch.manual_seed(seed)
    vits = [loaded.build_vit(), build_vit(loaded.header.vit_spec)]
    vits = [vit.to(target).eval() for vit in vits]
    size = loaded.header.vit_spec.image_size

    path = cache_path or loaded.header.cache.path
    samples = _read(vits, path, max_samples, data, size, target)
    if test_cache is None:
        train = [samples.part(vit, ~samples.is_test) for vit in range(2)]
        test = [samples.part(vit, samples.is_test) for vit in range(2)]
    else:
        others = _read(vits, Path(test_cache), max_samples, data, size, target)
        train = [samples.part(vit, samples.labels >= 0) for vit in range(2)]
        test = [others.part(vit, others.labels >= 0) for vit in range(2)]
    num_classes = _count_classes(train[0], test[0], path, k)
    scores = []
    for vit in range(2):
        parts = _standardise(train[vit], test[vit])
        scores.append(
            (
                knn_accuracy(*parts, num_classes, k=k, temperature=temperature),
                linear_accuracy(*parts, num_classes),
            )
        )
    commonest = train[0].labels.bincount().argmax()
    return ProbeResult(
        knn=scores[0][0],
        knn_random=scores[1][0],
        linear=scores[0][1],
        linear_random=scores[1][1],
        chance=_share(test[0].labels == commonest),
        num_train=len(train[0].labels),
        num_test=len(test[0].labels),
        num_classes=num_classes,
    )


def knn_accuracy(train: Part, test: Part, num_classes: int, *, k: int, temperature: float) -> float:
    """Return the share of the test part that its k nearest training samples, by cosine, get right.

    Each votes with weight exp(cosine / temperature). Ties go to the lower class.
    """
    keys = normalize(train.features, dim=1)
    classes = one_hot(train.labels, num_classes).float()
    right = []
    queries = normalize(test.features, dim=1).split(_NUM_QUERIES)
    for block, labels in zip(queries, test.labels.split(_NUM_QUERIES), strict=True):
        cosine, nearest = (block @ keys.T).topk(k, dim=1)
        # Subtracting the largest cosine scales all votes of a query alike and cannot overflow.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = (weights[..., None] * classes[nearest]).sum(1)
        right.append(votes.argmax(1) == labels)
    return _share(torch.cat(right))


def linear_accuracy(train: Part, test: Part, num_classes: int) -> float:
    """Return the accuracy of multinomial logistic regression on the test part.

    The weight decay is the one of `WEIGHT_DECAYS` that does best on every fifth training sample,
    having been fitted to the others; then all of the training part is fitted.
    """
    held_out = torch.arange(len(train.labels)) % 5 == 0
    fitted = Part(train.features[~held_out], train.labels[~held_out])
    tuned = Part(train.features[held_out], train.labels[held_out])

    def accuracy(fit: Part, score: Part, weight_decay: float) -> float:
        weight, bias = fit_logistic(fit, num_classes, weight_decay)
        return _share((score.features @ weight + bias).argmax(1) == score.labels)

    best = max(WEIGHT_DECAYS, key=lambda decay: accuracy(fitted, tuned, decay))
    return accuracy(train, test, best)


def fit_logistic(part: Part, num_classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
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


def pooled_features(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Return the mean patch token after the final norm: (B, 3, S, S) float to (B, D) float32."""
    tokens = vit.forward_features(images)
    return tokens[:, vit.num_prefix_tokens :].mean(1).float()


def choose_samples(cache_path: str | Path, max_samples: int) -> list[Pick]:
    """Return up to `max_samples` samples of a cache, chosen by a hash of their keys."""
    with TokenCache.open(cache_path) as cache:
        ranked = [
            (stable_hash(f"probe {key}"), shard, row)
            for shard in range(len(cache.manifest.shards))
            for row, key in enumerate(cache.shard(shard).keys)
        ]
    chosen = sorted(ranked)[:max_samples]
    return [Pick(0, shard, row) for _, shard, row in sorted(chosen, key=lambda at: at[1:])]


def is_test_key(key: str) -> bool:
    """Return whether a sample is kept for testing: a fifth of all keys, the same in every run."""
    return stable_hash(f"test {key}") % 1000 < 1000 * TEST_SHARE


def _read(
    vits: list[VisionTransformer],
    cache_path: str | Path,
    max_samples: int,
    data: DataConfig,
    image_size: int,
    device: torch.device,
) -> _Labelled:
    picks = choose_samples(cache_path, max_samples)
    dataset = CachedViews(cache_path, image_size=image_size, images=data.images, views="first")
    blocks = (picks[at : at + _BATCH_SIZE] for at in range(0, len(picks), _BATCH_SIZE))
    features: list[list[Tensor]] = [[] for _ in vits]
    labels: list[Tensor] = []
    is_test: list[bool] = []
    normalise_input = Normalise(data.mean, data.std).to(device)
    for batch in read_batches(dataset, blocks, num_workers=data.num_workers, device=device):
        images = pixels.to_unit_range(batch.pixels, device)
        images = normalise_input(images)
        with torch.inference_mode():
            for rows, vit in zip(features, vits, strict=True):
                rows.append(pooled_features(vit, images).cpu())
        labels.append(batch.labels)
        is_test.extend(is_test_key(key) for key in batch.keys)
    dataset.close()
    all_labels = torch.cat(labels)
    known = all_labels >= 0
    if not known.any():
        raise ConfigError(
            f"{cache_path} has no labels: a probe needs some. Build a cache of a folder with one "
            "subfolder per class, or of tars with .cls members, and pass it as the cache."
        )
    return _Labelled(
        [torch.cat(rows)[known] for rows in features],
        all_labels[known],
        torch.tensor(is_test)[known],
    )


def _count_classes(train: Part, test: Part, cache_path: str | Path, k: int) -> int:
    num_classes = len(train.labels.unique())
    if num_classes < 2:
        raise ConfigError(
            f"The labelled samples of {cache_path} are of {num_classes} class; a probe needs two "
            "or more. Pass a cache with more classes."
        )
    if len(train.labels) <= k or len(test.labels) == 0:
        raise ConfigError(
            f"{len(train.labels)} samples to train on and {len(test.labels)} to test on are too "
            f"few for k = {k} neighbours. Raise max_samples, lower k or pass a larger cache."
        )
    return int(torch.cat([train.labels, test.labels]).max()) + 1


def _standardise(train: Part, test: Part) -> tuple[Part, Part]:
    std, mean = torch.std_mean(train.features, dim=0)
    std = std.clamp_min(1e-6)
    return tuple(part._replace(features=(part.features - mean) / std) for part in (train, test))  # type: ignore[return-value]


def _share(right: Tensor) -> float:
    return float(right.float().mean())
