from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.test_match import KEY, view, wanted_values
from ucp.errors import FitError
from ucp.layout import Box, FlatRange, boxes, numel
from ucp.layout.block import View
from ucp.plan import Cover, Extent, Fragment, TensorSpec
from ucp.plan.views import refined, refinement, spelled_out
from ucp.testing.strategies import extents, fragmentations, regions, regular_boxes, views

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), max_size=3).map(tuple)


def scatter(tensor, fragments):
    """Objects as a framework would write them: `tensor` has the shape of the view that `fragments` are in."""
    objects = {}
    for fragment in fragments:
        memory = objects[fragment.extent.object] = np.full(fragment.extent.span[1] // 4 + 1, -1, "<i4")
        view(memory, fragment.extent)[...] = wanted_values(tensor, fragment.region)
    return objects


def carry_out(copies, objects, target):
    out = np.full(target.extent.span[1] // 4 + 1, -7, "<i4")
    copied = 0
    for copy in copies:
        view(out, copy.target)[...] = view(objects[copy.source.object], copy.source)
        copied += copy.source.size
    assert copied == target.region.size
    return view(out, target.extent)


@given(st.data())
def test_copies_fill_any_region_in_any_view_from_any_fragmentation_in_another(data):
    shape = data.draw(SHAPES)
    tensor = np.arange(numel(shape), dtype="<i4").reshape(shape)
    held_in = data.draw(views(shape))
    fragments = data.draw(fragmentations(held_in.shape))
    objects = scatter(tensor.reshape(held_in.shape), fragments)
    cover = Cover.of(KEY, TensorSpec(shape, "int32"), fragments, view=held_in)
    wanted_in = data.draw(st.one_of(st.none(), st.just(held_in), views(shape)))
    seen = shape if wanted_in is None else wanted_in.shape
    region = data.draw(regions(seen))
    sizes = (region.length,) if isinstance(region, FlatRange) else region.shape
    target = Fragment(region, data.draw(extents("out", sizes, "int32", 4)))
    found = carry_out(cover.copies_into(target, wanted_in), objects, target)
    np.testing.assert_array_equal(found, wanted_values(tensor.reshape(seen), region))


@given(st.data())
def test_replicas_in_a_view_are_offered_where_they_meet_the_target(data):
    shape = data.draw(SHAPES)
    tensor = np.arange(numel(shape), dtype="<i4").reshape(shape)
    held_in = data.draw(views(shape))
    fragments = data.draw(fragmentations(held_in.shape))
    whole = [Fragment(Box.whole(shape), Extent.contiguous("first", 0, shape, "int32"))]
    objects = scatter(tensor.reshape(held_in.shape), fragments)
    copies = [Fragment(f.region, f.extent, 1) for f in fragments]
    first = [part for f in whole for part in refined(f, View.plain(shape), held_in)]
    cover = Cover.of(KEY, TensorSpec(shape, "int32"), [*first, *copies], view=held_in)
    target = Fragment(FlatRange(0, tensor.size), Extent.contiguous("", 0, (tensor.size,), "int32"))
    assert {copy.source.object for copy in cover.copies_into(target)} <= {"first"}
    (group,) = cover.replica_copies_into(target) or [[]]
    np.testing.assert_array_equal(carry_out(group, objects, target), tensor.ravel())


@given(st.data())
def test_refining_and_spelling_out_keep_every_element_where_it_is(data):
    shape = data.draw(SHAPES)
    one, other = data.draw(views(shape)), data.draw(views(shape))
    box = data.draw(regular_boxes(one.shape))
    fragment = Fragment(box, data.draw(extents("f", box.shape, "int32", 4)))
    memory = np.arange(fragment.extent.span[1] // 4 + 1, dtype="<i4")
    expected = np.full(numel(shape), -1)
    expected.reshape(one.shape)[tuple(map(slice, box.start, box.stop))] = view(memory, fragment.extent)
    fine = refinement(one, other)
    forms = [(spelled_out(fragment, one), shape)] + ([(refined(fragment, one, fine), fine.shape)] if fine else [])
    for parts, seen in forms:
        found = np.full(numel(shape), -1)
        for part in parts:
            for inside in boxes(part.region, seen):
                found.reshape(seen)[tuple(map(slice, inside.start, inside.stop))] = view(memory, part.extent)
        np.testing.assert_array_equal(found, expected)


def test_a_refinement_is_the_coarsest_and_there_may_be_none():
    assert refinement(View(((4, 6),)), View(((2, 12),))) == View(((2, 2, 6),))
    assert refinement(View(((4, 6), (5,))), View.plain((24, 5))) == View(((4, 6), (5,)))
    assert refinement(View(((3, 8),)), View(((4, 6),))) is None


def test_a_view_of_another_shape_is_refused():
    with pytest.raises(FitError, match="view"):
        Cover.of(KEY, TensorSpec((2, 3), "int32"), [], view=View(((3,), (2,))))


def test_the_parts_of_a_view_that_are_held_twice_or_not_at_all_are_found():
    held_in = View(((4, 2), (3,)))
    extent = Extent.contiguous("f", 0, (4, 1, 3), "int32")
    halves = [Fragment(Box((0, half, 0), (4, 1, 3)), extent) for half in (0, 1)]
    Cover.of(KEY, TensorSpec((8, 3), "int32"), halves, view=held_in)
    with pytest.raises(FitError, match="hold 12 of 24"):
        Cover.of(KEY, TensorSpec((8, 3), "int32"), halves[:1], view=held_in)
    with pytest.raises(FitError, match="overlap"):
        Cover.of(KEY, TensorSpec((8, 3), "int32"), [*halves, halves[0]], view=held_in)


def test_blocks_of_many_experts_are_found_without_looking_at_all():
    count, rows, columns = 4096, 64, 8
    held_in = View(((count,), (rows,), (columns,)))
    extent = Extent.contiguous("f", 0, (1, rows, columns), "int32")
    fragments = [Fragment(Box((n, 0, 0), (1, rows, columns)), extent) for n in range(count)]
    strided = [Fragment(f.region, Extent("f", 0, f.extent.shape, (0, 1, rows), "int32")) for f in fragments]
    cover = Cover.of(KEY, TensorSpec((count, rows, columns), "int32"), strided, view=held_in)
    start = time.process_time()
    for n in range(count):
        run = FlatRange(n * rows * columns, rows * columns)
        assert len(cover.copies_into(Fragment(run, Extent.contiguous("", 0, (run.length,), "int32")))) == 1
    assert time.process_time() - start < 3
