"""What the query of each path may say, and how a route gets it.

A query is a model that is checked in one go: what a path does not know, what is said twice and what
is of the wrong type is refused, and never ignored. FastAPI reads the same model for the documents,
but takes no part in a request: solving its dependencies costs more than reading the query.
"""

import typing
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from tokenizers_svc.problems import ProblemError

PictureForm = Literal["png", "webp", "npy"]


class NoQuery(BaseModel, frozen=True):
    """Of a path that has none."""


class ModelQuery(BaseModel, frozen=True):
    """Of every path that works with a model."""

    model: str | None = Field(None, description="name of the model; without it, the default one")


class ViewQuery(ModelQuery, frozen=True):
    """Of a path that works with one view of one picture."""

    view: str | None = Field(
        None,
        description="top,left,height,width in pixels of the decoded, upright picture, and ,1 "
        "to mirror the resized view; without it, the largest centred square",
        examples=["0,32,224,224", "0,32,224,224,1"],
    )


class TokenizeQuery(ViewQuery, frozen=True):
    """Of one picture."""

    soft_top_k: int | None = Field(
        None, description="nearest centroids of every patch to answer with"
    )
    soft_temperature: float | None = Field(
        None, description="of their softmax, in units of the codebook's mean distance"
    )


class BatchQuery(ModelQuery, frozen=True):
    """Of several pictures."""

    on_error: Literal["item", "fail"] = Field(
        "item",
        description="what a bad picture does: its own item says why, or the whole request fails",
    )


class DetokenizeQuery(ModelQuery, frozen=True):
    """Of token ids that become pictures."""

    format: PictureForm | None = Field(
        None,
        description="of the picture; npy is (S, S, 3) uint8, and the one form of several "
        "pictures, (B, S, S, 3)",
    )


class ReconstructQuery(DetokenizeQuery, ViewQuery, frozen=True):
    """Of a picture that goes through its token ids."""


class FileQuery(BaseModel, frozen=True):
    """Of a file that belongs to a model."""

    digest: str | None = Field(
        None, description="of the centroids; the answer may then be kept for ever"
    )


Kind = TypeVar("Kind", bound=BaseModel)


def read_query(request: Request, kind: type[Kind]) -> Kind:
    """Return the query of a request.

    Raises:
        ProblemError: 400, it names what the path does not know, or anything twice, or has a value
            that is none; values are not repeated.
    """
    if not request.scope["query_string"]:
        return kind()
    given = request.query_params.multi_items()
    values = dict(given)
    if len(values) < len(given) or not values.keys() <= kind.model_fields.keys():
        known = ", ".join(f"`{name}`" for name in kind.model_fields) or "none"
        raise ProblemError("bad-request", f"Query parameters of this path, each once: {known}.")
    try:
        return kind.model_validate(values)
    except ValidationError as exc:
        names = sorted({str(error["loc"][0]) for error in exc.errors()})
        raise ProblemError(
            "bad-request",
            f"The query has a value that is not allowed for {', '.join(names)}; "
            "/docs describes them.",
        ) from None


class DirectRoute(APIRoute):
    """A route whose function takes the request, its `query` and what the path says."""

    async def answer(self, request: Request) -> Response:
        """Return the answer to a request of this route.

        Raises:
            ProblemError: The request is refused.
            ClientDisconnect: The client hung up.
        """
        response: Response = await self.endpoint(
            request, query=read_query(request, self._query), **request.path_params
        )
        return response

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what FastAPI calls for an answer."""
        self._query = typing.get_type_hints(self.endpoint)["query"]
        return self.answer
