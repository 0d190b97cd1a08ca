"""SIGHUP: keys and codebooks are read again, and what is wrong with a file leaves the old in force.

A codebook whose fingerprint is the same is left alone, so that new keys cost no loading of models.
"""

import asyncio
import logging

from fastapi import FastAPI

from cache_builder.errors import PatchCacheError
from cache_builder.formats.codebook import Codebook
from tokenizers_svc.access import Access
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.registry import Served
from tokenizers_svc.service import TokenizeService

logger = logging.getLogger(__name__)


async def renew(app: FastAPI) -> None:
    """Read the files of an application of `create_app` again; the log says what came of it."""
    access: Access = app.state.access
    service: TokenizeService = app.state.service
    try:
        logger.info("keys in force: %d", access.reload())
    except PatchCacheError as exc:
        logger.error("the keys stay what they were: %s", exc)  # noqa: TRY400 - the text says it
    for served in list(service.registry):
        try:
            await _renew_model(service, served)
        except PatchCacheError as exc:
            logger.error("model %s stays what it was: %s", served.name, exc)  # noqa: TRY400
        except ProblemError as exc:
            logger.error("model %s stays what it was: %s", served.name, exc.detail)  # noqa: TRY400
        except Exception:
            logger.exception("model %s stays what it was", served.name)


async def _renew_model(service: TokenizeService, served: Served) -> None:
    path = served.source.path
    if path is None:
        return
    codebook = await asyncio.to_thread(Codebook.load, path)
    if codebook.fingerprint == served.fingerprint:
        logger.info("model %s is what its file holds", served.name)
        return
    await service.reloader.reload(served.name)
