"""The artifacts that are damaged: how a whole one is made, and how it is read as its users read it.

`make_...` writes into an empty folder; `read_...` returns plain values, which `==` compares.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, SecretStr

from cache_builder import build_log, sample_store, token_files, verify
from cache_builder.errors import ArtifactError, PatchCacheError
from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.manifest import read_model
from cache_builder.formats.plan import PlanUnit
from cache_builder.formats.shards import read_shard
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import open_store
from tests import factories
from tests.golden.test_golden import V1
from tests.listings import read_all
from tests.trainer.caches import make_cache, tiny_config
from tokenizers_svc.access import Access, AccessOptions
from tokenizers_svc.client import files as client_files
from trainer import checkpoint, config, finetune, finetune_checkpoint, run_log, train
from trainer.backbones import load_backbone
from trainer.data import CachedViews, Pick
from trainer.export import export
from trainer.finetune_config import parse_finetune_config


def plain(value: Any) -> Any:
    """Return a value as tuples, texts and numbers, which compare as they should."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return tuple((key, plain(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(plain(each) for each in value)
    # True == 1 == 1.0, and nan != nan.
    return repr(value) if isinstance(value, bool | float) else value


def golden(name: str) -> Callable[[Path], object]:
    """Return what makes a copy of a golden file or folder."""
    place = V1 / name
    if place.is_file():
        return lambda folder: shutil.copy(place, folder)
    return lambda folder: shutil.copytree(place, folder, dirs_exist_ok=True)


def read_codebook(folder: Path) -> Any:
    codebook = Codebook.load(folder / "codebook.safetensors")
    # How the centroids were fitted is provenance, which no digest covers.
    return plain((
        codebook.centroids, codebook.metric, codebook.pixel_rule, codebook.extractor.identity(),
        codebook.header.digest, codebook.fingerprint,
    ))  # fmt: skip


def read_cache(folder: Path) -> Any:
    with TokenCache.open(folder) as cache:
        manifest = cache.manifest
        samples = [cache[index] for index in range(len(cache))]
        columns = [cache.columns(shard) for shard in range(len(manifest.shards))]
        infos = [
            cache.shard(shard).info(row)
            for shard, info in enumerate(manifest.shards)
            for row in range(info.num_samples)
        ]
        spec = plain(manifest.spec)
        return plain((spec, manifest.payloads, cache.codebook.fingerprint, samples, columns, infos))


def read_batches(folder: Path) -> Any:
    cache = folder / "cache" if (folder / "cache").is_dir() else folder
    with TokenCache.open(cache) as opened:
        sizes = [shard.num_samples for shard in opened.manifest.shards]
    images = str(folder / "images") if (folder / "images").is_dir() else None
    views = CachedViews(cache, image_size=16, images=images)
    picks = [Pick(1, shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    try:
        return plain(tuple(views.read(picks)))
    finally:
        views.close()


def read_by_verify(folder: Path) -> Any:
    cache = folder / "cache" if (folder / "cache").is_dir() else folder
    report = verify.run(cache, cluster=ClusterOptions(num_workers=0))
    if report.damages:
        raise ArtifactError(
            f"{cache}: {report.problems[0]}. Run `patchcache verify --repair {cache}`."
        )
    # Where it says that all is well, every file must be what it was.
    return plain(dict(sorted(factories.contents(cache).items())))


def verify_tells(folder: Path) -> bool:
    try:
        read_by_verify(folder)
    except PatchCacheError:
        return True
    return False


def make_layers(folder: Path) -> None:
    further = factories.write_codebook(
        folder / "other.safetensors", colours=factories.COLOURS[::-1]
    )
    make_cache(folder, num_images=6, further_codebooks=(further,))


def make_zarr(folder: Path) -> None:
    make_cache(folder, num_images=6, layout="zarr")


def make_imageless(folder: Path) -> None:
    make_cache(folder, num_images=6, images_in_cache="none")


def read_layer(folder: Path) -> Any:
    with TokenCache.open(folder / "cache") as cache:
        fingerprints = sorted(cache.manifest.tokenizers)
    found = []
    for fingerprint in fingerprints:
        with TokenCache.open(folder / "cache", fingerprint) as cache:
            found.append((cache.manifest.fingerprint, [cache[i] for i in range(len(cache))]))
    return plain(found)


def make_run(folder: Path) -> None:
    cache = make_cache(folder / "made", num_images=12)
    train.run(
        tiny_config(run={"steps": 2, "checkpoint_every": 1}, optim={"warmup_steps": 1}),
        cache,
        folder,
    )
    shutil.rmtree(folder / "made")
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def read_checkpoint(folder: Path) -> Any:
    path = folder / "checkpoints" / "step_00000002.pt"
    loaded = checkpoint.load(path)
    load_backbone(path).build()
    return plain((loaded.header, loaded.config, loaded.model, loaded.optimizer, loaded.average))


def read_run(folder: Path) -> Any:
    """Go on from the newest good checkpoint, as a run does."""
    found = checkpoint.newest_good(folder)
    assert found is not None
    return found[0].name


def make_export(folder: Path) -> None:
    make_run(folder / "run")
    export(folder / "run", folder / "vit.safetensors")
    shutil.rmtree(folder / "run")


def read_export(folder: Path) -> Any:
    backbone = load_backbone(folder / "vit.safetensors")
    backbone.build()
    return plain((backbone.name, backbone.arguments, dict(backbone.state)))


def make_finetuned(folder: Path) -> None:
    make_export(folder)
    images = factories.write_folder(folder / "images", factories.patch_images(20))
    settings = {
        "data": {"batch_size": 4}, "optim": {"lr": 1e-3, "warmup_epochs": 0},
        "run": {"epochs": 1, "precision": "fp32", "device": "cpu"},
    }  # fmt: skip
    tuned = parse_finetune_config(settings)
    finetune.run(tuned, folder / "vit.safetensors", images, folder)
    for other in ("images", "tensorboard"):
        shutil.rmtree(folder / other, ignore_errors=True)


def read_finetuned(folder: Path) -> Any:
    loaded = finetune_checkpoint.load(folder)
    load_backbone(folder).build()
    return plain(tuple(loaded))


def make_recipe(folder: Path) -> None:
    shutil.copy(Path(config.__file__).parent / "recipes" / "beit.toml", folder / "recipe.toml")


def make_tokens(folder: Path) -> None:
    ids = np.arange(6 * 16, dtype=np.int64).reshape(6, 4, 4)
    for i in range(2):
        np.save(folder / f"{i}.npy", ids[i])
    np.save(folder / "all.npy", ids)
    torch.save(torch.from_numpy(ids), folder / "all.pth")
    torch.save({f"{i}": torch.from_numpy(ids[i]) for i in range(2)}, folder / "named.pth")
    (folder / "keys.txt").write_text("".join(f"{i}\n" for i in range(6)))
    (folder / "keys.json").write_text('["0","1","2","3","4","5"]')


def read_tokens(folder: Path) -> Any:
    keys = [token_files.read_keys(folder / name) for name in ("keys.txt", "keys.json")]
    named = [token_files.open_rows(folder / name) for name in ("", "named.pth")]
    found = [rows.read(str(i), None) for rows in named for i in range(2)]
    listed = [token_files.open_rows(folder / name) for name in ("all.npy", "all.pth")]
    found += [rows.read("", i) for rows in listed for i in range(min(6, rows.num_rows or 0))]
    ids = [token_files.as_token_ids(each, 1, (4, 4), 200) for each in found]
    return plain((keys, ids))


def make_journal(folder: Path) -> None:
    lines = (
        f'{{"image": "{name}", "model": "m", "fingerprint": "{"0" * 64}", "shape": [2, 2], '
        '"token_ids": [0, 1, 2, 3]}\n'
        for name in "abc"
    )
    (folder / "tokens.jsonl").write_text("".join(lines))


def make_source(folder: Path, suffix: str) -> None:
    images = factories.patch_images(6)
    if suffix == "tar":
        members = [
            member
            for name, data in images.items()
            for member in ((name, data), (f"{name[:-4]}.json", b'{"label": 1, "caption": "x"}'))
        ]
        factories.write_tar(folder / "images.tar", members)
    elif suffix == "zip":
        shutil.make_archive(
            str(folder / "images"), "zip", factories.write_folder(folder / "in", images)
        )
        shutil.rmtree(folder / "in")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"bytes": data, "path": name} for name, data in images.items()]
        pq.write_table(
            pa.table({"image": rows, "label": list(range(6))}), folder / "images.parquet"
        )


