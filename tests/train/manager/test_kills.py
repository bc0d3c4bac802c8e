"""Processes killed while they save and while they delete: what is left is what was whole before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ucp
from tests.train.manager.jobs import differing, run, uninterrupted
from ucp.errors import NotFoundError
from ucp.train.manager import CheckpointManager

ROOT = Path(__file__).parents[3]


@contextmanager
def process(kind: str, url: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.train.manager.jobs", kind, url]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert child.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.005)


def half_written(folder: Path) -> bool:
    shards = list(folder.glob("shards/*"))
    return bool(shards) and any(b"\0" * 64 in shard.read_bytes() for shard in shards)


def test_killed_while_saving(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with process("save", str(url)) as child:
        wait_until(lambda: half_written(url / "step-00000003"), child)
        child.send_signal(signal.SIGKILL)
        child.wait()
    manager = CheckpointManager(str(url))
    assert manager.incomplete == [f"{url}/step-00000003"]
    assert manager.latest is not None
    assert manager.latest.step == 2
    with pytest.raises(NotFoundError):
        ucp.open(url / "step-00000003")
    first, _, state = run(str(url), 4, every=1, keep_latest=2)
    assert first == 2
    assert not differing(state, uninterrupted(4))
    assert [saved.step for saved in manager.saved] == [3, 4]
    assert manager.incomplete == []


def test_killed_while_deleting(tmp_path: Path) -> None:
    url = tmp_path / "run"
    victim = url / "step-00000001"
    with process("retention", str(url)) as child:
        wait_until(lambda: victim.exists() and not (victim / "ucp.json").exists() and _newer(url), child)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert list(victim.glob("shards/*")), "killed too late: this shows nothing"
    manager = CheckpointManager(str(url))
    assert f"{victim}" in manager.incomplete
    with pytest.raises(NotFoundError):
        ucp.open(victim)
    assert manager.latest is not None
    last = manager.latest.step
    first, _, state = run(str(url), last + 2, every=1, keep_latest=1)
    assert first == last
    assert not differing(state, uninterrupted(last + 2))
    assert sorted(os.listdir(url)) == [f"step-{last + 2:08}", f"step-{last + 2:08}.json"]


def _newer(url: Path) -> bool:
    return (url / "step-00000002" / "ucp.json").exists()
