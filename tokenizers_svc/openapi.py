"""What OpenAPI says of bodies and answers, with an example of each.

The schemas of JSON bodies are those that check them. Msgpack has the same fields.
"""

from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tokenizers_svc.bodies import BatchBody, PictureBody
from tokenizers_svc.forms import JSON, MSGPACK, NPY, RAW
from tokenizers_svc.schemas import Problem

_PNG: Final = (  # 2 x 2 pixels, red
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGM8ISfHwMDAxMDAwMDAAAANBAEIfXHKZgAAAABJRU5ErkJggg=="
)
_REFS: Final = "#/components/schemas/{model}"
_FINGERPRINT: Final = "3f1c0b7d2a6e48f9b05c91d7e2aa64138c0d5e9f7b1a24c6830f9d5be17a6c42"
_FILE: Final = {"type": "string", "format": "binary"}


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REFS.format(model=model.__name__)}


BINARY: Final[dict[str, Any]] = {"schema": _FILE}

_HEAD: Final = {
    "model": "imagenet-k8192", "fingerprint": _FINGERPRINT, "shape": [2, 2], "dtype": "uint16",
}  # fmt: skip
_PICTURE: Final = {
    "token_ids": [17, 4093, 4093, 8120],
    "view": [0, 32, 224, 224, False],
    "image": {"width": 288, "height": 224, "format": "JPEG"},
}
TOKENS_EXAMPLE: Final = {**_HEAD, **_PICTURE}
BATCH_EXAMPLE: Final = {
    **_HEAD,
    "items": [
        {"index": 0, **_PICTURE},
        {
            "index": 1,
            "error": {
                "type": "urn:patchcache:problem:not-an-image",
                "title": "The body is not a picture of a known format",
                "status": 415,
                "detail": "The picture is refused: not an image of a known format (JPEG, PNG, "
                "WebP, GIF, BMP, TIFF).",
                "code": "not-an-image",
                "instance": "urn:request:7d0c3a9e5b1f4a6c8e2d",
            },
        },
    ],
}

PICTURE_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "one JPEG, PNG, WebP, GIF, BMP or TIFF file: its bytes as they are under "
        "any content type but the others, or in a form, in JSON or in msgpack",
        "content": {
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": _FILE, "view": {"type": "string"}},
                    "required": ["file"],
                    "additionalProperties": False,
                }
            },
            JSON: {
                "schema": _ref(PictureBody),
                "example": {"image": {"b64": _PNG}, "view": [0, 0, 2, 2]},
            },
            MSGPACK: BINARY,
        },
    }
}

BATCH_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "image files in a form, in JSON or in msgpack",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {"type": "array", "items": _FILE, "minItems": 1},
                        "views": {
                            "type": "string",
                            "description": "JSON: a list of views and nulls, as long as `files`",
                        },
                    },
                    "required": ["files"],
                    "additionalProperties": False,
                }
            },
            JSON: {
                "schema": _ref(BatchBody),
                "example": {
                    "items": [
                        {"image": {"b64": _PNG}},
                        {"image": {"b64": f"data:image/png;base64,{_PNG}"}, "view": [0, 0, 1, 1]},
                    ]
                },
            },
            MSGPACK: BINARY,
        },
    }
}


TOKENS_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "token ids of one picture, flat or nested as the model's shape is, or a "
        "list of several; as npy or as bare little-endian uint16 too",
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "properties": {"token_ids": {"type": "array", "minItems": 1}},
                    "required": ["token_ids"],
                    "additionalProperties": False,
                },
                "example": {"token_ids": [17, 4093, 4093, 8120]},
            },
            NPY: BINARY,
            RAW: BINARY,
            MSGPACK: BINARY,
        },
    }
}
NOT_MODIFIED: Final = {"description": "The client has this already"}


def file_answer(media_type: str) -> dict[str, Any]:
    """Return the entry of an answer that is a file."""
    return {"description": "the file, or the range that was asked for", "content": {
        media_type: BINARY,
    }}  # fmt: skip


def tokens_answer(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of an answer in all four forms."""
    return {
        "model": model,
        "description": "JSON, or what Accept asks for: a NumPy file, the bare values "
        "(little-endian uint16, row-major), or msgpack with the fields of the JSON and ids as "
        "bytes",
        "content": {JSON: {"example": example}, NPY: BINARY, RAW: BINARY, MSGPACK: BINARY},
    }


def complete(app: FastAPI) -> None:
    """Let the application describe itself with the schemas of bodies, which FastAPI never sees.

    FastAPI's own 422 is left out: a bad query is a 400 here.
    """
    describe = app.openapi
    _, definitions = models_json_schema(
        [(model, "validation") for model in (PictureBody, BatchBody, Problem)], ref_template=_REFS
    )

    def described() -> dict[str, Any]:
        document = describe()
        schemas = document["components"]["schemas"]
        if "HTTPValidationError" not in schemas:
            return document  # that of the first call
        del schemas["HTTPValidationError"], schemas["ValidationError"]
        schemas.update(definitions["$defs"])
        for operations in document["paths"].values():
            for operation in operations.values():
                refusal = operation["responses"].get("422", {}).get("content", {})
                if JSON in refusal:
                    del operation["responses"]["422"]
        return document

    app.openapi = described  # type: ignore[method-assign]