def make_samples(folder: Path) -> None:
    sample_store.settle(folder / "store", {"seed": 0, "num": 3}, replace=False)
    points = np.arange(12, dtype=np.uint8).reshape(6, 2)
    sample_store.write_unit(folder / "store", sample_store.UnitSample(0, points, points[:2], 3, 0))


def read_samples(folder: Path) -> Any:
    store = folder / "store"
    sample_store.settle(store, {"seed": 0, "num": 3}, replace=False)
    record = sample_store.whole_unit(store, 0)
    if record is None:
        raise ArtifactError(f"{store}: the unit is damaged. Run `patchcache fit` again.")
    arrays = [sample_store.read_array(store, 0, held_out=held_out) for held_out in (False, True)]
    return plain([np.array(array) for array in arrays])


def make_keys(folder: Path) -> None:
    (folder / "keys.txt").write_text(f"# users\n{'a1' * 16} ada\nsha256:{'0f' * 32} bob\n")


def read_keys(folder: Path) -> Any:
    options = AccessOptions(key_file=folder / "keys.txt", keys=(SecretStr("b2" * 16),))
    return plain(Access(options).find("a1" * 16))


def make_log(folder: Path) -> None:
    run = build_log.BuildRun(
        started="2026-11-28T00:00:00Z", outcome="finished", seconds=2, working_seconds=1,
        hosts=("a",), num_workers=1, devices=("cpu",), num_images=3, num_views=6, num_skipped=0,
        bytes_read=9, bytes_written=9, num_units=1, num_units_kept=0, images_per_s=3,
        versions={"patchcache": "0"},
    )  # fmt: skip
    for _ in range(3):
        build_log.append(str(folder / "cache"), run)


def read_log(folder: Path) -> Any:
    return plain(build_log.read(str(folder / "cache")))  # without lines that are damaged


def read_recipe(folder: Path) -> Any:
    return plain(config.load_config(folder / "recipe.toml", []))


def read_imageless(folder: Path) -> Any:
    plans = sorted((folder / "cache" / "plan").iterdir())
    store = open_store(folder / "cache")
    rows = [read_model(PlanUnit, store, f"plan/{path.name}") for path in plans]
    return rows and read_batches(folder)


def read_tar(folder: Path) -> Any:
    return plain(list(read_shard(folder / "shards" / "000000.tar")))


def read_training_log(folder: Path) -> Any:
    return run_log._rows_up_to(folder / run_log.LOG_NAME, 2)


def read_journal(folder: Path) -> Any:
    path = folder / "tokens.jsonl"
    path.touch()  # its reader makes an empty one where it is missing
    return plain(list(client_files._read_journal(path)))


def read_source(folder: Path, suffix: str) -> Any:
    return plain(read_all(folder / f"images.{suffix}"))
