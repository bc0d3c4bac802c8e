"""Optimizer states in ``fully_sharded_model_space``: flat ranges of what a model-parallel rank has of a tensor.

Until Megatron-Core 0.14 (dist_checkpointing/strategies/torch.py, ``flattened_range``): a tensor that ranks cut into a
grid of equal blocks is kept with the shape of that grid and one dim more, the elements of a block in row-major order. A
tensor of one dim is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ucp.errors import FitError
from ucp.layout import FlatRange, Shape, boxes, numel
from ucp.plan import Extent, Fragment, TensorSpec

from .._dcp.metadata import Chunk, Entry
from .dist import STATE, Dist
from .found import Found
from .local import flat, shifted


def read_flattened(dist: Dist, found: Found) -> None:
    """Put the states in `found`; FitError for those that are not kept so."""
    for key, entry in dist.metadata.tensors.items():
        match = STATE.fullmatch(key)
        if match is None:
            continue
        state, name = match.groups()
        shape = dist.model[name].shape if name in dist.model else None
        if shape is None:
            raise FitError(f"{dist.where}: {key} is of no tensor of the model")
        if entry.shape == shape:
            spec, fragments = dist.held(key, entry, found)
            found.add(name, state, spec, fragments)
            continue
        block = _block(dist, key, entry, shape)
        pieces = [
            fragment
            for chunk in entry.chunks
            if chunk.stored is not None
            for fragment in _fragments(chunk, dist.extent(key, chunk, entry.dtype, found), block)
        ]
        found.add(name, state, TensorSpec(shape, entry.dtype), pieces)


def _block(dist: Dist, key: str, entry: Entry, shape: Shape) -> Shape:
    """Shape of what one rank has of the tensor."""
    grid = entry.shape[:-1]
    if len(grid) == len(shape) and all(n and size % n == 0 for size, n in zip(shape, grid, strict=True)):
        block = tuple(size // n for size, n in zip(shape, grid, strict=True))
        if numel(block) == entry.shape[-1]:
            return block
    raise FitError(
        f"{dist.where}: {key} has shape {list(entry.shape)}, which is no grid of flat blocks of {list(shape)}",
        hint="load it with the Megatron-Core that saved it, and save it as fully_reshardable",
    )


def _fragments(chunk: Chunk, extent: Extent, block: Shape) -> Iterator[Fragment]:
    run = FlatRange(chunk.offsets[-1], chunk.sizes[-1])
    places = product(*(range(a, a + n) for a, n in zip(chunk.offsets[:-1], chunk.sizes[:-1], strict=True)))
    for number, place in enumerate(places):
        corner = tuple(i * n for i, n in zip(place, block, strict=True))
        first = number * run.length
        for part in boxes(run, block):
            at = flat(extent, first, first + part.size)
            yield Fragment(shifted(part, corner), Extent.contiguous(at.object, at.offset, part.shape, at.dtype))
            first += part.size
