from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from ucp.errors import FitError
from ucp.layout import Box, FlatRange, boxes, numel
from ucp.plan import Cover, Extent, Fragment, Key, TensorSpec
from ucp.testing.strategies import extents, fragmentations, regions, regular_boxes, shapes

KEY = Key("w", "value")


def view(memory, extent):
    """The elements of an extent in a numpy buffer: the oracle's own reading of what an extent means."""
    flat = memory[extent.offset // 4 :]
    return as_strided(flat, extent.shape, tuple(4 * stride for stride in extent.strides))


def scatter(tensor, fragments):
    """Objects as a framework would write them: each fragment's elements at its extent."""
    objects = {}
    for fragment in fragments:
        memory = objects[fragment.extent.object] = np.full(fragment.extent.span[1] // 4 + 1, -1, "<i4")
        region = fragment.region
        if isinstance(region, FlatRange):
            view(memory, fragment.extent)[...] = tensor.ravel()[region.start : region.stop]
        else:
            view(memory, fragment.extent)[...] = tensor[tuple(map(slice, region.start, region.stop))]
    return objects


def wanted_values(tensor, region):
    if isinstance(region, FlatRange):
        return tensor.ravel()[region.start : region.stop]
    return tensor[tuple(map(slice, region.start, region.stop))]


@given(st.data())
def test_copies_fill_any_region_from_any_fragmentation(data):
    shape = data.draw(shapes(max_dims=3))
    tensor = np.arange(numel(shape), dtype="<i4").reshape(shape)
    fragments = data.draw(fragmentations(shape))
    objects = scatter(tensor, fragments)
    cover = Cover.of(KEY, TensorSpec(shape, "int32"), fragments)
    region = data.draw(regions(shape))
    sizes = (region.length,) if isinstance(region, FlatRange) else region.shape
    target = Fragment(region, data.draw(extents("out", sizes, "int32", 4)))
    out = np.full(target.extent.span[1] // 4 + 1, -7, "<i4")
    copied = 0
    for copy in cover.copies_into(target):
        view(out, copy.target)[...] = view(objects[copy.source.object], copy.source)
        copied += copy.source.size
    assert copied == region.size
    if region.size:
        np.testing.assert_array_equal(view(out, target.extent), wanted_values(tensor, region))


@given(st.data())
def test_a_dropped_fragment_is_a_hole(data):
    shape = data.draw(shapes(max_dims=3))
    fragments = data.draw(fragmentations(shape))
    gone = data.draw(st.integers(0, len(fragments) - 1))
    with pytest.raises(FitError, match="w\\[value\\]"):
        Cover.of(KEY, TensorSpec(shape, "int32"), fragments[:gone] + fragments[gone + 1 :])


@given(st.data())
def test_a_repeated_fragment_is_an_overlap(data):
    shape = data.draw(shapes(max_dims=3))
    fragments = data.draw(fragmentations(shape))
    with pytest.raises(FitError):
        Cover.of(KEY, TensorSpec(shape, "int32"), [*fragments, data.draw(st.sampled_from(fragments))])


def test_a_fragment_outside_the_shape_is_refused():
    fragment = Fragment(FlatRange(3, 4), Extent.contiguous("f", 0, (4,), "int32"))
    with pytest.raises(FitError, match="outside"):
        Cover.of(KEY, TensorSpec((2, 3), "int32"), [fragment])


def test_overlap_hidden_by_an_equal_total_is_found():
    """Two halves that overlap plus a hole of the same size add up to the right number of elements."""
    shape = (4, 4)
    parts = [Box((0, 0), (2, 4)), Box((1, 0), (2, 4))]
    fragments = [Fragment(b, Extent.contiguous(f"f{i}", 0, b.shape, "int32")) for i, b in enumerate(parts)]
    with pytest.raises(FitError):
        Cover.of(KEY, TensorSpec(shape, "int32"), fragments)


@given(st.data())
def test_boxes_cover_exactly_when_every_element_is_in_one(data):
    """Any boxes at all, against an oracle that counts."""
    shape = data.draw(shapes(max_dims=3, max_side=4))
    parts = data.draw(st.lists(regular_boxes(shape), min_size=1, max_size=6))
    counts = np.zeros(shape, int)
    for box in parts:
        counts[tuple(map(slice, box.start, box.stop))] += 1
    fragments = [Fragment(box, Extent.contiguous("f", 0, box.shape, "int32")) for box in parts]
    if (counts == 1).all():
        Cover.of(KEY, TensorSpec(shape, "int32"), fragments)
    else:
        with pytest.raises(FitError):
            Cover.of(KEY, TensorSpec(shape, "int32"), fragments)


@pytest.mark.parametrize("grid", [(1, 2048), (2048, 1), (64, 32)])
def test_thousands_of_shards_are_checked_at_once(grid):
    """A tensor cut over the columns of 2,048 ranks took a minute when every pair of shards was compared."""
    shape = (grid[0] * 2, grid[1] * 2, 3)
    starts = [(2 * row, 2 * column, 0) for row in range(grid[0]) for column in range(grid[1])]
    fragments = [Fragment(Box(start, (2, 2, 3)), Extent.contiguous("f", 0, (2, 2, 3), "int32")) for start in starts]
    start = time.process_time()
    cover = Cover.of(KEY, TensorSpec(shape, "int32"), fragments)
    assert time.process_time() - start < 3
    assert len(cover.fragments) == 2048


def test_replicas_are_kept_apart_and_offered_for_comparison():
    whole = Box.whole((2, 3))
    fragments = [Fragment(whole, Extent.contiguous(f"f{n}", 0, (2, 3), "int32"), n) for n in range(3)]
    cover = Cover.of(KEY, TensorSpec((2, 3), "int32"), fragments)
    target = Fragment(FlatRange(1, 3), Extent.contiguous("", 0, (3,), "int32"))
    assert [copy.source.object for copy in cover.copies_into(target)] == ["f0"]
    assert [[c.source.object for c in copies] for copies in cover.replica_copies_into(target)] == [["f1"], ["f2"]]


@given(st.data())
def test_an_extent_knows_whether_it_is_contiguous(data):
    shape = data.draw(shapes(max_dims=3))
    extent = data.draw(extents("f", shape, "int32", 4))
    memory = np.arange(extent.span[1] // 4 + 1)
    start = extent.offset // 4
    elements = as_strided(memory[start:], shape, tuple(8 * s for s in extent.strides)).ravel()
    assert extent.is_contiguous == (list(elements) == list(range(start, start + numel(shape))))
    assert extent.span == (start * 4, (int(elements.max()) + 1) * 4)
    for box in boxes(Box.whole(shape), shape):
        assert extent.sub(box) == extent
