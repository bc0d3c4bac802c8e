"""The stores that fail do fail, where they are told to, and count what everybody else counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucp.errors import StorageError, UsageError
from ucp.store import LocalStore, open_store
from ucp.testing.faults import Crash, Dying, Failing, Fault, Operation, crash, crashes, placed

NAMES = ["put", "create", "write_at", "write_at", "close", "flush", "children", "read", "delete"]


def work(folder: Path, fault: Fault) -> None:
    with placed(there=fault.around(LocalStore(str(folder)))):
        store = open_store("placed://there")
        store.put("a", b"1" * 10)
        with open_store("placed://there/below").create("b", 10) as writer:
            writer.write_at(0, b"01234")
            writer.write_at(5, b"56789")
        store.flush(["below/b"])
        store.children()
        assert store.read("below/b") == b"0123456789"
        store.delete("a")


def contents(folder: Path) -> dict[str, bytes]:
    store = LocalStore(str(folder))
    return {entry.path.partition(".")[0]: store.read(entry.path) for entry in store.entries()}


def test_every_operation_is_counted(tmp_path: Path) -> None:
    fault = Fault()
    work(tmp_path, fault)
    assert [operation.name for operation in fault.operations] == NAMES
    assert [operation.number for operation in fault.operations] == list(range(1, len(NAMES) + 1))
    assert [operation.path for operation in fault.operations[:2]] == ["a", "below/b"]
    assert crash(lambda fault: work(tmp_path, fault)) == Crash(None, "before", tuple(fault.operations))


def test_a_process_dies_at_each_of_them(tmp_path: Path) -> None:
    found = [(str(one.at), contents(tmp_path)) for one in crashes(lambda fault: work(tmp_path, fault))]
    assert [told.split()[1] for told, _ in found] == NAMES
    assert found[0] == ("1: put a", {})
    assert found[3] == ("4: write_at below/b", {"a": b"1" * 10, "below/b": b"01234" + bytes(5)})
    assert contents(tmp_path) == {"below/b": b"0123456789"}


def test_what_is_torn_is_there_by_half(tmp_path: Path) -> None:
    died = crash(lambda fault: work(tmp_path, fault), at=1, how="torn")
    assert died.at == Operation(1, "put", "a")
    assert not LocalStore(str(tmp_path)).exists("a")
    assert contents(tmp_path) == {"a": b"1" * 10}, "it has another name yet"
    crash(lambda fault: work(tmp_path, fault), at=4, how="torn")
    assert contents(tmp_path)["below/b"] == b"0123456" + bytes(3)


def test_what_is_killed_after_is_done(tmp_path: Path) -> None:
    crash(lambda fault: work(tmp_path, fault), at=1, how="after")
    assert LocalStore(str(tmp_path)).read("a") == b"1" * 10


def test_what_a_process_raises_is_told(tmp_path: Path) -> None:
    ended = crash(lambda fault: 1 / 0)
    assert ended.at is None
    assert "ZeroDivisionError" in str(ended)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        list(crashes(lambda fault: 1 / 0))


def test_storage_fails_once_or_for_ever(tmp_path: Path) -> None:
    once, lasting = Failing(LocalStore(str(tmp_path)), at=1), Failing(LocalStore(str(tmp_path)), at=2, lasting=True)
    with pytest.raises(StorageError, match="put fails on purpose"):
        once.put("a", b"1")
    once.put("a", b"1")
    assert lasting.exists("a")
    for _ in range(2):
        with pytest.raises(StorageError, match="on purpose"):
            lasting.read("a")


def test_a_dying_store_is_one_line(tmp_path: Path) -> None:
    def child(_: Fault) -> None:
        Dying(LocalStore(str(tmp_path)), at=2).put("a", b"1")
        Dying(LocalStore(str(tmp_path)), at=1).put("b", b"1")

    with pytest.raises(AssertionError, match="killed by signal 9"):
        crash(child)
    assert contents(tmp_path) == {"a": b"1"}


def test_places_are_there_for_a_while(tmp_path: Path) -> None:
    with pytest.raises(UsageError), placed(other=LocalStore(str(tmp_path))):
        open_store("placed://there")
    with placed(there=LocalStore(str(tmp_path))):
        open_store("placed://there/a").put("b", b"1")
    assert (tmp_path / "a" / "b").read_bytes() == b"1"
    with pytest.raises(UsageError):
        open_store("placed://there")
