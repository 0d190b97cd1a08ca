"""What tests draw and build: pictures in known colours, folders, tars, codebooks and caches."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cache_builder import build
from cache_builder.build_worker import BuildTask, BuildWorker
from cache_builder.commit import UnitSummary, describe_layer, summarise, write_manifest
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.formats.manifest import (
    CacheManifest,
    UnitRecord,
    read_model,
    to_json,
    unit_record_name,
)
from cache_builder.formats.plan import BuildPlan
from cache_builder.formats.sample import CachedSample
from cache_builder.formats.views import View
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.planning import settle_plan
from cache_builder.sources import Listing, open_source
from cache_builder.stores import Store, join_location, open_store
from cache_builder.tokenizers.features import FeatureOptions, make_extractor

PATCH = 4  # side of a patch of the drawn pictures
GRID = 4
SIZE = PATCH * GRID

COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]], np.uint8
)


def draw_patches(ids, patch_size=PATCH, colours=COLOURS):
    """Draw (rows, cols) ids as a picture (H, W, 3) whose patch at (r, c) has colour ids[r, c]."""
    return np.repeat(np.repeat(colours[np.asarray(ids)], patch_size, 0), patch_size, 1)


def draw_photo(seed, height=48, width=64):
    """Draw something as smooth and as varied as a photograph: waves, a gradient, some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width, 3))
    for channel in range(3):
        for _ in range(4):
            fy, fx, phase = rng.uniform(0, 0.3), rng.uniform(0, 0.3), rng.uniform(0, 6)
            picture[..., channel] += rng.uniform(10, 40) * np.sin(fy * y + fx * x + phase)
        picture[..., channel] += 128 + rng.uniform(-1, 1) * (x - width / 2)
    picture += rng.normal(0, 3, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def photo_views(count, size) -> torch.Tensor:
    """Return square photographs as the drawn ones are, (count, 3, size, size) uint8."""
    photos = np.stack([draw_photo(seed, size, size) for seed in range(count)])
    return torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()


def photo_patches(num_photos=12, patch_size=PATCH) -> torch.Tensor:
    """Return all patches of drawn photographs of 64 pixels, (n, D) uint8."""
    return patchify(photo_views(num_photos, 64), patch_size).flatten(0, 1)


def random_ids(seed, rows=GRID, cols=GRID, num_colours=6):
    return np.random.default_rng(seed).integers(0, num_colours, (rows, cols))


def encode(pixels, image_format="PNG", **options):
    """Encode an array or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_folder(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def colour_codebook(colours=COLOURS, size=SIZE, patch_size=PATCH, **changes: Any) -> Codebook:
    """Return a pixel codebook whose centroid i is one patch of colour i."""
    centroids = np.repeat(np.asarray(colours, np.uint8), patch_size**2, axis=1)[None]
    fields: dict[str, Any] = {
        "metric": "l2",
        "pixel_rule": PixelRule(size=size, patch_size=patch_size),
        "extractor": ExtractorSpec(id="pixel"),
    }
    counts = np.ones(centroids.shape[:2], np.int64)
    return Codebook(centroids, counts, **(fields | changes))


def write_codebook(path: Path, **changes: Any) -> Path:
    colour_codebook(**changes).save(path)
    return path


def feature_codebook(
    features="timm:resnet10t",
    image_size=64,
    layer="2",
    metric="l2",
    centroids=None,
    num_centroids=16,
    **changes: Any,
) -> Codebook:
    """Return a codebook of a small model, of random weights unless a file is named.

    Its centroids are features of drawn photographs unless they are given. At 64 pixels layer 2 has
    8 x 8 patches and layer 4 has 2 x 2.
    """
    seed = None if "@" in features else 0
    options = FeatureOptions(features, image_size=image_size, layer=layer, random_weights_seed=seed)
    extractor = make_extractor(options, torch.device("cpu"))
    fields: dict[str, Any] = {"metric": metric}
    if centroids is None:
        photos = np.stack([draw_photo(i, image_size, image_size) for i in range(4)])
        found = extractor(torch.from_numpy(photos).permute(0, 3, 1, 2)).flatten(0, 1)
        if metric == "cosine":
            found = torch.nn.functional.normalize(found, dim=1)
        points = found.numpy()
        centroids = points[None, :: len(points) // num_centroids].copy()
        spread = np.square(points - points.mean(0)).sum(1).mean()
        fields["objective"] = (float(spread),)
    return Codebook(
        centroids,
        np.ones(centroids.shape[:2], np.int64),
        pixel_rule=extractor.pixel_rule,
        extractor=extractor.spec,
        **(fields | changes),
    )


def views_of(sample: CachedSample, rule: PixelRule) -> torch.Tensor:
    """Cut the views of a sample with an image, (V, 3, S, S) uint8."""
    picture = decode(sample.image or b"")
    boxes = [View(*box[:4], bool(box[4])) for box in sample.views.tolist()]
    return torch.stack([apply_view(picture, box, rule.size, rule.interpolation) for box in boxes])


def patch_images(num_images, **shape) -> dict[str, bytes]:
    """Return PNGs in known colours, half of them in class `a`, half in class `b`."""
    return {
        f"{'ab'[i % 2]}/{i:03d}.png": encode(draw_patches(random_ids(i, **shape)))
        for i in range(num_images)
    }


def photo_images(num_images, **shape) -> dict[str, bytes]:
    """Return JPEGs of drawn photographs in two classes."""
    return {
        f"{'ab'[i % 2]}/{i:03d}.jpg": encode(draw_photo(i, **shape), "JPEG", quality=90)
        for i in range(num_images)
    }


def build_cache(listing: Listing | None = None, **settings: Any) -> CacheManifest:
    """Build a cache as `patchcache build` does, one unit after another in this process."""
    options = build.BuildOptions(**({"device": "cpu"} | settings))
    plan = plan_cache(listing, **settings)
    task = {"names": ("", *plan.layers), "images": options.images, "weights": options.weights}
    worker = make_worker(options.out, plan, **task)
    for unit in range(plan.num_units):
        worker.run(unit)
    return finish(options.out)


def plan_cache(listing: Listing | None = None, **settings: Any) -> BuildPlan:
    """Write the plan of a build, and no unit of it."""
    options = build.BuildOptions(**settings)
    codebook = Codebook.load(options.codebook)
    listing = listing or open_source(options.images).scan(options.unit_size)
    spec = build._cache_spec(options, codebook, listing)
    further = [Codebook.load(path) for path in options.further_codebooks]
    layers = [
        build.layer_spec(
            spec,
            each,
            soft_top_k=options.soft_top_k,
            soft_temperature=options.soft_temperature,
            store_features=options.store_features,
        )
        for each in further
    ]
    return settle_plan(open_store(options.out), spec, listing.units, codebook, layers)


def make_worker(cache_dir: Path, plan: BuildPlan, **task: Any) -> BuildWorker:
    """Return a worker of a planned build, on the CPU."""
    told = {"images": plan.spec.source.location, "names": ("",), "device": "cpu"} | task
    return BuildWorker(BuildTask(cache=str(cache_dir), **told))


def read_summaries(store: Store, num_units: int) -> list[UnitSummary]:
    """Read what the manifest says of every unit from the commit records."""
    names = (unit_record_name(unit) for unit in range(num_units))
    return [summarise(unit, read_model(UnitRecord, store, name)) for unit, name in enumerate(names)]


def finish(cache_dir: Path) -> CacheManifest:
    """Write the manifests that belong to the commit records, those of layers first."""
    plan = read(BuildPlan, cache_dir, "plan.json")
    layers = [
        describe_layer(name, finish(join_location(cache_dir, name))) for name in sorted(plan.layers)
    ]
    store = open_store(cache_dir)
    return write_manifest(store, plan, read_summaries(store, plan.num_units), tuple(layers))


def read(model, cache_dir: Path, name: str):
    """Read a JSON file of a cache."""
    return read_model(model, open_store(cache_dir), name)


def rewrite_record(cache_dir: Path, unit: int, record) -> None:
    """Replace a commit record, and publish the manifest that belongs to it."""
    open_store(cache_dir).publish(unit_record_name(unit), to_json(record))
    finish(cache_dir)


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below `root` by its relative path, for comparing whole directories."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def open_files(root: Path) -> list[str]:
    """Return the files below `root` that this process has open, by Linux's /proc."""
    links = (link.resolve() for link in Path("/proc/self/fd").iterdir())
    return sorted(str(path) for path in links if path.is_relative_to(root.resolve()))


def flip_byte(path: Path, position: int = -1) -> None:
    """Damage one byte; by default the middle one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position < 0 else position] ^= 0x55
    path.write_bytes(data)


def peak_memory_since_reset(action):
    """Most memory that this process held during `action`, beyond what it held before, bytes."""

    def field(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    action()
    return field("VmHWM") - before
