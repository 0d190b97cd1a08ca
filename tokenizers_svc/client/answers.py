"""What the service's answers mean: checked, and as numpy arrays.

Nothing is believed because it came with status 200: a proxy, another server or a broken disk may
have written it. What is not as the service promises is a `BadAnswerError`.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from cache_builder.errors import PatchCacheError
from cache_builder.formats.views import View
from tokenizers_svc.client.errors import BadAnswerError, ProblemError

MSGPACK: Final = "application/vnd.msgpack"
NPY: Final = "application/x-npy"
# msgpack carries ids as bytes; JSON is what a proxy or an older service may answer all the same.
TOKENS: Final = f"{MSGPACK}, application/json;q=0.5"

_ID_TYPE: Final = np.dtype("<u2")
_PROBABILITY_TYPE: Final = np.dtype("<f2")
# What reading a body that may hold anything can raise; a ValidationError is a ValueError.
_BROKEN: Final = (
    LookupError, TypeError, ValueError, AttributeError, EOFError, OSError, OverflowError,
    RecursionError, msgpack.UnpackException,
)  # fmt: skip
_SHOWN_CHARACTERS = 200
_TIMING: Final = re.compile(r"(\w+);dur=(\d+(?:\.\d+)?)")


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """The nearest centroids of every patch, nearest first."""

    ids: NDArray[np.uint16]  # (rows, cols, k)
    probabilities: NDArray[np.float16]  # (rows, cols, k)


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids of one view of one picture."""

    ids: NDArray[np.uint16]  # (rows, cols), or (rows, cols, M) of a residual codebook
    fingerprint: str
    model: str
    view: View | None = None  # the box that was used
    soft: SoftTokens | None = None
    timings: dict[str, float] = field(default_factory=dict)  # seconds in each stage of the service


@dataclass(frozen=True, eq=False)
class Item:
    """What became of one picture of many."""

    index: int  # its place among the pictures that were given
    result: Tokens | PatchCacheError

    @property
    def error(self) -> PatchCacheError | None:
        """Why there are no tokens, if there are none."""
        return None if isinstance(self.result, Tokens) else self.result

    @property
    def tokens(self) -> Tokens:
        """The tokens.

        Raises:
            PatchCacheError: There are none, for this reason.
        """
        if isinstance(self.result, Tokens):
            return self.result
        raise self.result


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A view as its token ids describe it."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    psnr_db: float  # against the resized view
    fingerprint: str


class ServiceLimits(BaseModel, frozen=True, extra="ignore"):
    """What one request may hold; a service that does not say is asked for one picture at a time."""

    max_queue: int = Field(1, ge=1)
    max_items: int = Field(1, ge=1)
    max_batch_body_bytes: int = Field(20_000_000, ge=1)


class ModelInfo(BaseModel, frozen=True, extra="ignore"):
    """One tokenizer of the service; a newer service may tell more."""

    id: str
    fingerprint: str
    vocab_size: int
    num_stages: int
    grid: tuple[int, int]
    image_size: int
    patch_size: int
    extractor: str
    limits: ServiceLimits


def read_models(answer: httpx.Response) -> list[ModelInfo]:
    """Return the tokenizers that an answer lists, at least one."""
    with _promised(answer):
        models = [ModelInfo.model_validate(fields) for fields in _fields(answer)["models"]]
        _check(bool(models), "no models")
        return models


def read_tokens(answer: httpx.Response) -> Tokens:
    """Return the tokens that an answer holds."""
    with _promised(answer):
        return _tokens(_fields(answer), _timings(answer))


def read_batch(answer: httpx.Response, num_pictures: int) -> list[Tokens | ProblemError]:
    """Return what became of every picture of a batch, in order."""
    with _promised(answer):
        fields, timings = _fields(answer), _timings(answer)
        items = fields["items"]
        indices = [item["index"] for item in items]
        _check(indices == list(range(num_pictures)), f"items {indices} of {num_pictures}")
        return [
            _problem(item["error"]) if item.get("error") else _tokens(fields | item, timings)
            for item in items
        ]


def read_array(answer: httpx.Response) -> NDArray[Any]:
    """Return the array of an answer in the .npy format."""
    with _promised(answer):
        array: NDArray[Any] = np.load(io.BytesIO(answer.content), allow_pickle=False)
        _check(isinstance(array, np.ndarray), "an archive of numpy")
        return array


