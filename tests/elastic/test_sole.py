"""The same job started twice by mistake: the second start is refused, and takes nothing away from the first."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from ucp.elastic import Memory, Run, keep, sole
from ucp.elastic import meeting as meeting_module
from ucp.elastic.meeting import Meeting
from ucp.elastic.sole import Sole
from ucp.elastic.world import World
from ucp.errors import ConflictError

PATIENCE = 60.0

HOLDER = """
import sys
from ucp.elastic import sole
from ucp.elastic.sole import Sole
from ucp.elastic.meeting import Meeting
from ucp.elastic.world import World
held = Sole(sys.argv[1], "there")
held.take(Meeting(World(0, 1, 0, "n", alone=True), 60))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the node's folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "ucp-0" / "job" / "n")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def alone():
    return Meeting(World(0, 1, 0, "n", alone=True), PATIENCE)


def test_a_second_start_is_refused_until_the_first_is_gone(tmp_path, other, monkeypatch):
    monkeypatch.setattr(sole, "_PATIENCE", 0.2)
    second = Sole(str(tmp_path / "ucp-0" / "job" / "n"), "there")
    told = f"there: this job is at work already: node n, process {other.pid} since"
    with pytest.raises(ConflictError, match=told):
        second.take(alone())
    monkeypatch.setattr(sole, "_PATIENCE", PATIENCE)
    other.kill()
    second.take(alone())
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_hear_it(tmp_path, other, monkeypatch):
    shared = HashStore()
    monkeypatch.setattr(meeting_module, "_base", lambda *_, **__: shared)
    monkeypatch.setattr(sole, "_PATIENCE", 0.2)

    def work(rank):
        node = "n" if rank else "m"
        with pytest.raises(ConflictError, match="at work already: node n, process") as caught:
            Sole(str(tmp_path / "ucp-0" / "job" / node), "there").take(Meeting(World(rank, 3, 0, node), PATIENCE))
        return caught.value.message

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(work, range(3)))) == 1


def test_a_file_that_its_holder_took_away_is_not_held(tmp_path):
    """Who waited for it has locked what has no name any more."""
    folder = str(tmp_path / "ucp-0" / "job" / "n")
    first, second = Sole(folder, "there"), Sole(folder, "there")
    first.take(alone())
    Path(f"{folder}.lock").unlink()
    Path(f"{folder}.lock").write_text("another's")
    second.take(alone())
    assert Path(f"{folder}.lock").read_text() != "another's"
    second.release()
    first.release()


def test_a_place_that_knows_no_locks_is_told(tmp_path, monkeypatch, caplog):
    def locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sole.fcntl, "lockf", locks)
    Sole(str(tmp_path / "ucp-0" / "job" / "n"), "there").take(alone())
    assert "there: that it is started once is not checked on this node: [Errno 37] No locks available" in caplog.text


TWICE = """
import sys
import torch
from ucp.elastic import Memory, Run, keep
with Run(sys.argv[1], layouts=keep(), memory=Memory(every=1, copies=1, root=sys.argv[2]), timeout=1) as run:
    model = torch.nn.Linear(2, 2)
    run.resume(model)
    run.step(1, model)
"""


def test_a_run_keeps_a_second_one_out(tmp_path, monkeypatch):
    monkeypatch.setenv("UCP_NODE", "n")
    url, memory = str(tmp_path / "run"), str(tmp_path / "memory")
    command = [sys.executable, "-c", TWICE, url, memory]
    with Run(url, layouts=keep(), memory=Memory(root=memory)) as run:
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert second.returncode == 1
        assert "ConflictError" in second.stderr
        assert "this job is at work already: node n, process" in second.stderr
        assert run.epoch == 1
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "memory").iterdir()) == []


def test_folders_that_another_start_removes_are_made_for_this_user_alone(tmp_path, other, monkeypatch):
    """Where a start that ends removes them while this one waits."""
    second = Sole(str(tmp_path / "ucp-0" / "job" / "n"), "there")
    tried = []

    def ended(seconds):
        if not tried:
            other.kill()
            other.wait()
            shutil.rmtree(tmp_path / "ucp-0")
        tried.append(seconds)

    monkeypatch.setattr(sole.time, "sleep", ended)
    second.take(alone())
    assert tried
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("ucp-0", "ucp-0/job")] == [0o700, 0o700]
    second.release()
