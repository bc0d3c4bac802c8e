"""Other users of the machine, other machines' addresses, and things in folders that nobody of us has put there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.elastic.nodes.conftest import Nodes
from tests.elastic.nodes.processes import end, eventually, serve
from ucp.elastic.nodes import NodeFolder, NodeServer, RemoteNode, folder_of
from ucp.elastic.nodes import server as serving
from ucp.elastic.nodes.wire import Line, Op, Request
from ucp.errors import CorruptError, NotFoundError, StorageError, UcpError, UnsafeError, UsageError

Make = Callable[[int], Nodes]
NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in which, as in ``/dev/shm``, everybody may make files."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@pytest.fixture
def others() -> None:
    """Where we may act as another user."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can be somebody else")


def test_other_users_see_nothing(shared: Path, others: None) -> None:
    """Neither objects nor their names, whatever this process's mask is."""
    before = os.umask(0)
    try:
        folder = NodeFolder(folder_of(str(shared), "job", "n0"))
        folder.put("e1/x", b"state")
    finally:
        os.umask(before)
    for words in (["ls", str(shared / f"ucp-{os.geteuid()}")], ["cat", f"{folder.root}/e1/x"]):
        found = subprocess.run(words, check=False, capture_output=True, user=NOBODY)
        assert found.returncode != 0
        assert b"Permission denied" in found.stderr
    for part in ("", "/job", "/job/n0"):
        assert os.stat(f"{shared}/ucp-{os.geteuid()}{part}").st_mode & 0o7777 == 0o700


def test_a_folder_that_another_user_was_first_to_make_is_refused(shared: Path, others: None) -> None:
    path = shared / f"ucp-{os.geteuid()}"
    subprocess.run(["mkdir", "-m", "700", str(path)], check=True, user=NOBODY)
    with pytest.raises(UnsafeError, match="not a folder of this user alone"):
        folder_of(str(shared), "job", "n0")
    path.rmdir()
    subprocess.run(["ln", "-s", "/etc", str(path)], check=True, user=NOBODY)
    with pytest.raises(UnsafeError, match="not a folder of this user alone"):
        folder_of(str(shared), "job", "n0")


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 256, "ü" * 100], ids=["none", "dot", "dots", "long", "escaped"])
def test_names_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    for job, node in ((name, "n0"), ("job", name)):
        with pytest.raises(UsageError, match="is no name"):
            folder_of(str(tmp_path), job, node)


def test_what_is_no_file_is_not_waited_for(make_nodes: Make) -> None:
    """A pipe that nobody writes to, and a link, which is none of ours: an answer, and the connection goes on."""
    nodes = make_nodes(1)
    folder, node = nodes.folders["a"], nodes.remote("a", timeout=10)
    folder.put("x", b"1")
    os.mkfifo(f"{folder.root}/pipe")
    os.symlink("/etc/passwd", f"{folder.root}/link")
    for path in ("pipe", "link"):
        for ask in (node.entry, node.read, lambda path: node.read(path, 0, 1)):
            with pytest.raises((CorruptError, NotFoundError)):
                ask(path)
    assert node.read("x") == b"1"
    node.close()


def test_a_folder_that_is_deleted_under_a_node_is_not_made_anew_by_writing(make_nodes: Make) -> None:
    """As systemd-logind does when its user logs out: whoever is quicker could make it then, and read what we write."""
    nodes = make_nodes(2)
    store, top = nodes.store("a"), Path(nodes.folders["a"].root)
    store.put("v/x", b"1")
    writer = store.create("v/y", 5)
    shutil.rmtree(top.parent / "a")
    with pytest.raises(StorageError, match="removed while it was written"), writer:
        writer.write_at(0, b"12345")
    for ask in (
        lambda: store.put("v/z", b"1"),
        lambda: nodes.remote("a").put("v/z", b"1"),
        lambda: store.folder.put("v/z", b"1", if_absent=True),
        lambda: store.create("v/z", 2 << 20),
    ):
        with pytest.raises(StorageError, match="folder of this node was removed"):
            ask()
    store.clear("v/nothing")
    assert not top.exists()
    assert store.read("v/x") == b"1", "another node has it"
    assert all(os.stat(path).st_mode & 0o77 == 0 for path in Path(nodes.folders["b"].root).rglob("*") if path.is_dir())


