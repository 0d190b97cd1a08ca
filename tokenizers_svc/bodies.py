"""The forms in which pictures are sent: raw bytes, multipart forms, JSON and msgpack.

What is counted is counted before it is made: values of JSON by its punctuation, those of msgpack
and the parts of a form as they are read, the bytes of base64 by the length of its text. URLs are
never fetched.
"""

import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

import msgpack
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from cache_builder.formats.views import View
from tokenizers_svc.forms import MSGPACK_NAMES
from tokenizers_svc.intake import Upload, media_type_of, parse_view
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.schemas import FieldError
from tokenizers_svc.tokens import Picture

Model = TypeVar("Model", bound=BaseModel)

Kind = Literal["raw", "multipart", "json", "msgpack"]

_MAX_FIELD_BYTES = 65_536  # of a form, other than its files
_VALUES_PER_PICTURE = 24
_MAX_ERRORS = 10
_MAX_CORNER = 999_999_999


def kind_of(request: Request) -> Kind:
    """Return in which form a body is sent; what is none of the others is the file itself."""
    media_type = media_type_of(request)
    if media_type.startswith("multipart/"):
        return "multipart"
    if media_type == "application/json" or media_type.endswith("+json"):
        return "json"
    return "msgpack" if media_type in MSGPACK_NAMES else "raw"


def _as_view(value: Any) -> Any:
    if value is None:
        return None
    is_list = isinstance(value, list | tuple) and len(value) in (4, 5)
    if not is_list or any(type(corner) is not int for corner in value[:4]):
        raise ValueError("a view is [top, left, height, width] or [..., true], in pixels")
    top, left, height, width, hflip = value if len(value) == 5 else [*value, False]
    in_range = all(0 <= corner <= _MAX_CORNER for corner in (top, left, height, width))
    if not in_range or hflip not in (0, 1):
        raise ValueError(f"a box has numbers from 0 to {_MAX_CORNER}; it is mirrored or not")
    return View(top, left, height, width, hflip=bool(hflip))


def _as_image(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": value}
    if isinstance(value, dict) and "url" in value:
        raise ValueError("URLs are never fetched; send the bytes of the file as `b64`")
    return value


def _as_base64(value: Any) -> Any:
    if not isinstance(value, str | bytes):
        raise PydanticCustomError("base64", "this is not a text of base64")
    return value


ViewBody = Annotated[
    View | None,
    BeforeValidator(_as_view),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "prefixItems": [{"type": "integer", "minimum": 0, "maximum": _MAX_CORNER}] * 4
                    + [{"type": "boolean"}],
                    "items": False,
                    "minItems": 4,
                    "maxItems": 5,
                },
                {"type": "null"},
            ],
            "description": "[top, left, height, width] in pixels of the decoded, upright picture, "
            "and true to mirror the resized view; null is the largest centred square",
        }
    ),
]


class ImageBody(BaseModel, frozen=True, extra="forbid"):
    """One image file."""

    b64: Annotated[
        Any,
        BeforeValidator(_as_base64),
        WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
    ] = Field(description="the file in base64, or a data URI of it")


class PictureBody(BaseModel, frozen=True, extra="forbid"):
    """One picture as JSON or msgpack; in msgpack, `image` may be the bytes themselves."""

    image: Annotated[ImageBody, BeforeValidator(_as_image)]
    view: ViewBody = None


class BatchBody(BaseModel, frozen=True, extra="forbid"):
    """Several pictures as JSON or msgpack."""

    items: list[PictureBody] = Field(min_length=1)


