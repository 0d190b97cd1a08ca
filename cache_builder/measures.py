"""What tables of measures are made of, on a terminal or on a page."""

from typing import NamedTuple


class Measure(NamedTuple):
    """One line of a table of measures."""

    name: str
    value: str
    beside: str  # what to compare it with; empty where there is nothing
    meaning: str


def size_text(num_bytes: float) -> str:
    """Return a size as a person reads it: 1.5 MB, powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
