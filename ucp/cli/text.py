"""Numbers, shapes and places as people read them: pure functions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ucp.layout import FlatRange, Region

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_COUNTS = (("T", 10**12), ("B", 10**9), ("M", 10**6))


def printable(text: str, *, keep: str = "") -> str:
    """`text` with control and direction-changing characters spelled out: names come from files, and terminals obey."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def size(count: float) -> str:
    """Bytes in decimal units: ``653.8 GB``."""
    for unit in _UNITS:
        if round(count, 1) < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit always fits")


def amount(count: int) -> str:
    """A number of elements: ``46.7 B`` (billions), ``1.2 M``, or exactly below a million."""
    for unit, value in _COUNTS:
        if count >= value:
            return f"{count / value:.1f} {unit}"
    return f"{count:,}"


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``2m38s``, ``1h05m``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def shape(sizes: Sequence[int]) -> str:
    """``[4096, 1024]``; ``[]`` is a scalar."""
    return f"[{', '.join(map(str, sizes))}]"


def region(part: Region) -> str:
    """``elements 0..512`` for a flat range, ``[0:64, 32:64]`` for a box."""
    if isinstance(part, FlatRange):
        return f"elements {part.start}..{part.stop}"
    return f"[{', '.join(f'{a}:{b}' for a, b in zip(part.start, part.stop, strict=True))}]"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]
