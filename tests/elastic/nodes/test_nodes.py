"""Several nodes as one store: where copies lie, what is lost with a node, and what half of an object is never seen."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.elastic.nodes.conftest import Nodes
from tests.elastic.nodes.processes import eventually, files
from ucp.catalog import Checksum
from ucp.elastic.nodes import NodeFolder, NodesStore, RemoteNode
from ucp.errors import ConflictError, CorruptError, NotFoundError, StorageError, UsageError
from ucp.run.crc import crc
from ucp.store import Writer
from ucp.testing.reading import noise

Make = Callable[[int], Nodes]

DATA = noise(300_000)


def write(store: NodesStore, path: str, data: bytes = DATA) -> None:
    with store.create(path, len(data)) as writer:
        writer.write_at(0, data)


def test_an_object_lies_on_its_writer_and_its_buddies_and_a_put_on_all(make_nodes: Make) -> None:
    nodes = make_nodes(4)
    store = nodes.store("b", copies=2)
    assert store.targets == ("b", "c")
    write(store, "e1/s1/shard")
    store.put("e1/s1/root", b"1")
    assert store.holders("e1/s1/shard") == ("b", "c")
    assert store.holders("e1/s1/root") == ("a", "b", "c", "d")
    assert store.holders("nothing") == ()
    other = nodes.store("a")
    assert other.read("e1/s1/shard") == DATA
    found = other.child("e1").listing("s1/")
    assert {path: set(held) for path, held in found.items()} == {"s1/root": set("abcd"), "s1/shard": set("bc")}


def test_fingerprints_are_the_same_on_every_node(make_nodes: Make) -> None:
    """So that who reads on at another node does not take the copy for another object."""
    nodes = make_nodes(3)
    write(nodes.store("a", copies=3), "x")
    nodes.store("b").put("y", b"1")
    for path in ("x", "y"):
        assert len({nodes.folders[name].entry(path).fingerprint for name in nodes.names}) == 1
        assert len({nodes.store(name).entry(path).fingerprint for name in nodes.names}) == 1
    before = nodes.store("a").entry("y")
    nodes.store("c").put("y", b"2")
    assert nodes.store("a").entry("y").fingerprint != before.fingerprint


def test_a_lost_node_is_made_up_for_by_its_buddies(make_nodes: Make, caplog: pytest.LogCaptureFixture) -> None:
    nodes = make_nodes(3)
    write(nodes.store("b"), "x")
    store = nodes.store("a", timeout=5)
    assert store.read("x") == DATA
    listed = {entry.path: entry for entry in store.entries()}
    nodes.servers["b"].close()
    assert store.read("x") == DATA
    assert store.entry("x") == listed["x"]
    assert [entry.path for entry in store.entries()] == ["x"]
    store.delete("nothing")
    assert store.gone == ("b",)
    assert caplog.text.count("node b does not answer") == 1
    nodes.servers["c"].close()
    with pytest.raises(StorageError, match="node c"):
        store.entry("x")
    with pytest.raises(StorageError):
        store.read("x")
    assert list(store.entries()) == []
    with pytest.raises(StorageError, match="node"):
        write(store, "y")
    assert not [name for name in files(Path(store.folder.root)) if "y" in name]


def test_stores_of_folders_know_what_the_whole_one_knows(make_nodes: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Who is gone is told once, and not asked first in another folder."""
    nodes = make_nodes(3)
    store = nodes.store("a", timeout=5)
    store.tend("ab")
    nodes.servers["b"].close()
    assert store.child("v").children() == store.child("w").child("x").sibling("y").children() == []
    assert store.gone == store.child("z").gone == ("b",)
    assert caplog.text.count("node b does not answer") == 1
    assert store.child("v").tended == ("a", "c")


