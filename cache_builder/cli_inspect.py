"""What `patchcache inspect` does with a codebook and images, and with a cache."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cache_builder.cli_options import print_json
from cache_builder.errors import ConfigError

if TYPE_CHECKING:
    from cache_builder.appraisal import AppraisalOptions

logger = logging.getLogger(__name__)


def appraise(options: "AppraisalOptions", page: Path | None, *, as_json: bool) -> None:
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


def survey(
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
