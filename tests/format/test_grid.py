from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ucp.errors import UsageError
from ucp.format.grid import CHUNK_BYTES, Grid, inner_chunk
from ucp.layout import numel

SHAPES = st.lists(st.integers(1, 60), max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((), 4, ()),
        ((4096, 4096), 4, (256, 4096)),
        ((64, 512, 4096), 2, (1, 512, 4096)),
        ((8, 4096, 14336), 4, (1, 64, 14336)),
        ((100_000_007,), 4, (100_000_007,)),
        ((50261, 768), 4, (1, 768)),
        ((3, 50261), 4, (3, 50261)),
        ((30,), 4, (30,)),
    ],
)
def test_chunks_are_as_near_to_their_size_as_division_allows(
    shape: tuple[int, ...], size: int, expected: tuple[int, ...]
) -> None:
    assert inner_chunk(shape, size) == expected


@given(SHAPES, st.sampled_from([1, 2, 4, 8]))
def test_a_chunk_is_one_run_of_bytes_and_tiles_the_tensor(shape: tuple[int, ...], size: int) -> None:
    chunk = inner_chunk(shape, size)
    assert all(n % c == 0 for n, c in zip(shape, chunk, strict=True))
    first = next((dim for dim, c in enumerate(chunk) if c > 1), len(chunk))
    assert chunk[first + 1 :] == shape[first + 1 :]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3).map(tuple))
def test_the_index_stays_small(shape: tuple[int, ...]) -> None:
    chunk = numel(inner_chunk(shape, 4)) * 4
    assert 16 / chunk <= 0.01 or chunk == numel(shape) * 4


@given(SHAPES, st.integers(1, 3), st.integers(1, 4000))
def test_objects_cover_the_tensor_once_in_order(shape: tuple[int, ...], states: int, shard_bytes: int) -> None:
    grid = Grid.choose(states, shape, "float32", shard_bytes=shard_bytes)
    at = 0
    for number in range(grid.count):
        region = grid.region(number)
        assert region.start == at
        assert numel(grid.part_shape(number)) == region.length > 0
        assert grid.run_bytes(number) % grid.chunk_bytes == 0
        at = region.stop
    assert at == numel(shape)


def test_large_tensors_are_cut_near_the_wanted_size() -> None:
    grid = Grid.choose(3, (128256, 4096), "float32")
    sizes = [3 * grid.run_bytes(number) for number in range(grid.count)]
    assert len(sizes) == math.ceil(3 * 128256 * 4096 * 4 / (1 << 30))
    assert max(sizes) <= (1 << 30) + 3 * CHUNK_BYTES
    assert min(sizes) >= max(sizes) * 0.9


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple))
def test_without_elements_there_are_no_objects(shape: tuple[int, ...]) -> None:
    assume(not numel(shape))
    grid = Grid.choose(2, shape, "float32")
    assert grid.count == 0
    assert min(grid.chunk) >= 1


def test_objects_of_no_size_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Grid.choose(1, (4,), "float32", shard_bytes=0)
