"""What every store must do that can be read, if only read. `StoreConformance` in `ucp.testing.stores` has it all."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ClassVar

import pytest

from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.store import Store

Fill = Callable[[Mapping[str, bytes]], Store]
"""Makes objects with the given contents and gives the store that has them."""

DATA = bytes(range(256)) * 5

NAMES = (
    "ünï/ço dé",
    "a b",
    "x%2Fy",
    "x#y?z",
    "日本/語",
    "[1]*",
    "🙂",
    "é",  # one code point
    "e\u0301",  # the same to the eye, in two
    "a+b",
    "a&b=c;d,e",
    "'quoted' \"twice\"",
    "$HOME `x` ~ ^ | <>{}",
    "%41%",
    " lead/trail ",
    ".hidden/..not",
    "a@v1:b!",
    "long/" + "x" * 200,
)
"""Names that some store or protocol might take for something else."""


@cache
def noise(length: int) -> bytes:
    """Bytes of which no part looks like another."""
    return random.Random(length).randbytes(length)  # noqa: S311, RUF100


class ReadConformance:
    """Tests of what `ucp.store.base.Store` says of reading. Inherit it and give it a fixture ``filled``, a `Fill`."""

    large_bytes: ClassVar[int] = (33 << 20) + 13
    """Size of a large object: several parts, whatever the store takes for one, and a rest."""

    def test_objects_are_read_whole_and_by_range(self, filled: Fill) -> None:
        """And their entries tell their sizes."""
        store = filled({"a/b.bin": DATA, "a/empty": b""})
        assert store.read("a/b.bin") == DATA
        assert store.read("a/b.bin", 100, 50) == DATA[100:150]
        assert store.read("a/b.bin", 1279) == DATA[1279:]
        assert store.read("a/b.bin", 1280, 0) == store.read("a/empty") == b""
        assert store.entry("a/b.bin").size == len(DATA)
        assert store.entry("a/b.bin") == store.entry("a/b.bin")
        assert store.exists("a/b.bin")

    def test_reading_past_the_end_is_an_error(self, filled: Fill) -> None:
        """A truncated object is never taken for zeros."""
        store = filled({"a": DATA, "empty": b""})
        for path, offset, length in (("a", len(DATA) - 1, 2), ("a", len(DATA), 1), ("a", 5000, 3), ("empty", 0, 1)):
            with pytest.raises(CorruptError, match="early"):
                store.read_into(path, offset, bytearray(length))
            with pytest.raises(CorruptError, match="early"):
                store.read_runs(path, [0, offset], length, memoryview(bytearray(2 * length)))

    def test_a_missing_object_is_not_found(self, filled: Fill) -> None:
        """In every way of asking."""
        store = filled({"there": DATA})
        for ask in (store.entry, store.read):
            with pytest.raises(NotFoundError):
                ask("nothing/here")
        with pytest.raises(NotFoundError):
            store.read_into("nothing", 0, bytearray(1))
        with pytest.raises(NotFoundError):
            store.read_ranges("nothing", [(0, memoryview(bytearray(1))), (50, memoryview(bytearray(1)))])
        with pytest.raises(NotFoundError):
            store.read_runs("nothing", [0, 9], 1, memoryview(bytearray(2)))
        assert not store.exists("nothing")

    def test_a_folder_is_not_an_object(self, filled: Fill) -> None:
        """Folders have no entry."""
        store = filled({"a/b": b"1"})
        assert not store.exists("a")

    def test_ranges_are_read_in_any_order(self, filled: Fill) -> None:
        """Next to each other, far apart, overlapping, and empty."""
        store = filled({"a": DATA})
        wanted = [(1000, 10), (0, 4), (4, 6), (2, 7), (1279, 1), (5, 0)]
        buffers = [bytearray(length) for _, length in wanted]
        store.read_ranges("a", [(at, memoryview(buffer)) for (at, _), buffer in zip(wanted, buffers, strict=True)])
        assert buffers == [bytearray(DATA[at : at + length]) for at, length in wanted]
        with pytest.raises(CorruptError, match="early"):
            store.read_ranges("a", [(0, memoryview(bytearray(4))), (1279, memoryview(bytearray(2)))])

    def test_runs_are_read_one_after_the_other(self, filled: Fill) -> None:
        """In the order that was asked for."""
        store = filled({"a": DATA})
        offsets = [1200, 0, 3, 1277, 0]
        buffer = bytearray(15)
        store.read_runs("a", offsets, 3, memoryview(buffer))
        assert buffer == b"".join(DATA[at : at + 3] for at in offsets)

    def test_a_large_object_is_read_by_many_at_once(self, filled: Fill) -> None:
        """Whole, in ranges far apart, and across the borders of any parts."""
        data = noise(self.large_bytes)
        store = filled({"large": data})
        whole = bytearray(len(data))
        store.read_into("large", 0, whole)
        assert whole == data
        step = len(data) // 16
        with ThreadPoolExecutor(8) as pool:
            pieces = pool.map(lambda at: store.read("large", at, min(step, len(data) - at)), range(0, len(data), step))
            assert b"".join(pieces) == data
        wanted = [(at - 50_000, 100_000) for at in range(3 << 20, len(data) - 50_000, 3 << 20)]
        buffers = [bytearray(length) for _, length in wanted]
        store.read_ranges("large", [(at, memoryview(buffer)) for (at, _), buffer in zip(wanted, buffers, strict=True)])
        assert buffers == [data[at : at + length] for at, length in wanted]

    @pytest.mark.parametrize("name", NAMES)
    def test_unusual_names(self, filled: Fill, name: str) -> None:
        """Names are data."""
        store = filled({name: b"12"})
        assert store.read(name) == b"12"
        assert store.entry(name).size == 2
        if store.lists:
            assert [entry.path for entry in store.entries()] == [name]
            folder, _, last = name.rpartition("/")
            assert store.children(folder) == [last]
            assert [entry.path for entry in store.entries(name)] == [name]

    def test_names_that_look_the_same_are_not(self, filled: Fill) -> None:
        """In Unicode, in case, in escapes."""
        objects = {name: name.encode() for name in ("é", "e\u0301", "A", "a", "a%20b", "a b", "a+b")}
        store = filled(objects)
        assert {name: store.read(name) for name in objects} == objects

    @pytest.mark.parametrize("path", ["../out", "a/../../out", "/etc/passwd", "a\0b"])
    def test_no_path_leads_out_of_the_store(self, filled: Fill, path: str) -> None:
        """Whatever a checkpoint names."""
        store = filled({"a/b": DATA})
        for ask in (store.entry, store.read, store.exists):
            with pytest.raises(UsageError):
                ask(path)
        with pytest.raises(UsageError):
            store.read_into(path, 0, bytearray(1))

    def test_a_child_store_is_the_folder(self, filled: Fill) -> None:
        """Same bytes, shorter paths."""
        store = filled({"a/b/c": b"1", "a/bb/c": b"2"})
        child = store.child("a/b")
        assert child.read("c") == b"1"
        assert child.url.endswith("a/b")
        assert not child.exists("b/c")

    def test_a_sibling_is_the_folder_beside(self, filled: Fill) -> None:
        """Of a folder inside the store."""
        store = filled({"b/c": b"1"})
        assert store.child("a").sibling("b").read("c") == b"1"
        assert store.child("x/y").sibling("z").url.endswith("x/z")

    def test_folders_that_overlap(self, filled: Fill) -> None:
        """The same one, one inside the other, but not one whose name begins with the other's."""
        store = filled({})
        a, below, beside = store.child("a"), store.child("a/b"), store.child("ab")
        assert a.overlaps(store.child("a"))
        assert a.overlaps(below)
        assert below.overlaps(a)
        assert not a.overlaps(beside)
        assert not beside.overlaps(a)

    def test_stores_cross_process_boundaries(self, filled: Fill) -> None:
        """By pickle."""
        store = filled({"a": b"1"})
        again: Store = pickle.loads(pickle.dumps(store))  # noqa: S301, TID251 - our own object
        assert again.url == store.url
        assert again.read("a") == b"1"
