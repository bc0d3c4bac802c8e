"""Parts of blocks, and blocks restated in other views, against their elements."""

from __future__ import annotations

import itertools
import math

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ucp.layout import (
    Block,
    Box,
    Compiled,
    FlatRange,
    Region,
    Shape,
    View,
    clip,
    coarsen,
    compile_layout,
    in_view,
    linear,
    refine,
    restate,
    row_major_strides,
    spread,
)
from ucp.testing.equations import Equation, equations
from ucp.testing.strategies import regions, regular_boxes

Pairs = set[tuple[int, int]]
"""(row-major position in the logical tensor, row-major position in the shard)."""


def pairs(block: Block, shard: Shape, view: View) -> list[tuple[int, int]]:
    """Every element of `block`: where it is in the logical tensor and where in the shard."""
    found = []
    for index in itertools.product(*(range(n) for n in block.box.shape)):
        at = list(block.start)
        for i, (dim, stride) in zip(index, block.steps, strict=True):
            if i:
                at[dim] += i * stride
        there = [a + i for a, i in zip(block.box.start, index, strict=True)]
        found.append((dot(there, row_major_strides(view.shape)), dot(at, row_major_strides(shard))))
    return found


def dot(a: list[int], b: Shape) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def once(blocks: list[Block], shard: Shape, view: View) -> Pairs:
    found = [pair for block in blocks for pair in pairs(block, shard, view)]
    assert len(found) == len(set(found))
    return set(found)


@st.composite
def compiled_blocks(draw: st.DrawFn) -> tuple[Block, Shape, View]:
    """A block of some equation at some coordinate, with the shape of its shard and its view."""
    equation: Equation = draw(equations())
    coordinate = draw(st.sampled_from(list(equation.setting.mesh.coordinates())))
    found: Compiled = compile_layout(
        equation.source,
        equation.targets,
        setting=equation.setting,
        coordinate=coordinate,
        fixed=equation.fixed_at(coordinate, dict.fromkeys(equation.fixed, 0)),
        captured=equation.captured,
    )
    blocks = [(placed.block, view) for view, of in zip(found.views, found.blocks, strict=True) for placed in of]
    assume(blocks)
    block, view = draw(st.sampled_from(blocks))
    return block, found.shape, view


mixed = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@mixed
@given(st.data())
def test_clipping_keeps_what_lies_in_the_region(data: st.DataObject) -> None:
    block, shard, view = data.draw(compiled_blocks())
    region: Region = data.draw(regions(shard))
    parts = clip(block, shard, region)
    inside = positions(region, shard)
    assert once(parts, shard, view) == {pair for pair in pairs(block, shard, view) if pair[1] in inside}
    if isinstance(region, FlatRange):
        assert len(parts) <= max(1, 2 * len(view.shape) - 1)


def positions(region: Region, shape: Shape) -> set[int]:
    if isinstance(region, FlatRange):
        return set(range(region.start, region.stop))
    index = itertools.product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True)))
    return {dot(list(at), row_major_strides(shape)) for at in index}


@mixed
@given(st.data())
def test_a_box_of_the_view_keeps_its_part(data: st.DataObject) -> None:
    block, shard, view = data.draw(compiled_blocks())
    box = data.draw(regular_boxes(view.shape))
    part = block.within(box)
    inside = positions(box, view.shape)
    kept = {pair for pair in pairs(block, shard, view) if pair[0] in inside}
    assert (once([part], shard, view) if part else set()) == kept


@mixed
@given(compiled_blocks())
def test_linear_is_the_place_in_a_strided_shard(found: tuple[Block, Shape, View]) -> None:
    block, shard, view = found
    strides = row_major_strides(shard)
    offset, steps = linear(block, strides)
    index = list(itertools.product(*(range(n) for n in block.box.shape)))
    assert [offset + dot(list(at), steps) for at in index] == [at for _, at in pairs(block, shard, view)]


