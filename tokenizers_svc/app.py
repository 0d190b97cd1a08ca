"""The HTTP surface: paths, what they take and what they answer.

    POST /v1/tokenize   one picture in, its token ids out
    GET  /v1/models     which tokenizer, and the limits
    GET  /healthz       the process answers
    GET  /readyz        the tokenizer is loaded, warm and at work, and the service is not leaving
    GET  /docs, /openapi.json

The tokenizer is loaded after the application has started, so that probes are answered meanwhile.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cache_builder.formats.codebook import Codebook
from cache_builder.tokenizers.tokenizer import PatchTokenizer, choose_device
from tokenizers_svc.batcher import Tokenizer
from tokenizers_svc.intake import check_headers, parse_view, read_body
from tokenizers_svc.limits import Limits
from tokenizers_svc.middleware import CommonHeaders
from tokenizers_svc.problems import (
    ProblemError,
    answer_http_exception,
    answer_problem,
    documented,
)
from tokenizers_svc.schemas import Health, ModelList, TokenizeAnswer
from tokenizers_svc.service import Timings, TokenizeService, not_ready

_CLIENT_CLOSED_REQUEST = 499

_PICTURE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "the bytes of one JPEG, PNG, WebP, GIF, BMP or TIFF file",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}

T = TypeVar("T")


def create_app(
    tokenizer: str | Path | Tokenizer,
    *,
    model: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        tokenizer: The path of a codebook, whose tokenizer is loaded when the application starts,
            or a loaded tokenizer.
        model: The name in answers; None is the codebook's file name without the suffix or, for a
            loaded tokenizer, the first twelve digits of its fingerprint.
        device: Where a codebook's tokenizer runs: `auto`, `cpu`, `cuda`, `cuda:N`.
        weights: Weights file of a codebook's feature model, if it is not where the codebook says.
        limits: What is accepted; None is the defaults.

    Returns:
        The application; `app.state.service` is its `TokenizeService`.

    Raises:
        ArtifactError: There is no codebook at the path, or it is damaged.
        ConfigError: There is no such device.
    """
    if isinstance(tokenizer, str | Path):
        codebook = Codebook.load(tokenizer)
        chosen = choose_device(device)
        name = model or Path(tokenizer).stem
        load: Callable[[], Tokenizer] = partial(PatchTokenizer.load, codebook, chosen, weights)
    else:
        codebook, chosen = tokenizer.codebook, tokenizer.device
        name = model or codebook.fingerprint[:12]
        load = partial(_the_same, tokenizer)
    on_cpu, num_cores = chosen.type == "cpu", _num_cores()
    service = TokenizeService(
        load,
        codebook,
        model=name,
        limits=(limits or Limits()).resolved(on_cpu=on_cpu, num_cores=num_cores),
        # One core is left to the event loop and the decoders.
        num_torch_threads=max(1, num_cores - 1) if on_cpu else None,
    )
    app = FastAPI(
        title="patchcache tokenizer",
        description="Pictures in, per-patch token ids out. "
        "Refusals are RFC 9457 problems with a `code`.",
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            ProblemError: answer_problem,
            HTTPException: answer_http_exception,
            ClientDisconnect: _answer_nobody,
        },
    )
    app.state.service = service
    app.add_middleware(
        CommonHeaders,
        fingerprint=codebook.fingerprint,
        is_draining=lambda: service.is_draining,
    )
    _add_routes(app)
    return app


def _add_routes(app: FastAPI) -> None:
    app.add_api_route(
        "/v1/tokenize",
        tokenize,
        methods=["POST"],
        responses=documented(
            "bad-request", "empty-body", "body-timeout", "body-too-large", "image-too-large",
            "unsupported-body", "not-an-image", "corrupt-image", "view-outside", "overloaded",
            "internal", "not-ready", "deadline",
        ),
        openapi_extra=_PICTURE_BODY,
    )  # fmt: skip
    app.add_api_route("/v1/models", list_models)
    app.add_api_route("/healthz", check_health)
    app.add_api_route("/readyz", check_readiness, responses=documented("not-ready"))


async def tokenize(
    request: Request,
    response: Response,
    view: Annotated[  # for the documentation; the query is checked as a whole
        str | None,
        Query(
            description="top,left,height,width in pixels of the decoded, upright picture, and ,1 "
            "to mirror the resized view; without it, the largest centred square",
            examples=["0,32,224,224", "0,32,224,224,1"],
        ),
    ] = None,
) -> TokenizeAnswer:
    """Return the token ids of one view of the picture in the body.

    `curl --data-binary @photo.jpg http://HOST/v1/tokenize`
    """
    service: TokenizeService = request.app.state.service
    check_headers(request, service.limits)
    box = parse_view(request.query_params)
    with service.admit():
        async with _deadline(service.limits.request_deadline_s):
            started = time.perf_counter()
            body = await read_body(request, service.limits)
            read_s = time.perf_counter() - started
            work = service.tokenize(body, box)
            del body
            answer, timings = await _while_connected(request, work)
    response.headers["Server-Timing"] = _server_timing(read_s, timings)
    return answer


async def list_models(request: Request) -> ModelList:
    """Return the tokenizers that answer here, and the limits."""
    service: TokenizeService = request.app.state.service
    return ModelList(models=[service.describe()])


async def check_health() -> Health:
    """Answer, to show that the process is alive."""
    return Health(status="alive")


async def check_readiness(request: Request) -> Health:
    """Answer 200 when clients should be sent here, 503 with the reason when not."""
    service: TokenizeService = request.app.state.service
    reason = service.why_not_ready()
    if reason is not None:
        raise not_ready(reason)
    return Health(status="ready")


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: TokenizeService = app.state.service
    service.start()
    try:
        yield
    finally:
        await service.close()


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise ProblemError(
            "deadline",
            f"There was no answer within {seconds:g} s; the work was dropped. Ask again later.",
            limit=seconds,
        ) from None


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client hangs up.

    Raises:
        ClientDisconnect: The client hung up.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnection(request: Request) -> None:
    """Return when the client has gone; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


def _server_timing(read_s: float, timings: Timings) -> str:
    parts = {
        "read": read_s,
        "decode": timings.decode_s,
        "queue": timings.queue_s,
        "infer": timings.infer_s,
    }
    return ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in parts.items())


def _the_same(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


def _num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
