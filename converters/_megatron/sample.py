"""Whether a flat buffer holds the masters of a parameter, seen from its first elements."""

from __future__ import annotations

from collections.abc import Iterator

from ucp.container.torchfile import leaf_numpy
from ucp.layout import Box
from ucp.plan import Extent
from ucp.tree import TensorLeaf

from .dist import Dist
from .local import Local, flat
from .transposed import Transposed

_SAMPLE = 64


def is_master(dist: Dist, one: Local | Transposed, extent: Extent) -> bool:
    """Whether elements from the start of `extent` on are those of `one`, or round to them where these are narrower."""
    from ucp.run.cast import contradicts

    for master, weight in _pairs(dist, one, flat(extent, 0, min(_SAMPLE, extent.size))):
        exact, low = (leaf_numpy(dist.store, TensorLeaf(held)) for held in (master, weight))
        if contradicts(exact, master.dtype, low, weight.dtype).any():
            return False
    return True


def _pairs(dist: Dist, one: Local | Transposed, extent: Extent) -> Iterator[tuple[Extent, Extent]]:
    """The same elements in the buffer and among the weights."""
    entry = dist.model[one.key]
    for fragment in one.fragments(0, extent, replica=0):
        assert isinstance(fragment.region, Box)
        for chunk in entry.chunks:
            met = Box(chunk.offsets, chunk.sizes).intersect(fragment.region)
            if met is not None and chunk.stored is not None:
                weight, _ = dist.items.tensor(chunk.stored, chunk.sizes, entry.dtype, key=one.key)
                own = fragment.extent.sub(met.relative_to(fragment.region.start))
                yield own, weight.sub(met.relative_to(chunk.offsets))
