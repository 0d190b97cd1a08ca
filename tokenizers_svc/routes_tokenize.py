"""Token ids of pictures: one, several, and those that were answered before."""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final, cast

import msgpack
import numpy as np
from fastapi import Path, Query, Request, Response

from cache_builder.errors import ConfigError
from cache_builder.formats.payloads import SoftSpec
from cache_builder.soft_targets import soft_spec
from tokenizers_svc.bodies import read_picture, read_pictures
from tokenizers_svc.conditional import is_known
from tokenizers_svc.decoding import check_total_pixels
from tokenizers_svc.encoding import TokenizerFailedError
from tokenizers_svc.exchange import Exchange
from tokenizers_svc.forms import (
    Form,
    array_response,
    choose_form,
    fields_response,
    head_fields,
    picture_fields,
    token_response,
)
from tokenizers_svc.intake import Upload, parse_view
from tokenizers_svc.limits import Limits
from tokenizers_svc.observation import RequestRecord
from tokenizers_svc.problems import ProblemError, internal_problem
from tokenizers_svc.queries import BatchQuery, TokenizeQuery, ViewQuery
from tokenizers_svc.registry import Served
from tokenizers_svc.schemas import FieldError
from tokenizers_svc.service import TokenizeService, begin
from tokenizers_svc.tokens import Key, Outcome, Picture, Timings, Tokens

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ALL_FORMS: Final = ("json", "npy", "raw", "msgpack")
_FIELD_FORMS: Final = ("json", "msgpack")


async def tokenize(request: Request, query: Annotated[TokenizeQuery, Query()]) -> Response:
    """Return the token ids of one view of the picture in the body.

    `curl --data-binary @photo.jpg http://HOST/v1/tokenize`
    """
    service, served = begin(request, query.model)
    soft = _soft(served, query, service.limits)
    form = choose_form(request, *(_FIELD_FORMS if soft else _ALL_FORMS))
    box = parse_view(query.view)
    upload = Upload(request, service.limits.max_body_bytes)
    with service.admit(served, upload):
        async with Exchange(request, service.limits) as exchange:
            picture = await exchange.read(read_picture(request, upload, service.limits, box))
            outcome = await exchange.work(service.tokenize(served, picture, soft))
    note_outcomes(request, exchange.read_s, [outcome])
    headers = {
        **timing_headers(exchange.read_s, [outcome]),
        "ETag": _etag(served, outcome.tokens, form),
        "Vary": "Accept",
    }
    return token_response(served, outcome.tokens, form, headers)


async def tokenize_batch(request: Request, query: Annotated[BatchQuery, Query()]) -> Response:
    """Return the token ids of several pictures.

    `curl -F files=@a.jpg -F files=@b.jpg http://HOST/v1/tokenize/batch`
    """
    service, served = begin(request, query.model)
    limits = service.limits
    # An array has no place for an error.
    form = choose_form(request, *(_ALL_FORMS if query.on_error == "fail" else _FIELD_FORMS))
    upload = Upload(request, limits.max_batch_body_bytes)
    with service.admit(served, upload) as place:
        async with Exchange(request, limits) as exchange:
            pictures = await exchange.read(read_pictures(request, upload, limits))
            place.hold_pictures(len(pictures))
            results = await exchange.work(_tokenize_all(service, served, pictures))
    outcomes = [result for result in results if isinstance(result, Outcome)]
    note_outcomes(request, exchange.read_s, outcomes)
    headers = {**timing_headers(exchange.read_s, outcomes), "Vary": "Accept"}
    if query.on_error == "fail":
        _raise_first(results)
    if form in ("npy", "raw"):
        ids = np.frombuffer(b"".join(outcome.tokens.ids for outcome in outcomes), "<u2")
        return array_response(ids.reshape(-1, *served.shape), form, headers)
    items = [
        {"index": index, **_item_fields(request, result, form)}
        for index, result in enumerate(results)
    ]
    return fields_response({**head_fields(served), "items": items}, form, headers)


async def find_tokens(
    request: Request,
    sha256: Annotated[str, Path(description="of the image file, hexadecimal")],
    query: Annotated[ViewQuery, Query()],
) -> Response:
    """Return what was answered for the picture with this SHA-256, if it is still kept.

    The view is that of the earlier request, in the same words.
    """
    service, served = begin(request, query.model)
    form = choose_form(request, *_ALL_FORMS)
    if not _SHA256.fullmatch(sha256):
        raise ProblemError("bad-request", "A SHA-256 has 64 hexadecimal digits, in lower case.")
    key = Key(sha256, served.fingerprint, parse_view(query.view), None)
    tokens = service.kept.find(key)
    if tokens is None:
        raise ProblemError(
            "not-found", "No answer is kept for this picture, model and view; send the picture."
        )
    headers = {"ETag": _etag(served, tokens, form), "Vary": "Accept"}
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return token_response(served, tokens, form, headers)


