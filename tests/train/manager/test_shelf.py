from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from ucp.errors import CorruptError, StorageError, UsageError
from ucp.lifecycle.shelf import ROOTS, Shelf, folder_name


@pytest.fixture(params=["local", "memory"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    if request.param == "local":
        yield Shelf(str(tmp_path / "run"))
        return
    name = f"run-{uuid.uuid4().hex}"
    yield Shelf(f"memory://{name}")
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def fill(shelf: Shelf, step: int, *, root: str | None = ROOTS[0]) -> None:
    for path in ("shards/rank-00000-0.safetensors", "shards/rank-00001-0.safetensors", root):
        if path is not None:
            shelf.store.put(f"{folder_name(step)}/{path}", b"x" * 10)


@pytest.mark.parametrize("root", ROOTS)
def test_a_folder_with_a_root_is_complete_and_one_without_is_not(shelf: Shelf, root: str) -> None:
    fill(shelf, 12, root=root)
    fill(shelf, 7, root=None)
    shelf.store.put("notes.txt", b"")
    shelf.store.put("step-12/ucp.json", b"")
    contents = shelf.contents()
    assert [saved.step for saved in contents.saved] == [12]
    assert contents.saved[0].url == f"{shelf.address}/step-00000012"
    assert contents.incomplete == (7,)
    fill(shelf, 3, root=None)


def test_metrics_are_kept_whatever_number_they_are(shelf: Shelf) -> None:
    fill(shelf, 1)
    shelf.record(1, {"loss": 0.1, "worst": math.inf, "none": math.nan})
    (saved,) = shelf.contents().saved
    assert (saved.metrics["loss"], saved.metrics["worst"]) == (0.1, math.inf)
    assert math.isnan(saved.metrics["none"])
    assert not saved.aside


def test_a_record_that_says_something_else_is_damage(shelf: Shelf) -> None:
    fill(shelf, 1)
    shelf.record(1, {})
    shelf.store.put("step-00000001.json", shelf.store.read("step-00000001.json").replace(b'"step": 1', b'"step": 2'))
    with pytest.raises(CorruptError, match="no record of step 1"):
        shelf.contents()


def test_removing_leaves_nothing_of_the_step_and_all_of_others(shelf: Shelf) -> None:
    for step in (1, 10):
        fill(shelf, step)
        shelf.record(step, {})
    shelf.remove(1)
    tops = [entry.path.partition("/")[0] for entry in shelf.store.entries()]
    assert sorted(tops) == ["step-00000010"] * 3 + ["step-00000010.json"]
    assert shelf.strays(99) == []
    shelf.record(2, {})
    shelf.store.put("step-00000010.json.77-1.tmp", b"{")
    assert shelf.strays(99) == ["step-00000002.json", "step-00000010.json.77-1.tmp"]
    assert shelf.strays(10) == ["step-00000002.json"]


def test_whatever_stops_a_removal_the_checkpoint_is_gone_first(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(shelf, 1)
    whole = {entry.path for entry in shelf.store.entries()}
    delete, left = shelf.store.delete, len(whole) + 1
    for stop in range(1, left):
        fill(shelf, 1)
        done: list[str] = []

        def stopping(path: str, *, stop: int = stop, done: list[str] = done) -> None:
            if shelf.store.exists(path):
                if len(done) == stop:
                    raise StorageError("stopped")
                done.append(path)
            delete(path)

        with monkeypatch.context() as patch:
            patch.setattr(shelf.store, "delete", stopping)
            if stop < len(whole):
                with pytest.raises(StorageError):
                    shelf.remove(1)
            else:
                shelf.remove(1)
        assert done[0] == f"step-00000001/{ROOTS[0]}"
        assert not shelf.complete(1)
        shelf.remove(1)
        assert not list(shelf.store.entries("step-00000001"))


def test_names_sort_as_steps_do() -> None:
    assert folder_name(1000) == "step-00001000"
    with pytest.raises(UsageError):
        folder_name(-1)
