"""Parts of blocks, and where blocks lie in strided shards, against their elements."""

from __future__ import annotations

import itertools

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ucp.layout import (
    Block,
    Compiled,
    FlatRange,
    Region,
    Shape,
    View,
    clip,
    compile_layout,
    linear,
    row_major_strides,
)
from ucp.testing.equations import Equation, equations
from ucp.testing.strategies import regions

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
@given(compiled_blocks())
def test_linear_is_the_place_in_a_strided_shard(found: tuple[Block, Shape, View]) -> None:
    block, shard, view = found
    strides = row_major_strides(shard)
    offset, steps = linear(block, strides)
    index = list(itertools.product(*(range(n) for n in block.box.shape)))
    assert [offset + dot(list(at), steps) for at in index] == [at for _, at in pairs(block, shard, view)]
