"""Whoever does not know the secret gets nothing, and who does gets nothing but objects below the folder."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.elastic.nodes.conftest import Nodes
from tests.elastic.nodes.processes import eventually, files
from ucp.elastic.nodes import NodeServer, RemoteNode
from ucp.elastic.nodes import server as serving
from ucp.elastic.nodes.wire import MOST_EXTRA, MOST_RANGES, SECRET_BYTES, Line, Op, Request
from ucp.errors import NotFoundError, StorageError, UcpError, UsageError

Make = Callable[[int], Nodes]
_HEAD = struct.Struct("<BBHIQqI")


@pytest.fixture
def server(make_nodes: Make) -> NodeServer:
    nodes = make_nodes(1)
    nodes.folders["a"].put("x", b"secret")
    return nodes.servers["a"]


@pytest.fixture
def line(server: NodeServer) -> Iterator[Line]:
    """A connection that said the secret."""
    with connected(server) as connection:
        line = Line(connection, 30.0)
        line.send(server.address.secret)
        yield line


@contextlib.contextmanager
def connected(server: NodeServer) -> Iterator[socket.socket]:
    with socket.create_connection(server.address[:2], timeout=30) as connection:
        yield connection


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("said", [b"x" * SECRET_BYTES, b"\0" * SECRET_BYTES * 4, b"GET / HTTP/1.1\r\n" * 9])
def test_who_does_not_know_the_secret_is_cut_off(server: NodeServer, said: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(said)
        assert ended(connection)
    wrong = RemoteNode("a", server.address._replace(secret=b"x" * SECRET_BYTES), timeout=5)
    for ask in (lambda: wrong.read("x"), lambda: wrong.put("x", b"1"), lambda: wrong.delete("x")):
        with pytest.raises(StorageError, match="node a is gone"):
            ask()
    assert server.folder.read("x") == b"secret"


def test_who_says_nothing_is_not_waited_for(make_nodes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are, others get their turn."""
    monkeypatch.setattr(serving, "_KNOCK_SECONDS", 0.2)
    nodes = make_nodes(1)
    nodes.folders["a"].put("x", b"1")
    with contextlib.ExitStack() as silent:
        for _ in range(150):
            silent.enter_context(connected(nodes.servers["a"]))
        store = nodes.remote("a")
        assert store.read("x") == b"1"
        store.close()


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "..", "\0", ".ucp-partial/x", ".ucp-partial", "a\0b", "/"]
)
@pytest.mark.parametrize("op", [Op.ENTRY, Op.ENTRIES, Op.CHILDREN, Op.READ, Op.WRITE, Op.DELETE, Op.CLEAR])
def test_no_path_leads_out_of_the_folder(server: NodeServer, line: Line, path: str, op: Op) -> None:
    """The server looks at them itself: another client need not."""
    outside = Path(server.folder.root).parent / "x"
    outside.write_bytes(b"outside")
    line.send(Request(op, path, size=3).packed())
    with pytest.raises((UsageError, NotFoundError)):
        line.receive(line.answered())
    assert outside.read_bytes() == b"outside"
    line.send(Request(Op.ENTRY, "x").packed())
    assert line.answered() > 0, "and the connection goes on"


def test_flushing_stays_inside(server: NodeServer, line: Line) -> None:
    for extra in ('["../x"]', "[1e999]", "{", '"yz"', "7", "[" * 100_000):
        line.send(Request(Op.FLUSH, extra=extra).packed())
        with pytest.raises(UcpError):
            line.answered()


@pytest.mark.parametrize(
    "head",
    [
        b"\xff" * _HEAD.size,
        _HEAD.pack(99, 0, 1, 0, 0, 0, 0),
        _HEAD.pack(Op.READ, 0, 1, MOST_RANGES + 1, 0, 0, 0),
        _HEAD.pack(Op.FLUSH, 0, 1, 0, 0, 0, MOST_EXTRA + 1),
    ],
)
def test_a_request_that_is_none_of_ours_ends_the_connection(line: Line, head: bytes) -> None:
    line.send(head + b"x" * 64)
    assert ended(line.socket)


