"""The forms of an answer: which one a client accepts, and its bytes.

    application/json            the default
    application/x-npy           one array, as numpy.save writes it
    application/octet-stream    the array's values alone: little-endian, row-major
    application/vnd.msgpack     the fields of the JSON answer; arrays as little-endian bytes

JSON is written by pydantic-core from plain lists and dicts: models cost three times as much, and
FastAPI's own encoder ten times.
"""

import functools
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from tokenizers_svc.problems import ProblemError
from tokenizers_svc.registry import Served
from tokenizers_svc.request_fields import field_of
from tokenizers_svc.tokens import Tokens

Form = Literal["json", "npy", "raw", "msgpack"]

JSON: Final = "application/json"
NPY: Final = "application/x-npy"
RAW: Final = "application/octet-stream"
MSGPACK: Final = "application/vnd.msgpack"
MSGPACK_NAMES: Final = frozenset({MSGPACK, "application/msgpack", "application/x-msgpack"})

MEDIA_TYPES: Final[Mapping[Form, str]] = {
    "json": JSON, "npy": NPY, "raw": RAW, "msgpack": MSGPACK,
}  # fmt: skip
_FORM_OF: Final[Mapping[str, Form]] = {
    **{media_type: form for form, media_type in MEDIA_TYPES.items()},
    **dict.fromkeys(MSGPACK_NAMES, "msgpack"),
}
_ANY: Final = frozenset({"*/*", "application/*"})
_MAX_ACCEPT_CHARS = 1000
_QUALITY = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")


def choose_form(request: Request, *offered: Form) -> Form:
    """Return the form that a client likes best; of equals, the first one it names.

    Args:
        request: Whose Accept decides; without one, the first that is offered.
        offered: The forms that the answer has.

    Raises:
        ProblemError: 406, it accepts none of them.
    """
    return _choose(field_of(request.scope, b"accept", "*/*")[:_MAX_ACCEPT_CHARS], offered)


@functools.lru_cache(256)
def _choose(accept: str, offered: tuple[Form, ...]) -> Form:
    best: tuple[float, Form] | None = None
    for part in (accept or "*/*").split(","):
        media_type, *parameters = (word.strip().lower() for word in part.split(";"))
        form = offered[0] if media_type in _ANY else _FORM_OF.get(media_type)
        qualities = [match[1] for word in parameters if (match := _QUALITY.fullmatch(word))]
        quality = float(qualities[0]) if qualities else 1.0
        if form in offered and quality > (best[0] if best else 0):
            best = quality, form
    if best is None:
        names = ", ".join(MEDIA_TYPES[form] for form in offered)
        raise ProblemError("not-acceptable", f"This answer comes as {names}; accept one of them.")
    return best[1]


def array_response(
    array: NDArray[Any], form: Form, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an array as npy or raw."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    content = little.tobytes()
    if form == "npy":
        return _response(npy_header(little.shape, little.dtype.str) + content, NPY, headers)
    described = {"X-Shape": ",".join(map(str, little.shape)), "X-Dtype": little.dtype.str}
    return _response(content, RAW, {**described, **(headers or {})})


def token_response(
    served: Served, tokens: Tokens, form: Form, headers: Mapping[str, str]
) -> Response:
    """Return the token ids of one picture in the form that was chosen."""
    if form in ("npy", "raw"):
        array = np.frombuffer(tokens.ids, "<u2").reshape(served.shape)
        return array_response(array, form, headers)
    fields = {**head_fields(served), **picture_fields(tokens, form)}
    return fields_response(fields, form, headers)


def head_fields(served: Served) -> dict[str, Any]:
    """Return what every answer of a model begins with."""
    return {
        "model": served.name,
        "fingerprint": served.fingerprint,
        "shape": served.shape,
        "dtype": "uint16",
    }


def picture_fields(tokens: Tokens, form: Form) -> dict[str, Any]:
    """Return what is said about one picture: lists in JSON, bytes in msgpack."""
    as_bytes = form == "msgpack"
    fields: dict[str, Any] = {
        "token_ids": tokens.ids if as_bytes else _listed(tokens.ids, "<u2"),
        "view": tokens.view,
        "image": tokens.image._asdict(),
    }
    soft = tokens.soft
    if soft is not None:
        fields["soft"] = {
            "k": soft.top_k,
            "ids": soft.ids if as_bytes else _listed(soft.ids, "<u2"),
            "probabilities": soft.probabilities if as_bytes else _listed(soft.probabilities, "<f2"),
        }
    return fields


def fields_response(
    fields: Mapping[str, Any], form: Form, headers: Mapping[str, str] | None = None
) -> Response:
    """Return fields as JSON or msgpack."""
    if form == "msgpack":
        return _response(msgpack.packb(fields), MSGPACK, headers)
    return _response(to_json(fields), JSON, headers)


@functools.lru_cache(256)
def npy_header(shape: Sequence[int], descr: str) -> bytes:
    """Return what numpy.save writes before the values of a row-major array."""
    buffer = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _listed(values: bytes, descr: str) -> list[Any]:
    listed: list[Any] = np.frombuffer(values, descr).tolist()
    return listed


def _response(content: bytes, media_type: str, headers: Mapping[str, str] | None) -> Response:
    return Response(content, headers=headers, media_type=media_type)
