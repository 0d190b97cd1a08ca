"""Assigning to a codebook and fitting one, beside faiss in the same run.

    python tests/benchmarks/bench_kmeans.py             # a quarter of an hour on one core
    python tests/benchmarks/bench_kmeans.py --quick     # smaller, for a look

Data: patches of photographs (`../shared/data/photos` or $PATCHCACHE_TEST_DATA/photos; drawn ones
where there are none, which prune better than real ones), features of a MobileNetV2 where its
weights are at hand, and Gaussian features whose variance falls like 1/i or more slowly.
Times on a CPU are process times of one thread. Every fit starts from random points.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import faiss
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cache_builder.formats.views import ViewSpec, draw_views
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.kmeans import fit_centroids
from cache_builder.quality import usage
from cache_builder.tokenizers import CentroidIndex, prefix
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from cache_builder.tokenizers.kernels.library import kernels
from tests import factories
from tests.places import DATA

WEIGHTS = DATA / "weights" / "mobilenetv2_100.same.fp16.safetensors"
NUM_HELD_OUT = 5  # every fifth photo


class Data(NamedTuple):
    """Points to fit to and points to assign."""

    name: str
    train: Tensor  # (n, D)
    test: Tensor


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="smaller and faster")
    parser.add_argument("--only", choices=("assign", "fit"), help="one table alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    console = Console(width=130)
    compiled = kernels()
    console.print(
        f"torch {torch.__version__}, faiss {faiss.__version__}, kernels "
        f"{compiled.variant if compiled else 'not built'}"
    )
    pixels = pixel_data()
    k = 1024 if args.quick else 8192
    if args.only != "fit":
        console.print(assignment_table(pixels, k, args.quick))
    if args.only != "assign":
        console.print(fit_table(pixels, k, args.quick))


def assignment_table(pixels: Data, k: int, quick: bool) -> Table:
    """Time the nearest of K centroids by every route that there is."""
    table = Table(title="Nearest centroid, one core, microseconds per patch")
    for name in ("data", "D", "K", "faiss flat", "torch dense", "ours, torch", "ours, compiled",
                 "x faiss", "x dense", "prefix", "wrong, faiss", "wrong, ours"):  # fmt: skip
        table.add_column(name, justify="left" if name == "data" else "right")
    num_rows = 1000 if quick else 5000
    sizes = dict.fromkeys((k, 1024))
    for data, num in [*((pixels, size) for size in sizes), *((d, k) for d in feature_data(k))]:
        centroids = codebook(data, num)
        add_assignment(table, data, centroids, data.test[:num_rows])
    return table


def add_assignment(table: Table, data: Data, centroids: Tensor, x: Tensor) -> None:
    """Add a row: four routes, and how many ids differ from those in float64."""
    exact = nearest_in_float64(x, centroids)
    flat = faiss.IndexFlatL2(x.shape[1])
    flat.add(centroids.float().numpy())
    queries = x.float().numpy()
    of_faiss, ids_of_faiss = timed(lambda: flat.search(queries, 1)[1][:, 0], len(x))
    dense, _ = timed(lambda: dense_torch(x.float(), centroids.float()), len(x))
    in_torch, _ = timed(searcher(centroids, x, use_kernels=False), len(x))
    index = CentroidIndex(centroids)
    index.assign(x[:256])
    ours, ids = timed(lambda: index.assign(x)[0], len(x))
    length = index._plan.prefix if index._plan else None
    table.add_row(
        data.name, f"{x.shape[1]}", f"{len(centroids):,}", f"{of_faiss:.1f}", f"{dense:.1f}",
        f"{in_torch:.1f}", f"{ours:.1f}" if kernels() else "-", f"{of_faiss / ours:.1f}",
        f"{dense / ours:.1f}", str(length or "dense"),
        f"{int((torch.from_numpy(ids_of_faiss) != exact).sum())}", f"{int((ids != exact).sum())}",
    )  # fmt: skip


def fit_table(pixels: Data, k: int, quick: bool) -> Table:
    """Fit the same points by faiss and by us, and compare time and quality."""
    table = Table(title="k-means of pixel patches, one core, equal iterations, random seeds")
    for name in ("K", "patches", "iterations", "fit", "CPU s", "x faiss", "MSE", "held-out MSE",
                 "perplexity", "held-out perplexity", "one member or none"):  # fmt: skip
        table.add_column(name, justify="left" if name == "fit" else "right")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(pixels.train), generator=generator)
    num_points = 10_000 if quick else 150_000
    for num in dict.fromkeys((k, 1024)):
        points = pixels.train[order[:num_points]]
        of_faiss = None
        for name, fit in (("faiss.Kmeans", fit_by_faiss), ("ours", fit_by_us)):
            start = time.process_time()
            centroids, iterations = fit(points, num)
            seconds = time.process_time() - start
            of_faiss = of_faiss or seconds
            train, held_out = measured(points, centroids), measured(pixels.test, centroids)
            table.add_row(
                f"{num:,}", f"{len(points):,}", f"{iterations}", name, f"{seconds:.1f}",
                f"{of_faiss / seconds:.1f}", f"{train[0]:.1f}", f"{held_out[0]:.1f}",
                f"{train[1]:,.0f}", f"{held_out[1]:,.0f}", f"{train[2]:,}",
            )  # fmt: skip
    return table


def pixel_data() -> Data:
    """Cut photographs into patches; every fifth one is held out, the others give six views."""
    spec = ViewSpec(
        size=224, patch_size=16, interpolation="bicubic", num_views=6, scale=(0.3, 1),
        ratio=(0.75, 4 / 3), hflip=0.5, seed=0,
    )  # fmt: skip
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for number, (key, pixels) in enumerate(photographs()):
        held_out = number % NUM_HELD_OUT == 0
        views = draw_views(spec, key, (int(pixels.shape[-2]), int(pixels.shape[-1])))
        cut = [apply_view(pixels, v, 224, "bicubic") for v in views[: 1 if held_out else None]]
        parts[held_out].append(patchify(torch.stack(cut), 16).reshape(-1, 768))
    return Data("pixels of photos", torch.cat(parts[False]), torch.cat(parts[True]))


def feature_data(k: int) -> list[Data]:
    """Return real features where there are weights, and Gaussian ones."""
    found = []
    if WEIGHTS.is_file():
        options = FeatureOptions(
            f"timm:mobilenetv2_100@{WEIGHTS}", image_size=448, model_args={"pad_type": "same"}
        )
        extractor = make_extractor(options, torch.device("cpu"))
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for number, (_, pixels) in enumerate(photographs()):
            side = min(pixels.shape[-2:])
            view = (0, 0, side, side, False)
            features = extractor(apply_view(pixels, view, 448, "bicubic")[None])[0]
            parts[number % NUM_HELD_OUT == 0].append(features)
        found.append(Data("MobileNetV2 of photos", torch.cat(parts[False]), torch.cat(parts[True])))
    gaussian = [gaussian_data(k, *shape) for shape in ((1.0, 0.45), (0.5, 0.45), (0.5, 0.6))]
    return found + gaussian


def gaussian_data(k: int, slope: float, within: float, dim: int = 768) -> Data:
    """Draw K clusters in a random rotation.

    The variance falls like i ** -slope, and a share `within` of it lies within the clusters.
    """
    generator = torch.Generator().manual_seed(0)
    variances = torch.arange(1, dim + 1).double() ** -slope
    scales = (variances / variances.sum()).sqrt()
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator).double()).Q

    def draw(num: int) -> Tensor:
        return torch.randn(num, dim, generator=generator).double() * scales

    centres = draw(k) * (1 - within) ** 0.5
    members = torch.randint(k, (5000,), generator=generator)
    test = centres[members] + draw(5000) * within**0.5
    name = f"Gaussian i^-{slope:g}, {within:.0%} within"
    return Data(name, (centres @ rotation).float(), (test @ rotation).float())


def photographs() -> list[tuple[str, Tensor]]:
    """Return keys and pixels of real photographs, or of drawn ones where there are none."""
    paths = sorted((DATA / "photos").glob("*.JPEG"))
    if paths:
        return [(path.stem, decode(path.read_bytes())) for path in paths]
    drawn = [factories.draw_photo(seed, 256, 256) for seed in range(250)]
    return [(str(n), torch.from_numpy(photo).permute(2, 0, 1)) for n, photo in enumerate(drawn)]


def codebook(data: Data, k: int) -> Tensor:
    """Return K centroids: two iterations are enough to time an assignment."""
    if len(data.train) == k:
        return data.train
    return fit_centroids(data.train[: 15 * k], k, iterations=2).centroids


def fit_by_faiss(points: Tensor, k: int) -> tuple[Tensor, int]:
    """Fit as CCViT does."""
    kmeans = faiss.Kmeans(
        points.shape[1], k, niter=10, seed=1, max_points_per_centroid=10**7,
        min_points_per_centroid=1,
    )  # fmt: skip
    kmeans.train(points.float().numpy())
    return torch.from_numpy(kmeans.centroids), 10


def fit_by_us(points: Tensor, k: int) -> tuple[Tensor, int]:
    """Fit as `patchcache fit` does."""
    fit = fit_centroids(points, k, iterations=10, seed=1)
    return fit.centroids, len(fit.objective) - 1


def measured(points: Tensor, centroids: Tensor) -> tuple[float, float, int]:
    """Return MSE per value, perplexity, and how many centroids have one member or none."""
    ids, distances = CentroidIndex(centroids).assign(points)
    counts = ids.bincount(minlength=len(centroids))
    mse = float(distances.double().mean()) / points.shape[1]
    return mse, usage(counts.numpy()).perplexity, int((counts <= 1).sum())


def nearest_in_float64(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroids by float64 products, enough for all but closest ties."""
    exact = centroids.double()
    norms = exact.square().sum(1)
    parts = [(norms - 2 * part.double() @ exact.T).argmin(1) for part in x.split(512)]
    return torch.cat(parts)


def dense_torch(x: Tensor, centroids: Tensor) -> Tensor:
    """Do what anyone would write in torch, in blocks that fit the cache."""
    norms = centroids.square().sum(1)
    step = 32 if x.device.type == "cpu" else len(x)
    parts = [torch.addmm(norms, part, centroids.T, alpha=-2).argmin(1) for part in x.split(step)]
    return torch.cat(parts)


def searcher(centroids: Tensor, x: Tensor, *, use_kernels: bool) -> Callable[[], Any]:
    """Return our search, prepared, with or without the compiled kernels."""
    before = prefix.kernels
    prefix.kernels = before if use_kernels else lambda: None  # type: ignore[assignment]
    index = CentroidIndex(centroids)
    index.assign(x[:256])
    prefix.kernels = before
    return lambda: index.assign(x)[0]


def timed(run: Callable[[], Any], num_rows: int) -> tuple[float, Any]:
    """Return microseconds of CPU per row, the best of three, and the answer."""
    best, answer = float("inf"), None
    for _ in range(3):
        start = time.process_time()
        answer = run()
        best = min(best, time.process_time() - start)
    return best / num_rows * 1e6, answer


if __name__ == "__main__":
    main()
