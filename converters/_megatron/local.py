"""What of a saved tensor each rank held, seen from the chunks in which ``torch_dist`` keeps it.

Every chunk is what one rank held of a tensor (megatron/core/dist_checkpointing/mapping.py), except in gated MLPs: a
rank's part of the gate and its part of up are two chunks (``apply_swiglu_sharded_factory`` in transformer/mlp.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ucp.errors import FitError
from ucp.layout import Box, FlatRange, Shape, boxes, itemsize
from ucp.plan import Extent, Fragment

from .._dcp.metadata import Entry


@dataclass(frozen=True, slots=True)
class Local:
    """A parameter of one rank: `boxes` are the regions of tensor `key` that it holds, end to end, each row-major.

    `replica` tells apart ranks that hold the same; `ndim` is its number of dims in the module.
    """

    key: str
    boxes: tuple[Box, ...]
    replica: int
    ndim: int
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(box.size for box in self.boxes)

    def fragments(self, start: int, extent: Extent, *, replica: int) -> Iterator[Fragment]:
        """Elements from `start` on lie at `extent`, which is one dim and contiguous."""
        first = 0
        for box in self.boxes:
            low, high = max(start, first), min(start + extent.size, first + box.size)
            if low < high:
                yield from _placed(box, FlatRange(low - first, high - low), extent, low - start, replica)
            first += box.size


def _placed(box: Box, run: FlatRange, extent: Extent, skip: int, replica: int) -> Iterator[Fragment]:
    """Elements `run` of a row-major `box`, which lie in `extent` from its element `skip` on."""
    for part in boxes(run, box.shape):
        place = shifted(part, box.start)
        at = Extent.contiguous(extent.object, extent.offset + skip * itemsize(extent.dtype), part.shape, extent.dtype)
        yield Fragment(place, at, replica)
        skip += part.size


def shifted(box: Box, corner: Shape) -> Box:
    """`box` with `corner` as its origin."""
    return Box(tuple(a + b for a, b in zip(box.start, corner, strict=True)), box.shape)


def by_index(entry: Entry, depth: int) -> dict[tuple[int, ...], list[Box]]:
    """Chunks of a tensor by their leading `depth` indices, in order; one that spans several counts for each."""
    found: dict[tuple[int, ...], list[Box]] = {}
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets):
        if 0 in chunk.sizes:
            continue
        shape = (1,) * depth + chunk.sizes[depth:]
        spans = (range(a, a + n) for a, n in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True))
        for index in product(*spans):
            found.setdefault(index, []).append(Box(index + chunk.offsets[depth:], shape))
    return found


def local(
    key: str, entry: Entry, found: Sequence[Box], *, index: Sequence[int], rank: int, degree: int, where: str
) -> Local:
    """What rank `rank` of `degree` held of the tensor `key`: `found` are its chunks at the leading indices `index`.

    FitError if its chunks are not those of `degree` ranks.
    """
    leading = tuple(index)
    held = {1: found, degree: found[rank : rank + 1], 2 * degree: found[rank::degree]}.get(len(found))
    if held is None:
        raise FitError(
            f"{where}: {key} is kept in {len(found)} chunks at {list(leading)}, which is not how {degree} ranks cut it",
            hint="args and tensors are of different jobs, or the layer is none that this reader knows",
        )
    shape: Shape = entry.shape[len(leading) :]
    replica = rank if len(found) == 1 else 0
    return Local(key, tuple(held), replica, len(shape), entry.dtype)


def copy_of(one: Local, replica: int) -> Local:
    """The same parameter as a further copy."""
    return replace(one, replica=one.replica + replica)


def flat(extent: Extent, start: int, stop: int) -> Extent:
    """Elements ``[start, stop)`` of a contiguous tensor, as one dim."""
    return Extent.contiguous(extent.object, extent.offset + start * extent.itemsize, (stop - start,), extent.dtype)
