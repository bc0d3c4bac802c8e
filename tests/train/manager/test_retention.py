"""Retention among readers: a reader sees a whole checkpoint, or is told that it is gone; and what is shared is kept."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import ucp
from tests.share.made import pool
from tests.train.manager.retention_jobs import ROOT, build, reads
from ucp.lifecycle.gc import gc
from ucp.lifecycle.shelf import remove_folder
from ucp.store import LocalStore
from ucp.testing.faults import crashes, placed
from ucp.train.manager import CheckpointManager


@pytest.mark.parametrize("share", [False, True])
def test_readers_of_what_is_being_deleted(tmp_path: Path, share: bool) -> None:
    """Processes read every checkpoint that they see, again and again, while a manager saves and deletes."""
    url = tmp_path / "run"
    command = [sys.executable, "-m", "tests.train.manager.retention_jobs", str(url), str(tmp_path / "stop")]
    readers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    try:
        with CheckpointManager(str(url), keep_latest=2, share=share, grace=60) as manager:
            deadline, step = time.monotonic() + 400, 0
            while step < 10 or _seen(tmp_path) < 20:
                assert time.monotonic() < deadline, "the readers see nothing"
                step += 1
                manager.save(step, build(step)).result()
        (tmp_path / "stop").touch()
        assert [reader.wait(timeout=60) for reader in readers] == [0, 0]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    assert [saved.step for saved in manager.saved] == [step - 1, step]
    assert reads(str(url / f"step-{step:08}")) == step


def _seen(folder: Path) -> int:
    """How many whole checkpoints the readers have read."""
    told = [path.read_text().split() for path in folder.glob("seen-*")]
    return sum(int(words[0]) for words in told if words)


def test_managers_share_and_collect(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with CheckpointManager(url, keep_latest=1, share=True, grace=60) as manager:
        for step in range(1, 6):
            manager.save(step, build(step)).result()
            if step == 1:
                first = pool(tmp_path / "run")
    assert pool(tmp_path / "run") >= {
        name for name in first if (tmp_path / "run" / "shared" / name).stat().st_size > 2**20
    }
    assert [saved.step for saved in manager.saved] == [5]
    assert reads(f"{url}/step-00000005") == 5
    kept = pool(tmp_path / "run")
    gc(url, grace=0)
    gc(url, grace=0)
    assert pool(tmp_path / "run") <= kept
    assert reads(f"{url}/step-00000005") == 5


def test_what_a_manager_shared_stays_for_the_grace_period(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with CheckpointManager(url, keep_latest=1, share=True) as manager:
        manager.save(1, {"a": torch.nn.Linear(600, 600).requires_grad_(False)}).result()
        first = pool(tmp_path / "run")
        manager.save(2, {"a": torch.nn.Linear(600, 600).requires_grad_(False)}).result()
    assert [saved.step for saved in manager.saved] == [2]
    assert first < pool(tmp_path / "run"), "somebody may still be reading it"


def test_a_deletion_killed_at_every_operation_never_leaves_a_part_that_opens(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    points = 0

    def work(fault):
        remove_folder(fault.around(store), "victim")

    for number in range(1, 100):
        ucp.save(build(number), str(tmp_path / "victim"), step=number, overwrite=True)
        crash = next(iter(crashes(work, start=number)), None)
        points += crash is not None
        with suppress(ucp.NotFoundError):
            assert reads(str(tmp_path / "victim")) == number
        if crash is None:
            break
    assert points > 4
    with placed(run=store), pytest.raises(ucp.NotFoundError):
        ucp.open("placed://run/victim")


@pytest.mark.parametrize("grace", ["soon", -1, float("nan")])
def test_wrong_grace_periods(tmp_path: Path, grace: object) -> None:
    with pytest.raises(ucp.UsageError):
        CheckpointManager(str(tmp_path), share=True, grace=grace)  # type: ignore[arg-type]