@st.composite
def factorings(draw: st.DrawFn, size: int) -> Shape:
    """`size` as a product, with ones now and then."""
    factors: list[int] = []
    while size > 1:
        factors.append(draw(st.sampled_from([n for n in range(2, size + 1) if size % n == 0])))
        size //= factors[-1]
    for _ in range(draw(st.integers(0 if factors else 1, 2))):
        factors.insert(draw(st.integers(0, len(factors))), 1)
    return tuple(factors)


@st.composite
def views(draw: st.DrawFn, shape: Shape) -> View:
    return View(tuple(draw(factorings(size)) for size in shape))


@st.composite
def blocks_in_views(draw: st.DrawFn) -> tuple[Block, Shape, View]:
    """A box of a view of a small tensor, in a shard with its factors in another order."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6, 12, 16, 24]), min_size=1, max_size=2)))
    view = draw(views(shape))
    box = draw(regular_boxes(view.shape))
    order = draw(st.permutations(range(len(view.shape))))
    shard = tuple(box.shape[i] for i in order)
    strides = row_major_strides(shard)
    steps = tuple((0, strides[order.index(i)]) if n > 1 else (-1, 0) for i, n in enumerate(box.shape))
    return Block(box, (0,), steps), (math.prod(shard),), view


@mixed
@given(st.data())
def test_restated_blocks_are_the_same_elements(data: st.DataObject) -> None:
    block, shard, view = data.draw(blocks_in_views())
    to = refine(view, data.draw(views(view.tensor)))
    assume(to is not None)
    assert once(restate(block, view, to), shard, to) == set(pairs(block, shard, view))


@mixed
@given(st.data())
def test_boxes_of_the_tensor_in_a_view(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 4, 6, 12, 24]), min_size=1, max_size=3).map(tuple))
    box, to = data.draw(regular_boxes(shape)), data.draw(views(shape))
    found = in_view(box, View.plain(shape), to)
    assert once(found, shape, to) == {(at, at) for at in positions(box, shape)}
    bound = math.prod(2 * len(group) - 1 for group in to.factors)
    assert len(found) <= bound


@mixed
@given(st.data())
def test_spread_blocks_are_the_same_elements(data: st.DataObject) -> None:
    block, shard, view = data.draw(blocks_in_views())
    to = coarsen(view, data.draw(views(view.tensor)))
    assert once(list(spread(block, view, to)), shard, to) == set(pairs(block, shard, view))


@given(st.data())
def test_a_refinement_refines_both(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 4, 6, 12, 24]), max_size=2).map(tuple))
    a, b = data.draw(views(shape)), data.draw(views(shape))
    fine = refine(a, b)
    if fine is None:
        assert any(not dividing(x, y) for x, y in zip(a.factors, b.factors, strict=True))
        return
    assert fine.tensor == shape
    assert refine(fine, a) == refine(fine, b) == fine == refine(b, a)
    assert coarsen(fine, a).factors == refine(a, a).factors


def dividing(a: Shape, b: Shape) -> bool:
    strides = sorted({*row_major_strides(a), *row_major_strides(b), math.prod(a)})
    return all(y % x == 0 for x, y in itertools.pairwise(strides))


def test_spreading_joins_what_stays_evenly_apart() -> None:
    whole = Block(Box((0, 0), (4, 6)), (0,), ((0, 6), (0, 1)))
    (block,) = spread(whole, View(((4, 6),)), View(((24,),)))
    assert block == Block(Box((0,), (24,)), (0,), ((0, 1),))
    swapped = Block(Box((0, 0), (2, 3)), (0,), ((0, 1), (0, 2)))
    assert len(list(spread(swapped, View(((2, 3),)), View(((6,),))))) == 2


def test_an_empty_tensor_has_views_too() -> None:
    a, b = View(((0,), (4,))), View(((2, 0), (2, 2)))
    fine = refine(a, b)
    assert fine == View(((0,), (2, 2)))
    assert in_view(Box((0, 0), (0, 4)), a, fine) == []