async def read_picture(
    request: Request, upload: Upload, limits: Limits, view: View | None
) -> Picture:
    """Return the picture of a request.

    Args:
        request: Whose body it is.
        upload: The body.
        limits: Of the service.
        view: The view that the query names; the body may name it too if the query does not.

    Raises:
        ProblemError: 400, 408 or 413.
    """
    kind = kind_of(request)
    if kind == "raw":
        return Picture(await upload.read(), view)
    if kind == "multipart":
        async with open_form(request, upload, max_files=1) as form:
            picture = _picture_of_form(form)
    else:
        fields = parse_fields(kind, await upload.read(), _VALUES_PER_PICTURE)
        picture = _picture(_validated(PictureBody, fields), limits, "")
    if view is not None and picture.view is not None:
        raise ProblemError("bad-request", "The view is named twice: by the query and by the body.")
    return picture if view is None else picture._replace(view=view)


async def read_pictures(request: Request, upload: Upload, limits: Limits) -> list[Picture]:
    """Return the pictures of a request of several.

    Raises:
        ProblemError: 400, 408, 413 or 415.
    """
    kind = kind_of(request)
    if kind == "raw":
        raise ProblemError(
            "unsupported-body",
            "Several pictures come as a multipart form with `files`, or as JSON or msgpack with "
            "`items`.",
        )
    if kind == "multipart":
        async with open_form(request, upload, max_files=limits.max_items) as form:
            pictures = _pictures_of_form(form, limits)
    else:
        max_values = _VALUES_PER_PICTURE * (limits.max_items + 1)
        fields = parse_fields(kind, await upload.read(), max_values, too_many(limits.max_items))
        items = fields.get("items")
        if isinstance(items, list) and len(items) > limits.max_items:
            raise too_many(limits.max_items, len(items))
        body = _validated(BatchBody, fields)
        pictures = [_picture(item, limits, f"/items/{i}") for i, item in enumerate(body.items)]
    return pictures


@contextlib.asynccontextmanager
async def open_form(request: Request, upload: Upload, *, max_files: int) -> AsyncIterator[FormData]:
    """Read a multipart form of at most one field beside its files, which lie in memory.

    Raises:
        ProblemError: 400, 408 or 413.
    """
    parser = MultiPartParser(
        request.headers,
        upload.chunks(),
        max_files=max_files,
        max_fields=1,
        max_part_size=_MAX_FIELD_BYTES,
    )
    # The length of the whole body is limited already; nothing is written to a disk.
    parser.spool_max_size = 0
    try:
        form = await parser.parse()
    except MultiPartException as exc:
        if exc.message.startswith("Too many files"):
            raise too_many(max_files) from None
        raise ProblemError(
            "bad-request", "The body is not a well-formed multipart form of this path."
        ) from None
    try:
        yield form
    finally:
        await form.close()


def parse_fields(
    kind: Kind, body: bytes, max_values: int, excess: ProblemError | None = None
) -> dict[str, Any]:
    """Return the object that a JSON or msgpack body holds.

    Args:
        kind: `json` or `msgpack`.
        body: The whole body.
        max_values: How many values it may hold.
        excess: What a body of more is refused with; None is a 400.

    Raises:
        ProblemError: 400, or `excess`.
    """
    excess = excess or ProblemError("bad-request", "The body holds more values than it needs.")
    try:
        if kind == "json":
            # Base64 has none of these, so nothing is counted that is not made.
            if sum(body.count(mark) for mark in (b",", b"[", b"{")) > max_values:
                raise excess
            fields = from_json(body, allow_inf_nan=False)
        else:
            fields = _unpack(body, max_values, excess)
    except (ValueError, RecursionError, msgpack.UnpackException):
        name = "JSON" if kind == "json" else "msgpack"
        raise ProblemError("bad-request", f"The body is not well-formed {name}.") from None
    if not isinstance(fields, dict):
        raise ProblemError("bad-request", "The body has to be an object with named fields.")
    return cast(dict[str, Any], fields)


def _unpack(body: bytes, max_values: int, excess: ProblemError) -> Any:
    num_values = 0

    def count(container: Any) -> Any:
        nonlocal num_values
        num_values += len(container) + 1
        if num_values > max_values:
            raise excess
        return container

    return msgpack.unpackb(
        body,
        object_hook=count,
        list_hook=count,
        max_array_len=max_values,
        max_map_len=_VALUES_PER_PICTURE,
        max_ext_len=0,
    )


