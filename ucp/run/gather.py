"""Gathering: fill a buffer with the blocks that a plan says, each byte read once where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ucp.layout import Box, FlatRange, Region, Shape
from ucp.layout.block import View
from ucp.plan import HULL_BYTES, ZEROS, Copy, Cover, Extent, Fragment
from ucp.run.cast import Array, cast, storage_dtype
from ucp.run.reduce import PIECE_ELEMENTS, reduced
from ucp.store import Store

Record = Callable[[str, int, memoryview], None]
"""Called with (object, offset, bytes) for every range that was read."""

Direct = dict[str, list[tuple[int, memoryview]]]
"""Ranges to be read straight into place, by object."""

_DENSE = 4
_SLACK = 64 << 10
_PAGE = 4 << 10
_SHORT = 64 << 10
"""Longest run that is read together with others: the call would cost more than the bytes."""


def gather(store: Store, copies: Sequence[Copy], buffer: memoryview, record: Record | None = None) -> None:
    """Carry out `copies` from objects of `store` into `buffer`, whose byte 0 is offset 0 of every target extent.

    Contiguous blocks are read straight into place, those of one object together, so that a store may fetch neighbours
    with one request. Strided ones are read as the hull of their bytes where at least a quarter of it is wanted or a
    part of every page, at most 8 MiB at a time, else run by run. Casts where dtypes differ.
    """
    direct: Direct = {}
    for copy in copies:
        _copy(store, copy, buffer, record, direct)
    for name, ranges in direct.items():
        store.read_ranges(name, ranges)
        if record is not None:
            for offset, view in ranges:
                record(name, offset, view)


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


def _copy(store: Store, copy: Copy, buffer: memoryview, record: Record | None, direct: Direct) -> None:
    """Carry out `copy`, or add to `direct` what is to be read for it."""
    source, target = copy.source, copy.target
    if source.size == 0:
        return
    if source.object == ZEROS:
        _strided(buffer, target.offset, target)[...] = 0
        return
    if source.dtype == target.dtype and source.is_contiguous and target.is_contiguous:
        view = buffer[target.offset : target.offset + target.nbytes]
        direct.setdefault(source.object, []).append((source.offset, view))
        return
    outer, run = _innermost(source)
    dense = _is_dense(source, run)
    start, stop = source.span
    if dense and stop - start <= HULL_BYTES:
        _through_hull(store, copy, buffer, record)
    elif not dense and run <= _SHORT and source.nbytes <= HULL_BYTES:
        _through_runs(store, copy, _starts(source, outer), buffer, record)
    else:
        for part in _parts(copy, 2 if dense else source.size):
            _copy(store, part, buffer, record, direct)


def _innermost(source: Extent) -> tuple[int, int]:
    """How many outer dims `source` has around its longest runs of bytes, and the bytes of such a run."""
    outer, run = len(source.shape), 1
    while outer and (source.shape[outer - 1] == 1 or source.strides[outer - 1] == run):
        outer -= 1
        run *= source.shape[outer]
    return outer, run * source.itemsize


def _is_dense(source: Extent, run: int) -> bool:
    """Whether the bytes between the elements cost less than to leave them out.

    So it is where a quarter of the bytes is wanted, or a part of every page: storage gives whole pages.
    """
    start, stop = source.span
    pages = source.nbytes // run * max(_PAGE, run)
    return stop - start <= max(_DENSE * source.nbytes, pages) + _SLACK


def _through_hull(store: Store, copy: Copy, buffer: memoryview, record: Record | None) -> None:
    start, stop = copy.source.span
    hull = memoryview(bytearray(stop - start))
    store.read_into(copy.source.object, start, hull)
    if record is not None:
        record(copy.source.object, start, hull)
    values = _strided(hull, 0, copy.source)
    _strided(buffer, copy.target.offset, copy.target)[...] = cast(values, copy.source.dtype, copy.target.dtype)


def _through_runs(store: Store, copy: Copy, starts: Sequence[int], buffer: memoryview, record: Record | None) -> None:
    """Read the many short runs that begin at `starts` with one call of the store."""
    source = copy.source
    run = source.nbytes // len(starts)
    scratch = memoryview(bytearray(source.nbytes))
    store.read_runs(source.object, starts, run, scratch)
    if record is not None:
        for number, start in enumerate(starts):
            record(source.object, start, scratch[number * run : (number + 1) * run])
    values = np.frombuffer(scratch, storage_dtype(source.dtype)).reshape(source.shape)
    _strided(buffer, copy.target.offset, copy.target)[...] = cast(values, source.dtype, copy.target.dtype)


def _starts(source: Extent, outer: int) -> list[int]:
    """The first byte of each run, in row-major order of the `outer` dims."""
    offsets = np.array([source.offset])
    for n, stride in zip(source.shape[:outer], source.strides[:outer], strict=True):
        offsets = (offsets[:, None] + np.arange(n) * (stride * source.itemsize)).reshape(-1)
    found: list[int] = offsets.tolist()
    return found


def _strided(buffer: memoryview, offset: int, extent: Extent) -> Array:
    """View of `extent`'s elements in `buffer`, its first one at byte `offset`."""
    dtype = storage_dtype(extent.dtype)
    flat = np.frombuffer(buffer, np.uint8)[offset:]
    usable = len(flat) // dtype.itemsize * dtype.itemsize
    strides = tuple(stride * dtype.itemsize for stride in extent.strides)
    return as_strided(flat[:usable].view(dtype), extent.shape, strides)


def _parts(copy: Copy, count: int) -> list[Copy]:
    """The copy cut in at most `count` parts along the dim whose source stride is largest."""
    source = copy.source
    dim = max(range(len(source.shape)), key=lambda d: source.strides[d] if source.shape[d] > 1 else -1)
    size = source.shape[dim]
    step = -(-size // count)
    parts = []
    for start in range(0, size, step):
        box = Box(
            tuple(start if d == dim else 0 for d in range(len(source.shape))),
            tuple(min(step, size - start) if d == dim else n for d, n in enumerate(source.shape)),
        )
        parts.append(Copy(source.sub(box), copy.target.sub(box)))
    return parts
