"""Sample keys: the name that joins an image to its targets, in every layout.

A key matches `[A-Za-z0-9_/-]+`. WebDataset ends a key at the first dot, so a dot in a file name
would merge two samples without a word; every other character is therefore written as `_-XX`, the
hexadecimal of its UTF-8 bytes, and a `_` that stands before a `-` as `_-5F`, which makes the
escape reversible.
"""

import re

KEY_PATTERN = re.compile(r"[A-Za-z0-9_/-]+")

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_/-")
_ESCAPE = re.compile(rb"_-([0-9A-F]{2})")


def escape_key(name: str) -> str:
    """Return the key of a sample called `name` (a path without its image extension)."""
    if KEY_PATTERN.fullmatch(name) and "_-" not in name:
        return name
    raw = name.encode("utf-8", "surrogateescape").replace(b"_-", b"_-5F-")
    return "".join(chr(byte) if byte in _PLAIN else f"_-{byte:02X}" for byte in raw)


def unescape_key(key: str) -> str:
    """Return the name that `escape_key` made `key` of."""
    raw = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), key.encode())
    return raw.decode("utf-8", "surrogateescape")
