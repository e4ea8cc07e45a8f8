"""Seconds and bytes as text."""

from __future__ import annotations

import math


def seconds_text(seconds: float) -> str:
    """Three digits with the unit that fits: `4.96 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def bytes_text(size: float) -> str:
    """Three digits with the unit that fits: `1.51 MiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def amount(size: float) -> str:
    """Bytes in a unit that `parse_bytes` reads, never rounded down."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{math.ceil(size / scale * 100) / 100:.2f}{unit}"
    return f"{math.ceil(size)}B"
