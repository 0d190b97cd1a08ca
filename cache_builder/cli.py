"""The table of commands.

Results go to stdout, everything else to stderr; `--json` prints what a script may read. Exit
status: 0 done, 1 failed, 2 wrong usage. Every command imports what it needs when it runs, so that
`patchcache --help` answers at once and the trainer never loads a tokenizer.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cache_builder import __version__
from cache_builder.cli_caches import convert, merge, subset, verify
from cache_builder.cli_errors import one_line_errors
from cache_builder.cli_inspect import inspect
from cache_builder.cli_interchange import export_codebook, import_tokens, pull, push
from cache_builder.cli_options import (
    IMAGES,
    CpusPerWorker,
    Device,
    GpusPerWorker,
    Images,
    Json,
    RayAddress,
    Weights,
    Workers,
    keyword_args,
    number_or_all,
    pair,
    print_json,
    print_lines,
    refuse_given,
    triple,
)
from cache_builder.cli_serving import serve
from cache_builder.cli_setup import adopt, doctor
from cache_builder.cli_tokenize import tokenize
from cache_builder.cli_training import export, finetune, probe, train
from cache_builder.errors import ConfigError

# What a finished cache has settled.
_SETTLED = (
    "scale", "ratio", "hflip", "seed", "layout", "images_in_cache", "resized_short_side",
    "jpeg_quality", "unit_size",
)  # fmt: skip

app = typer.Typer(
    name="patchcache",
    help="Fit patch codebooks, cache per-patch targets, serve them, train ViTs from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Set up logging."""
    if version:
        print(f"patchcache {__version__}")
        raise typer.Exit
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(message)s" if not verbose else "%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for chatty in ("ray", "httpx", "PIL", "zarr", "asyncio", "numcodecs", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@app.command()
def fit(
    images: Images,
    out: Annotated[Path, typer.Option(help="Where the codebook goes.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of centroids.")] = 8192,
    features: Annotated[
        str,
        typer.Option(
            help="What a patch is described by: pixel, its raw pixels; or a model's features, "
            "open_clip:MODEL[@PRETRAINED|PATH] or timm:MODEL[@PATH]."
        ),
    ] = "pixel",
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of a view, pixels; pixel: 224, else the model's."),
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Side of a patch; pixel: 16, else the model's.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Which map of the model. open_clip ViT: ln_post or proj; ResNet: stem, layer1 .. "
            "layer4; timm: last or a number."
        ),
    ] = None,
    features_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the model, e.g. pad_type=same.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="R,G,B in [0, 1]; default the model's.")] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B in [0, 1]; default the model's.")] = None,
    weights: Annotated[
        Literal["pretrained", "random"],
        typer.Option(help="Of the model of --features; `random` needs an explicit --seed."),
    ] = "pretrained",
    metric: Annotated[Literal["l2", "cosine"], typer.Option(help="Distance of features.")] = "l2",
    stages: Annotated[
        int,
        typer.Option(
            min=1, help="Token ids per patch: each quantises what the ones before left over."
        ),
    ] = 1,
    sample: Annotated[
        str | None, typer.Option(help="Patches to fit to, or all; default 256 per centroid.")
    ] = None,
    images_per_class: Annotated[
        int | None,
        typer.Option(min=1, help="Sample so many images of each class, all their patches."),
    ] = None,
    patches_per_image: Annotated[
        int | None, typer.Option(min=1, help="Sample so many patches of an image; default 16.")
    ] = None,
    sample_dir: Annotated[
        Path | None, typer.Option(help="Keep the sample here, for fits with another -k.")
    ] = None,
    sample_dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Of sampled features on disk.")
    ] = "float16",
    iterations: Annotated[
        int, typer.Option(min=1, help="Most k-means iterations, or mini-batches.")
    ] = 20,
    restarts: Annotated[int, typer.Option(min=1, help="Fits, of which the best is kept.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Mini-batch k-means, so many patches at a time.")
    ] = None,
    warm_start: Annotated[
        Path | None, typer.Option(help="Start from the centroids of this codebook.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice; default 0.")] = None,
    device: Device = "auto",
    ray_address: RayAddress = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0,
    cpus_per_worker: CpusPerWorker = 1,
    fit_workers: Annotated[
        int | None, typer.Option(min=1, help="Spread k-means over so many Ray actors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit a codebook to the patches of images.

    Example: `patchcache fit --images photos/ -k 8192 --out codebook.safetensors`
    """
    from cache_builder import fit as job
    from cache_builder.console import fit_lines
    from cache_builder.progress import FitProgress
    from cache_builder.ray_cluster import ClusterOptions
    from cache_builder.tokenizers.features import FeatureOptions

    if weights == "random" and seed is None:
        raise ConfigError("--weights random needs an explicit --seed.")
    feature_options = FeatureOptions(
        features=features,
        image_size=image_size,
        patch_size=patch_size,
        layer=layer,
        mean=triple("--mean", mean),
        std=triple("--std", std),
        model_args=keyword_args("--features-arg", features_arg),
        random_weights_seed=seed if weights == "random" else None,
    )
    with FitProgress(iterations * restarts * stages) as progress:
        summary = job.run(
            job.FitOptions(
                images=images,
                out=out,
                k=k,
                features=feature_options,
                metric=metric,
                stages=stages,
                sample=number_or_all("--sample", sample),
                images_per_class=images_per_class,
                patches_per_image=patches_per_image,
                sample_dir=sample_dir,
                sample_dtype=sample_dtype,
                iterations=iterations,
                restarts=restarts,
                batch_size=batch_size,
                warm_start=warm_start,
                seed=seed or 0,
                device=device,
                cluster=ClusterOptions(ray_address, workers, gpus_per_worker, cpus_per_worker),
                fit_workers=fit_workers,
            ),
            job.FitReports(progress.sampled, progress.iterated),
        )
    if as_json:
        from cache_builder.inspection import describe_codebook

        print_json(describe_codebook(summary.codebook))
        return
    print_lines(*fit_lines(summary, images, out))


@app.command()
def build(
    context: typer.Context,
    out: Annotated[str, typer.Option(help="The cache: a directory, s3://, gs:// or az://.")],
    images: Annotated[str | None, IMAGES] = None,
    codebook: Annotated[
        list[str] | None,
        typer.Option(
            help="What `patchcache fit` wrote. May be given many times: the cache then holds the "
            "targets of each, made from one decode."
        ),
    ] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Add to the finished cache at --out: more --views, a further --codebook. Its "
            "images are read from it; --images says where those lie that it does not hold.",
        ),
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Crops stored per image, the first of them centred; default 1. With --extend how "
            "many there are to be; default as many as there are.",
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="LOW,HIGH share of the picture in a random crop.")
    ] = "0.2,1",
    ratio: Annotated[
        str, typer.Option(help="LOW,HIGH width / height of a random crop.")
    ] = "3/4,4/3",
    hflip: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the random crops that is mirrored.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the crops.")] = 0,
    layout: Annotated[
        Literal["webdataset", "zarr"], typer.Option(help="Tars or one Zarr group.")
    ] = "webdataset",
    images_in_cache: Annotated[
        Literal["original", "resized", "none"],
        typer.Option(
            help="The source's bytes; the same but for large pictures, which become smaller "
            "JPEGs; or none, to be read from where they lie."
        ),
    ] = "original",
    resized_short_side: Annotated[
        int, typer.Option(min=1, help="Of `resized` images, pixels.")
    ] = 256,
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100, help="Of `resized` images.")] = 92,
    unit_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images per shard; default 64 to 1,024. Not of tars: each is one shard."
        ),
    ] = None,
    soft_top_k: Annotated[
        int | None,
        typer.Option(min=2, help="Also store this many nearest centroids and probabilities."),
    ] = None,
    soft_temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the probabilities of --soft-top-k, in mean squared distances of the fit; "
            "default 0.05."
        ),
    ] = None,
    store_features: Annotated[
        Literal["float16", "int8"] | None,
        typer.Option(help="Also store the features of every patch; not of pixels."),
    ] = None,
    device: Device = "auto",
    weights: Weights = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0,
    cpus_per_worker: CpusPerWorker = 1,
    as_json: Json = False,
) -> None:
    """Tokenise every image into a cache; the same command continues a build that was stopped.

    Example: `patchcache build --images photos/ --codebook codebook.safetensors --out cache/`
    """
    from cache_builder.console import build_lines, build_result
    from cache_builder.progress import BuildProgress
    from cache_builder.ray_cluster import ClusterOptions

    cluster = ClusterOptions(ray_address, workers, gpus_per_worker, cpus_per_worker)
    if extend:
        from cache_builder import extend as extension

        refuse_given(context, _SETTLED, "cannot be given with --extend: the cache has settled it")
        with BuildProgress() as progress:
            summary = extension.run(
                extension.ExtendOptions(
                    cache=out,
                    codebooks=tuple(codebook or ()),
                    num_views=views,
                    images=images,
                    soft_top_k=soft_top_k,
                    soft_temperature=soft_temperature,
                    store_features=store_features,
                    device=device,
                    weights=weights,
                    cluster=cluster,
                ),
                progress.unit_done,
            )
    else:
        from cache_builder import build as job

        if images is None or not codebook:
            raise ConfigError(
                f"build needs --{'codebook' if images else 'images'}. "
                "Without it, --extend adds to a finished cache."
            )
        with BuildProgress() as progress:
            summary = job.run(
                job.BuildOptions(
                    images=images,
                    codebook=codebook[0],
                    further_codebooks=tuple(codebook[1:]),
                    out=out,
                    num_views=views or 1,
                    scale=pair("--scale", scale),
                    ratio=pair("--ratio", ratio),
                    hflip=hflip,
                    seed=seed,
                    layout=layout,
                    images_in_cache=images_in_cache,
                    resized_short_side=resized_short_side,
                    jpeg_quality=jpeg_quality,
                    unit_size=unit_size,
                    soft_top_k=soft_top_k,
                    soft_temperature=soft_temperature,
                    store_features=store_features,
                    device=device,
                    weights=weights,
                    cluster=cluster,
                ),
                progress.unit_done,
            )
    if as_json:
        print_json(build_result(summary, out))
    else:
        print_lines(*build_lines(summary, out))


for command in (
    adopt, verify, convert, merge, subset, inspect, serve, tokenize, train, probe, finetune, export,
    doctor,
):  # fmt: skip
    app.command()(command)
app.command("import")(import_tokens)
app.command("export-codebook")(export_codebook)
app.command()(push)
app.command()(pull)


def main() -> None:
    """Run the command line and exit."""
    with one_line_errors():
        app(prog_name="patchcache")  # also as `python -m cache_builder`


if __name__ == "__main__":
    main()