def test_what_a_node_has_lost_is_read_from_another(make_nodes: Make) -> None:
    """The whole object, or its end."""
    nodes = make_nodes(2)
    store = nodes.store("a")
    write(store, "x")
    write(store, "y")
    os.truncate(f"{nodes.folders['a'].root}/x", 1000)
    os.unlink(f"{nodes.folders['a'].root}/y")
    for path in ("x", "y"):
        assert store.read(path, 0, len(DATA)) == DATA
        view = memoryview(bytearray(20))
        store.read_runs(path, [299_000, 5], 10, view)
        assert view == DATA[299_000:299_010] + DATA[5:15]
    assert [(entry.path, entry.size) for entry in store.entries()] == [("x", len(DATA)), ("y", len(DATA))]
    assert store.entry("x").size == len(DATA), "the one that counts is known from the list"
    os.truncate(f"{nodes.folders['b'].root}/x", 2000)
    with pytest.raises(CorruptError, match="early"):
        store.read("x", 0, len(DATA))


def test_damaged_copies_are_found_and_removed(make_nodes: Make, caplog: pytest.LogCaptureFixture) -> None:
    nodes = make_nodes(2)
    store = nodes.store("a")
    for path in ("v/x", "v/y", "v/z"):
        write(store, path)
    with open(f"{nodes.folders['a'].root}/v/x", "r+b") as file:
        file.seek(200_000)
        file.write(b"wrong")
    os.truncate(f"{nodes.folders['a'].root}/v/z", 7)
    checksums = [
        Checksum(path, at, 150_000, "crc32c", crc("crc32c", DATA[at : at + 150_000]))
        for path in ("x", "y", "z", "missing")
        for at in (0, 150_000)
    ]
    assert store.child("v").scrub(checksums) == ("x", "z")
    assert store.child("v").read("x") == store.read("v/z") == DATA
    assert store.holders("v/x") == ("b",)
    assert caplog.text.count("is damaged, and is removed") == 2
    assert store.child("v").scrub(checksums) == ()


@pytest.mark.parametrize("written", [0, 1, 100_000, 299_999])
def test_what_is_not_written_to_the_end_is_nowhere(make_nodes: Make, written: int) -> None:
    nodes = make_nodes(2)
    store = nodes.store("a")
    writer = store.create("x", len(DATA))
    writer.write_at(0, DATA[:written])
    with pytest.raises(StorageError, match="written"):
        writer.close()
    writer = store.create("x", len(DATA))
    writer.write_at(0, DATA[:written])
    with pytest.raises(StorageError, match="written after"):
        writer.write_at(written + 1, b"1")
    writer.abort()
    for name in nodes.names:
        assert list(nodes.folders[name].entries()) == []
        assert eventually(lambda name=name: files(Path(nodes.folders[name].root)) == [])  # type: ignore[misc]


def test_a_buddy_that_is_gone_in_the_middle_is_named(make_nodes: Make) -> None:
    """And nothing of the object is left."""
    nodes = make_nodes(3)
    store = nodes.store("a", timeout=5)
    writer = store.create("x", 64 << 20)
    writer.write_at(0, bytes(1 << 20))
    nodes.servers["b"].close()
    with pytest.raises(StorageError, match="node b is gone"):
        writer.write_at(1 << 20, bytes(63 << 20))
    writer.abort()
    assert files(Path(nodes.folders["a"].root)) == []
    assert eventually(lambda: files(Path(nodes.folders["b"].root)) == [])
    with pytest.raises(StorageError, match="node b is gone"):
        store.put("root", b"1")


def test_a_condition_is_decided_by_one_node(make_nodes: Make) -> None:
    nodes = make_nodes(3)
    a, c = nodes.store("a"), nodes.store("c")
    a.put("x", b"1", if_absent=True)
    with pytest.raises(ConflictError):
        c.put("x", b"2", if_absent=True)
    seen = c.entry("x").fingerprint
    a.put("x", b"3", if_match=seen)
    with pytest.raises(ConflictError):
        c.put("x", b"4", if_match=seen)
    assert {nodes.folders[name].read("x") for name in nodes.names} == {b"3"}


