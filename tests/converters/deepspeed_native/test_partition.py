"""ZeRO's partitions as arithmetic: nothing is lost, nothing is twice there, padding is where DeepSpeed has it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ucp.converters._deepspeed_native.partition import (
    Piece,
    collected,
    dealt,
    flat_partition,
    held,
    partition_size,
    sliced_partition,
    sub_groups,
)

SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 40), min_size=1, max_size=8)
RANKS = st.integers(1, 9)


@given(SIZES, RANKS)
def test_flat_partitions_are_the_padded_whole_in_equal_parts(sizes: dict[str, int], dp: int) -> None:
    parts = [flat_partition(sizes, dp=dp, rank=rank) for rank in range(dp)]
    assert {sum(piece.length for piece in part) for part in parts} == {partition_size(sizes, dp=dp)}
    total = sum(sizes.values())
    padded = math.ceil(total / (2 * dp)) * 2 * dp
    assert spelled([piece for part in parts for piece in part]) == [*every(sizes), *[None] * (padded - total)]


@given(SIZES, RANKS)
def test_slices_hold_every_element_once(sizes: dict[str, int], dp: int) -> None:
    parts = [sliced_partition(sizes, dp=dp, rank=rank) for rank in range(dp)]
    assert {sum(p.length for p in part) for part in parts} == {sum(math.ceil(n / dp) for n in sizes.values())}
    assert sorted(place for part in parts for place in spelled(part) if place) == sorted(every(sizes))
    assert sum(map(held, parts)) == sum(sizes.values())


@given(SIZES, RANKS, st.integers(1, 60))
def test_sub_groups(sizes: dict[str, int], dp: int, most: int) -> None:
    groups = sub_groups(sizes, dp=dp, most=most)
    assert [name for group in groups for name in group] == list(sizes)
    widths = [[math.ceil(count / dp) for count in group.values()] for group in groups]
    assert all(sum(width) >= most for width in widths[:-1])
    assert all(sum(width[:-1]) < most for width in widths)


@given(st.lists(st.integers(), unique=True), RANKS)
def test_dealing_is_undone(numbers: list[int], dp: int) -> None:
    names = [str(number) for number in numbers]
    assert collected(dealt(names, dp=dp), dp=dp) == names


def test_a_group_smaller_than_its_ranks() -> None:
    """Whole partitions of padding, as one parameter of one element has them."""
    assert flat_partition({"gain": 1}, dp=3, rank=0) == [Piece("gain", 0, 1), Piece(None, 0, 1)]
    assert flat_partition({"gain": 1}, dp=3, rank=2) == [Piece(None, 0, 2)]
    assert sliced_partition({"gain": 1}, dp=3, rank=2) == [Piece(None, 0, 1)]
    assert sub_groups({}, dp=2, most=5) == []


@given(st.lists(st.integers(), unique=True), RANKS)
def test_dealt_in_turn(numbers: list[int], dp: int) -> None:
    """Parameter i goes to bucket i mod dp, and buckets follow each other."""
    names = [str(number) for number in numbers]
    buckets: dict[int, list[str]] = {}
    for number, name in enumerate(names):
        buckets.setdefault(number % dp, []).append(name)
    assert dealt(names, dp=dp) == [name for bucket in buckets.values() for name in bucket]


def every(sizes: dict[str, int]) -> list[tuple[str, int]]:
    return [(name, place) for name, count in sizes.items() for place in range(count)]


def spelled(pieces: list[Piece]) -> list[tuple[str, int] | None]:
    return [
        None if piece.name is None else (piece.name, piece.start + place)
        for piece in pieces
        for place in range(piece.length)
    ]
