"""Ranges become requests: nothing is left out, little is read in vain, nothing is too large."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucp.store.cloud.ranges import FREE_BYTES, GAP_BYTES, OVER_READ, PART_BYTES, fetches

PLACES = st.lists(
    st.tuples(st.integers(0, 64 << 20), st.one_of(st.integers(0, 4096), st.integers(0, 20 << 20))), max_size=12
)


def wanted(places):
    return [(offset, memoryview(bytes(length))) for offset, length in places]


@given(PLACES)
def test_every_range_is_fetched_whole(places):
    found = fetches(wanted(places))
    got = sorted((offset, len(buffer)) for fetch in found for offset, buffer in fetch.ranges)
    assert sum(length for _, length in got) == sum(length for _, length in places)
    for offset, length in places:
        # Parts of a range follow each other without a hole.
        at = offset
        for start, count in got:
            if start == at < offset + length:
                at += count
        assert at >= offset + length or any(start <= offset and start + count > offset for start, count in got)


@given(PLACES)
def test_requests_are_small_and_little_of_them_is_thrown_away(places):
    for fetch in fetches(wanted(places)):
        assert 0 < fetch.stop - fetch.start <= PART_BYTES
        covered = _covered(fetch)
        wasted = fetch.stop - fetch.start - covered
        assert wasted <= max((fetch.stop - fetch.start) / OVER_READ, 0) + FREE_BYTES * (len(fetch.ranges) - 1)
        for offset, buffer in fetch.ranges:
            assert fetch.start <= offset
            assert offset + len(buffer) <= fetch.stop


def _covered(fetch):
    covered, end = 0, fetch.start
    for offset, buffer in sorted(fetch.ranges, key=lambda entry: entry[0]):
        stop = offset + len(buffer)
        covered += max(0, stop - max(offset, end))
        end = max(end, stop)
    return covered


def test_neighbours_are_read_together():
    step = 4096 + FREE_BYTES
    (fetch,) = fetches(wanted([(number * step, 4096) for number in range(20)]))
    assert (fetch.start, fetch.stop) == (0, 19 * step + 4096)


def test_ranges_far_apart_are_not():
    assert len(fetches(wanted([(0, 1 << 20), ((1 << 20) + GAP_BYTES + 1, 1 << 20)]))) == 2
    assert len(fetches(wanted([(0, 1 << 20), ((1 << 20) + GAP_BYTES, 1 << 20)]))) == 1


def test_a_large_range_is_cut_in_equal_parts():
    found = fetches(wanted([(5, PART_BYTES + 2)]))
    assert [fetch.stop - fetch.start for fetch in found] == [PART_BYTES // 2 + 1] * 2
