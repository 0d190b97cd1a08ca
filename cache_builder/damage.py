"""What `verify` finds: a damage names one file, or the content of one unit, and what is wrong.

Every JSON file of a cache is canonical, so that one wrong byte is seen even where the text can
still be read. A digest that differs from another in a few of its 64 digits was itself damaged: of
a changed file nearly all of them differ.
"""

from collections.abc import Iterator
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel

from cache_builder import files
from cache_builder.errors import ArtifactError, FormatVersionError, one_line
from cache_builder.formats.manifest import FileDigest, read_model, to_json
from cache_builder.stores import Measure, Store

DamageKind = Literal[
    "missing",  # a file is not there
    "cut",  # a file is shorter or longer than it was
    "changed",  # a file has other bytes than it had
    "unreadable",  # a file is not what its name says
    "contradicts",  # two files say two things, and nothing tells which is right
    "content",  # a unit has its bytes, and they are wrong
    "tokens",  # tokenised again, images give other tokens
]

_MAX_OTHER_DIGITS = 8
_ModelT = TypeVar("_ModelT", bound=BaseModel)


class Damage(NamedTuple):
    """One thing that is wrong with a cache."""

    kind: DamageKind
    detail: str  # for people
    file: str = ""  # name relative to the cache
    unit: int | None = None
    layer: str = ""  # of the cache; empty is the cache itself

    def line(self) -> str:
        """Return it as one line."""
        place = [f"layer {self.layer}"] if self.layer else []
        place += [] if self.unit is None else [f"unit {self.unit}"]
        return one_line(f"{', '.join(place)}: {self.detail}" if place else self.detail)


class Examined(NamedTuple, Generic[_ModelT]):
    """A JSON file, as far as it can be read."""

    text: bytes  # empty if it is missing
    model: _ModelT | None  # None if it is missing or damaged
    kind: DamageKind | None  # None if nothing is wrong
    detail: str
    is_newer: bool = False  # than this patchcache, or so it says


def examine(model: type[_ModelT], store: Store, name: str) -> Examined[_ModelT]:
    """Read a JSON file that may be damaged."""
    try:
        text = store.read(name)
    except FileNotFoundError:
        return Examined(b"", None, "missing", f"{store.where(name)} is missing")
    try:
        found = read_model(model, store, name)
    except FormatVersionError as exc:
        return Examined(text, None, "unreadable", str(exc), is_newer=True)
    except ArtifactError as exc:
        return Examined(text, None, "unreadable", str(exc))
    if to_json(found) != text:
        detail = f"{store.where(name)} is not the JSON that patchcache writes"
        return Examined(text, None, "changed", detail)
    return Examined(text, found, None, "")


def measure(store: Store, name: str) -> Measure | None:
    """Measure a file; None if there is none."""
    try:
        return store.measure(name)
    except FileNotFoundError:
        return None


def is_whole(found: Measure | None, expected: FileDigest) -> bool:
    """Say whether a file is what a digest says."""
    return found is not None and (found.bytes, found.sha256) == (expected.bytes, expected.sha256)


def file_damage(
    store: Store,
    layer: str,
    found: Measure | None,
    expected: FileDigest,
    unit: int | None = None,
) -> Damage | None:
    """Return what is wrong with a file, or None."""
    where, name = store.where(expected.path), full_name(layer, expected.path)
    if found is None:
        return Damage("missing", f"{where} is missing", name, unit, layer)
    if found.bytes != expected.bytes:
        detail = f"{where} has {found.bytes:,} bytes, expected {expected.bytes:,}"
        return Damage("cut", detail, name, unit, layer)
    if found.sha256 != expected.sha256:
        detail = f"{where} has SHA-256 {found.sha256}, expected {expected.sha256}"
        return Damage("changed", detail, name, unit, layer)
    return None


def is_misspelt(digest: str, other: str) -> bool:
    """Say whether two different digests were one before a few digits were damaged."""
    if digest == other or len(digest) != len(other):
        return False
    different = sum(a != b for a, b in zip(digest, other, strict=True))
    return different <= _MAX_OTHER_DIGITS


def full_name(layer: str, name: str) -> str:
    """Return the name relative to the cache of a file of a layer."""
    return f"{layer}/{name}" if layer else name


def model_differences(old: BaseModel, new: BaseModel) -> Iterator[str]:
    """Say in which fields two models differ, and how."""
    return _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}.{number}".lstrip("."))
    elif old != new:
        yield f"{path} is {_short(old)}, not {_short(new)}"


def _short(value: Any) -> str:
    text = files.canonical_json(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
