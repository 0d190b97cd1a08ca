"""`patchcache inspect`: of a codebook with images, of a cache, and of whatever else is ours."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_builder.cli_options import Device, Json, Weights, print_json
from cache_builder.errors import ConfigError

if TYPE_CHECKING:
    from cache_builder.appraisal import AppraisalOptions

logger = logging.getLogger(__name__)


def inspect(
    location: Annotated[
        str, typer.Argument(help="A codebook, cache, shard or checkpoint.", metavar="PATH")
    ],
    images: Annotated[
        str | None,
        typer.Option(
            help="Codebook: measure it on these images; of those that it was fitted to, on the "
            "ones held out. Cache without images: where they lie now, for --page."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Cache of several tokenizers: the one to show, by the start of its fingerprint; "
            "default the first. All of them are listed."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Of a cache, or a codebook with --images: write a page, .html."),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Codebook: look at so many, default 1,000. Cache: count no more; default all.",
        ),
    ] = None,
    device: Device = "auto",
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Show what a codebook, a cache, a shard or a checkpoint holds, or what a codebook is worth.

    Example: `patchcache inspect cache/ --page cache.html`
    """
    path = Path(location)
    is_cache = "://" in location or path.is_dir()
    if (is_cache or images is None) and (device != "auto" or weights is not None):
        raise ConfigError(
            "--device and --weights are of the model that measures a codebook on --images, and "
            "here none runs. Leave them out."
        )
    if is_cache:
        _survey(
            location,
            tokenizer=tokenizer,
            images=images,
            page=page,
            max_images=max_images,
            as_json=as_json,
        )
        return
    if tokenizer is not None:
        raise ConfigError(f"--tokenizer chooses one of a cache's, and {location} is no cache.")
    if images is not None:
        from cache_builder.appraisal import AppraisalOptions

        options = AppraisalOptions(path, images, max_images or 1000, device, weights)
        _appraise(options, page, as_json=as_json)
        return
    from cache_builder.console import print_description

    if max_images is not None:
        raise ConfigError("--max-images bounds a cache, or a codebook's --images.")
    if page is not None:
        raise ConfigError("--page shows a cache, or a codebook at work, which needs --images.")
    if path.suffix == ".pt":
        from trainer import checkpoint, finetune_checkpoint

        is_finetuned = finetune_checkpoint.is_finetuned(path)
        description: Any = (finetune_checkpoint if is_finetuned else checkpoint).describe(path)
    else:
        from cache_builder import inspection

        description = inspection.describe(path)
    if as_json:
        print_json(description)
    else:
        print_description(description)


def _appraise(options: "AppraisalOptions", page: Path | None, *, as_json: bool) -> None:
    """Measure a codebook on images and print what came of it."""
    from cache_builder import appraisal as job
    from cache_builder import codebook_page
    from cache_builder.appraisal_table import appraisal_result
    from cache_builder.console import print_appraisal
    from cache_builder.progress import Steps

    with Steps("measuring", "images") as progress:
        appraisal = job.run(options, progress.update)
    if page is not None:
        codebook_page.write(page, appraisal, options.codebook.name)
    if as_json:
        print_json(appraisal_result(appraisal))
    else:
        print_appraisal(appraisal, page)


def _survey(
    location: str,
    *,
    tokenizer: str | None,
    images: str | None,
    page: Path | None,
    max_images: int | None,
    as_json: bool,
) -> None:
    """Count what a cache holds and print it."""
    from cache_builder import cache_page, cache_survey
    from cache_builder.cache_table import survey_result
    from cache_builder.console import print_survey
    from cache_builder.formats.cache import TokenCache
    from cache_builder.progress import Steps

    if images is not None and page is None:
        raise ConfigError(
            "--images says where the images of a cache lie, for the pictures of --page. Name a "
            "page, or leave --images out."
        )
    with TokenCache.open(location, tokenizer) as cache:
        with Steps("counting", "images") as progress:
            found = cache_survey.run(
                cache, max_images, cache_page.NUM_EXAMPLES if page else 0, progress.update
            )
        if page is not None:
            for problem in cache_page.write(page, found, cache, images):
                logger.warning("not shown on the page: %s", problem)
    if as_json:
        print_json(survey_result(found))
    else:
        print_survey(found, page)
