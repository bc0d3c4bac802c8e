"""Options as the command line gives them: text."""

from __future__ import annotations

import re

from ucp.errors import UsageError
from ucp.layout.dtypes import WORDS, narrows

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[KMGT])B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_WORD = {name: word for word, name in WORDS.items()}
CASTABLE = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that are cast into each other."""


def size_of(size: int | str) -> int:
    """Bytes: a number, or text such as ``5GB`` with decimal units as ``save_pretrained`` takes it."""
    match = _SIZE.fullmatch(str(size).strip())
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise UsageError(f"shard_bytes is a size such as 5GB, not {size!r}")
    return found


def dtype_of(dtype: str | None) -> str | None:
    """The dtype to cast to, by its name or as programs write it (``bf16``)."""
    found = WORDS.get(dtype, dtype) if dtype else None
    if found is not None and found not in CASTABLE:
        raise UsageError(f"no cast to dtype {dtype!r}", hint=f"known: {' '.join(CASTABLE)}")
    return found


def cast_to(dtype: str, wanted: str | None) -> str:
    """The dtype in which a tensor of `dtype` is written."""
    return wanted if wanted is not None and dtype in CASTABLE else dtype


def rounds(source: str, target: str) -> bool:
    """Whether a cast can change a value."""
    return source != target and narrows(_WORD[source], _WORD[target])
