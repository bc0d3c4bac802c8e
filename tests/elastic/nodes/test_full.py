"""Nodes whose memory is full: what finds no room is an error at once, leaves nothing, and spoils nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.elastic.nodes import jobs
from tests.elastic.nodes.processes import end, eventually, files, serve
from tests.elastic.nodes.test_processes import store_of, write
from tests.support.gloo import spawn
from ucp.elastic.nodes import NodeFolder, NodesStore
from ucp.elastic.nodes import server as serving
from ucp.errors import StorageError
from ucp.store import Writer
from ucp.testing.reading import noise

ROOM = 4 << 20
PIECE = noise(500_000)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 4 MiB, where this machine lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("needs the command mount")
    mount = ("mount", "-t", "tmpfs", "-o", f"size={ROOM},nr_inodes=200", "none", str(folder))
    found = subprocess.run(mount, check=False, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"may mount nothing here: {found.stderr.strip()}")
    yield folder
    subprocess.run(("umount", "-l", str(folder)), check=True)


@pytest.fixture(params=["the writer's", "its buddy's"])
def store(request: pytest.FixtureRequest, tmp_path: Path, small: Path) -> Iterator[NodesStore]:
    """Two nodes, one of which has little memory."""
    folders = [small / "a", tmp_path / "b"] if request.param == "the writer's" else [tmp_path / "a", small / "b"]
    process, address = serve(folders[1])
    store = store_of(folders[0], address)
    yield store
    store.close()
    end(process)


def _folders(store: NodesStore, tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.name in ("a", "b") and path.is_dir()]


def _fill(store: NodesStore) -> int:
    """Objects written until there was no room for another."""
    for number in range(100):
        try:
            write(store, f"v1/{number}", PIECE)
        except StorageError as error:
            if "space" not in str(error):
                raise
            return number
    raise AssertionError("that is more than there is")


def test_the_room_of_the_tightest_node(store: NodesStore) -> None:
    room = store.room()
    assert ROOM // 2 < room <= ROOM
    write(store, "x", PIECE)
    assert ROOM // 2 < store.room() <= room - len(PIECE)
    with pytest.raises(StorageError, match="no room"):
        store.create("y", room + 1)


def test_what_finds_no_room_leaves_nothing_and_the_next_has_it(store: NodesStore, tmp_path: Path) -> None:
    count = _fill(store)
    assert count == ROOM // len(PIECE)
    folders = _folders(store, tmp_path)
    assert len(folders) == 2
    whole = [f"v1/{number}" for number in range(count)]
    for folder in folders:
        assert eventually(lambda folder=folder: files(folder) == whole)  # type: ignore[misc]
    assert store.gone == ()
    with pytest.raises(StorageError, match="space"):
        store.put("v1/root", PIECE)
    store.clear("v1")
    assert _fill(store) == count
    assert all(store.read(f"v1/{number}") == PIECE for number in range(count))


def test_a_save_that_finds_no_room_on_one_node_fails_on_all_and_the_next_is_made(tmp_path: Path, small: Path) -> None:
    """Nothing is left of it on any node."""
    first, second = spawn(jobs.save_where_one_node_is_full, 2, [str(tmp_path / "much"), str(small)])
    for one in (first, second):
        assert re.search("no room|No space", one["told"])
        assert one["left"] == []
        assert one["again"] == 9
        assert 2 < one["step"] < 8


def test_a_file_system_that_cannot_take_room_before(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full in the middle of an object: the one who sends it hears so, and not that the node is gone."""

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    (small / "b").mkdir()
    server = serving.NodeServer(NodeFolder(str(small / "b")), "127.0.0.1")
    store, size = store_of(tmp_path / "a", server.address), 3 << 20
    try:
        with pytest.raises(StorageError, match=r"node b: .*space"):
            _end([store.create(f"x{number}", size) for number in range(2)], size)
        assert eventually(lambda: files(small / "b") in ([], ["x0"]))
        assert store.gone == ()
        store.delete("x0")
        write(store, "y", PIECE)
        assert files(small / "b") == ["y"]
    finally:
        store.close()
        server.close()


def _end(writers: Sequence[Writer], size: int) -> None:
    for writer in writers:
        with writer:
            writer.write_at(0, bytes(size))


def _put_many(folder: NodeFolder) -> None:
    for number in range(300):
        folder.put(f"d{number}/x", b"1")


def test_a_full_disk_has_no_names_left(small: Path) -> None:
    """Room for bytes there is, for files there is none."""
    folder = NodeFolder(str(small / "a"))
    os.makedirs(folder.root)
    with pytest.raises(StorageError, match="space"):
        _put_many(folder)
    listed = [entry.path for entry in folder.entries()]
    assert 10 < len(listed) < 200
    assert sorted(files(small / "a")) == sorted(listed)
