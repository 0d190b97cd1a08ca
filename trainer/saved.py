"""Files that the trainer saves with torch: written whole or not at all, read without trust.

A file is a zip whose members have checksums, which torch does not look at; here they are verified
first. Nothing in it is executed (`weights_only`). Sizes that it promises cost nothing before they
are there: torch takes storages from members, whose sizes the zip has proved.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.headers import check_format_version, first_problem, shorten

# What zipfile and torch raise of damaged files, and of forged ones: the pickle of a file may be
# anything, and weights_only interprets it in Python.
_UNREADABLE = (
    OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError,
    ArithmeticError, AssertionError, ImportError, MemoryError, struct.error, pickle.UnpicklingError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


HeaderT = TypeVar("HeaderT", bound=BaseModel)


class Saved(NamedTuple):
    """What a file holds."""

    path: Path
    way_out: str  # what to do about a damaged one
    header: str  # JSON
    parts: dict[str, Any]  # dictionaries of tensors and plain values, or None

    def parse_header(self, kind: type[HeaderT]) -> HeaderT:
        """Return the header.

        Raises:
            ArtifactError: It is none of that kind.
        """
        try:
            return kind.model_validate_json(self.header)
        except ValidationError as exc:
            raise _damaged(self.path, first_problem(exc), self.way_out) from exc

    def require(self, *names: str) -> None:
        """Refuse a file without some of its parts.

        Raises:
            ArtifactError: One is missing, or any is no dictionary.
        """
        wrong = [name for name in names if self.parts.get(name) is None]
        wrong += [name for name, part in self.parts.items() if not isinstance(part, dict | None)]
        if wrong:
            raise _damaged(self.path, shorten(f"it has no {wrong[0]!r}"), self.way_out)


def write_saved(path: Path, header: BaseModel, parts: Mapping[str, Any]) -> None:
    """Write a file of a header and further parts; it is there when all of it is.

    Raises:
        OSError: It cannot be written: the disk is full, say.
    """
    content = {"header": files.canonical_json(header.model_dump(mode="json")).decode(), **parts}
    with files.publishing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as exc:
            # After a write that failed, torch tells that its zip cannot be ended.
            if isinstance(exc.__context__, OSError):
                raise exc.__context__ from None
            raise


def read_saved(path: Path, newest: int, *, way_out: str, content: bytes | None = None) -> Saved:
    """Read a file of a header and further parts.

    Args:
        path: Of the file.
        newest: Format version that can be read.
        way_out: What to do about a damaged one.
        content: Of the file, where another host has it.

    Raises:
        FormatVersionError: It was written by a newer version.
        ArtifactError: It is damaged, or no such file.
    """

    def file() -> Path | io.BytesIO:
        return path if content is None else io.BytesIO(content)

    try:
        with zipfile.ZipFile(file()) as archive:
            # A member that inflates could promise anything; torch stores them as they are.
            packed = [info for info in archive.infolist() if info.compress_type]
            damaged = packed[0].filename if packed else archive.testzip()
        if damaged is not None:
            raise _damaged(path, shorten(f"member {damaged} is damaged"), way_out)
        parts = torch.load(file(), map_location="cpu", weights_only=True)
    except _UNREADABLE as exc:
        # The first sentence: torch adds advice of its own, and the stack of its C++.
        line = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        reason = line.partition(". ")[0].rstrip(".")
        raise _damaged(path, shorten(reason), way_out) from exc
    if not isinstance(parts, dict) or not isinstance(parts.get("header"), str):
        raise _damaged(path, "it has no header", way_out)
    header = parts.pop("header")
    check_format_version(header, newest, str(path), way_out=way_out)
    return Saved(path, way_out, header, parts)


def _damaged(path: Path, reason: str, way_out: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged or not a checkpoint: {reason}. {way_out}")