def test_a_disk_is_given_time_for_what_was_sent_to_it(make_nodes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a node counts as gone that sends nothing for long, and one that writes out gigabytes sends nothing."""
    nodes, flush, flushed = make_nodes(1), NodeFolder.flush, []

    def slow(self: NodeFolder, paths: Sequence[str]) -> None:
        time.sleep(1.5)
        flush(self, paths)
        flushed.extend(paths)

    monkeypatch.setattr(NodeFolder, "flush", slow)
    node = nodes.remote("a")
    node.put("x", bytes(64 << 20), durable=False)
    node.link.timeout = 0.2
    node.flush(["x"])
    assert flushed == ["x"]
    with pytest.raises(StorageError, match="node a is gone"):
        node.flush(["x"])
    node.close()


def test_nodes_with_addresses_of_the_sixth_version(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has none")
    process, address = serve(tmp_path / "b", "::1")
    node = RemoteNode("b", address)
    try:
        node.put("x", bytes(3 << 20))
        assert node.read("x") == bytes(3 << 20)
    finally:
        node.close()
        end(process)


def test_an_address_that_is_not_this_hosts_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"192\.0\.2\.1"):
        NodeServer(NodeFolder(str(tmp_path)), "192.0.2.1")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_server_that_has_no_memory_for_a_moment_goes_on(
    make_nodes: Make, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """As where the system lets it start no thread."""
    nodes = make_nodes(1)
    nodes.folders["a"].put("x", b"1")
    start, failed = threading.Thread.start, threading.Event()

    def once(self: threading.Thread) -> None:
        if self.name == "ucp-node" and not failed.is_set():
            failed.set()
            raise error
        start(self)

    monkeypatch.setattr(threading.Thread, "start", once)
    node = nodes.remote("a", timeout=2)
    with pytest.raises(StorageError):
        node.read("x")
    assert failed.is_set()

    def answers() -> bool:
        try:
            return node.read("x") == b"1"
        except StorageError:
            return False

    assert eventually(answers)
    node.close()


@pytest.mark.parametrize("request_", [Request(Op.ENTRY, "x" * 1000), Request(Op.WRITE, "y", size=1 << 20)])
def test_who_sends_a_byte_now_and_then_is_not_waited_for(
    make_nodes: Make, monkeypatch: pytest.MonkeyPatch, request_: Request
) -> None:
    monkeypatch.setattr(serving, "_PATIENCE_SECONDS", 0.2)
    server = make_nodes(1).servers["a"]
    with socket.create_connection(server.address[:2], timeout=30) as connection:
        line = Line(connection, 30.0)
        line.send(server.address.secret)
        data, begun = request_.packed() + bytes(1 << 20), time.monotonic()
        with pytest.raises(ConnectionError):
            _send_slowly(connection, data)
        assert time.monotonic() - begun < 60
    assert eventually(lambda: not server._lines)


def _send_slowly(connection: socket.socket, data: bytes) -> None:
    for at in range(len(data)):
        connection.sendall(data[at : at + 1])
        time.sleep(0.02)


def test_a_rank_that_asks_for_too_much_is_told(make_nodes: Make) -> None:
    """And what it says of itself takes no memory before it is there."""
    node = make_nodes(1).remote("a", timeout=10)
    for ask in (lambda: node.entry("x" * 70_000), lambda: node.flush(["x" * 1000] * 20_000)):
        with pytest.raises(UcpError, match=r"too (long|much)"):
            ask()
    node.close()
