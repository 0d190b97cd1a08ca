"""What becomes one when caches are merged, and what must be one already.

Tokenizers, views and payloads must be equal: a sample means the same in every unit of a cache.
Classes are united by name. Keys must differ, because a key is what joins an image to its targets.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from cache_builder.arrangement import InputCache
from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats.manifest import CacheSpec, SourceInfo

_MAX_NAMED = 5


class UnitedClasses(NamedTuple):
    """The classes of several caches as one list."""

    names: tuple[str, ...]
    relabel: list[dict[int, int]]  # of every cache, the labels that change


def unite_classes(inputs: Sequence[InputCache]) -> UnitedClasses:
    """Unite class names; the classes of the first cache keep their labels, new ones follow.

    Raises:
        ConfigError: The lists differ, and one has a name twice or does not name every label.
    """
    lists = [cache.spec.class_names for cache in inputs]
    if all(names == lists[0] for names in lists):
        return UnitedClasses(lists[0], [{} for _ in inputs])
    for cache, names in zip(inputs, lists, strict=True):
        labels = (entry.row.label for entry in cache.rows() if entry.row.label is not None)
        nameless = next((label for label in labels if label >= len(names)), None)
        if nameless is not None:
            raise ConfigError(
                f"{cache.location} has no name for label {nameless}, and the class names of the "
                "caches differ: they cannot be united by name."
            )
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            both = " and ".join(str(label) for label, each in enumerate(names) if each == name)
            raise ConfigError(
                f"{cache.location} calls the classes {both} {name!r}, and the class names of the "
                "caches differ: they cannot be united by name."
            )
    united = {name: label for label, name in enumerate(dict.fromkeys(n for x in lists for n in x))}
    relabel = [
        {label: united[name] for label, name in enumerate(names) if united[name] != label}
        for names in lists
    ]
    return UnitedClasses(tuple(united), relabel)


def refuse_differences(inputs: Sequence[InputCache]) -> None:
    """Check that samples of the caches may lie in one.

    Raises:
        TokenizerMismatchError: The token ids come from different tokenizers.
        ConfigError: Views, payloads or images differ.
    """
    first = inputs[0]
    for other in inputs[1:]:
        pair = f"{first.location} and {other.location}"
        if first.spec.fingerprint != other.spec.fingerprint:
            raise TokenizerMismatchError(
                f"{first.location} holds tokens from {first.spec.fingerprint}, {other.location} "
                f"from {other.spec.fingerprint}. Only tokens of one tokenizer can be merged."
            )
        lone = sorted(first.by_tokenizer.keys() ^ other.by_tokenizer.keys())
        if lone:
            raise TokenizerMismatchError(
                f"{pair} do not hold targets of the same tokenizers: {lone[0]} is in one of them "
                "alone."
            )
        for fingerprint, cache in first.by_tokenizer.items():
            before = cache.manifest.spec
            after = other.by_tokenizer[fingerprint].manifest.spec
            differences = [
                f"{name}: {old} and {new}"
                for name, old, new in _differences(_essence(before), _essence(after))
            ]
            if differences:
                raise ConfigError(
                    f"{pair} cannot be merged, their settings differ: {'; '.join(differences)}. "
                    "Build one of them with the settings of the other."
                )


def refuse_equal_keys(inputs: Sequence[InputCache]) -> None:
    """Check that no key is in two caches; skipped images count.

    Eight bytes of a hash per key are held; only keys whose hashes are equal are looked at.

    Raises:
        ConfigError: A key occurs twice.
    """
    hashes = np.concatenate([np.fromiter(map(_hash, _keys(cache)), np.uint64) for cache in inputs])
    hashes.sort()
    twice = {int(value) for value in hashes[1:][hashes[1:] == hashes[:-1]]}
    if not twice:
        return
    places = defaultdict(list)
    for cache in inputs:
        for key in _keys(cache):
            if _hash(key) in twice:
                places[key].append(cache.location)
    equal = sorted(key for key, where in places.items() if len(where) > 1)
    if equal:
        more = f" and {len(equal) - _MAX_NAMED:,} more" if len(equal) > _MAX_NAMED else ""
        raise ConfigError(
            f"{' and '.join(places[equal[0]])} share {len(equal):,} keys: "
            f"{', '.join(equal[:_MAX_NAMED])}{more}. A key joins an image to its targets; leave "
            "these samples out of one cache with `patchcache subset`."
        )


def common_source(inputs: Sequence[InputCache]) -> SourceInfo | None:
    """Return where the images of all caches come from, None if that is no one place.

    Files that hold many images, such as tars, are named by the plan unit by unit; their places are
    listed in braces.
    """
    sources = [cache.spec.source for cache in inputs]
    num_samples = sum(source.num_samples for source in sources)
    locations = list(dict.fromkeys(source.location for source in sources))
    if len({source.kind for source in sources}) > 1:
        return None
    if len(locations) > 1 and not all(cache.has_containers for cache in inputs):
        return None
    return SourceInfo(kind=sources[0].kind, location=in_braces(locations), num_samples=num_samples)


def in_braces(locations: Sequence[str]) -> str:
    """Return a brace pattern of several absolute locations; one is itself."""
    if len(locations) == 1:
        return locations[0]
    folders = (location.partition("{")[0].split("/")[:-1] for location in locations)
    common = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    start = "".join(f"{names[0]}/" for names in common)
    return f"{start}{{{','.join(location.removeprefix(start) for location in locations)}}}"


def _essence(spec: CacheSpec) -> dict[str, Any]:
    """Return the settings that a sample's meaning depends on."""
    fields = spec.model_dump(mode="json", include={"images_in_cache", "view_spec"})
    if spec.images_in_cache == "resized":
        fields |= spec.model_dump(include={"resized_short_side", "jpeg_quality"})
    for name in ("soft", "features"):
        settings = getattr(spec, name)
        fields[name] = None if settings is None else settings.model_dump(mode="json")
    return fields


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            for inner, *values in _differences(before, after):
                yield f"{name}.{inner}", values[0], values[1]
        elif before != after:
            yield name, before, after


def _keys(cache: InputCache) -> Iterator[str]:
    return (entry.row.key for entry in cache.rows())


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
