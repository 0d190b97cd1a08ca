"""The JSON answers of the service, as OpenAPI shows them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cache_builder.formats.codebook import Metric
from cache_builder.formats.views import Interpolation
from tokenizers_svc.limits import Limits


class TokenizeAnswer(BaseModel):
    """The token ids of one view of one picture."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "example": {
                "model": "imagenet-k8192",
                "fingerprint": "3f1c0b7d2a6e48f9b05c91d7e2aa64138c0d5e9f7b1a24c6830f9d5be17a6c42",
                "shape": [2, 2],
                "dtype": "uint16",
                "token_ids": [17, 4093, 4093, 8120],
            }
        },
    )

    model: str = Field(description="name of the codebook: its file name without the suffix")
    fingerprint: str = Field(description="identity of the tokenizer, SHA-256 in hexadecimal")
    shape: list[int] = Field(
        description="[rows, cols], or [rows, cols, stages] of a residual codebook"
    )
    dtype: Literal["uint16"] = Field("uint16", description="the type that holds every id")
    token_ids: list[int] = Field(description="ids of all patches, flat, row-major")


class Health(BaseModel, frozen=True):
    """The answer of a probe that succeeds."""

    status: Literal["alive", "ready"]


class ModelInfo(BaseModel, frozen=True):
    """One tokenizer, and what may be asked of it."""

    id: str = Field(description="name of the codebook: its file name without the suffix")
    fingerprint: str = Field(description="identity of the tokenizer, SHA-256 in hexadecimal")
    vocab_size: int = Field(description="K: ids lie in [0, K)")
    num_stages: int = Field(description="ids per patch")
    grid: tuple[int, int] = Field(description="rows and columns of patches")
    image_size: int = Field(description="side that a view is resized to, pixels")
    patch_size: int = Field(description="side of a patch of the resized view, pixels")
    interpolation: Interpolation
    metric: Metric
    extractor: str = Field(description="which patch features are quantised")
    limits: Limits


class ModelList(BaseModel, frozen=True):
    """The tokenizers of this service."""

    models: list[ModelInfo]


class Problem(BaseModel, frozen=True):
    """Why a request was refused: RFC 9457, `application/problem+json`."""

    type: str = Field(description="URN of the kind of problem; `code` is its last part")
    title: str
    status: int
    detail: str = Field(description="what is wrong and what to do")
    code: str
    instance: str = Field(description="`urn:request:` and the X-Request-Id")
    limit: float | int | None = Field(None, description="the limit that was passed")
    actual: float | int | None = Field(None, description="the value that passed it, if known")
