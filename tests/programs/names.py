"""The table of ``spec/logical-names.md``, read from the page itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "spec" / "logical-names.md"
_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)


def table() -> dict[str, tuple[str, ...]]:
    """Dims of every listed name; ``{l}`` stands for the number of a layer."""
    text = _PAGE.read_text().partition("## Tensors")[2]
    rows = {name: tuple(dim.strip() for dim in dims.split(",")) for name, dims in _ROW.findall(text)}
    assert len(rows) > 30
    return rows


def listed_shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the logical tensor `name` by the table. KeyError if the table lacks it."""
    dims = table()[re.sub(r"^layers\.(0|[1-9][0-9]*)\.", "layers.{l}.", name)]
    return tuple(math.prod(int(word) if word.isdecimal() else sizes[word] for word in dim.split()) for dim in dims)
