"""One sample of a cache, as every layout stores it and every reader returns it."""

import functools
import io
import tokenize
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats.payloads import restore_features
from cache_builder.stores import RandomReader

# What numpy raises of a damaged header: it is parsed as Python, and its type as a type of numpy.
BAD_NPY_HEADER = (
    SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError, OverflowError,
    AttributeError, LookupError,
)  # fmt: skip


class CachedSample(NamedTuple):
    """An image and its targets."""

    key: str
    image: bytes | None  # the encoded image; None in a cache built with --images-in-cache none
    label: int | None
    views: NDArray[np.int32]  # (V, 5): top, left, height, width, hflip
    token_ids: NDArray[np.uint16]  # (V, rows, cols), or (V, rows, cols, M) with M > 1 stages
    # Optional payloads, see `payloads`; None where a cache has none or the reader left it out.
    soft_ids: NDArray[np.uint16] | None = None  # (V, rows, cols, k), nearest first
    soft_probs: NDArray[np.float16] | None = None  # (V, rows, cols, k)
    features: NDArray[Any] | None = None  # (V, rows, cols, D) float16 or int8
    feature_scales: NDArray[np.float32] | None = None  # (V, rows, cols), of int8 features
    extra: Mapping[str, JsonValue] = {}  # further columns of the source; the default is shared

    def float_features(self) -> NDArray[np.float32]:
        """Return the stored features as float32, (V, rows, cols, D).

        Raises:
            ConfigError: They are not there.
        """
        if self.features is None:
            raise ConfigError(
                f"Sample {self.key} was read without features. Build the cache with "
                "`--store-features float16` or `int8`, and read the payload `features`."
            )
        return restore_features(self.features, self.feature_scales)


class SampleInfo(NamedTuple):
    """What only a person or a check asks of a cached sample."""

    source: str  # path within the source
    image_size: tuple[int, int]  # (height, width) of the decoded picture


class NewSample(NamedTuple):
    """A sample on its way into a cache: what is read back, and what only a person asks for."""

    sample: CachedSample
    image_extension: str  # of the embedded image: jpg, png, ...; empty when there is none
    source: str
    image_size: tuple[int, int]  # (height, width) of the decoded picture


def read_sample(
    file: RandomReader, start: int, stop: int, key: str, where: str, location: str
) -> bytes:
    """Return a part of a file of many samples.

    Args:
        file: The file.
        start: First byte.
        stop: Behind the last byte.
        key: Of the sample that lies there, for the message.
        where: The file lies, for the message.
        location: Of its cache.

    Raises:
        ArtifactError: The file ends before.
    """
    data = file.read(start, stop - start)
    if len(data) < stop - start:
        raise ArtifactError(
            f"{where} ends before sample {key}. Run `patchcache verify {location}`."
        )
    return data


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Return `array` as the content of a .npy file."""
    return _npy_header(array.shape, array.dtype) + array.tobytes()


@functools.lru_cache(maxsize=64)
def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    # It takes numpy longer than the array itself, and is the same for every sample.
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def from_npy(data: bytes, what: str) -> NDArray[Any]:
    """Read a .npy member, in rows and columns as it was written; `what` names it in the error.

    Raises:
        ArtifactError: It is not a .npy file, or it has more or fewer values than it says.
    """
    try:
        # Headers are written in one piece, and are the same for every sample.
        start = 10 + int.from_bytes(data[8:10], "little")
        shape, dtype = _parse_npy_header(data[:start])
        values = np.frombuffer(data, dtype, offset=start)
        return values.reshape(shape).copy()
    except ValueError as exc:
        raise ArtifactError(
            f"{what} is damaged ({exc}). Run `patchcache verify` to see what else is."
        ) from exc


@functools.lru_cache(maxsize=64)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of the values behind a header of a .npy file.

    Raises:
        ValueError: It is none, or one of values that cannot be taken as they lie there.
    """
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of the .npy format, not (1, 0)")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    except BAD_NPY_HEADER as exc:
        raise ValueError(f"its header cannot be read: {type(exc).__name__}") from exc
    if by_columns or dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} {shape}, in columns: {by_columns}, is no array of plain values")
    return shape, dtype
