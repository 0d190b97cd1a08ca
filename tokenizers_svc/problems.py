"""Refusals: every way in which a request can fail, and how the client is told.

Answers follow RFC 9457. A `detail` is written here or by the image decoder; it never repeats what
the client sent, and that of a 500 never what the exception said.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tokenizers_svc.schemas import FieldError, Problem

MEDIA_TYPE: Final = "application/problem+json"

KINDS: Final = {
    "bad-request": (400, "The request is malformed"),
    "empty-body": (400, "The body is empty"),
    "unauthorized": (401, "A key is needed"),
    "forbidden": (403, "This key may not do that"),
    "not-found": (404, "There is nothing here"),
    "model-not-found": (404, "There is no such model"),
    "method-not-allowed": (405, "This path has other methods"),
    "not-acceptable": (406, "The answer has no form that is accepted"),
    "header-timeout": (408, "The head of the request did not arrive in time"),
    "body-timeout": (408, "The body did not arrive in time"),
    "body-too-large": (413, "The body is too large"),
    "image-too-large": (413, "The picture is too large"),
    "batch-too-large": (413, "The request has too many parts"),
    "range-not-satisfiable": (416, "The range lies outside the content"),
    "unsupported-body": (415, "The body is not in a form that is read"),
    "not-an-image": (415, "The body is not a picture of a known format"),
    "corrupt-image": (422, "The picture cannot be decoded"),
    "view-outside": (422, "The view does not lie within the picture"),
    "invalid-tokens": (422, "The token ids are not those of this model"),
    "not-decodable": (422, "Centroids of this model are not pictures"),
    "no-soft-targets": (422, "This model has no such soft targets"),
    "reload-failed": (422, "The model was not loaded again; the old one serves"),
    "overloaded": (429, "Too many pictures at once"),
    "header-too-large": (431, "The head of the request is too long"),
    "internal": (500, "The service failed"),
    "not-ready": (503, "The service is not ready"),
    "too-many-connections": (503, "Every connection is at work"),
    "draining": (503, "The service is shutting down"),
    "deadline": (504, "The answer did not come in time"),
}


class ProblemError(Exception):
    """A request is refused; the HTTP answer says why."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        limit: float | None = None,
        actual: float | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[FieldError] = (),
    ) -> None:
        """Refuse.

        Args:
            code: Which kind of problem; decides status and title.
            detail: What is wrong and what to do; no input, no internals.
            limit: The limit that was passed.
            actual: The value that passed it.
            headers: To send along, such as Retry-After.
            errors: Which parts of the body are wrong.
        """
        super().__init__(detail)
        self.code = code
        self.status, self.title = KINDS[code]
        self.detail = detail
        self.limit = limit
        self.actual = actual
        self.headers = headers
        self.errors = errors

    def document(self, request_id: str) -> Problem:
        """Return what a client is told; see RFC 9457."""
        return Problem(
            type=f"urn:patchcache:problem:{self.code}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            code=self.code,
            instance=f"urn:request:{request_id}",
            limit=self.limit,
            actual=self.actual,
            errors=list(self.errors) or None,
        )


def internal_problem() -> ProblemError:
    """Return the refusal that says nothing about what happened."""
    return ProblemError("internal", "The log of the service has the reason under this request id.")


def problem_response(error: ProblemError, request_id: str) -> Response:
    """Return the answer that tells a client about `error`."""
    content = error.document(request_id).model_dump_json(exclude_none=True)
    return Response(content, error.status, error.headers, MEDIA_TYPE)


async def answer_problem(request: Request, error: Exception) -> Response:
    """Answer a refusal of ours."""
    assert isinstance(error, ProblemError)
    return problem_response(error, request.state.request_id)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        problem = ProblemError(
            "method-not-allowed",
            "The header Allow names the methods of this path; /docs describes them.",
            headers=error.headers,
        )
    elif error.status_code == 404:
        problem = ProblemError("not-found", "See /docs for the paths of this service.")
    else:
        raise error
    return problem_response(problem, request.state.request_id)


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the problems that a route answers with."""
    schema = {"$ref": "#/components/schemas/Problem"}
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status, title = KINDS[code]
        known = responses.get(status)
        responses[status] = {
            "description": f"{known['description']}; {title}" if known else title,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
    return responses