def test_copies_that_were_lost_are_made_again(make_nodes: Make) -> None:
    """By one of the nodes that are left, on one that has none; the same object, as its fingerprint says."""
    before = make_nodes(4)
    for name in before.names:
        write(before.store(name), f"v/{name}")
        write(before.store(name), f"w/{name}")
    before.store("a").put("v/root", b"1")
    lost = before.folders["c"].root
    before.close()
    shutil.rmtree(lost)
    os.mkdir(lost)
    (Path(lost) / "v").mkdir()
    nodes = Nodes(Path(lost).parent, 5)
    try:
        stores = {name: nodes.store(name) for name in nodes.names}
        found = {path: sorted(held) for path, held in stores["a"].listing("v/").items()}
        assert found["v/b"] == ["b"]
        assert found["v/c"] == ["d"]
        copied = {name: store.heal("v") for name, store in stores.items()}
        assert copied == {"a": 0, "b": len(DATA), "c": 0, "d": len(DATA), "e": 0}
        healed = stores["e"].listing("v/")
        assert {path: sorted(held) for path, held in healed.items()} == {
            "v/a": ["a", "b"],
            "v/b": ["b", "c"],
            "v/c": ["d", "e"],
            "v/d": ["a", "d"],
            "v/root": ["a", "b", "d"],
        }
        assert all(len({entry.fingerprint for entry in held.values()}) == 1 for held in healed.values())
        assert nodes.folders["e"].read("v/c") == nodes.folders["c"].read("v/b") == DATA
        assert len(stores["a"].holders("w/b")) == 1, "nobody asked"
        nodes.servers["c"].close()
        nodes.folders["c"].clear("v")
        nodes.folders["b"].delete("v/a")
        assert stores["a"].heal("v") == len(DATA)
        assert sum(store.heal("v") for store in stores.values()) == len(DATA)
        assert sorted(stores["a"].listing("v/")["v/b"]) == ["b", "d"]
    finally:
        nodes.close()


def test_copies_of_what_only_a_spare_node_has_are_made_by_who_tends_it(make_nodes: Make) -> None:
    nodes = make_nodes(4)
    write(nodes.store("a", copies=1), "v/x")
    write(nodes.store("c", copies=1), "v/x2")
    stores = {name: nodes.store(name) for name in "bcd"}
    for store in stores.values():
        store.tend("bcd")
    assert {name: store.heal("v") for name, store in stores.items()} == {"b": len(DATA), "c": len(DATA), "d": 0}
    found = stores["d"].listing("v/")
    assert {path: sorted(held) for path, held in found.items()} == {"v/x": ["a", "b"], "v/x2": ["c", "d"]}
    assert all(len({entry.fingerprint for entry in held.values()}) == 1 for held in found.values())
    assert nodes.folders["b"].read("v/x") == DATA


