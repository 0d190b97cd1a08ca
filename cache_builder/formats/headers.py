"""What every JSON header of ours has in common: a format version, and how damage is told.

A version is looked at before anything else is, so that a file of a newer patchcache is called that
and not damaged.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from cache_builder.errors import ArtifactError, FormatVersionError, one_line

_NAME = re.compile(r"[A-Za-z0-9_.-][A-Za-z0-9_./-]{0,500}")
_MAX_SHOWN = 200  # characters of what a damaged file says


def check_format_version(text: str | bytes, newest: int, place: str, *, way_out: str) -> None:
    """Refuse JSON whose `format_version` is missing or newer than `newest`.

    Args:
        text: The JSON.
        newest: Format version that can be read.
        place: Where it lies, for the message.
        way_out: What to do about a damaged one.

    Raises:
        FormatVersionError: It is newer.
        ArtifactError: There is none, or the text is not a JSON object.
    """
    try:
        version = VersionOnly.model_validate_json(text).format_version
    except ValidationError as exc:
        raise ArtifactError(f"{place} is damaged: {first_problem(exc)}. {way_out}") from exc
    if version > newest:
        raise FormatVersionError(
            f"{place} has format version {version}; this patchcache reads up to {newest}. "
            "Upgrade patchcache: pip install -U patchcache"
        )


def first_problem(exc: ValidationError) -> str:
    """Return the first thing that a model complained of, in one line with its place."""
    error = exc.errors()[0]
    where = ".".join(shorten(str(part)) for part in error["loc"])
    what = error["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def shorten(text: str, most: int = _MAX_SHOWN) -> str:
    """Return what a file says, at most `most` characters, as a part of one readable line."""
    return one_line(text if len(text) <= most else f"{text[: most - 3]}...")


def _check_name(path: str) -> str:
    if not _NAME.fullmatch(path) or ".." in path:
        raise ValueError(f"{shorten(path)} is no name of a file of a cache")
    return path


FileName = Annotated[str, AfterValidator(_check_name)]  # of a file that lies below its cache


class VersionOnly(BaseModel, frozen=True):
    """The one field that every version of every header has."""

    format_version: int = Field(ge=1)
