"""A file opened as a checkpoint by itself: nothing beside it is seen, nothing is written."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from ucp.errors import NotFoundError, UsageError
from ucp.store import SingleStore, open_source, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.pt").write_bytes(b"0123456789")
    (tmp_path / "other.pt").write_bytes(b"x")
    return tmp_path


def test_the_url_of_a_file_is_a_store_of_that_file(folder: Path) -> None:
    store = open_source(str(folder / "model.pt"))
    assert isinstance(store, SingleStore)
    assert (store.url, store.address) == (str(folder), str(folder / "model.pt"))
    assert store.children() == ["model.pt"]
    assert [entry.path for entry in store.entries()] == ["model.pt"]
    assert list(store.entries("other")) == []
    assert store.read("model.pt", 2, 3) == b"234"
    assert store.exists("model.pt")


def test_what_lies_beside_it_is_not_there(folder: Path) -> None:
    store = open_source(str(folder / "model.pt"))
    assert not store.exists("other.pt")
    with pytest.raises(NotFoundError, match=r"only model.pt"):
        store.read("other.pt")


def test_a_folder_is_a_folder(folder: Path) -> None:
    assert not isinstance(open_source(str(folder)), SingleStore)
    assert not isinstance(open_source(str(folder / "nothing.pt")), SingleStore)


def test_nothing_is_written(folder: Path) -> None:
    store = open_source(str(folder / "model.pt"))
    for change in (
        lambda: store.put("model.pt", b""),
        lambda: store.create("model.pt", 1),
        lambda: store.delete("model.pt"),
    ):
        with pytest.raises(UsageError, match="a file and no folder"):
            change()
    assert (folder / "model.pt").read_bytes() == b"0123456789"


def test_it_overlaps_only_folders_that_it_lies_in(folder: Path) -> None:
    store = open_source(str(folder / "model.pt"))
    assert store.overlaps(open_store(str(folder)))
    assert not store.overlaps(open_store(str(folder / "converted")))


def test_a_file_elsewhere() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/single-store/a/model.pt", b"0123")
    try:
        store = open_source("memory://single-store/a/model.pt")
        assert isinstance(store, SingleStore)
        assert store.read("model.pt") == b"0123"
        assert store.address == "memory://single-store/a/model.pt"
        assert not isinstance(open_source("memory://single-store/a"), SingleStore)
    finally:
        memory.rm("/single-store", recursive=True)
