from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.errors import UsageError
from ucp.layout import Box, FlatRange, Mesh, as_flat, boxes, numel, ravel, row_major_strides
from ucp.testing.strategies import flat_ranges, regular_boxes, shapes


def positions(shape):
    return np.arange(numel(shape)).reshape(shape)


def select(array, box):
    return array[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]


@given(st.data())
def test_boxes_of_a_flat_range_are_its_elements_in_order(data):
    shape = data.draw(shapes())
    flat = data.draw(flat_ranges(shape))
    parts = list(flat.boxes(shape))
    found = [position for box in parts for position in select(positions(shape), box).ravel()]
    assert found == list(range(flat.start, flat.stop))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@given(st.data())
def test_a_box_is_flat_exactly_when_its_positions_are_one_run(data):
    shape = data.draw(shapes())
    box = data.draw(regular_boxes(shape))
    held = select(positions(shape), box).ravel()
    is_run = list(held) == list(range(held[0], held[0] + len(held)))
    flat = as_flat(box, shape)
    assert (flat == FlatRange(int(held[0]), len(held))) if is_run else flat is None


@given(st.data())
def test_intersection_of_boxes(data):
    shape = data.draw(shapes())
    a, b = data.draw(regular_boxes(shape)), data.draw(regular_boxes(shape))
    expected = set(select(positions(shape), a).ravel()) & set(select(positions(shape), b).ravel())
    met = a.intersect(b)
    assert (set(select(positions(shape), met).ravel()) if met else set()) == expected
    assert met == b.intersect(a)


@given(st.data())
def test_intersection_of_flat_ranges(data):
    shape = data.draw(shapes())
    a, b = data.draw(flat_ranges(shape)), data.draw(flat_ranges(shape))
    met = a.intersect(b)
    expected = set(range(a.start, a.stop)) & set(range(b.start, b.stop))
    assert (set(range(met.start, met.stop)) if met else set()) == expected


@given(st.data())
def test_ravel_and_strides_agree_with_numpy(data):
    shape = data.draw(shapes())
    box = data.draw(regular_boxes(shape))
    assert ravel(box.start, shape) == np.ravel_multi_index(box.start, shape) if shape else True
    assert tuple(stride // 8 for stride in positions(shape).strides) == row_major_strides(shape)


def test_relative_to_moves_the_origin():
    assert Box((3, 5), (2, 2)).relative_to((1, 5)) == Box((2, 0), (2, 2))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,)])
def test_edges(shape):
    whole = Box.whole(shape)
    assert whole.size == numel(shape)
    assert whole.within(shape)
    assert sum(box.size for box in boxes(whole, shape)) == numel(shape)
    assert sum(box.size for box in boxes(FlatRange(0, numel(shape)), shape)) == numel(shape)
    assert not FlatRange(1, numel(shape)).within(shape)


def test_mesh_ranks_count_row_major():
    mesh = Mesh({"pp": 2, "dp": 3, "tp": 2})
    assert mesh.size == 12
    assert mesh["dp"] == 3
    assert mesh["ep"] == 1
    assert [mesh.rank(c) for c in mesh.coordinates()] == list(range(12))
    assert [mesh.coordinate(rank) for rank in range(12)] == list(mesh.coordinates())
    assert str(mesh) == "pp2 dp3 tp2"
    assert str(Mesh({})) == "1 rank"


@pytest.mark.parametrize("axes", [(("dp", 2), ("dp", 3)), (("dp", 0),)])
def test_mesh_refuses_nonsense(axes):
    with pytest.raises(UsageError):
        Mesh(axes)


def test_mesh_refuses_a_rank_off_it():
    with pytest.raises(UsageError, match="rank 4"):
        Mesh({"dp": 4}).coordinate(4)