@pytest.mark.parametrize("ranges", [((0, 7),), ((6, 1),), ((1 << 63, 1),), ((0, 1), (0, 1 << 63)), ((0, 1 << 64 - 1),)])
def test_ranges_outside_of_the_object_are_refused(line: Line, ranges: tuple[tuple[int, int], ...]) -> None:
    line.send(Request(Op.READ, "x", ranges=ranges).packed())
    with pytest.raises(UcpError, match="early"):
        line.answered()


def test_huge_objects_are_refused_before_any_memory_is_taken(server: NodeServer, line: Line) -> None:
    line.send(Request(Op.WRITE, "y", size=(1 << 64) - 1).packed())
    with pytest.raises(StorageError, match="no room"):
        line.answered()
    line.send(Request(Op.WRITE, "y", size=2).packed())
    assert line.answered() == 0
    line.send(b"12X")
    assert ended(line.socket), "an object ends with the word that it does"
    assert [entry.path for entry in server.folder.entries()] == ["x"]


@pytest.mark.parametrize("sent", [0, 1, 70_000, 99_999, 100_000])
def test_an_object_that_stops_coming_is_nowhere(server: NodeServer, sent: int) -> None:
    with connected(server) as connection:
        line = Line(connection, 30.0)
        line.send(server.address.secret + Request(Op.WRITE, "y", size=100_000).packed())
        assert line.answered() == 0
        assert len(files(Path(server.folder.root))) == 2
        line.send(bytes(sent))
    assert eventually(lambda: files(Path(server.folder.root)) == ["x"])


def test_who_stops_in_the_middle_is_not_waited_for(make_nodes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the memory kept that its object would take."""
    monkeypatch.setattr(serving, "_PATIENCE_SECONDS", 0.2)
    nodes = make_nodes(1)
    with connected(nodes.servers["a"]) as connection:
        line = Line(connection, 30.0)
        line.send(nodes.servers["a"].address.secret + Request(Op.WRITE, "y", size=100_000).packed())
        assert line.answered() == 0
        line.send(bytes(1000))
        assert ended(connection)
    assert eventually(lambda: files(Path(nodes.folders["a"].root)) == [])


def test_a_time_that_there_is_not_ends_the_connection(server: NodeServer, line: Line) -> None:
    line.send(Request(Op.WRITE, "y", size=1, stamp=-(1 << 63)).packed())
    assert line.answered() == 0
    line.send(b"1C")
    try:
        line.answered()
    except (UcpError, ConnectionError):
        assert not server.folder.exists("y")
    assert not [name for name in files(Path(server.folder.root)) if ".ucp" in name]


def test_links_out_of_the_folder_are_no_objects(server: NodeServer, line: Line, tmp_path: Path) -> None:
    """Nobody of us makes any; they are not told either."""
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", f"{server.folder.root}/link")
    os.symlink("/etc/passwd", f"{server.folder.root}/passwd")
    assert [entry.path for entry in server.folder.entries()] == ["x"]


class Impostor:
    """Says something else than a node would, to whoever asks."""

    def __init__(self, answer: bytes) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answer = answer
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(self.answer)
                    connection.settimeout(5)
                    connection.recv(1 << 16)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack("<BQ", 0, 1 << 62),
        struct.pack("<BQ", 5, 1 << 40),
        struct.pack("<BQ", 77, 4) + b"abcd",
        struct.pack("<BQ", 0, 4) + b"{}{}",
        struct.pack("<BQ", 0, 2) + b"{}",
        struct.pack("<BQ", 0, 3) + b'"a"',
    ],
)
def test_an_impostor_in_a_nodes_place_is_an_error(answer: bytes) -> None:
    """As after a restart, when somebody else has the port."""
    impostor = Impostor(answer)
    host, port = impostor.listener.getsockname()
    for ask in (
        lambda node: node.entry("x"),
        lambda node: list(node.entries()),
        lambda node: node.children(),
        lambda node: node.room(),
        lambda node: node.read("x", 0, 5),
        lambda node: node.put("x", b"123"),
    ):
        node = RemoteNode("a", serving.Address(host, port, b"s" * SECRET_BYTES), timeout=1)
        with pytest.raises(UcpError):
            ask(node)
        node.close()
    impostor.listener.close()
