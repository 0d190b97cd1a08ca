"""Values of further columns, as JSON can hold them and a reader gets them back."""

import math
from typing import Any

_MAX_DEPTH = 16
_MAX_INTEGER_BITS = 64  # of an integer; other readers of JSON know no longer ones


def clean_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object without what JSON cannot hold.

    NaN and infinity become null, text that is not Unicode gets replacement characters, and integers
    beyond 64 bits and what is nested deeper than 16 levels become text.
    """
    return {_text(name): _clean(value, _MAX_DEPTH) for name, value in fields.items()}


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict | list) and not depth:
        return "..."
    if isinstance(value, dict):
        return {_text(name): _clean(inner, depth - 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner, depth - 1) for inner in value]
    if isinstance(value, int) and value.bit_length() >= _MAX_INTEGER_BITS:
        return str(value)
    return value


def _text(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