def test_what_is_removed_while_it_is_copied_stays_removed(make_nodes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = make_nodes(2)
    write(nodes.store("a", copies=1), "v/x")
    store = nodes.store("a")
    create = store.members["b"].create

    def removed(path: str, size: int, **options: Any) -> Writer:
        store.folder.clear("v")
        return create(path, size, **options)

    monkeypatch.setattr(store.members["b"], "create", removed)
    store.heal("v")
    assert list(store.entries()) == []


def test_of_copies_that_differ_all_nodes_read_the_same(make_nodes: Make) -> None:
    """As after nodes were apart from each other and each put its own."""
    nodes = make_nodes(3)
    nodes.folders["b"].put("root", b"older", stamp=10**18)
    nodes.folders["c"].put("root", b"newer", stamp=10**18 + 1)
    nodes.folders["a"].put("root", b"old", stamp=10**18 + 2)
    for name in nodes.names:
        for ask in (lambda one: one.read("root"), lambda one: list(one.entries()) and one.read("root")):
            assert ask(nodes.store(name)) == b"newer"
    assert nodes.store("a").entry("root") == next(nodes.store("b").entries())


def test_bytes_are_counted(make_nodes: Make) -> None:
    nodes = make_nodes(3)
    store = nodes.store("a", copies=3)
    write(store, "x")
    store.put("y", bytes(10))
    assert store.bytes_kept == len(DATA) + 10
    assert store.bytes_sent == store.child("v").bytes_sent == 2 * (len(DATA) + 10)
    assert store.bytes_received == 0
    assert store.read("x") == DATA
    assert store.bytes_received == 0, "its own copy is nearer"
    nodes.folders["a"].delete("x")
    assert store.read("x", 1000, 500) == DATA[1000:1500]
    assert store.bytes_received == 500


def test_a_folder_is_cleared_everywhere_and_no_other(make_nodes: Make) -> None:
    nodes = make_nodes(3)
    store = nodes.store("a")
    for path in ("e1/s1/x", "e1/s1/d/y", "e1/s2/x", "e1/s10/x"):
        write(store, path)
        store.put(f"{path}.root", b"1")
    store.child("e1").clear("s1")
    store.clear("nothing")
    names = [entry.path for entry in store.entries()]
    assert names == [f"e1/{path}" for path in ("s10/x", "s10/x.root", "s2/x", "s2/x.root")]
    for name in nodes.names:
        assert not [path for path in files(Path(nodes.folders[name].root)) if "s1/" in path or ".ucp" in path]
    store.clear("e1/s2/x")
    assert store.exists("e1/s2/x"), "an object is no folder"
    with pytest.raises(UsageError):
        store.clear("../nodes")
    store.clear("")
    assert list(store.entries()) == []


def test_the_room_is_that_of_the_tightest_node_that_gets_copies(
    make_nodes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = make_nodes(3)
    rooms = {"a": 7, "b": 5, "c": 3}
    monkeypatch.setattr(NodeFolder, "room", lambda self: rooms[os.path.basename(self.top)])
    assert [nodes.store(name).room() for name in "abc"] == [5, 3, 3]
    assert nodes.store("a", copies=3).room() == 3
    store = nodes.store("a", timeout=5)
    nodes.servers["b"].close()
    assert store.room() == 7
    assert store.gone == ("b",)


@pytest.mark.parametrize("remote", [True, False])
def test_what_there_is_no_room_for_is_refused_before_any_is_taken(
    make_nodes: Make, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    nodes = make_nodes(1)
    store = nodes.remote("a") if remote else nodes.folders["a"]
    with pytest.raises(StorageError, match="no room"):
        store.create("x", 1 << 60)
    monkeypatch.setattr(NodeFolder, "room", lambda self: 5 << 20)
    with pytest.raises(StorageError, match="no room"):
        store.create("x", (5 << 20) + 1)
    store.create("x", 5 << 20).abort()
    store.close()


def test_streaming_takes_no_second_copy_of_the_object(make_nodes: Make) -> None:
    """Neither where it is written nor where it arrives, which is the same process here."""
    nodes = make_nodes(3)
    store = nodes.store("a", copies=3)
    data = bytes(48 << 20)
    target = bytearray(len(data))
    tracemalloc.start()
    try:
        write(store, "x", data)
        nodes.folders["a"].delete("x")
        store.read_into("x", 0, target)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20
    assert bytes(target) == data


def test_no_copies_are_a_mistake(make_nodes: Make) -> None:
    nodes = make_nodes(2)
    with pytest.raises(UsageError, match="0 copies"):
        nodes.store("a", copies=0)
    with pytest.raises(UsageError, match="not here"):
        NodesStore("a", {"a": nodes.remote("a")}, copies=1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # it is what data loaders do
def test_a_child_process_lets_go_of_connections(make_nodes: Make) -> None:
    """Else a node that is killed would seem to be alive as long as a child of it is."""
    nodes = make_nodes(2)
    store = nodes.store("a")
    write(store, "x")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = RemoteNode("b", nodes.servers["b"].address, timeout=5).read("x", 0, 5)
            code = 0 if found == DATA[:5] and store.members["b"].read("x") == DATA else 2
            code = code or (0 if nodes.servers["b"]._listener.fileno() == -1 else 3)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert store.members["b"].read("x") == DATA


def test_a_missing_object_names_the_store(make_nodes: Make) -> None:
    with pytest.raises(NotFoundError, match="nodes://memory/v/x: no node has it"):
        make_nodes(2).store("a").child("v").read("x")
