from __future__ import annotations

import os
import zlib

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.catalog import Checksum
from ucp.errors import CorruptError
from ucp.run.integrity import Ledger, Spans
from ucp.store import open_store

DATA = os.urandom(1000)
CRC = {"crc32": zlib.crc32, "crc32c": crc32c.crc32c}
CUTS = [(0, 100), (100, 450), (600, 399)]


def checksums(data=DATA):
    """Spans with a gap between them, of both algorithms."""
    kinds = ["crc32", "crc32c", "crc32"]
    return [Checksum("f", a, n, kind, CRC[kind](data[a : a + n])) for (a, n), kind in zip(CUTS, kinds, strict=True)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("ledger")))
    store.put("f", DATA)
    return store


ranges = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(sorted)


@given(reads=st.lists(ranges, max_size=12), split=st.integers(0, 12))
def test_any_reads_in_any_order_by_two_workers_verify(store, reads, split):
    spans = Spans(checksums())
    workers = Ledger(spans), Ledger(spans)
    for number, (a, b) in enumerate(reads):
        workers[number < split].record("f", a, memoryview(DATA)[a:b])
    whole = Ledger(spans)
    for worker in workers:
        whole.add(worker.pieces())
    extra = whole.verify(store)
    read = {position for a, b in reads for position in range(a, b)}
    touched = [range(a, a + n) for a, n in CUTS if read & set(range(a, a + n))]
    assert sum(len(set(span) - read) for span in touched) <= extra <= sum(map(len, touched))


@given(at=st.integers(0, 999), reads=st.lists(ranges, min_size=1, max_size=6))
def test_a_flipped_bit_in_a_touched_span_is_found(store, at, reads):
    damaged = bytearray(DATA)
    damaged[at] ^= 4
    other = open_store("memory://flipped")
    other.put("f", damaged)
    ledger = Ledger(Spans(checksums()))
    for a, b in reads:
        ledger.record("f", a, memoryview(damaged)[a:b])
    hit = [(a, n) for a, n in CUTS if a <= at < a + n]
    touched = hit and any(max(a, hit[0][0]) < min(b, sum(hit[0])) for a, b in reads)
    if touched:
        with pytest.raises(CorruptError, match="f: bytes"):
            ledger.verify(other)
    else:
        ledger.verify(other)


def test_only_whole_spans_can_be_asked_for(store):
    ledger = Ledger(Spans(checksums()))
    wrong = bytearray(50)
    ledger.record("f", 0, memoryview(wrong))
    assert ledger.verify(store, gap=0) == 0
    with pytest.raises(CorruptError):
        ledger.verify(store)


def test_neighbours_are_joined():
    ledger = Ledger(Spans(checksums()))
    for a in range(100, 550, 10):
        ledger.record("f", a, memoryview(DATA)[a : a + 10])
    assert len(ledger.pieces()) == 1
