"""Who writes what: everything once, evenly, and only what a rank can write."""

from __future__ import annotations

import random

import pytest

from ucp.errors import ConflictError
from ucp.format.native_shard import Piece
from ucp.layout import Box
from ucp.plan import Key
from ucp.train.save.plan import SLAB_BYTES, Holding, assign, slabs


def piece(name: str, shape, start=None, dtype="float32") -> Piece:
    return Piece(Key(name, "value"), dtype, Box(start or (0,) * len(shape), shape))


def no_buffer(_: Piece) -> bool:
    return False


def cells(box: Box) -> set[tuple[int, ...]]:
    found = {()}
    for start, length in zip(box.start, box.shape, strict=True):
        found = {(*cell, start + i) for cell in found for i in range(length)}
    return found


BOXES = [((5,), (3,)), ((2, 3), (0, 1)), ((1, 4, 2), (7, 0, 5)), ((), ()), ((1, 1), (4, 4)), ((6, 1), (0, 9))]


@pytest.mark.parametrize(("shape", "start"), BOXES)
@pytest.mark.parametrize("limit", [4, 8, 20, 1000])
def test_slabs_are_the_piece_in_order(monkeypatch, shape, start, limit) -> None:
    monkeypatch.setattr("ucp.train.save.plan.SLAB_BYTES", limit)
    whole = piece("w", shape, start)
    found = list(slabs(whole))
    assert sum(len(cells(one.box)) for one in found) == whole.box.size
    assert set().union(*(cells(one.box) for one in found)) == cells(whole.box)
    assert [one.box.start for one in found] == sorted(one.box.start for one in found)
    assert all(one.nbytes <= max(limit, 4) for one in found)


@pytest.mark.parametrize("seed", range(20))
def test_every_element_is_written_once_by_a_rank_that_holds_it(seed) -> None:
    rng = random.Random(seed)
    world = rng.randint(1, 5)
    pieces = [piece(f"w{i}", (rng.randint(1, 40), 1000)) for i in range(30)]
    held = [[one for one in pieces if rng.random() < 0.6] for _ in range(world)]
    plans = assign(3, [Holding(mine) for mine in held], no_buffer)
    written = [(cut.piece, rank) for rank, plan in enumerate(plans) for cut in plan.write]
    assert len({one for one, _ in written}) == len(written)
    assert {one for one, _ in written} == {one for mine in held for one in mine}
    assert all(cut.of in held[rank] for rank, plan in enumerate(plans) for cut in plan.write)
    for rank, plan in enumerate(plans):
        checked = {cut.piece for cut in plan.check}
        assert checked | {cut.piece for cut in plan.write} == set(held[rank])
        assert plan.version == 3


def test_what_all_hold_is_spread_by_bytes_around_what_each_has_alone() -> None:
    shared = [piece(f"s{i}", (SLAB_BYTES // 4,)) for i in range(6)] + [piece("large", (8, SLAB_BYTES // 8))]
    own = piece("own", (3, SLAB_BYTES // 4))
    plans = assign(1, [Holding([own, *shared]), Holding(shared), Holding(shared)], no_buffer)
    loads = [sum(cut.piece.nbytes for cut in plan.write) for plan in plans]
    assert sum(loads) == 13 * SLAB_BYTES
    assert max(loads) - min(loads) <= SLAB_BYTES
    assert [cut.piece for cut in plans[0].write if cut.of == own] == [own]


def test_of_a_buffer_the_lowest_rank_writes_its_copy_and_nobody_compares() -> None:
    plans = assign(1, [Holding([piece("w", (4,))]), Holding([piece("w", (4,))])], lambda _: True)
    assert [len(plan.write) for plan in plans] == [1, 0]
    assert [len(plan.check) for plan in plans] == [0, 0]
    assert plans[0].write[0].compare == ""


def test_copies_are_compared_on_the_device_only_where_all_of_them_are_there() -> None:
    both, mixed = piece("both", (4,)), piece("mixed", (4,))
    gpu = Holding([both, mixed], frozenset({both, mixed}))
    plans = assign(1, [gpu, Holding([both, mixed], frozenset({both}))], no_buffer)
    found = {cut.piece.key.name: cut.compare for plan in plans for cut in plan.write}
    assert found == {"both": "device", "mixed": "crc32c"}


def test_only_what_was_staged_is_written() -> None:
    one, two, large = piece("one", (4,)), piece("two", (4,)), piece("large", (4, SLAB_BYTES // 8))
    cut = list(slabs(large))
    first = Holding([one, two, large], staged=frozenset({one, *cut[:1]}))
    second = Holding([one, two, large], staged=frozenset({two, *cut[1:]}))
    plans = assign(2, [first, second], no_buffer)
    assert [{cut.piece for cut in plan.write} for plan in plans] == [{one, cut[0]}, {two, *cut[1:]}]
    with pytest.raises(ConflictError, match=r"two\[value\]: no rank has staged"):
        assign(2, [first, Holding([large], staged=second.staged)], no_buffer)
    plans = assign(2, [first, Holding([one, two, large])], no_buffer)
    assert {cut.piece for plan in plans for cut in plan.write} == {one, two, *cut}
    assert {cut.piece for cut in plans[0].write} <= first.staged


def test_a_piece_that_was_staged_whole_may_be_written_whole() -> None:
    large = piece("large", (4, SLAB_BYTES // 8))
    plans = assign(2, [Holding([large], staged=frozenset({large})), Holding([large], staged=frozenset())], no_buffer)
    assert [len(plan.write) for plan in plans] == [1, 0]
    assert plans[0].write[0].piece == large
