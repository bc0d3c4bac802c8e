"""Two folders of a run: saves go to the fast one, follow to the other, and are found wherever they are whole."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.lifecycle.made import files
from tests.support.gloo import spawn
from tests.train.manager.jobs import build, differing, fingerprint, run, train_step, uninterrupted
from ucp.errors import ConflictError, CorruptError, StorageError, UsageError
from ucp.lifecycle.shelf import Shelf
from ucp.store import OPENERS, LocalStore
from ucp.store.base import Writer
from ucp.testing.watched import Around
from ucp.train.manager import CheckpointManager, uploads

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fast(tmp_path: Path) -> str:
    return str(tmp_path / "fast")


@pytest.fixture
def far(tmp_path: Path) -> str:
    return str(tmp_path / "far")


def steps(url: str) -> list[int]:
    return [saved.step for saved in Shelf(url).contents().saved]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.01)


def test_what_is_saved_is_copied_and_kept_in_each(fast: str, far: str) -> None:
    run(fast, 6, every=1, upload=far, keep_local=2, keep_latest=4)
    assert steps(fast) == [5, 6]
    assert {3, 4, 5, 6} >= {*steps(far)} >= {5, 6}
    for step in steps(fast):
        assert files(Path(fast, f"step-{step:08}")) == files(Path(far, f"step-{step:08}"))
    assert Shelf(far).saved(6).metrics.keys() == {"loss"}
    manager = CheckpointManager(fast, upload=far)
    assert manager.not_uploaded == []
    assert [saved.step for saved in manager.saved] == steps(far)
    assert manager.latest is not None
    assert manager.latest.url == f"{fast}/step-00000006"


def test_everything_is_kept_far_without_retention(fast: str, far: str) -> None:
    run(fast, 5, every=1, upload=far, keep_local=1)
    assert steps(fast) == [5]
    assert steps(far) == [1, 2, 3, 4, 5]


def test_a_run_goes_on_from_the_near_copy_or_from_the_far_one(fast: str, far: str) -> None:
    run(fast, 4, every=2, upload=far)
    with CheckpointManager(fast, upload=far) as manager:
        resumed = manager.resume(build())
        assert resumed is not None
        assert resumed.url == f"{fast}/step-00000004"
    shutil.rmtree(fast)
    first, _, state = run(fast, 6, every=2, upload=far)
    assert first == 4
    assert not differing(state, uninterrupted(6))
    assert steps(fast) == [6]


def test_a_damaged_near_copy_is_passed_over(fast: str, far: str, caplog: pytest.LogCaptureFixture) -> None:
    run(fast, 4, every=2, upload=far)
    shard = next(Path(fast, "step-00000004", "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        first, _, state = run(fast, 5, every=2, upload=far)
    assert first == 4
    assert "not whole" in caplog.text
    assert not differing(state, uninterrupted(5))
    shutil.rmtree(Path(far, "step-00000004"))
    with pytest.raises(CorruptError):
        run(fast, 6, every=2, upload=far)


def test_a_restart_copies_what_was_left(fast: str, far: str) -> None:
    run(fast, 4, every=2)
    assert not os.path.exists(far)
    with CheckpointManager(fast, upload=far) as manager:
        assert [saved.step for saved in manager.not_uploaded] == [4, 2]
        manager.resume(build())
    assert steps(far) == [2, 4]


class Broken(Around):
    """A far folder that cannot be written for a while."""

    broken = True

    def create(self, path: str, size: int) -> Writer:
        if Broken.broken:
            raise StorageError("no route to host")
        return super().create(path, size)

    def child(self, path: str) -> Broken:
        return Broken(self.inner.child(path))


def broken_at(far: str) -> Callable[..., Broken]:
    def opener(url: str, **_: Any) -> Broken:
        path = url.removeprefix("broken://").strip("/")
        return Broken(LocalStore(f"{far}/{path}" if path else far))

    return opener


def test_failures_are_tried_again_and_block_nothing(
    fast: str, far: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(OPENERS, "broken", broken_at(far))
    monkeypatch.setattr(Broken, "broken", True)
    monkeypatch.setattr(uploads, "_FIRST_WAIT", 0.01)
    model, optimizer = build()
    with CheckpointManager(fast, every=1, upload="broken://run", keep_local=1) as manager:
        manager.resume((model, optimizer))
        for step in (1, 2, 3):
            train_step(model, optimizer, step)
            manager.step(step, (model, optimizer))
        wait_until(lambda: "no route to host" in caplog.text)
        Broken.broken = False
    assert steps(f"{far}/run") == [1, 2, 3]
    assert steps(fast) == [3]
    assert not differing(fingerprint(model, optimizer), uninterrupted(3))


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_what_could_not_be_copied_is_reported_at_the_end(
    fast: str, far: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_error: Any
) -> None:
    monkeypatch.setitem(OPENERS, "broken", broken_at(far))
    monkeypatch.setattr(Broken, "broken", True)
    monkeypatch.setattr(uploads, "_FIRST_WAIT", 0.01)
    state = build()
    manager = CheckpointManager(fast, upload="broken://run", keep_local=1, on_error=on_error)
    for step in (1, 2):
        manager.save(step, state)
    if on_error == "raise":
        with pytest.raises(StorageError, match="not everything could be copied"):
            manager.close()
    else:
        manager.close()
        assert "not everything could be copied" in caplog.text
    assert steps(fast) == [1, 2]
    monkeypatch.setattr(Broken, "broken", False)
    with CheckpointManager(fast, upload="broken://run", keep_local=1) as manager:
        manager.resume(state)
    assert steps(f"{far}/run") == [1, 2]


def test_an_older_history_is_replaced_in_both(fast: str, far: str) -> None:
    run(fast, 4, every=2, upload=far)
    old = files(Path(far, "step-00000004"))
    model, optimizer = build()
    with CheckpointManager(fast, every=2, upload=far) as manager:
        manager.resume((model, optimizer), step=2)
        assert Shelf(far).saved(4).aside
        for step in (3, 4):
            train_step(model, optimizer, step + 100)
            manager.step(step, (model, optimizer))
    assert steps(far) == steps(fast) == [2, 4]
    assert not Shelf(far).saved(4).aside
    assert files(Path(far, "step-00000004")) == files(Path(fast, "step-00000004")) != old


def test_a_damaged_checkpoint_does_not_stop_others(fast: str, far: str) -> None:
    run(fast, 4, every=2)
    shard = next(Path(fast, "step-00000004", "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    manager = CheckpointManager(fast, upload=far)
    manager.save(6, build())
    with pytest.raises(StorageError, match="fail their crc32c"):
        manager.close()
    assert steps(far) == [2, 6]


def test_options_that_make_no_sense(fast: str, far: str) -> None:
    with pytest.raises(UsageError, match="keep_local"):
        CheckpointManager(fast, keep_local=2)
    with pytest.raises(UsageError, match="keep_local"):
        CheckpointManager(fast, upload=far, keep_local=0)
    with pytest.raises(UsageError, match="overlaps"):
        CheckpointManager(fast, upload=f"{fast}/far")


def test_a_folder_of_somebody_else_stays(fast: str, far: str) -> None:
    run(far, 4, every=2)
    before = files(Path(far))
    with pytest.raises((ConflictError, UsageError)), CheckpointManager(fast, upload=far) as manager:
        manager.save(2, build())
    assert files(Path(far)) == before


def _node_local(rank: int, world: int, folder: str) -> str:
    state = build()
    manager = CheckpointManager(f"{folder}/node-{rank}", upload=f"{folder}/far")
    try:
        manager.save(1, state)
    except UsageError as error:
        return str(error)
    return ""


def test_disks_of_single_nodes_are_refused_on_all_ranks(tmp_path: Path) -> None:
    told = spawn(_node_local, 2, str(tmp_path))
    assert all("does not see" in one for one in told)
    assert not list(tmp_path.rglob("step-*"))


def _shared(rank: int, world: int, folder: str, steps: int) -> Any:
    return run(f"{folder}/fast", steps, sharded=True, every=1, upload=f"{folder}/far", keep_local=1)


def test_a_job_of_ranks(tmp_path: Path) -> None:
    spawn(_shared, 2, str(tmp_path), 3)
    assert steps(str(tmp_path / "far")) == [1, 2, 3]
    assert steps(str(tmp_path / "fast")) == [3]
    assert not list((tmp_path / "fast").glob(".shared-*"))
    shutil.rmtree(tmp_path / "fast")
    told = spawn(_shared, 2, str(tmp_path), 4)
    assert [one[0] for one in told] == [3, 3]
    assert not differing(told[0][2], uninterrupted(4))


def _names(folder: str) -> set[str]:
    """Of the files below a folder, which may go at any moment."""
    return {os.path.join(top, name) for top, _, names in os.walk(folder) for name in names}


def test_killed_while_uploading(fast: str, far: str) -> None:
    """Over and over; whatever is complete far is whole, and a last run copies the rest."""
    code = (
        "import sys; from tests.train.manager.jobs import run\n"
        "run(sys.argv[1], int(sys.argv[3]), every=1, upload=sys.argv[2], keep_local=1)"
    )
    for number, wait in enumerate((0.0, 0.05), 1):
        child = subprocess.Popen(
            [sys.executable, "-c", code, fast, far, str(number * 8)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        before = _names(far)
        while child.poll() is None and _names(far) == before:
            time.sleep(0.002)
        time.sleep(wait)
        child.kill()
        child.wait()
        for saved in Shelf(far).contents().saved if os.path.exists(far) else ():
            ucp.open(saved.url)
    with CheckpointManager(fast, upload=far, keep_local=1) as manager:
        resumed = manager.resume(build())
        assert resumed is not None
    assert steps(far)[-1] == resumed.step
    for saved in Shelf(far).contents().saved:
        assert ucp.open(saved.url).step == saved.step


def test_what_checkpoints_share_is_copied_once(fast: str, far: str) -> None:
    _, _, state = run(fast, 3, every=1, upload=far, keep_local=1, share=True)
    assert steps(far) == [1, 2, 3]
    shutil.rmtree(fast)
    for saved in Shelf(far).contents().saved:
        assert ucp.open(saved.url).step == saved.step
    first, _, again = run(fast, 3, every=1, upload=far)
    assert first == 3
    assert not differing(state, again)


def flip(path: Path) -> None:
    """One digit of a root, or one bit of a shard."""
    data = bytearray(path.read_bytes())
    at = data.index(b'"crc32c":') + 9 if path.name == "ucp.json" else len(data) - 1
    data[at] = ord("1") if data[at] == ord("2") else ord("2") if path.name == "ucp.json" else data[at] ^ 1
    path.write_bytes(data)


def test_a_near_root_that_is_damaged_never_costs_the_far_copy(
    fast: str, far: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(fast, 3, every=1, upload=far)
    before = files(Path(far, "step-00000003"))
    flip(Path(fast, "step-00000003", "ucp.json"))
    with CheckpointManager(fast, upload=far) as manager, caplog.at_level(logging.WARNING):
        resumed = manager.resume(build())
        assert resumed is not None
        assert resumed.url == f"{far}/step-00000003"
        assert manager.not_uploaded == []
    assert files(Path(far, "step-00000003")) == before
    assert f"ucp repair {fast}/step-00000003 --from {far}/step-00000003" in caplog.text
    first, _, state = run(fast, 6, every=1, upload=far, keep_local=1)
    assert first == 3
    assert not differing(state, uninterrupted(6))
    assert steps(fast) == [6]
    assert files(Path(far, "step-00000003")) == before


def test_a_damaged_checkpoint_never_replaces_another_one(fast: str, far: str, tmp_path: Path) -> None:
    """Both roots can be read, and a shard of the one in the fast folder is damaged."""
    run(fast, 4, every=2, upload=far)
    before = files(Path(far, "step-00000004"))
    run(str(tmp_path / "other"), 4, every=1)
    near = Path(fast, "step-00000004")
    shutil.rmtree(near)
    shutil.copytree(tmp_path / "other" / "step-00000004", near)
    flip(next((near / "shards").iterdir()))
    Shelf(far).record(4, {}, aside=True)
    manager = CheckpointManager(fast, upload=far, keep_local=1)
    manager.save(6, build())
    with pytest.raises(StorageError, match="not everything could be copied"):
        manager.close()
    assert files(Path(far, "step-00000004")) == before
    assert Shelf(far).saved(4).aside, "what is another one does not come back to life"
    assert steps(fast) == [4, 6], "it lies nowhere else"
    assert steps(far) == [2, 4, 6]
