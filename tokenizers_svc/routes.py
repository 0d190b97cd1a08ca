"""Which path is answered by which function, and what OpenAPI says about each."""

from typing import Final

from fastapi import FastAPI

from tokenizers_svc import routes_models, routes_probes, routes_tokenize
from tokenizers_svc.openapi import (
    BATCH_BODY,
    BATCH_EXAMPLE,
    PICTURE_BODY,
    TOKENS_EXAMPLE,
    tokens_answer,
)
from tokenizers_svc.problems import documented
from tokenizers_svc.schemas import BatchAnswer, TokenizeAnswer

# What any route that takes a picture may answer.
_PICTURE_PROBLEMS: Final = (
    "bad-request", "empty-body", "model-not-found", "not-acceptable", "body-timeout",
    "body-too-large", "image-too-large", "batch-too-large", "unsupported-body", "not-an-image",
    "corrupt-image", "view-outside", "overloaded", "internal", "not-ready", "deadline",
)  # fmt: skip


def add_all(app: FastAPI) -> None:
    """Add every route."""
    _add_tokenize(app)
    _add_models(app)
    routes_probes.add_routes(app)


def _add_tokenize(app: FastAPI) -> None:
    app.add_api_route(
        "/v1/tokenize",
        routes_tokenize.tokenize,
        methods=["POST"],
        responses={
            200: tokens_answer(TokenizeAnswer, TOKENS_EXAMPLE),
            **documented(*_PICTURE_PROBLEMS, "no-soft-targets"),
        },
        openapi_extra=PICTURE_BODY,
    )
    app.add_api_route(
        "/v1/tokenize/batch",
        routes_tokenize.tokenize_batch,
        methods=["POST"],
        responses={
            200: tokens_answer(BatchAnswer, BATCH_EXAMPLE),
            **documented(*_PICTURE_PROBLEMS),
        },
        openapi_extra=BATCH_BODY,
    )
    app.add_api_route(
        "/v1/tokens/{sha256}",
        routes_tokenize.find_tokens,
        responses={
            200: tokens_answer(TokenizeAnswer, TOKENS_EXAMPLE),
            304: {"description": "The client has this answer"},
            **documented("bad-request", "not-found", "model-not-found", "not-acceptable"),
        },
    )


def _add_models(app: FastAPI) -> None:
    app.add_api_route("/v1/models", routes_models.list_models, responses=documented("bad-request"))
    app.add_api_route(
        "/v1/models/{model}",
        routes_models.show_model,
        responses=documented("bad-request", "model-not-found"),
    )
    for kind, endpoint in (
        ("npy", routes_models.get_npy),
        ("png", routes_models.get_png),
        ("safetensors", routes_models.get_safetensors),
    ):
        app.add_api_route(f"/v1/models/{{model}}/codebook.{kind}", endpoint)
