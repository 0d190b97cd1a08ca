"""The HTTP surface: which paths there are, and what happens around all of them.

    POST /v1/tokenize                   one picture in, its token ids out
    POST /v1/tokenize/batch             several pictures
    GET  /v1/tokens/{sha256}            what was answered for a picture, without sending it again
    GET  /v1/models, /v1/models/{id}    which models there are, and the limits
    GET  /v1/models/{id}/codebook.npy   also .png and .safetensors
    GET  /healthz                       the process answers
    GET  /readyz                        every tokenizer is loaded, warm and at work, and the service
                                        is not leaving
    GET  /metrics                       what Prometheus asks for
    GET  /version, /docs, /openapi.json
    GET  /, /page/...                   the page for people

The tokenizers are loaded after the application has started, so that probes are answered meanwhile.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokenizers_svc import openapi, routes
from tokenizers_svc.access import Access, AccessControl, allow_origins
from tokenizers_svc.application import Application
from tokenizers_svc.cores import num_cores
from tokenizers_svc.encoding import Tokenizer
from tokenizers_svc.exchange import answer_nobody
from tokenizers_svc.limits import Limits
from tokenizers_svc.logs import log_request
from tokenizers_svc.metrics import Metrics
from tokenizers_svc.middleware import CommonHeaders
from tokenizers_svc.observation import Audience, Observation
from tokenizers_svc.options import ServiceOptions
from tokenizers_svc.page import page_router
from tokenizers_svc.problems import (
    ProblemError,
    answer_http_exception,
    answer_problem,
)
from tokenizers_svc.registry import Registry, name_models
from tokenizers_svc.service import TokenizeService

Codebook = str | Path | Tokenizer


def create_app(
    codebooks: Codebook | Mapping[str, Codebook] | None = None,
    *,
    model: str | None = None,
    device: str | None = None,
    weights: str | None = None,
    limits: Limits | None = None,
    options: ServiceOptions | None = None,
) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        codebooks: The path of a codebook, whose tokenizer is loaded when the application starts, a
            loaded tokenizer, or several of either by name, the default model first; None takes
            those of the options.
        model: The name of a single codebook in answers; None is its file name without the suffix
            or, for a loaded tokenizer, the first twelve digits of its fingerprint.
        device: Where tokenizers of paths run: `auto`, `cpu`, `cuda`, `cuda:N`; this, `weights` and
            `limits` go before those of the options.
        weights: Weights file of the feature models, if it is not where the codebooks say.
        limits: What is accepted.
        options: Everything else; None is the defaults.

    Returns:
        The application; `app.state.service` is its `TokenizeService`.

    Raises:
        ArtifactError: There is no codebook at a path, or it is damaged.
        ConfigError: There is no codebook at all, or no such device.
    """
    options = options or ServiceOptions()
    metrics = Metrics(lambda: service.state())
    audience = Audience(metrics.note_request, log_request)
    registry = Registry(
        name_models(options.codebooks if codebooks is None else codebooks, model),
        device=device or options.device,
        weights=weights or options.weights,
        limits=limits or options.limits,
        num_cores=options.num_cores or num_cores(),
        on_batch=metrics.note_batch,
    )
    access = Access(options.access)
    service = TokenizeService(registry, metrics)
    app = Application(
        title="patchcache tokenizer",
        description="Pictures in, per-patch token ids out. "
        "Refusals are RFC 9457 problems with a `code`.",
        lifespan=_lifespan,
        docs_url="/docs" if options.docs else None,
        openapi_url="/openapi.json" if options.docs else None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            ProblemError: answer_problem,
            HTTPException: answer_http_exception,
            ClientDisconnect: answer_nobody,
        },
    )
    app.state.service = service
    app.state.access = access
    app.state.audience = audience
    app.add_middleware(AccessControl, access=access)
    # Outside of the keys: a browser asks whether it may before it sends one.
    app.add_middleware(allow_origins, origins=options.access.cors_origins)
    app.add_middleware(
        CommonHeaders,
        fingerprint=lambda: registry.default.fingerprint,
        is_draining=lambda: service.is_draining,
    )
    app.add_middleware(Observation, audience=audience)
    routes.add_all(app)
    if options.page:
        app.include_router(page_router(has_docs=options.docs))
    openapi.complete(app)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: TokenizeService = app.state.service
    service.start()
    app.state.loop = asyncio.get_running_loop()
    watching = asyncio.create_task(service.metrics.watch_loop())
    try:
        yield
    finally:
        watching.cancel()
        await service.close()
        app.state.audience.tell()
