"""Nodes that are processes: killed, stopped, restarted elsewhere, or cut off, at the worst moments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.elastic.nodes.processes import end, eventually, files, serve, start
from ucp.elastic.nodes import Address, NodeFolder, NodesStore, RemoteNode
from ucp.errors import ConflictError, StorageError
from ucp.store import Writer
from ucp.testing.reading import noise

DATA = noise(5 << 20)

Serve = Callable[..., tuple["subprocess.Popen[str]", Address]]


@pytest.fixture
def serving() -> Iterator[Serve]:
    """As `serve`; what it starts is ended."""
    started: list[subprocess.Popen[str]] = []

    def begin(folder: Path, *arguments: str, **options: object) -> tuple[subprocess.Popen[str], Address]:
        process, address = serve(folder, *arguments, **options)  # type: ignore[arg-type]
        started.append(process)
        return process, address

    yield begin
    for process in started:
        end(process)


def store_of(folder: Path, address: Address, timeout: float = 20.0) -> NodesStore:
    """Node ``a`` in this process, with ``b`` at the address."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {"a": NodeFolder(str(folder)), "b": RemoteNode("b", address, timeout=timeout)}
    return NodesStore("a", members, copies=2)


def write(store: NodesStore, path: str, data: bytes = DATA) -> None:
    with store.create(path, len(data)) as writer:
        writer.write_at(0, data)


def write_on(writer: Writer) -> None:
    """From the second MiB to the 256th."""
    for at in range(1 << 20, 256 << 20, 1 << 20):
        writer.write_at(at, bytes(1 << 20))


def test_a_node_that_is_killed_in_the_middle_of_an_object(tmp_path: Path, serving: Serve) -> None:
    """The writer hears of it, and the object is nowhere; what was there before is read from the copy."""
    process, address = serving(tmp_path / "b")
    store = store_of(tmp_path / "a", address, timeout=10)
    write(store, "before")
    writer = store.create("x", 256 << 20)
    writer.write_at(0, bytes(1 << 20))
    process.kill()
    with pytest.raises(StorageError, match="node b is gone"):
        write_on(writer)
    writer.abort()
    assert files(tmp_path / "a") == ["before"]
    assert [entry.path for entry in NodeFolder(str(tmp_path / "b")).entries()] == ["before"]
    assert store.read("before") == DATA
    NodeFolder(str(tmp_path / "b")).tidy()
    assert files(tmp_path / "b") == ["before"], "who starts there again removes what is left"
    store.close()


def test_a_writer_that_is_killed_in_the_middle_of_an_object(tmp_path: Path, serving: Serve) -> None:
    """Its node keeps what has no name until it starts again; the other one gives the memory free at once."""
    _, address = serving(tmp_path / "b")
    (tmp_path / "a").mkdir()
    arguments = [str(tmp_path / "a"), address.host, str(address.port), address.secret.hex(), "5000000", "4999999"]
    process = start("write", *arguments)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert len(files(tmp_path / "b")) == 2
    finally:
        end(process)
    assert eventually(lambda: files(tmp_path / "b") == ["before"])
    assert len(files(tmp_path / "a")) == 2
    assert [entry.path for entry in NodeFolder(str(tmp_path / "a")).entries()] == ["before"]


def _read(store: NodesStore, path: str) -> bytes:
    try:
        return store.read(path)
    except StorageError:
        return b""


def test_a_node_that_hangs_is_given_up_in_bounded_time(tmp_path: Path, serving: Serve) -> None:
    """A stopped process still has its connections, and the kernel takes new ones for it."""
    process, address = serving(tmp_path / "b")
    patient = store_of(tmp_path / "a", address)
    write(patient, "x")
    shutil.rmtree(tmp_path / "a")
    assert patient.read("x") == DATA
    patient.close()
    store = store_of(tmp_path / "a", address, timeout=1)
    process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"node b is gone \(TimeoutError"):
        store.read("x")
    with pytest.raises(StorageError, match="node b is gone"):
        write(store, "y", bytes(64 << 20))
    assert list(store.entries()) == []
    assert store.gone == ("b",)
    assert time.monotonic() - begun < 60
    process.send_signal(signal.SIGCONT)
    assert eventually(lambda: _read(store, "x") == DATA), "it is asked again, a while later"
    assert store.gone == ()
    store.close()


def test_a_stale_address_is_an_error(tmp_path: Path, serving: Serve) -> None:
    """The node has started again, and another one has its port: nobody takes one for the other."""
    process, address = serving(tmp_path / "b")
    store = store_of(tmp_path / "a", address, timeout=5)
    write(store, "x")
    end(process)
    _, again = serving(tmp_path / "b")
    stale = store_of(tmp_path / "a", again._replace(secret=address.secret), timeout=5)
    shutil.rmtree(tmp_path / "a")
    for old in (store, stale):
        with pytest.raises(StorageError, match="node b is gone"):
            old.read("x")
    fresh = store_of(tmp_path / "a", again)
    assert fresh.read("x") == DATA, "what the node had in memory outlives its processes"
    for one in (store, stale, fresh):
        one.close()


def _claim(folder: str, number: int) -> None:
    try:
        NodeFolder(folder).put("claim", str(number).encode() * 1000, if_absent=True)
    except ConflictError:
        os._exit(3)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_ranks_of_one_node_share_its_folder(tmp_path: Path) -> None:
    """Of processes that put under a condition one wins, and what it put is whole."""
    pids = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            _claim(str(tmp_path), number)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes) == [0, 3, 3, 3, 3, 3]
    assert NodeFolder(str(tmp_path)).read("claim") == str(codes.index(0)).encode() * 1000
    assert files(tmp_path) == ["claim"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_rank_that_is_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path) -> None:
    """While it puts, replaces, deletes and clears as fast as it can."""
    for delay in (0.01, 0.03, 0.05, 0.08):
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            folder = NodeFolder(str(tmp_path))
            os.write(told, b"1")
            for number in range(1 << 30):
                letter = b"abcdefgh"[number % 8 : number % 8 + 1]
                folder.put(f"v{number % 3}/x", letter * 200_000, durable=False)
                folder.clear(f"v{(number + 1) % 3}")
        os.read(ready, 1)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end_of in (ready, told):
            os.close(end_of)
        folder = NodeFolder(str(tmp_path))
        for entry in list(folder.entries()):
            data = folder.read(entry.path)
            assert len(data) == 200_000
            assert len(set(data)) == 1
        folder.tidy()
        assert files(tmp_path) == [entry.path for entry in folder.entries()]
