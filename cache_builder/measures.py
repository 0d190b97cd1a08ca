"""What tables of measures are made of, on a terminal or on a page."""

import math
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
        if round(num_bytes, 1) < 1000:  # 999.96 kB would be printed as 1000.0
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def decibel_text(value: float, digits: int = 2) -> str:
    """Return a PSNR as a person reads it; it is infinite where there is no error."""
    return f"{value:.{digits}f} dB" if math.isfinite(value) else "no error"


def duration_text(seconds: float) -> str:
    """Return a time as a person reads it: 42 s, 3 min 05 s, 7 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"
