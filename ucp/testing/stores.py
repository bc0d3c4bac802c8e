"""What every store must do. Inherit `StoreConformance` and give it a fixture ``store`` with an empty store.

>>> class TestMine(StoreConformance):
...     @pytest.fixture
...     def store(self, tmp_path):
...         return open_store(str(tmp_path / "root"))
"""

from __future__ import annotations

import pickle

import pytest

from ucp.errors import ConflictError, CorruptError, NotFoundError, UsageError
from ucp.store import Store

_DATA = bytes(range(256)) * 5


class StoreConformance:
    """Tests of the contract in `ucp.store.base.Store`."""

    def test_what_is_put_is_read(self, store: Store) -> None:
        """Whole and by range."""
        store.put("a/b.bin", _DATA)
        assert store.read("a/b.bin") == _DATA
        assert store.read("a/b.bin", 100, 50) == _DATA[100:150]
        assert store.read("a/b.bin", 1280, 0) == b""
        assert store.entry("a/b.bin").size == len(_DATA)
        assert store.exists("a/b.bin")

    def test_reading_past_the_end_is_an_error(self, store: Store) -> None:
        """A truncated object is never taken for zeros."""
        store.put("a", _DATA)
        with pytest.raises(CorruptError, match="early"):
            store.read_into("a", len(_DATA) - 1, bytearray(2))

    def test_a_missing_object_is_not_found(self, store: Store) -> None:
        """In every way of asking."""
        for ask in (store.entry, store.read):
            with pytest.raises(NotFoundError):
                ask("nothing/here")
        with pytest.raises(NotFoundError):
            store.read_into("nothing", 0, bytearray(1))
        assert not store.exists("nothing")
        assert store.children("nothing") == []
        assert list(store.entries("nothing")) == []

    def test_a_folder_is_not_an_object(self, store: Store) -> None:
        """Folders have no entry."""
        store.put("a/b", b"1")
        assert not store.exists("a")

    def test_a_writer_makes_the_object_when_closed(self, store: Store) -> None:
        """In pieces, in order."""
        with store.create("deep/er/object", len(_DATA)) as writer:
            writer.write_at(0, _DATA[:1000])
            writer.write_at(1000, memoryview(bytearray(_DATA[1000:])))
        assert store.read("deep/er/object") == _DATA

    def test_a_writer_replaces_a_longer_object(self, store: Store) -> None:
        """Nothing of the old one is left."""
        store.put("a", _DATA)
        with store.create("a", 3) as writer:
            writer.write_at(0, b"xyz")
        assert store.read("a") == b"xyz"

    def test_an_empty_object(self, store: Store) -> None:
        """Is an object."""
        with store.create("empty", 0):
            pass
        store.put("empty2", b"")
        assert store.read("empty") == store.read("empty2") == b""

    def test_listing(self, store: Store) -> None:
        """Sorted, by prefix, with sizes; children show folders."""
        for path in ("b/2", "b/1", "a", "bc/3"):
            store.put(path, path.encode())
        assert [entry.path for entry in store.entries()] == ["a", "b/1", "b/2", "bc/3"]
        assert [entry.path for entry in store.entries("b/")] == ["b/1", "b/2"]
        assert [entry.path for entry in store.entries("b")] == ["b/1", "b/2", "bc/3"]
        assert [entry.size for entry in store.entries("b/")] == [3, 3]
        assert list(store.entries()) == [store.entry(path) for path in ("a", "b/1", "b/2", "bc/3")]
        assert store.children() == ["a", "b/", "bc/"]
        assert store.children("b") == ["1", "2"]

    def test_put_if_absent_has_one_winner(self, store: Store) -> None:
        """The second is told, and changes nothing."""
        store.put("a", b"first", if_absent=True)
        with pytest.raises(ConflictError):
            store.put("a", b"second", if_absent=True)
        assert store.read("a") == b"first"

    def test_put_replaces(self, store: Store) -> None:
        """Without the condition, the last one stays, and the fingerprint tells."""
        store.put("a", b"first")
        before = store.entry("a")
        assert store.read("a") == b"first"
        store.put("a", b"second!")
        assert store.read("a") == b"second!"
        with store.create("a", 3) as writer:
            writer.write_at(0, b"3rd")
        assert store.read("a") == b"3rd"
        assert store.entry("a") != before

    def test_delete(self, store: Store) -> None:
        """Twice is as good as once."""
        store.put("a/b", b"1")
        store.delete("a/b")
        store.delete("a/b")
        assert not store.exists("a/b")

    @pytest.mark.parametrize("name", ["ünï/ço dé", "a b", "x%2Fy", "x#y?z", "日本", "[1]*"])
    def test_unusual_names(self, store: Store, name: str) -> None:
        """Names are data."""
        store.put(name, b"1")
        assert store.read(name) == b"1"
        assert [entry.path for entry in store.entries()] == [name]

    @pytest.mark.parametrize("path", ["../out", "a/../../out", "/etc/passwd", "a\0b"])
    def test_no_path_leaves_the_store(self, store: Store, path: str) -> None:
        """Whatever a checkpoint names."""
        for ask in (store.entry, store.read, store.delete, store.children):
            with pytest.raises(UsageError):
                ask(path)
        with pytest.raises(UsageError):
            store.put(path, b"")
        with pytest.raises(UsageError):
            store.create(path, 0)

    def test_a_child_store_is_the_folder(self, store: Store) -> None:
        """Same bytes, shorter paths."""
        store.put("a/b/c", b"1")
        child = store.child("a/b")
        assert child.read("c") == b"1"
        assert child.url.endswith("a/b")

    def test_folders_that_overlap(self, store: Store) -> None:
        """The same one, one inside the other, but not one whose name begins with the other's."""
        a, below, beside = store.child("a"), store.child("a/b"), store.child("ab")
        assert a.overlaps(store.child("a"))
        assert a.overlaps(below)
        assert below.overlaps(a)
        assert not a.overlaps(beside)
        assert not beside.overlaps(a)

    def test_tidying_leaves_objects_alone(self, store: Store) -> None:
        """Whatever they are called."""
        store.put("a.tmp", b"1")
        store.tidy()
        assert store.read("a.tmp") == b"1"

    def test_stores_cross_process_boundaries(self, store: Store) -> None:
        """By pickle."""
        store.put("a", b"1")
        again: Store = pickle.loads(pickle.dumps(store))  # noqa: S301, TID251 - our own object
        assert again.url == store.url
        assert again.read("a") == b"1"
