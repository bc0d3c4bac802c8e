"""What every store must do. Inherit `StoreConformance` and give it a fixture ``store`` with an empty store.

>>> class TestMine(StoreConformance):
...     @pytest.fixture
...     def store(self, tmp_path):
...         return open_store(str(tmp_path / "root"))

A store that is only read inherits `ReadConformance` and has a fixture ``filled`` instead. A server that falls short
says how in its class, by the attributes here or by another version of a test: what it does is tested all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ClassVar

import pytest

from ucp.errors import ConflictError, UsageError
from ucp.store import Store
from ucp.testing.reading import DATA, Fill, ReadConformance, noise

_WRITERS = 8


class StoreConformance(ReadConformance):
    """Tests of the contract in `ucp.store.base.Store`."""

    many: ClassVar[int] = 1100
    """How many small objects are put: more than a page of any list."""

    in_place: ClassVar[bool] = False
    """Whether an object can be seen, unfinished, while `create` writes it."""

    @pytest.fixture
    def filled(self, store: Store) -> Fill:
        """Puts objects into ``store``."""

        def fill(objects: Mapping[str, bytes]) -> Store:
            for path, data in objects.items():
                store.put(path, data)
            return store

        return fill

    def winners(self, store: Store) -> range:
        """How many of several writers at once a condition may let through."""
        return range(1, 2) if store.conditional else range(1, _WRITERS + 1)

    def test_a_missing_folder_is_empty(self, store: Store) -> None:
        """As are the root of an empty store and what is in an object."""
        assert not [*store.children(), *store.children("nothing")]
        assert not [*store.entries(), *store.entries("nothing")]
        store.put("a", b"1")
        assert not [*store.children("a"), *store.entries("a/")]

    def test_a_writer_makes_the_object_when_closed(self, store: Store) -> None:
        """In pieces, in order."""
        with store.create("deep/er/object", len(DATA)) as writer:
            writer.write_at(0, DATA[:1000])
            if not self.in_place:
                assert not store.exists("deep/er/object")
            writer.write_at(1000, memoryview(bytearray(DATA[1000:])))
        assert store.read("deep/er/object") == DATA

    def test_a_large_object_is_written_in_pieces(self, store: Store) -> None:
        """Whose borders are not those of parts; two at once."""
        data = noise(self.large_bytes)
        piece = (3 << 20) + 1
        with store.create("a", len(data)) as a, store.create("b", len(data)) as b:
            for start in range(0, len(data), piece):
                a.write_at(start, memoryview(data)[start : start + piece])
                b.write_at(start, data[start : start + piece])
        store.flush(["a", "b"])
        assert store.read("a") == store.read("b") == data

    def test_a_large_put(self, store: Store) -> None:
        """Is one object like any other."""
        data = noise(self.large_bytes)
        store.put("a", memoryview(data))
        assert store.entry("a").size == len(data)
        assert store.read("a") == data

    def test_a_writer_replaces_a_longer_object(self, store: Store) -> None:
        """Nothing of the old one is left."""
        store.put("a", DATA)
        with store.create("a", 3) as writer:
            writer.write_at(0, b"xyz")
        assert store.read("a") == b"xyz"

    @pytest.mark.parametrize("large", [False, True])
    def test_a_writer_that_is_given_up_leaves_nothing(self, store: Store, large: bool) -> None:  # noqa: FBT001, RUF100
        """Neither the new object nor a hole where an old one was, except where it is written in place."""
        size = self.large_bytes if large else len(DATA)
        data = noise(size)
        store.put("old", b"old")
        for path in ("new", "old"):
            writer = store.create(path, size)
            writer.write_at(0, memoryview(data)[: size * 9 // 10])
            writer.abort()
            with suppress(ZeroDivisionError), store.create(path, size):
                raise ZeroDivisionError
        if not self.in_place:
            assert [entry.path for entry in store.entries()] == ["old"]
            assert store.read("old") == b"old"
        with store.create("new", size) as writer:
            writer.write_at(0, data)
        assert store.read("new") == data

    @pytest.mark.parametrize("large", [False, True])
    def test_what_is_replaced_stays_whole_until_then(self, store: Store, large: bool) -> None:  # noqa: FBT001, RUF100
        """And where the writer is given up, for good."""
        data = noise(self.large_bytes if large else 2 * len(DATA))
        store.put("a", DATA)
        with suppress(ZeroDivisionError), store.replace("a", len(data)) as writer:
            writer.write_at(0, data[: len(data) // 2])
            raise ZeroDivisionError
        assert store.read("a") == DATA
        with store.replace("a", len(data)) as writer:
            writer.write_at(0, data[:1000])
            assert store.read("a") == DATA
            writer.write_at(1000, data[1000:])
        assert store.read("a") == data
        assert [entry.path for entry in store.entries()] == ["a"]

    def test_an_empty_object(self, store: Store) -> None:
        """Is an object."""
        with store.create("empty", 0):
            pass
        store.put("empty2", b"")
        assert store.read("empty") == store.read("empty2") == b""
        assert [entry.path for entry in store.entries()] == ["empty", "empty2"]

    def test_listing(self, store: Store) -> None:
        """Sorted, by prefix, with sizes; children show folders."""
        for path in ("b/2", "b/1", "a", "bc/3", "b/d/e/4"):
            store.put(path, path.encode())
        assert [entry.path for entry in store.entries()] == ["a", "b/1", "b/2", "b/d/e/4", "bc/3"]
        assert [entry.path for entry in store.entries("b/")] == ["b/1", "b/2", "b/d/e/4"]
        assert [entry.path for entry in store.entries("b")] == ["b/1", "b/2", "b/d/e/4", "bc/3"]
        assert [entry.path for entry in store.entries("b/d/e/4")] == ["b/d/e/4"]
        assert [entry.size for entry in store.entries("b/")] == [3, 3, 7]
        assert list(store.entries()) == [store.entry(path) for path in ("a", "b/1", "b/2", "b/d/e/4", "bc/3")]
        assert store.children() == ["a", "b/", "bc/"]
        assert store.children("b") == ["1", "2", "d/"]
        assert store.children("b/d") == ["e/"]
        child = store.child("b")
        assert [entry.path for entry in child.entries()] == ["1", "2", "d/e/4"]
        assert child.children() == ["1", "2", "d/"]

    def test_many_objects(self, store: Store) -> None:
        """More than one page of a list, put by several threads; none is missing and none is there twice."""
        paths = [f"many/{number % 7}/{number:05}" for number in range(self.many)]
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda path: store.put(path, path.encode(), durable=False), paths))
        assert [(entry.path, entry.size) for entry in store.entries("many/")] == [
            (path, len(path)) for path in sorted(paths)
        ]
        assert store.children("many") == [f"{number}/" for number in range(7)]
        assert store.children("many/3") == [path[7:] for path in sorted(paths) if path.startswith("many/3/")]
        for path in paths[:: self.many // 7]:
            assert store.read(path) == path.encode()

    def test_lists_show_what_is_there_now(self, store: Store) -> None:
        """At once: each object after its put, none after its deletion, the new size after it was replaced."""
        for number in range(10):
            store.put(f"a/{number}", b"1")
            assert [entry.path for entry in store.entries("a/")] == [f"a/{n}" for n in range(number + 1)]
            assert store.children("a")[-1] == str(number)
        store.put("a/3", b"123")
        assert [entry.size for entry in store.entries("a/")][3] == 3
        for number in range(10):
            store.delete(f"a/{number}")
            assert f"a/{number}" not in [entry.path for entry in store.entries()]
        assert list(store.entries()) == []

    def test_put_if_absent_has_one_winner(self, store: Store) -> None:
        """The second is told, and changes nothing."""
        store.put("a", b"first", if_absent=True)
        with pytest.raises(ConflictError):
            store.put("a", b"second", if_absent=True)
        assert store.read("a") == b"first"
        store.delete("a")
        store.put("a", b"third", if_absent=True)
        assert store.read("a") == b"third"

    def test_put_if_match_replaces_only_what_was_seen(self, store: Store) -> None:
        """Not what somebody else put meanwhile, and not what is gone."""
        store.put("a", b"first")
        seen = store.entry("a").fingerprint
        store.put("a", b"second", if_match=seen)
        assert store.read("a") == b"second"
        with pytest.raises(ConflictError):
            store.put("a", b"third", if_match=seen)
        assert store.read("a") == b"second"
        store.delete("a")
        with pytest.raises(ConflictError):
            store.put("a", b"fourth", if_match=seen)
        assert not store.exists("a")

    def test_the_fingerprint_of_a_list_serves_as_a_condition(self, store: Store) -> None:
        """As well as that of an entry."""
        store.put("a", b"first")
        (seen,) = store.entries("a")
        store.put("a", b"second", if_match=seen.fingerprint)
        assert store.read("a") == b"second"

    def test_of_many_that_create_an_object_one_wins(self, store: Store) -> None:
        """And what it put is what stays."""
        for turn in range(5):
            path = f"race/{turn}"
            won = self._race(store, turn, lambda one, data, path=path: one.put(path, data, if_absent=True))  # type: ignore[misc]
            assert len(won) in self.winners(store)
            assert store.read(path) in won

    def test_of_many_that_replace_an_object_one_wins(self, store: Store) -> None:
        """Where the store locks, they lock."""
        store.put("race", b"before")
        for turn in range(5):
            seen = store.entry("race").fingerprint

            def replace(one: Store, data: bytes, seen: str = seen) -> None:
                with one.exclusive():
                    one.put("race", data, if_match=seen)

            won = self._race(store, turn, replace)
            assert len(won) in self.winners(store)
            assert store.read("race") in won

    def _race(self, store: Store, turn: int, write: Callable[[Store, bytes], None]) -> list[bytes]:
        """The contents of those that were not told of a conflict."""
        ready = threading.Barrier(_WRITERS)

        def run(number: int) -> bytes | None:
            one, data = store.child(""), noise(1000 + number + _WRITERS * turn)
            ready.wait()
            try:
                write(one, data)
            except ConflictError:
                return None
            return data

        with ThreadPoolExecutor(_WRITERS) as pool:
            return [data for data in pool.map(run, range(_WRITERS)) if data is not None]

    def test_what_is_replaced_while_it_is_read_is_never_mixed(self, store: Store) -> None:
        """An object is the old one or the new one."""
        versions = [bytes([letter]) * 300_000 for letter in b"ab"]
        store.put("a", versions[0])
        done = threading.Event()

        def replace() -> None:
            for number in range(40):
                store.put("a", versions[number % 2], durable=False)
            done.set()

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(replace)
            while not done.is_set() and not writing.done():
                assert store.read("a", 0, 300_000) in versions
            writing.result()

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

    @pytest.mark.parametrize("path", ["../out", "a/../../out", "/etc/passwd", "a\0b"])
    def test_no_path_leaves_the_store(self, store: Store, path: str) -> None:
        """Whatever a checkpoint names."""
        for ask in (store.delete, store.children):
            with pytest.raises(UsageError):
                ask(path)
        with pytest.raises(UsageError):
            store.put(path, b"")
        with pytest.raises(UsageError):
            store.create(path, 0)

    def test_tidying_leaves_objects_alone(self, store: Store) -> None:
        """Whatever they are called."""
        store.put("a.tmp", b"1")
        store.tidy()
        assert store.read("a.tmp") == b"1"


__all__ = ["ReadConformance", "StoreConformance"]
