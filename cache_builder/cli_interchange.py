"""The commands that exchange with others: `import`, `export-codebook`, `push`, `pull`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cache_builder.cli_options import (
    Images,
    Json,
    RayAddress,
    Workers,
    print_json,
    print_lines,
)
from cache_builder.errors import ConfigError

RepoType = Annotated[
    Literal["dataset", "model"], typer.Option(help="What kind of repository it is on the Hub.")
]
Revision = Annotated[str, typer.Option(help="A branch; to pull also a tag or a commit.")]


def import_tokens(
    tokens: Annotated[
        Path,
        typer.Argument(
            help="A folder with a .npy at the path of every image (4M); or one .npy, .pth or .pt: "
            "an array with a row per image (MaPeT), or a dictionary of tensors by image."
        ),
    ],
    images: Images,
    tokenizer: Annotated[
        str, typer.Option(help="A name for what made the ids, and with which weights.")
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Size of its codebook.")],
    out: Annotated[str, typer.Option(help="The cache: a directory, s3://, gs:// or az://.")],
    keys: Annotated[
        Path | None,
        typer.Option(
            help="Which image every row belongs to: a .txt with a path or key per line, a .csv "
            "with a column `key`, or a .json list."
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Side of a view, pixels.")] = 224,
    patch_size: Annotated[int, typer.Option(min=1, help="Side of a patch of it, pixels.")] = 16,
    interpolation: Annotated[
        Literal["bicubic", "bilinear"], typer.Option(help="Of the crops, when they were resized.")
    ] = "bicubic",
    resize: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The views were centred squares of --image-size in pictures resized to this short "
            "side; default --image-size, the largest centred squares.",
        ),
    ] = None,
    crop_settings: Annotated[
        Path | None,
        typer.Option(
            help="The views' boxes, kept like the ids: top, left, height, width and mirrored, in "
            "pixels of the image."
        ),
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Views per image.")] = 1,
    layout: Annotated[
        Literal["webdataset", "zarr"], typer.Option(help="Tars or one Zarr group.")
    ] = "webdataset",
    images_in_cache: Annotated[
        Literal["original", "none"],
        typer.Option(help="The source's bytes; or none, to be read from where they lie."),
    ] = "original",
    unit_size: Annotated[
        int | None, typer.Option(min=1, help="Images per shard; default 64 to 1,024.")
    ] = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Make a cache of token ids that another tool wrote; the same command continues.

    Example: `patchcache import ids.npy --keys keys.txt --images photos/ --tokenizer dalle -k 8192
    --image-size 112 --patch-size 8 --out imported/`
    """
    from cache_builder import importing as job
    from cache_builder.console import smaller_batch
    from cache_builder.progress import Steps
    from cache_builder.ray_cluster import ClusterOptions

    with Steps("importing", "images") as progress:
        summary = job.run(
            job.ImportOptions(
                tokens=tokens,
                images=images,
                out=out,
                tokenizer=tokenizer,
                vocab_size=k,
                keys=keys,
                image_size=image_size,
                patch_size=patch_size,
                interpolation=interpolation,
                num_views=views,
                resized_short_side=resize,
                crop_settings=crop_settings,
                layout=layout,
                images_in_cache=images_in_cache,
                unit_size=unit_size,
                cluster=ClusterOptions(ray_address, workers),
            ),
            progress.update,
        )
    manifest = summary.manifest
    if as_json:
        print_json(
            {
                "cache": out,
                "fingerprint": manifest.fingerprint,
                "num_samples": manifest.num_samples,
                "num_skipped": manifest.num_skipped,
                "num_shards": len(manifest.shards),
                "num_units_kept": summary.num_units_kept,
                "bytes": manifest.bytes,
            }
        )
        return
    print_lines(
        f"cache        {out}",
        f"fingerprint  {manifest.fingerprint}",
        f"images       {manifest.num_samples:,}, {manifest.view_spec.num_views} views each",
        f"left out     {manifest.num_skipped:,}"
        + (f", with reasons in {out.rstrip('/')}/skipped.jsonl" if manifest.num_skipped else ""),
        f"next         patchcache verify {out}",
        f"             patchcache train beit_drop --cache {out} --out run/"
        f"{smaller_batch(manifest)}",
    )


