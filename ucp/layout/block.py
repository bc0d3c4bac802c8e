"""Blocks: which elements of a shard are which elements of a logical tensor, as strided boxes with no data.

A logical tensor is seen through a *view*: each dim split into factors, outer to inner, which are the leaf dims of its
layout. In the view's coordinates the elements a block speaks of are a box; in the shard they lie a fixed step apart
along each factor. Composed, permuted, concatenated, cut and padded dims all come down to such blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ucp.layout.region import Box, Shape


@dataclass(frozen=True, slots=True)
class View:
    """The factors of each dim of a logical tensor, outer to inner. ``((4, 3, 8), (16,))`` is a view of ``[96, 16]``."""

    factors: tuple[Shape, ...]

    @property
    def tensor(self) -> Shape:
        """Shape of the logical tensor."""
        return tuple(math.prod(group) for group in self.factors)

    @property
    def shape(self) -> Shape:
        """All factors in order: the shape in whose coordinates boxes are given."""
        return tuple(n for group in self.factors for n in group)


@dataclass(frozen=True, slots=True)
class Block:
    """`box` of the view of a logical tensor lies in the shard.

    Element ``box.start`` is at index `start` of the shard (one entry per dim of the shard). One step along factor `i`
    of the view moves ``steps[i] = (dim, stride)``: by `stride` along `dim` of the shard. A factor that the shard's name
    or rank fixes has length 1 in the box and step ``(-1, 0)``.
    """

    box: Box
    start: Shape
    steps: tuple[tuple[int, int], ...]
