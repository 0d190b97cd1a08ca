"""What OpenAPI says of bodies and answers, with an example of each.

The schemas of JSON bodies are those that check them. Msgpack has the same fields.
"""

from typing import Any, Final

from pydantic import BaseModel

from tokenizers_svc.bodies import BatchBody, PictureBody
from tokenizers_svc.forms import JSON, MSGPACK, NPY, RAW

_PNG: Final = (  # 2 x 2 pixels, red
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGM8ISfHwMDAxMDAwMDAAAANBAEIfXHKZgAAAABJRU5ErkJggg=="
)
_FINGERPRINT: Final = "3f1c0b7d2a6e48f9b05c91d7e2aa64138c0d5e9f7b1a24c6830f9d5be17a6c42"
_FILE: Final = {"type": "string", "format": "binary"}

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
                "schema": PictureBody.model_json_schema(),
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
                "schema": BatchBody.model_json_schema(),
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


def tokens_answer(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of an answer in all four forms."""
    return {
        "model": model,
        "description": "JSON, or what Accept asks for: a NumPy file, the bare values "
        "(little-endian uint16, row-major), or msgpack with the fields of the JSON and ids as "
        "bytes",
        "content": {JSON: {"example": example}, NPY: BINARY, RAW: BINARY, MSGPACK: BINARY},
    }
