"""The JSON answers of the service, as OpenAPI shows them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from cache_builder.formats.codebook_header import Metric
from cache_builder.formats.views import Interpolation
from tokenizers_svc.limits import Limits

Box = Annotated[
    list[int | bool],
    Field(
        min_length=5,
        max_length=5,
        description="[top, left, height, width, mirrored] in pixels of the upright picture",
    ),
]


class ImageInfo(BaseModel, frozen=True):
    """What a picture turned out to be."""

    width: int = Field(description="of the upright picture, pixels")
    height: int = Field(description="of the upright picture, pixels")
    format: str = Field(description="JPEG, PNG, WEBP, GIF, BMP or TIFF")


class SoftAnswer(BaseModel, frozen=True):
    """The nearest centroids of every patch and their probabilities, as `build` stores them."""

    k: int = Field(description="centroids per patch")
    ids: list[int] = Field(description="patch by patch, nearest first")
    probabilities: list[float] = Field(
        description="softmax(-d^2 / (T s)) over the k, rounded to float16"
    )


class TokenizeAnswer(BaseModel, frozen=True):
    """The token ids of one view of one picture."""

    model: str = Field(description="name of the codebook")
    fingerprint: str = Field(description="identity of the tokenizer, SHA-256 in hexadecimal")
    shape: list[int] = Field(
        description="[rows, cols], or [rows, cols, stages] of a residual codebook"
    )
    dtype: Literal["uint16"] = Field("uint16", description="the type that holds every id")
    token_ids: list[int] = Field(description="ids of all patches, flat, row-major")
    view: Box
    image: ImageInfo
    soft: SoftAnswer | None = Field(None, description="only where it is asked for")


class BatchItem(BaseModel, frozen=True):
    """One picture of several: its token ids, or why there are none."""

    index: int = Field(description="place in the request, from 0")
    token_ids: list[int] | None = Field(None, description="flat, row-major")
    view: Box | None = None
    image: ImageInfo | None = None
    error: "Problem | None" = Field(None, description="in the place of the others")


class BatchAnswer(BaseModel, frozen=True):
    """The token ids of several pictures, in the order in which they were sent."""

    model: str = Field(description="name of the codebook")
    fingerprint: str = Field(description="identity of the tokenizer, SHA-256 in hexadecimal")
    shape: list[int] = Field(description="of one picture's ids")
    dtype: Literal["uint16"] = Field("uint16", description="the type that holds every id")
    items: list[BatchItem]


class Health(BaseModel, frozen=True):
    """The answer of a probe that succeeds."""

    status: Literal["alive", "ready"]


class ModelInfo(BaseModel, frozen=True):
    """One tokenizer, and what may be asked of it."""

    id: str = Field(description="name: as it was given, or that of the file without its suffix")
    fingerprint: str = Field(description="identity of the tokenizer, SHA-256 in hexadecimal")
    vocab_size: int = Field(description="K: ids lie in [0, K)")
    num_stages: int = Field(description="ids per patch")
    grid: tuple[int, int] = Field(description="rows and columns of patches")
    image_size: int = Field(description="side that a view is resized to, pixels")
    patch_size: int = Field(description="side of a patch of the resized view, pixels")
    interpolation: Interpolation
    metric: Metric
    extractor: str = Field(description="which patch features are quantised")
    dtype: str = Field(description="of the centroids")
    digest: str = Field(description="of the centroids, SHA-256 in hexadecimal")
    decodes_to_pixels: bool = Field(description="whether ids can be turned back into a picture")
    device: str = Field(description="where the tokenizer runs")
    limits: Limits


class ModelList(BaseModel, frozen=True):
    """The tokenizers of this service."""

    models: list[ModelInfo]


class ReloadAnswer(BaseModel, frozen=True):
    """A model that was loaded again."""

    model: str
    fingerprint: str = Field(description="of the tokenizer that answers now")
    previous_fingerprint: str = Field(description="of the one that answered before")
    seconds: float = Field(description="that loading and warming up took")


class FieldError(BaseModel, frozen=True):
    """One thing that is wrong with a body."""

    pointer: str = Field(description="where in the body, RFC 6901")
    message: str


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
    errors: list[FieldError] | None = Field(None, description="which parts of the body are wrong")


class Version(BaseModel, frozen=True):
    """Which program answers."""

    patchcache: str
    python: str
    torch: str