def export_codebook(
    codebook: Annotated[str, typer.Argument(help="What `patchcache fit` wrote.")],
    out: Annotated[
        Path,
        typer.Option(
            help="A .npy of the centroids, or a .faiss index of them; a .json of the same name "
            "says what they are."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write the centroids of a codebook for numpy or faiss.

    Example: `patchcache export-codebook codebook.safetensors --out codebook.faiss`
    """
    from cache_builder import codebook_export as job

    done = job.export_codebook(codebook, out)
    if as_json:
        print_json({name: str(value) for name, value in done._asdict().items()})
        return
    print_lines(
        f"centroids    {done.file}", f"described    {done.description}", f"load         {done.call}"
    )


def push(
    source: Annotated[Path, typer.Argument(help="A codebook, or a finished cache.")],
    place: Annotated[str, typer.Argument(help="USER/REPO or USER/REPO/FOLDER on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made is seen by everybody.")
    ] = False,
    repo_type: RepoType = "dataset",
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Send a codebook or cache to the Hugging Face Hub; the same command continues.

    Only what the Hub does not have is sent. The token is that of HF_TOKEN or of `hf auth login`.

    Example: `patchcache push cache/ USER/REPO`
    """
    from cache_builder import hub_push as job
    from cache_builder.hub import HubFolder
    from cache_builder.measures import size_text
    from cache_builder.progress import Steps

    with Steps("sending", "files") as progress:
        hub = HubFolder(place, repo_type=repo_type, revision=revision)
        done = job.push(source, hub, private=not public, progress=progress.update)
    if as_json:
        print_json(done._asdict())
        return
    print_lines(
        f"sent         {done.num_sent:,} files, {size_text(done.bytes_sent)}",
        f"kept         {done.num_there:,} that were there",
        f"next         patchcache pull {done.place}{hub.options} --out {source}",
    )


def pull(
    place: Annotated[
        str,
        typer.Argument(
            help="USER/REPO or USER/REPO/FOLDER of a cache; of a codebook with its file, "
            "USER/REPO/codebook.safetensors."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where it goes: a folder, or a .safetensors file.")],
    repo_type: RepoType = "dataset",
    revision: Revision = "main",
    as_json: Json = False,
) -> None:
    """Fetch a codebook or cache from the Hugging Face Hub and check every digest.

    The same command continues, and fetches only what is missing or damaged.

    Example: `patchcache pull USER/REPO --out cache/`
    """
    from cache_builder import hub_pull as job
    from cache_builder.hub import HubFolder
    from cache_builder.measures import size_text
    from cache_builder.progress import Steps

    is_codebook = place.endswith(".safetensors")
    if is_codebook != (out.suffix == ".safetensors"):
        raise ConfigError(
            f"{place} is a {'codebook' if is_codebook else 'cache'}, and --out {out} is the name "
            f"of a {'cache' if is_codebook else 'codebook'}: a codebook ends in .safetensors."
        )
    with Steps("fetching", "files") as progress:
        if is_codebook:
            folder, _, name = place.rpartition("/")
            hub = HubFolder(folder, repo_type=repo_type, revision=revision)
            done = job.pull_codebook(hub, name, out)
        else:
            hub = HubFolder(place, repo_type=repo_type, revision=revision)
            done = job.pull_cache(hub, out, progress.update)
    if as_json:
        print_json({**done._asdict(), "out": str(done.out)})
        return
    print_lines(
        f"fetched      {done.num_fetched:,} files, {size_text(done.bytes_fetched)}, of commit "
        f"{done.commit}",
        f"kept         {done.num_there:,} that were there",
        f"fingerprint  {done.fingerprint}",
        f"next         patchcache {'inspect' if is_codebook else 'verify'} {out}",
    )
