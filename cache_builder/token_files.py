"""Token ids that other tools wrote, found by key: nothing is ever matched by its order alone.

    a folder of .npy    one file per image, at the image's own path: the style of 4M's token saver
    one .npy            an array whose rows belong to a list of keys
    one .pth or .pt     a tensor likewise, as MaPeT's tokens are, or a dictionary of tensors by key

Nothing in these files is executed: .npy files are read without pickles, .pth files with
`weights_only`. Arrays are mapped into memory, so that a header that promises more than there is
costs nothing. What is wrong with the rows of one image is an `ImageError`, which the import records
as the reason for leaving that image out. A file of all images that cannot be read is a
`ConfigError`.
"""

import csv
import json
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import ConfigError, ImageError
from cache_builder.formats.keys import unescape_key
from cache_builder.formats.sample import BAD_NPY_HEADER
from cache_builder.formats.views import View
from cache_builder.sources.names import is_image

# What numpy raises of a damaged or hostile .npy file.
_BAD_NPY = (*BAD_NPY_HEADER, ValueError, OSError, EOFError)
# What torch raises of a damaged file, of bytes that are no pickle, and of tensors without a plain
# array.
_BAD_TORCH = (
    RuntimeError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError,
    ArithmeticError, AssertionError, ImportError, MemoryError, struct.error,
)  # fmt: skip
_TORCH_SUFFIXES = (".pth", ".pt")


class TokenRows(Protocol):
    """Arrays of integers, one for every image."""

    is_named: bool  # its own names are the keys
    num_rows: int | None  # None where they are not counted

    def read(self, key: str, row: int | None) -> NDArray[Any]:
        """Return what belongs to an image.

        Args:
            key: Of the image.
            row: Its place, where the rows have no names.

        Raises:
            ImageError: There is nothing, or it cannot be read.
        """


def open_rows(location: Path) -> TokenRows:
    """Open a folder of .npy files, or one .npy, .pth or .pt file.

    Raises:
        ConfigError: It is nothing of that kind, or cannot be read.
    """
    if location.is_dir():
        return _Folder(location)
    if not location.is_file():
        raise ConfigError(f"{location} is neither a folder nor a file.")
    if location.suffix == ".npy":
        try:
            return _Array(np.lib.format.open_memmap(location, mode="r"), location)
        except _BAD_NPY as exc:
            raise ConfigError(f"{location} cannot be read as a .npy file: {exc}.") from exc
    if location.suffix in _TORCH_SUFFIXES:
        return _open_torch(location)
    raise ConfigError(
        f"{location} is no folder, and its name does not end in .npy, .pth or .pt. Token ids are "
        "read from these."
    )


def read_keys(path: Path) -> list[str]:
    """Read a list of keys: lines of a .txt, the column `key` of a .csv, or a .json list of texts.

    A key may be the path of its image, with or without the extension.

    Raises:
        ConfigError: It is no such list, it is empty, or a key occurs twice.
    """
    try:
        # Spreadsheets put a byte order mark in front, which would belong to the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            keys = _READERS[path.suffix](file)
    except KeyError:
        raise ConfigError(
            f"--keys {path} is not a .txt with a key per line, a .csv with a column named `key` or "
            "a .json list."
        ) from None
    except (OSError, ValueError, RecursionError, csv.Error) as exc:
        raise ConfigError(f"--keys {path} cannot be read: {exc}.") from exc
    names = [_without_extension(key) for key in keys]
    if not names:
        raise ConfigError(f"--keys {path} is empty. It names the image of every row.")
    _refuse_twice(names, f"--keys {path}")
    return names


def names_of(key: str) -> tuple[str, str]:
    """Return how a list may name the image of a key: as the key is, and as its path is."""
    return key, unescape_key(key)


def as_token_ids(
    values: NDArray[Any], num_views: int, grid: tuple[int, int], vocab_size: int
) -> NDArray[np.uint16]:
    """Return token ids of one image, (V, rows, cols), of any array that can only mean that.

    Raises:
        ImageError: The shape is another, the type is no integer, or an id is not in [0, K).
    """
    rows, cols = grid
    _check_shape(values, "token ids", num_views, [(rows * cols,), (rows, cols)])
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= vocab_size:
        odd = lowest if lowest < 0 else highest
        raise ImageError(f"token id {odd} is not in [0, {vocab_size})")
    return values.reshape(num_views, rows, cols).astype(np.uint16)


