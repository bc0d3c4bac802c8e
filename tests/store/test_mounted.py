"""What is mounted is read like the rest, and cannot be written."""

from __future__ import annotations

import pickle

import pytest

import ucp
from tests.share.made import check, source
from ucp.errors import NotFoundError, UsageError
from ucp.lifecycle.gc import gc
from ucp.store import Store, open_store
from ucp.store.mounted import MountedStore
from ucp.testing.watched import Around, Counted

NAME, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def store(tmp_path) -> MountedStore:
    run = open_store(str(tmp_path))
    run.put("step-1/ucp.json", b"root")
    run.put("step-1/shards/x", b"0123")
    run.put(f"shared/{NAME}", b"shared bytes")
    run.put(f"shared/{OTHER}", b"of another checkpoint")
    return MountedStore(run.child("step-1"), run.child("shared"), [NAME])


@pytest.mark.parametrize(
    "wrap", [lambda store: store, Around, Counted, lambda store: pickle.loads(pickle.dumps(store))]
)
def test_reading(store: MountedStore, wrap) -> None:
    found: Store = wrap(store)
    assert [entry.path for entry in found.entries()] == ["shards/x", f"shared/{NAME}", "ucp.json"]
    assert [entry.path for entry in found.entries("sh")] == ["shards/x", f"shared/{NAME}"]
    assert [entry.path for entry in found.entries("shards/")] == ["shards/x"]
    assert [entry.path for entry in found.entries("shared/")] == [f"shared/{NAME}"]
    assert found.children() == ["shards/", "shared/", "ucp.json"]
    assert found.children("shared") == [NAME]
    assert found.read(f"shared/{NAME}") == b"shared bytes"
    assert found.read(f"shared/{NAME}", 7, 5) == b"bytes"
    assert found.entry(f"shared/{NAME}").size == 12
    buffers = [bytearray(3), bytearray(2)]
    found.read_ranges(f"shared/{NAME}", [(0, memoryview(buffers[0])), (3, memoryview(buffers[1]))])
    assert buffers == [b"sha", b"re"]
    assert found.read("shards/x") == b"0123"
    with pytest.raises(NotFoundError):
        found.read(f"shared/{OTHER}")


def test_writing(store: MountedStore) -> None:
    for write in (lambda path: store.put(path, b""), lambda path: store.create(path, 1), store.delete):
        with pytest.raises(UsageError, match="never changed"):
            write(f"shared/{NAME}")
    store.put("other", b"1")
    store.flush(["other", f"shared/{NAME}"])
    assert store.child("shards").read("x") == b"0123"
    assert store.sibling("shared").read(NAME) == b"shared bytes"


def test_overlaps(store: MountedStore) -> None:
    """A source is never written to, nor what it shares."""
    assert store.overlaps(store.sibling("shared"))
    assert store.overlaps(store.sibling("step-1"))
    assert not store.overlaps(store.sibling("step-2"))


def test_through_fsspec(tmp_path) -> None:
    """The general door has no conditions; one writer at a time shares and collects all the same."""
    run = f"memory://{tmp_path.name}"
    for step in (1, 2):
        ucp.convert(source(tmp_path, step), f"{run}/step-{step}", share=True)
        check(f"{run}/step-{step}", step)
    for entry in list(open_store(run).entries("step-1/")):
        open_store(run).delete(entry.path)
    assert not gc(run, grace=0).removed
    assert [one.kind for one in gc(run, grace=0).removed] == ["shared"]
    check(f"{run}/step-2", 2)
