"""Two other ways to tokenise a folder of images, with our tokenizer, decoder and cropper.

    python -m tests.benchmarks.build_peers per-image --images DIR --codebook FILE --out DIR
    python -m tests.benchmarks.build_peers ray-data  --images DIR --codebook FILE --out DIR

`per-image` is a straightforward script in the manner of 4M's token saver: a DataLoader whose
workers decode and crop, the tokenizer in the main process, one .npy of token ids and one of crop
settings per image; what exists is skipped, which is known only after the worker has decoded it.
Several ranks take every n-th image, as under torchrun, each with one worker.

`ray-data` is Ray Data as its documentation has it: `read_binary_files`, `map_batches` over actors
that hold the tokenizer, `write_parquet`; a second run leaves out the paths that are in the output.

Both draw their crops by `draw_views`, so that their token ids are those of `patchcache build`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache_builder.formats.views import View, ViewSpec, draw_views
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers import PatchTokenizer

IMAGES_PER_BATCH = 16


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("peer", choices=("per-image", "ray-data"))
    for name in ("images", "codebook", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    job = save_per_image if args.peer == "per-image" else save_by_ray_data
    job(args.images, args.codebook, args.out, args.views, args.processes, args.device)


class Crops(Dataset[tuple[str, Tensor, Tensor]]):
    """Images as their names without extension, boxes and resized views."""

    def __init__(self, paths: list[Path], settings: Path, spec: ViewSpec) -> None:
        self._paths, self._settings, self._spec = paths, settings, spec

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        path = self._paths[index]
        pixels = decode(path.read_bytes())
        stored = self._settings / f"{path.stem}.npy"
        views = (
            [View(*box[:4], bool(box[4])) for box in np.load(stored).tolist()]
            if os.path.exists(stored)  # noqa: PTH110  as the script that this stands for has it
            else draw_views(self._spec, path.stem, tuple(pixels.shape[-2:]))
        )
        return path.stem, torch.tensor(views, dtype=torch.int32), cut(pixels, views, self._spec)


def save_per_image(
    images: Path, codebook: Path, out: Path, num_views: int, num_processes: int, device: str
) -> None:
    """Save one .npy of token ids and one of crop settings per image, by several ranks."""
    torch.multiprocessing.start_processes(
        save_rank,
        (num_processes, images, codebook, out, num_views, device),
        nprocs=num_processes,
        start_method="spawn",
    )


def save_rank(
    rank: int, world: int, images: Path, codebook: Path, out: Path, num_views: int, device: str
) -> None:
    """Save every `world`-th image, from number `rank` on."""
    torch.set_num_threads(1)
    for name in ("tokens", "crop_settings"):
        (out / name).mkdir(parents=True, exist_ok=True)
    tokenizer = PatchTokenizer.load(codebook, device)
    paths = sorted(images.iterdir())[rank::world]
    crops = Crops(paths, out / "crop_settings", view_spec(tokenizer, num_views))
    for names, views, pixels in DataLoader(crops, IMAGES_PER_BATCH, num_workers=1):
        places = [out / "tokens" / f"{name}.npy" for name in names]
        if all(os.path.exists(place) for place in places):  # noqa: PTH110
            continue
        token_ids = encode(tokenizer, pixels)
        for name, place, ids, boxes in zip(names, places, token_ids, views, strict=True):
            np.save(out / "crop_settings" / f"{name}.npy", boxes.numpy())
            np.save(place, ids)


class TokeniseBatch:
    """What a Ray Data actor does with a batch of files."""

    def __init__(self, codebook: Path, num_views: int, device: str) -> None:
        torch.set_num_threads(1)
        self._tokenizer = PatchTokenizer.load(codebook, device)
        self._spec = view_spec(self._tokenizer, num_views)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return paths, boxes and token ids of a batch of paths and bytes."""
        boxes, pixels = [], []
        for path, data in zip(batch["path"], batch["bytes"], strict=True):
            picture = decode(data)
            views = draw_views(self._spec, Path(path).stem, tuple(picture.shape[-2:]))
            boxes.append(np.array(views, np.int32))
            pixels.append(cut(picture, views, self._spec))
        token_ids = encode(self._tokenizer, torch.stack(pixels))
        return {"path": batch["path"], "views": np.stack(boxes), "token_ids": token_ids}


def save_by_ray_data(
    images: Path, codebook: Path, out: Path, num_views: int, num_processes: int, device: str
) -> None:
    """Write parquet files of paths, boxes and token ids."""
    import ray
    import ray.data

    ray.init(address="local", include_dashboard=False, num_cpus=os.cpu_count())
    ray.data.DataContext.get_current().enable_progress_bars = False
    finished = finished_paths(out)
    paths = sorted({str(path) for path in images.iterdir()} - finished)
    if not paths:
        return
    # Actors of a whole CPU each would leave none for the tasks that read and write.
    ray.data.read_binary_files(paths, include_paths=True).map_batches(
        TokeniseBatch,
        fn_constructor_args=(codebook, num_views, device),
        batch_size=IMAGES_PER_BATCH,
        compute=ray.data.ActorPoolStrategy(size=num_processes),
        num_cpus=0.5,
        num_gpus=1 / num_processes if device.startswith("cuda") else 0,
    ).write_parquet(str(out))


def finished_paths(out: Path) -> set[str]:
    """Return the paths in the parquet files of `out`; a file that was cut short is removed."""
    import pyarrow
    import pyarrow.parquet

    found: set[str] = set()
    for file in out.glob("*.parquet"):
        try:
            found.update(pyarrow.parquet.read_table(file, columns=["path"])["path"].to_pylist())
        except pyarrow.ArrowInvalid:
            file.unlink()
    return found


def read_parquet(out: Path) -> dict[str, np.ndarray]:
    """Return the token ids of every image in the output of Ray Data, by name."""
    import ray.data  # noqa: F401  registers the type of its arrays with pyarrow
    from pyarrow import parquet

    found = {}
    for file in out.glob("*.parquet"):
        table = parquet.read_table(file, columns=["path", "token_ids"])
        ids = table["token_ids"].combine_chunks().to_numpy_ndarray()
        found |= dict(zip((Path(p).stem for p in table["path"].to_pylist()), ids, strict=True))
    return found


def num_rows(file: Path) -> int:
    """Return the number of images in a file of Ray Data."""
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)


def view_spec(tokenizer: PatchTokenizer, num_views: int) -> ViewSpec:
    """Return the views that `patchcache build` draws by default."""
    rule = tokenizer.pixel_rule
    return ViewSpec(
        size=rule.size,
        patch_size=rule.patch_size,
        interpolation=rule.interpolation,
        num_views=num_views,
    )


def cut(pixels: Tensor, views: list[View], spec: ViewSpec) -> Tensor:
    """Return the resized views of a picture, (V, 3, S, S) uint8."""
    return torch.stack([apply_view(pixels, view, spec.size, spec.interpolation) for view in views])


def encode(tokenizer: PatchTokenizer, pixels: Tensor) -> np.ndarray:
    """Return the token ids of (B, V, 3, S, S) views, (B, V, rows, cols) uint16."""
    ids = tokenizer.encode(pixels.flatten(0, 1)).numpy().astype(np.uint16)
    return ids.reshape(*pixels.shape[:2], *ids.shape[1:])


if __name__ == "__main__":
    main()