def read_pixels(answer: httpx.Response) -> NDArray[np.uint8]:
    """Return one picture (S, S, 3), or several (B, S, S, 3)."""
    array = read_array(answer)
    with _promised(answer):
        is_picture = array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-1] == 3
        _check(is_picture, f"{array.shape} of {array.dtype}")
    return array


def read_reconstruction(answer: httpx.Response) -> Reconstruction:
    """Return a picture and what its headers say."""
    pixels = read_pixels(answer)
    with _promised(answer):
        psnr_db = float(answer.headers["X-PSNR"])
        return Reconstruction(pixels, psnr_db, answer.headers["X-Tokenizer-Fingerprint"])


def problem_of(answer: httpx.Response) -> ProblemError:
    """Return why a request was refused, whoever did."""
    request_id = answer.headers.get("X-Request-Id")
    try:
        return _problem(answer.json(), request_id)
    except (KeyError, TypeError, ValueError, RecursionError):
        shown = " ".join(answer.text.split())[:_SHOWN_CHARACTERS]
    return ProblemError(
        f"http-{answer.status_code}",
        answer.status_code,
        f"{_url(answer)} answers with HTTP {answer.status_code} and not as the service does: "
        f"{shown!r}. See that the URL is that of the service.",
        request_id=request_id,
    )


def _problem(fields: dict[str, Any], request_id: str | None = None) -> ProblemError:
    return ProblemError(
        str(fields["code"]),
        int(fields["status"]),
        str(fields["detail"]),
        limit=fields.get("limit"),
        actual=fields.get("actual"),
        request_id=request_id,
    )


def _tokens(fields: dict[str, Any], timings: dict[str, float]) -> Tokens:
    shape, view, soft = fields["shape"], fields.get("view"), fields.get("soft")
    _check(len(shape) in (2, 3) and min(shape) > 0, f"shape {shape}")
    soft_tokens = None
    if soft:
        soft_shape = [*shape[:2], soft["k"]]
        soft_tokens = SoftTokens(
            _array(soft["ids"], _ID_TYPE, soft_shape),
            _array(soft["probabilities"], _PROBABILITY_TYPE, soft_shape),
        )
    return Tokens(
        _array(fields["token_ids"], _ID_TYPE, shape),
        str(fields["fingerprint"]),
        str(fields["model"]),
        None if view is None else _view(view),
        soft_tokens,
        timings,
    )


def _view(numbers: list[int]) -> View:
    top, left, height, width = map(int, numbers[:4])
    return View(top, left, height, width, any(numbers[4:]))


def _array(values: list[float] | bytes, dtype: np.dtype[Any], shape: list[int]) -> NDArray[Any]:
    """Return values, listed or as little-endian bytes, in the machine's byte order."""
    flat = np.frombuffer(values, dtype) if isinstance(values, bytes) else np.array(values, dtype)
    return flat.reshape(shape).astype(dtype.newbyteorder("="))


def _fields(answer: httpx.Response) -> dict[str, Any]:
    """Return the fields of an answer in msgpack or JSON."""
    if answer.headers.get("Content-Type", "").startswith(MSGPACK):
        fields = msgpack.unpackb(answer.content)
    else:
        fields = answer.json()
    _check(isinstance(fields, dict), f"a {type(fields).__name__} in place of named fields")
    return dict(fields)


def _timings(answer: httpx.Response) -> dict[str, float]:
    """Return the seconds of every stage that Server-Timing names."""
    found = _TIMING.findall(answer.headers.get("Server-Timing", ""))
    return {stage: float(milliseconds) / 1000 for stage, milliseconds in found}


@contextlib.contextmanager
def _promised(answer: httpx.Response) -> Iterator[None]:
    """Turn whatever an answer makes go wrong into a `BadAnswerError`."""
    try:
        yield
    except _BROKEN as exc:
        reason = f"it lacks {exc}" if isinstance(exc, KeyError) else str(exc) or type(exc).__name__
        raise BadAnswerError(
            f"The answer of {_url(answer)} is not what the service promises: {reason}. "
            "See that the URL is that of the service, and its version that of this client."
        ) from exc


def _check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


def _url(answer: httpx.Response) -> str:
    return str(answer.request.url.copy_with(query=None))
