"""What ranks have read between them: that one of them read what it should says nothing of what another one read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.catalog import Checksum
from ucp.errors import CorruptError
from ucp.run.crc import crc
from ucp.run.integrity import Ledger, Piece, Spans
from ucp.store import LocalStore
from ucp.testing.reading import noise
from ucp.train.checking import check_together
from ucp.train.crew import Crew

DATA = noise(1000)
SPANS = Spans([Checksum("x", 0, 1000, "crc32c", crc("crc32c", DATA))])


class Copies(LocalStore):
    """Of which each rank may read another copy."""

    copies = 2


@dataclass(frozen=True)
class Read:
    """What a rank has read: where, and whether from a damaged copy."""

    start: int
    stop: int
    damaged: bool = False

    def piece(self) -> Piece:
        data = bytearray(DATA[self.start : self.stop])
        if self.damaged:
            data[len(data) // 2] ^= 1
        return Piece(0, self.start, len(data), crc("crc32c", data))


def check(store: LocalStore, *ranks: Read) -> int:
    """The bytes read in addition."""
    extra, checked = check_together(Ledger(SPANS), [[one.piece()] for one in ranks], Crew.of(together=False), store)
    assert checked == 1000
    return extra


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    store = Copies(str(tmp_path_factory.mktemp("copies")))
    store.put("x", DATA)
    return store


def test_two_that_read_the_same_need_not_read_again(copies: Copies) -> None:
    assert check(copies, Read(0, 1000), Read(0, 1000), Read(0, 1000)) == 0
    assert check(copies, Read(0, 400), Read(400, 1000)) == 0


@pytest.mark.parametrize("order", [(True, False), (False, True), (False, False, True), (False, True, False)])
def test_a_damaged_copy_is_found_whoever_else_read_a_good_one(copies: Copies, order: tuple[bool, ...]) -> None:
    ranks = [Read(0, 1000, damaged) for damaged in order]
    with pytest.raises(CorruptError, match="fail their crc32c"):
        check(copies, *ranks)
    with pytest.raises(CorruptError, match="fail their crc32c"):
        check(LocalStore(copies.root), *ranks)


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 1000), st.booleans()), min_size=1, max_size=5))
def test_where_there_are_copies_no_damage_that_was_read_is_missed(
    copies: Copies, reads: list[tuple[int, int, bool]]
) -> None:
    """Whatever overlaps what."""
    ranks = [Read(0, 1000), *(Read(a, min(1000, a + n), damaged) for a, n, damaged in reads)]
    if any(rank.damaged for rank in ranks):
        with pytest.raises(CorruptError):
            check(copies, *ranks)
    else:
        check(copies, *ranks)


def test_parts_that_overlap_are_read_again_only_where_there_are_copies(copies: Copies) -> None:
    overlapping = (Read(0, 600), Read(500, 1000))
    assert check(copies, *overlapping) == 400 + 500
    assert check(LocalStore(copies.root), *overlapping) == 400