def _validated(model: type[Model], fields: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        errors = [
            FieldError(pointer=_pointer(error), message=error["msg"].removeprefix("Value error, "))
            for error in exc.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise ProblemError(
            "bad-request",
            "The body is not of the form that /docs describes.",
            errors=errors[:_MAX_ERRORS],
        ) from None


def _pointer(error: Mapping[str, Any]) -> str:
    """Return where a model found an error; the name of an unknown field is left out."""
    where: Sequence[int | str] = error["loc"]
    if error["type"] == "extra_forbidden":
        where = where[:-1]
    return "".join(f"/{part}" for part in where)


def _picture(body: PictureBody, limits: Limits, pointer: str) -> Picture:
    """Decode the base64 of a picture; bytes of msgpack are taken as they are."""
    text = body.image.b64
    if isinstance(text, bytes):
        data = text
    else:
        start = text.find(",") + 1 if text.startswith("data:") else 0
        num_bytes = 3 * (len(text) - start) // 4 - text.count("=", -2)  # less the padding
        if num_bytes > limits.max_body_bytes:
            raise _file_too_large(limits, num_bytes)
        data = _from_base64(text[start:], pointer)
    if len(data) > limits.max_body_bytes:
        raise _file_too_large(limits, len(data))
    return Picture(data, body.view)


def _from_base64(text: str, pointer: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        error = FieldError(pointer=f"{pointer}/image/b64", message="this is not base64")
        raise ProblemError(
            "bad-request", "A picture is not valid base64.", errors=[error]
        ) from None


def _picture_of_form(form: FormData) -> Picture:
    file = form.get("file")
    if not isinstance(file, UploadFile) or not set(form) <= {"file", "view"}:
        raise ProblemError(
            "bad-request",
            "A form has one file, `file`, and at most one field, `view`: "
            "curl -F file=@photo.jpg URL",
        )
    view = form.get("view")
    return Picture(_content(file), parse_view(view if isinstance(view, str) else None))


def _pictures_of_form(form: FormData, limits: Limits) -> list[Picture]:
    files = form.getlist("files")
    if (
        not files
        or not all(isinstance(file, UploadFile) for file in files)
        or not (set(form) <= {"files", "views"})
    ):
        raise ProblemError(
            "bad-request",
            "A form has files, all called `files`, and at most one field, `views`: "
            "curl -F files=@a.jpg -F files=@b.jpg URL",
        )
    views = _views_of_form(form, len(files))
    pictures = [
        Picture(_content(cast(UploadFile, file)), view)
        for file, view in zip(files, views, strict=True)
    ]
    largest = max(len(picture.data) for picture in pictures)
    if largest > limits.max_body_bytes:
        raise _file_too_large(limits, largest)
    return pictures


def _views_of_form(form: FormData, num_files: int) -> list[View | None]:
    text = form.get("views")
    if text is None:
        return [None] * num_files
    try:
        values = from_json(str(text), allow_inf_nan=False)
        views = [_as_view(value) for value in values]
    except (ValueError, TypeError):
        views = []
    if len(views) != num_files:
        raise ProblemError(
            "bad-request",
            "`views` is a JSON list as long as there are files, of views and nulls: "
            "[[0, 32, 224, 224], null]",
        )
    return views


def _content(file: UploadFile) -> bytes:
    return file.file.read()


def _file_too_large(limits: Limits, num_bytes: int) -> ProblemError:
    return ProblemError(
        "body-too-large",
        f"A picture has at most {limits.max_body_bytes:,} bytes. Send a smaller file.",
        limit=limits.max_body_bytes,
        actual=num_bytes,
    )


def too_many(most: int, actual: int | None = None) -> ProblemError:
    """Return the refusal of more pictures than one request may have."""
    return ProblemError(
        "batch-too-large",
        f"A request of this path has at most {most} pictures. Send the others in another one.",
        limit=most,
        actual=actual,
    )
