"""Gathering: fill a buffer with the blocks that a plan says, each byte read once where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ucp.layout import Box, FlatRange, Region, Shape
from ucp.layout.block import View
from ucp.plan import HULL_BYTES, Copy, Cover, Extent, Fragment
from ucp.run.cast import Array, cast, storage_dtype
from ucp.run.reduce import PIECE_ELEMENTS, reduced
from ucp.store import Store

Record = Callable[[str, int, memoryview], None]
"""Called with (object, offset, bytes) for every range that was read."""

_DENSE = 4
_SLACK = 64 << 10


def gather(store: Store, copies: Sequence[Copy], buffer: memoryview, record: Record | None = None) -> None:
    """Carry out `copies` from objects of `store` into `buffer`, whose byte 0 is offset 0 of every target extent.

    Contiguous blocks are read straight into place. Strided ones are read as the hull of their bytes where at least a
    quarter of it is wanted, at most 8 MiB at a time, else in smaller parts. Casts where dtypes differ.
    """
    for copy in copies:
        _copy(store, copy, buffer, record)


def read_into(
    store: Store,
    cover: Cover,
    target: Fragment,
    buffer: memoryview,
    record: Record | None = None,
    *,
    view: View | None = None,
) -> None:
    """Fill `target`, an extent of `buffer`, from `cover`; a box is in the coordinates of `view` (default: the dims).

    A mean or a sum is made here, a few terms of a small piece at a time.
    """
    if cover.reduce is None:
        gather(store, cover.copies_into(target, view), buffer, record)
        return
    for piece in target.cut(PIECE_ELEMENTS):
        shape = piece.extent.shape
        terms = (
            (_read_term(store, term, replace(piece, extent=_scratch(shape, term)), record, view), term.spec.dtype)
            for term in cover.terms
        )
        result = reduced(cover.reduce, terms, cover.spec.dtype)
        _strided(buffer, piece.extent.offset, piece.extent)[...] = cast(result, cover.spec.dtype, piece.extent.dtype)


def _scratch(shape: Shape, cover: Cover) -> Extent:
    return Extent.contiguous("", 0, shape, cover.spec.dtype)


def _read_term(store: Store, term: Cover, target: Fragment, record: Record | None, view: View | None) -> Array:
    buffer = np.empty(target.extent.nbytes, np.uint8)
    gather(store, term.copies_into(target, view), buffer.data, record)
    return buffer.view(storage_dtype(term.spec.dtype)).reshape(target.extent.shape)


def read_region(store: Store, cover: Cover, region: Region, record: Record | None = None) -> Array:
    """`region` of a tensor as contiguous C-order bytes (uint8, one dim) in the cover's dtype."""
    shape = (region.length,) if isinstance(region, FlatRange) else region.shape
    target = Fragment(region, _scratch(shape, cover))
    buffer = np.empty(target.extent.nbytes, np.uint8)
    read_into(store, cover, target, buffer.data, record)
    return buffer


def _copy(store: Store, copy: Copy, buffer: memoryview, record: Record | None) -> None:
    source, target = copy.source, copy.target
    if source.size == 0:
        return
    if source.dtype == target.dtype and source.is_contiguous and target.is_contiguous:
        _read(store, source, buffer[target.offset : target.offset + target.nbytes], record)
        return
    start, stop = source.span
    hull = stop - start
    if hull <= HULL_BYTES and hull <= _DENSE * source.nbytes + _SLACK:
        _through_hull(store, copy, buffer, record)
        return
    for part in _halves(copy, hull):
        _copy(store, part, buffer, record)


def _read(store: Store, source: Extent, view: memoryview, record: Record | None) -> None:
    store.read_into(source.object, source.offset, view)
    if record is not None:
        record(source.object, source.offset, view)


def _through_hull(store: Store, copy: Copy, buffer: memoryview, record: Record | None) -> None:
    start, stop = copy.source.span
    hull = memoryview(bytearray(stop - start))
    store.read_into(copy.source.object, start, hull)
    if record is not None:
        record(copy.source.object, start, hull)
    values = _strided(hull, 0, copy.source)
    _strided(buffer, copy.target.offset, copy.target)[...] = cast(values, copy.source.dtype, copy.target.dtype)


def _strided(buffer: memoryview, offset: int, extent: Extent) -> Array:
    """View of `extent`'s elements in `buffer`, its first one at byte `offset`."""
    dtype = storage_dtype(extent.dtype)
    flat = np.frombuffer(buffer, np.uint8)[offset:]
    usable = len(flat) // dtype.itemsize * dtype.itemsize
    strides = tuple(stride * dtype.itemsize for stride in extent.strides)
    return as_strided(flat[:usable].view(dtype), extent.shape, strides)


def _halves(copy: Copy, hull: int) -> list[Copy]:
    """The copy cut in two, or in single indices where it is sparse, along the dim whose source stride is largest."""
    source = copy.source
    dim = max(range(len(source.shape)), key=lambda d: source.strides[d] if source.shape[d] > 1 else -1)
    size = source.shape[dim]
    sparse = hull > _DENSE * source.nbytes + _SLACK
    step = 1 if sparse else (size + 1) // 2
    parts = []
    for start in range(0, size, step):
        box = Box(
            tuple(start if d == dim else 0 for d in range(len(source.shape))),
            tuple(min(step, size - start) if d == dim else n for d, n in enumerate(source.shape)),
        )
        parts.append(Copy(source.sub(box), copy.target.sub(box)))
    return parts