async def _tokenize_all(
    service: TokenizeService, served: Served, pictures: Sequence[Picture]
) -> list[Outcome | ProblemError | TokenizerFailedError]:
    """Return what became of every picture.

    Raises:
        ProblemError: 413, they are too large together; 503, the tokenizer has gone.
    """
    bodies = [picture.data for picture in pictures]
    await service.in_thread(check_total_pixels, bodies, service.limits)
    work = (service.tokenize(served, picture, None) for picture in pictures)
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        is_its_own = isinstance(result, ProblemError) and result.status < 500
        if isinstance(result, BaseException) and not (
            is_its_own or isinstance(result, TokenizerFailedError)
        ):
            raise result
    return cast(list[Outcome | ProblemError | TokenizerFailedError], results)


def _raise_first(results: Sequence[Outcome | ProblemError | TokenizerFailedError]) -> None:
    for index, result in enumerate(results):
        if isinstance(result, ProblemError):
            pointer = FieldError(pointer=f"/items/{index}", message=result.detail)
            raise ProblemError(
                result.code,
                f"Picture {index}: {result.detail}",
                limit=result.limit,
                actual=result.actual,
                errors=[pointer],
            )
        if isinstance(result, TokenizerFailedError):
            raise result


def _item_fields(
    request: Request, result: Outcome | ProblemError | TokenizerFailedError, form: Form
) -> dict[str, Any]:
    if isinstance(result, Outcome):
        return picture_fields(result.tokens, form)
    request_id = request.state.request_id
    if isinstance(result, TokenizerFailedError):
        logger.error("a picture of request %s failed", request_id, exc_info=result)
        result = internal_problem()
    request.state.record.problems.append(result.code)
    return {"error": result.document(request_id).model_dump(mode="json", exclude_none=True)}


def _soft(served: Served, query: TokenizeQuery, limits: Limits) -> SoftSpec | None:
    top_k, temperature = query.soft_top_k, query.soft_temperature
    if top_k is not None and top_k > limits.max_soft_top_k:
        raise ProblemError(
            "no-soft-targets",
            f"`soft_top_k` is at most {limits.max_soft_top_k}.",
            limit=limits.max_soft_top_k,
            actual=top_k,
        )
    try:
        return soft_spec(
            served.codebook, top_k, temperature, names=("soft_top_k", "soft_temperature")
        )
    except ConfigError as exc:
        raise ProblemError("no-soft-targets", str(exc)) from exc


def _etag(served: Served, tokens: Tokens, form: Form) -> str:
    identity = msgpack.packb((served.name, served.fingerprint, tokens))
    return f'"{hashlib.sha256(identity).hexdigest()[:32]}-{form}"'


def note_outcomes(request: Request, read_s: float, outcomes: Sequence[Outcome]) -> None:
    """Note in the record of a request what was answered, and where the time went."""
    record: RequestRecord = request.state.record
    record.num_images = len(outcomes)
    ended = time.perf_counter()
    for outcome in outcomes:
        timings = outcome.timings
        if timings is not None:
            queued = ended - timings.infer_s
            record.add_stage("decode", timings.decode_s, ended=queued - timings.queue_s)
            record.add_stage("queue", timings.queue_s, ended=queued)
            record.add_stage("infer", timings.infer_s, ended=ended)
    record.add_stage("read", read_s, ended=record.started + read_s)


def timing_headers(read_s: float, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Return where the time went; of several pictures, the longest of each."""
    timings = [outcome.timings for outcome in outcomes if outcome.timings is not None]
    parts = [f"read;dur={1000 * read_s:.2f}"]
    headers = {}
    if timings:
        longest = Timings(*map(max, zip(*timings, strict=True)))
        parts += (
            f"decode;dur={1000 * longest.decode_s:.2f}",
            f"queue;dur={1000 * longest.queue_s:.2f}",
            f"infer;dur={1000 * longest.infer_s:.2f}",
        )
        headers["X-Batch-Size"] = str(longest.batch_size)
    if len(timings) < len(outcomes):
        parts.append("cache;desc=hit")
    return {"Server-Timing": ", ".join(parts), **headers}
