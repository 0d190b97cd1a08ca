"""Which path is answered by which function, and what OpenAPI says about each."""

import functools
from typing import Any, Final

from fastapi import FastAPI, Response

from tokenizers_svc import (
    codebook_files,
    routes_models,
    routes_pictures,
    routes_probes,
    routes_tokenize,
)
from tokenizers_svc.codebook_files import FileKind
from tokenizers_svc.openapi import (
    BATCH_BODY,
    BATCH_EXAMPLE,
    BINARY,
    NOT_MODIFIED,
    PICTURE_BODY,
    TOKENS_BODY,
    TOKENS_EXAMPLE,
    file_answer,
    tokens_answer,
)
from tokenizers_svc.problems import documented
from tokenizers_svc.queries import DirectRoute
from tokenizers_svc.schemas import BatchAnswer, TokenizeAnswer

# What any route that takes a picture may answer.
_PICTURE_PROBLEMS: Final = (
    "bad-request", "empty-body", "model-not-found", "not-acceptable", "body-timeout",
    "body-too-large", "image-too-large", "batch-too-large", "unsupported-body", "not-an-image",
    "corrupt-image", "view-outside", "overloaded", "internal", "not-ready", "deadline",
)  # fmt: skip


_CODEBOOK_FILES: Final[dict[FileKind, Any]] = {
    "npy": routes_models.get_npy,
    "png": routes_models.get_png,
    "safetensors": routes_models.get_safetensors,
}


def _documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the problems of a path that may want a key."""
    return documented("unauthorized", *codes)


def add_all(app: FastAPI) -> None:
    """Add every route."""
    _add_tokenize(app)
    _add_pictures(app)
    _add_models(app)
    routes_probes.add_routes(app)


def _add_tokenize(app: FastAPI) -> None:
    add = functools.partial(app.router.add_api_route, route_class_override=DirectRoute)
    add(
        "/v1/tokenize",
        routes_tokenize.tokenize,
        methods=["POST"],
        responses={
            200: tokens_answer(TokenizeAnswer, TOKENS_EXAMPLE),
            **_documented(*_PICTURE_PROBLEMS, "no-soft-targets"),
        },
        openapi_extra=PICTURE_BODY,
    )
    add(
        "/v1/tokenize/batch",
        routes_tokenize.tokenize_batch,
        methods=["POST"],
        responses={
            200: tokens_answer(BatchAnswer, BATCH_EXAMPLE),
            **_documented(*_PICTURE_PROBLEMS),
        },
        openapi_extra=BATCH_BODY,
    )
    add(
        "/v1/tokens/{sha256}",
        routes_tokenize.find_tokens,
        responses={
            200: tokens_answer(TokenizeAnswer, TOKENS_EXAMPLE),
            304: NOT_MODIFIED,
            **_documented("bad-request", "not-found", "model-not-found", "not-acceptable"),
        },
    )


def _add_pictures(app: FastAPI) -> None:
    add = functools.partial(app.router.add_api_route, route_class_override=DirectRoute)
    pictures = dict.fromkeys(routes_pictures.MEDIA_TYPES.values(), BINARY)
    add(
        "/v1/detokenize",
        routes_pictures.detokenize,
        methods=["POST"],
        response_class=Response,
        responses={
            200: {"description": "the picture, or several as one array", "content": pictures},
            **_documented(
                "bad-request", "empty-body", "model-not-found", "not-acceptable", "body-timeout",
                "body-too-large", "batch-too-large", "unsupported-body", "invalid-tokens",
                "not-decodable", "overloaded", "internal", "not-ready", "deadline",
            ),
        },
        openapi_extra=TOKENS_BODY,
    )  # fmt: skip
    add(
        "/v1/reconstruct",
        routes_pictures.reconstruct,
        methods=["POST"],
        response_class=Response,
        responses={
            200: {"description": "what is left of the picture", "content": pictures},
            **_documented(*_PICTURE_PROBLEMS, "not-decodable"),
        },
        openapi_extra=PICTURE_BODY,
    )


def _add_models(app: FastAPI) -> None:
    app.add_api_route("/v1/models", routes_models.list_models, responses=_documented("bad-request"))
    app.add_api_route(
        "/v1/models/{model}",
        routes_models.show_model,
        responses=_documented("bad-request", "model-not-found"),
    )
    for kind, endpoint in _CODEBOOK_FILES.items():
        problems = ("not-decodable",) if kind == "png" else ()
        app.router.add_api_route(
            f"/v1/models/{{model}}/codebook.{kind}",
            endpoint,
            route_class_override=DirectRoute,
            response_class=Response,
            responses={
                200: file_answer(codebook_files.MEDIA_TYPES[kind]),
                206: file_answer(codebook_files.MEDIA_TYPES[kind]),
                304: NOT_MODIFIED,
                **_documented(
                    "bad-request", "not-found", "model-not-found", "range-not-satisfiable",
                    *problems,
                ),
            },
        )  # fmt: skip
    app.add_api_route(
        "/v1/admin/models/{model}:reload",
        routes_models.reload_model,
        methods=["POST"],
        responses=_documented(
            "bad-request", "forbidden", "model-not-found", "reload-failed", "draining"
        ),
    )
