"""The commands about what is installed: a tokenizer taken from a plugin, and a look at it all."""

from pathlib import Path
from typing import Annotated

import typer

from cache_builder.cli_options import (
    InstalledTokenizer,
    Json,
    keyword_args,
    print_json,
    print_lines,
)


def adopt(
    tokenizer: InstalledTokenizer,
    out: Annotated[Path, typer.Option(help="Where the codebook goes.")],
    weights: Annotated[str | None, typer.Option(help="Weights that it takes.")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for it; may be given many times.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the codebook file of a tokenizer that was learned elsewhere; nothing is fitted.

    Example: `patchcache adopt vq --weights vq.safetensors --out vq-codebook.safetensors`
    """
    from cache_builder.inspection import describe_codebook
    from cache_builder.tokenizers import plugins

    codebook = plugins.adopt(tokenizer, weights, keyword_args("--arg", arg))
    codebook.save(out)
    if as_json:
        print_json(describe_codebook(codebook))
        return
    plugin = codebook.plugin
    assert plugin is not None
    rows, cols = codebook.pixel_rule.grid
    stages = f"{codebook.num_stages} x " if codebook.num_stages > 1 else ""
    print_lines(
        f"codebook     {out}",
        f"tokenizer    {codebook.extractor.id} of {plugin.distribution} {plugin.version}",
        f"token ids    {stages}{codebook.vocab_size:,} for each of {rows} x {cols} patches of "
        f"{codebook.pixel_rule.size} pixels",
        f"centroids    {codebook.dim} values" if codebook.has_centroids else "centroids    none",
        f"pictures     {'decoded from ids' if plugin.decodes_to_pixels else 'none from ids'}",
        f"fingerprint  {codebook.fingerprint}",
        f"next         patchcache build --images IMAGES --codebook {out} --out CACHE",
    )


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="An extra, such as build, that must be whole; may be given many times. Without "
            "it only what is installed must work."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at what is installed and at this machine; exit status 1 if something does not work.

    Example: `patchcache doctor --require train`
    """
    from cache_builder import doctor as job

    report = job.run(require or [])
    if as_json:
        print_json(report.result())
    else:
        print_lines(*report.lines())
    if not report.is_well:
        raise typer.Exit(1)
