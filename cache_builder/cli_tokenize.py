"""`patchcache tokenize`: ask a service for the token ids of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_builder.cli_options import print_lines

if TYPE_CHECKING:
    from tokenizers_svc.client.files import Summary

_MAX_FAILURES_SHOWN = 50


def tokenize(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders, WebDataset tars, zips, Parquet files, lists of paths or "
            "URLs (.txt); as many as you like.",
        ),
    ],
    url: Annotated[str, typer.Option(help="Of a service that `patchcache serve` runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="tokens.jsonl, a line per image, which the same command continues; tokens.npz, "
            "the arrays token_ids and images; or tokens.npy, the ids alone, in the order of the "
            "images, 65535 where an image has none. Default: lines on stdout."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which tokenizer of the service; its default.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key, if the service asks for one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per request; default what the service likes.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 4,
) -> None:
    """Tokenise images by a service; the same command continues what was stopped or failed.

    Example: `patchcache tokenize photos/ --url http://127.0.0.1:8000 --out tokens.npz`
    """
    from cache_builder.progress import Steps
    from tokenizers_svc.client import files as job

    options = job.TokenizeOptions(
        images=tuple(images),
        url=url,
        out=out,
        key_file=key_file,
        model=model,
        batch_size=batch_size,
        concurrency=concurrency,
    )
    with Steps("tokenising", "images") as progress:
        summary = job.run(options, progress.update)
    for name, reason in summary.failures[:_MAX_FAILURES_SHOWN]:
        typer.echo(f"failed       {name}: {reason}", err=True)
    if len(summary.failures) > _MAX_FAILURES_SHOWN:
        more = len(summary.failures) - _MAX_FAILURES_SHOWN
        typer.echo(f"             and {more:,} more", err=True)
    if out is not None:
        print_lines(*_lines(summary, out))
    if summary.failures:
        raise typer.Exit(1)


def _lines(summary: "Summary", out: Path) -> list[str]:
    lines = [f"tokenised    {summary.num_tokenised:,} images"]
    if summary.num_kept:
        lines.append(f"kept         {summary.num_kept:,} of an earlier run")
    if summary.failures:
        lines.append(f"failed       {len(summary.failures):,}; run the same command to try again")
    if summary.num_tokenised or summary.num_kept:
        lines.append(f"written to   {out}")
        lines.append(f"next         {_how_to_read(out)}")
    return lines


def _how_to_read(out: Path) -> str:
    if out.suffix == ".npz":
        return f"numpy.load({str(out)!r})['token_ids']"
    if out.suffix == ".npy":
        return f"numpy.load({str(out)!r})"
    return f"[json.loads(line)['token_ids'] for line in open({str(out)!r})]"
