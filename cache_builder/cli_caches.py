"""The commands on finished caches: `verify`, and `convert`, `merge`, `subset` into other ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cache_builder.cli_options import (
    CodebookCopy,
    Device,
    GpusPerWorker,
    Json,
    MovedImages,
    RayAddress,
    Weights,
    Workers,
    print_json,
    print_lines,
)
from cache_builder.errors import ConfigError

if TYPE_CHECKING:
    from cache_builder.transform import TransformSummary

Out = Annotated[str, typer.Option(help="The new cache: a directory, s3://, gs:// or az://.")]
Layouts = Annotated[
    Literal["webdataset", "zarr"] | None,
    typer.Option(help="Tars or one Zarr group; by default as it is."),
]
Cache = Annotated[str, typer.Argument(help="A finished cache.")]


def verify(
    cache: Annotated[
        str, typer.Argument(help="A finished cache: a directory, s3://, gs:// or az://.")
    ],
    retokenize: Annotated[
        int, typer.Option(min=0, help="Tokenise so many images again; none.")
    ] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Which one tokenises again, by the start of its fingerprint, which `patchcache "
            "inspect` lists; default all."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make again what is damaged, and nothing else.")
    ] = False,
    images: MovedImages = None,
    codebook: CodebookCopy = None,
    device: Device = "auto",
    weights: Weights = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0,
    as_json: Json = False,
) -> None:
    """Check every digest, count, key, id and view of a cache, tokenise a sample again, repair.

    Example: `patchcache verify cache/ --retokenize 100`
    """
    from cache_builder import verify as job
    from cache_builder.console import verify_lines, verify_result
    from cache_builder.progress import Steps
    from cache_builder.ray_cluster import ClusterOptions

    if tokenizer is not None and not retokenize:
        raise ConfigError(
            f"--tokenizer {tokenizer} says which one tokenises again, and no image is to be. Add "
            "--retokenize, or leave it out."
        )
    if codebook is not None and not repair:
        raise ConfigError(
            f"--codebook {codebook} is a copy to repair with. Add --repair, or leave it out."
        )
    if not (repair or retokenize):
        given = {"--images": images, "--weights": weights, "--device": device}
        for option, value in given.items():
            if value not in (None, "auto"):
                raise ConfigError(
                    f"{option} {value} is to repair or to tokenise again with, and digests alone "
                    "are checked. Add --repair or --retokenize, or leave it out."
                )
    with Steps("verifying", "units") as progress:
        report = job.run(
            cache,
            retokenize=retokenize,
            tokenizer=tokenizer,
            repair=repair,
            images=images,
            codebook=codebook,
            device=device,
            weights=weights,
            cluster=ClusterOptions(ray_address, workers, gpus_per_worker),
            progress=progress.update,
        )
    if as_json:
        print_json(verify_result(report))
    else:
        print_lines(*verify_lines(report, cache, was_repair=repair))
    if report.problems:
        raise typer.Exit(1)


def convert(
    cache: Cache,
    out: Out,
    layout: Layouts = None,
    images_in_cache: Annotated[
        Literal["none"] | None,
        typer.Option(
            help="none leaves the images out, to be read from where they lie; by default they stay."
        ),
    ] = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Write a cache in the other layout, or without its images; nothing is tokenised again.

    Example: `patchcache convert cache/ --layout zarr --out cache.zarr/`
    """
    from cache_builder import transform as job
    from cache_builder.progress import Steps
    from cache_builder.ray_cluster import ClusterOptions

    with Steps("converting", "images") as progress:
        summary = job.convert(
            job.ConvertOptions(
                cache=cache,
                out=out,
                layout=layout,
                drop_images=images_in_cache == "none",
                cluster=ClusterOptions(ray_address, workers),
            ),
            progress.update,
        )
    _print_summary(summary, out, as_json)


def merge(
    caches: Annotated[list[str], typer.Argument(help="Finished caches, two or more.")],
    out: Out,
    layout: Annotated[
        Literal["webdataset", "zarr"] | None,
        typer.Option(help="Tars or one Zarr group; by default that of the first cache."),
    ] = None,
    unit_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per shard; by default the shards stay as they are."),
    ] = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Write several caches of the same tokenizers and views into one; classes are united by name.

    Example: `patchcache merge train/ more/ --out all/`
    """
    from cache_builder import transform as job
    from cache_builder.progress import Steps
    from cache_builder.ray_cluster import ClusterOptions

    with Steps("merging", "images") as progress:
        summary = job.merge(
            job.MergeOptions(
                caches=tuple(caches),
                out=out,
                layout=layout,
                unit_size=unit_size,
                cluster=ClusterOptions(ray_address, workers),
            ),
            progress.update,
        )
    _print_summary(summary, out, as_json)


def subset(
    cache: Cache,
    out: Out,
    labels: Annotated[
        list[str] | None,
        typer.Option(help="Classes by name, with commas between; may be given many times."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="A text file that names the samples, a key per line.")
    ] = None,
    max_per_class: Annotated[
        int | None, typer.Option(min=1, help="At most so many of every class, drawn.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="So many samples, drawn from what is left.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    views: Annotated[int | None, typer.Option(min=1, help="The first so many views.")] = None,
    layout: Layouts = None,
    unit_size: Annotated[
        int | None, typer.Option(min=1, help="Images per shard; by default as it is.")
    ] = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Write some samples or views of a cache into another one; labels keep their numbers.

    Example: `patchcache subset cache/ --max-per-class 20 --out small/`
    """
    from cache_builder import transform as job
    from cache_builder.progress import Steps
    from cache_builder.ray_cluster import ClusterOptions

    with Steps("copying", "images") as progress:
        summary = job.subset(
            job.SubsetOptions(
                cache=cache,
                out=out,
                labels=tuple(labels or ()),
                keys=None if keys is None else _read_keys(keys),
                max_per_class=max_per_class,
                sample=sample,
                seed=seed,
                num_views=views,
                layout=layout,
                unit_size=unit_size,
                cluster=ClusterOptions(ray_address, workers),
            ),
            progress.update,
        )
    _print_summary(summary, out, as_json)


def _read_keys(path: Path) -> frozenset[str]:
    try:
        keys = frozenset(path.read_text().split())  # a key holds no space
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--keys {path} cannot be read as text: {exc}.") from exc
    if not keys:
        raise ConfigError(f"--keys {path} names no sample. Write a key per line.")
    return keys


def _print_summary(summary: "TransformSummary", out: str, as_json: bool) -> None:
    from cache_builder.console import transform_lines, transform_result

    if as_json:
        print_json(transform_result(summary, out))
    else:
        print_lines(*transform_lines(summary, out))
