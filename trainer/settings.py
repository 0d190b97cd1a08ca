"""How settings are read and refused, for every tree of settings.

A tree is a pydantic model of models. Texts like `optim.lr=1e-3` replace single values; what is
wrong is said with its key, its value and, for a key that does not exist, the nearest one that does.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_builder.errors import ConfigError

# Returns the keys that there are below some parents.
KeysAt = Callable[[Sequence[str]], list[str]]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        ConfigError: It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(
            f"The recipe {path} cannot be read: {str(exc).rstrip('.')}. "
            "Correct it, or name another."
        ) from exc


def recipe_path(recipe: str | Path, folder: Path) -> Path:
    """Return the file that a user means: a path, or the name of a recipe in `folder`.

    Raises:
        ConfigError: It is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if isinstance(recipe, str) and recipe in names:
        return folder / f"{recipe}.toml"
    raise ConfigError(
        f"There is no recipe {recipe}: it is neither a file nor one of {', '.join(names)}."
    )


def override(tree: dict[str, Any], text: str, keys_at: KeysAt) -> None:
    """Replace one value of a tree by a text like `optim.lr=1e-3`.

    The value is TOML; a bare word is a string, and `none` takes the key away, so that its default
    holds.

    Raises:
        ConfigError: The text is no such pair, or names a key that does not exist.
    """
    key, separator, value_text = text.partition("=")
    *parents, name = parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set takes key=value, as in optim.lr=1e-3, not {text!r}.")
    for depth, parent in enumerate(parents, start=1):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"Unknown key '{key.strip()}': '{'.'.join(parts[:depth])}' is a value, not a table."
            )
    value = _parse_value(value_text.strip())
    if value is None:
        tree.pop(name, None)
        # A key that does not exist is refused whatever its value.
        if name not in keys_at(parents):
            raise ConfigError(_unknown_key(parts, keys_at))
    else:
        tree[name] = value


def explain(error: Mapping[str, Any], keys_at: KeysAt) -> str:
    """Say what an error of pydantic means to the one who wrote the settings."""
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    if error["type"] == "extra_forbidden":
        return _unknown_key(parts, keys_at)
    if error["type"] == "missing":
        return f"Missing key '{key}'."
    reason = error["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:] if reason.startswith("Input") else reason
    if error["type"] == "value_error":
        return f"Wrong setting in '{key}': {reason}." if key else f"Wrong settings: {reason}."
    return f"Wrong value {error['input']!r} for '{key}': {reason}."


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ: key -> (old value, new value)."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = dict.fromkeys((*before, *after))  # another method has other keys
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _parse_value(text: str) -> object:
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _unknown_key(parts: Sequence[str], keys_at: KeysAt) -> str:
    """Name the first part of a key that there is not, and what there is in its place."""
    depth = 0
    while depth + 1 < len(parts) and parts[depth] in keys_at(parts[:depth]):
        depth += 1
    name, known = parts[depth], keys_at(parts[:depth])
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}."
    )
    return f"Unknown key '{'.'.join(parts[: depth + 1])}'; {hint}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_rates(lr: float, min_lr: float, betas: tuple[float, float]) -> None:
    """Refuse rates of AdamW that make no sense.

    Raises:
        ValueError: A beta is outside of [0, 1), or the last learning rate above the peak.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), not {betas}")
    if min_lr > lr:
        raise ValueError(f"min_lr {min_lr} is above lr {lr}")