def as_views(values: NDArray[Any], num_views: int, image_size: tuple[int, int]) -> list[View]:
    """Return the boxes of one image, of an array (V, 5): top, left, height, width, mirrored.

    Raises:
        ImageError: The shape is another, the type is no integer, or a box leaves the picture.
    """
    _check_shape(values, "crop settings", num_views, [(5,)])
    height, width = image_size
    boxes = []
    for top, left, rows, cols, mirrored in values.reshape(num_views, 5).tolist():
        is_box = min(top, left) >= 0 and min(rows, cols) >= 1 and mirrored in (0, 1)
        if not is_box or top + rows > height or left + cols > width:
            raise ImageError(
                f"crop settings {[top, left, rows, cols, mirrored]} are no box of a picture of "
                f"{height} x {width}"
            )
        boxes.append(View(top, left, rows, cols, bool(mirrored)))
    return boxes


def _check_shape(
    values: NDArray[Any], what: str, num_views: int, of_a_view: Sequence[tuple[int, ...]]
) -> None:
    shapes = [(num_views, *shape) for shape in of_a_view]
    if num_views == 1:
        shapes += of_a_view
    if values.shape not in shapes:
        raise ImageError(f"{what} have the shape {values.shape}, not {shapes[0]}")
    if values.dtype.kind not in "iu":
        raise ImageError(f"{what} are {values.dtype}, not integers")


class _Folder:
    """A .npy file for every image, under its path."""

    is_named: bool = True
    num_rows: int | None = None

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str, row: int | None) -> NDArray[Any]:
        del row
        paths = [self._root / f"{name}.npy" for name in names_of(key)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ImageError(f"{paths[-1]} is not there")
        try:
            return np.array(np.lib.format.open_memmap(path, mode="r"))
        except _BAD_NPY as exc:
            raise ImageError(f"{path} cannot be read as a .npy file: {exc}") from exc


class _Array:
    """Rows of one array."""

    is_named: bool = False

    def __init__(self, values: NDArray[Any], location: Path) -> None:
        if values.ndim < 2:
            raise ConfigError(f"{location} has the shape {values.shape}: it has no row per image.")
        self._values = values
        self.num_rows: int | None = len(values)

    def read(self, key: str, row: int | None) -> NDArray[Any]:
        if row is None:
            raise ImageError(f"no row is named {key}")
        return np.array(self._values[row])


class _Named:
    """Tensors by key."""

    is_named: bool = True

    def __init__(self, tensors: dict[str, Any], location: Path) -> None:
        _refuse_twice([_without_extension(name) for name in tensors], str(location))
        self._tensors = {_without_extension(name): tensor for name, tensor in tensors.items()}
        self.num_rows: int | None = len(tensors)

    def read(self, key: str, row: int | None) -> NDArray[Any]:
        del row
        for name in names_of(key):
            if name in self._tensors:
                return np.array(self._tensors[name])
        raise ImageError(f"no tensor is named {key}")


def _open_torch(location: Path) -> TokenRows:
    import torch

    try:
        try:
            content = torch.load(location, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before zip files cannot be mapped
            content = torch.load(location, map_location="cpu", weights_only=True)
        if isinstance(content, torch.Tensor):
            return _Array(content.numpy(), location)
        if content and isinstance(content, dict) and all(isinstance(name, str) for name in content):
            named = {name: tensor.numpy() for name, tensor in content.items()}
            return _Named(named, location)
    except pickle.UnpicklingError as exc:
        raise ConfigError(
            f"{location} holds more than tensors, and nothing else is loaded: it could run code. "
            "Save the token ids alone with torch.save(tensor, path)."
        ) from exc
    except _BAD_TORCH as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise ConfigError(f"{location} cannot be read as tensors: {reason[:300]}.") from exc
    raise ConfigError(
        f"{location} holds a {type(content).__name__}, not a tensor nor a dictionary of tensors by "
        "the keys of their images."
    )


def _without_extension(name: str) -> str:
    return name.rpartition(".")[0] if is_image(name) else name


def _refuse_twice(names: list[str], where: str) -> None:
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{where} names {twice!r} twice. Every row has one image.")


def _text_keys(file: Any) -> list[str]:
    return [line for line in file.read().splitlines() if line]


def _csv_keys(file: Any) -> list[str]:
    rows = csv.DictReader(file)
    if "key" not in (rows.fieldnames or ()):
        raise ValueError("it has no column named `key`")
    return [row["key"] or "" for row in rows]


def _json_keys(file: Any) -> list[str]:
    keys = json.load(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it is not a list of texts")
    return keys


_READERS: dict[str, Callable[[Any], list[str]]] = {
    ".txt": _text_keys,
    ".csv": _csv_keys,
    ".json": _json_keys,
}
