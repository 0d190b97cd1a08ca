"""SIGHUP: the keys are read again; what is wrong with a file leaves the old ones in force."""

import logging

from fastapi import FastAPI

from cache_builder.errors import PatchCacheError
from tokenizers_svc.access import Access

logger = logging.getLogger(__name__)


async def renew(app: FastAPI) -> None:
    """Read the files of an application of `create_app` again; the log says what came of it."""
    access: Access = app.state.access
    try:
        logger.info("keys in force: %d", access.reload())
    except PatchCacheError as exc:
        logger.error("the keys stay what they were: %s", exc)  # noqa: TRY400 - the text says it
