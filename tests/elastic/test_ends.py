"""Ranks that fail, stop and die under a launcher that starts nobody anew: how the others end, and what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gloo import die_with_parent
from ucp.elastic.options import shared_memory
from ucp.elastic.world import job_name

JOB = Path(__file__).with_name("torchrun_job.py")
ROOT = Path(__file__).parents[2]
PATIENCE = 240
RANKS = 3

pytestmark = pytest.mark.slow


class Job:
    """Ranks as mpirun or srun start them; none outlives the test."""

    def __init__(self, folder, order, environments=({},) * RANKS):
        self.folder = folder
        self.out = folder / "out"
        self.out.mkdir()
        order = {"url": str(folder / "run"), "out": str(self.out), "root": str(folder), "kind": "ddp", **order}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.ranks = [self._start(rank, port, order, more) for rank, more in enumerate(environments)]

    def _start(self, rank, port, order, more):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")},
            "RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_RANK": str(rank),
            "UCP_NODE": "n",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **more,
        }
        environment = {name: value for name, value in environment.items() if value}
        with open(self.folder / f"{rank}.log", "w") as log:
            return subprocess.Popen(
                [sys.executable, str(JOB), json.dumps(order)],
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it calls prctl alone
            )

    def code(self, rank):
        return self.ranks[rank].wait(timeout=PATIENCE)

    def log(self, rank):
        return (self.folder / f"{rank}.log").read_text()

    def saved(self):
        return sorted(path.parent.name for path in (self.folder / "run").glob("step-*/ucp.json"))

    def close(self):
        for process in self.ranks:
            process.kill()
            process.wait()
        forget(self.folder)


def forget(folder):
    """What the ranks of a job that failed leave on their node for the next start."""
    shutil.rmtree(Path(shared_memory(), f"ucp-{os.geteuid()}", job_name(str(folder / "run"))), ignore_errors=True)


@pytest.fixture
def job(tmp_path):
    made = []

    def start(order, **options):
        made.append(Job(tmp_path, {"steps": 12, "every": 4, **order}, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def fails(rank, how):
    return {"orders": [{"epoch": 1, "step": 3, "rank": rank, "at": "step", "how": how}]}


def test_the_cause_is_told_by_whom_it_hit_and_by_all_others(job):
    ran = job(fails(1, "raise"))
    assert [ran.code(rank) for rank in range(RANKS)] == [1] * RANKS, ran.log(0)
    assert "Traceback" in ran.log(1)
    assert 'raise ValueError("told to fail")' in ran.log(1)
    for rank in (0, 2):
        assert "rank 1 on n left: ValueError: told to fail" in ran.log(rank)


def test_a_rank_that_stood_still_ends_when_it_wakes_and_saves_nothing_any_more(job):
    ran = job({**fails(2, "stop"), "timeout": 30, "every": 1, "memory": 1})
    for rank in (0, 1):
        assert ran.code(rank) == 1
    told = ran.log(0) + ran.log(1)
    assert re.search(r"rank 2( on n)? was not heard of for \d+ s", told), told
    assert ran.ranks[2].poll() is None
    saved = ran.saved()
    ran.ranks[2].send_signal(signal.SIGCONT)
    assert ran.code(2) == 1
    assert ran.saved() == saved
    assert "leaves: " in ran.log(2) or "ends: " in ran.log(2)


def test_the_host_of_the_store_dies(job):
    ran = job(fails(0, "kill"))
    assert [ran.code(rank) for rank in range(RANKS)] == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        assert "leaves: " in ran.log(rank) or "the store of the rendezvous is gone" in ran.log(rank)


def test_ranks_that_were_given_no_numbers_do_not_save_over_each_other(job):
    unknown = {"RANK": "", "WORLD_SIZE": "", "OMPI_COMM_WORLD_SIZE": str(RANKS)}
    ran = job({"orders": []}, environments=[unknown] * RANKS)
    assert [ran.code(rank) for rank in range(RANKS)] == [1] * RANKS
    assert all("UsageError" in ran.log(rank) for rank in range(RANKS))
    assert not (ran.folder / "run").exists()


def test_torchrun_names_the_rank_that_failed_as_the_root_cause(tmp_path):
    """The others leave a moment later: who leaves first is what torchrun tells, and it ends the others."""
    (tmp_path / "out").mkdir()
    order = {"url": str(tmp_path / "run"), "out": str(tmp_path / "out"), "kind": "ddp", "steps": 12, "every": 4}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["--max-restarts=0", "--monitor-interval=0.1", str(JOB), json.dumps({**order, **fails(1, "raise")})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "UCP_NODE": "n"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=die_with_parent,  # noqa: PLW1509  it calls prctl alone
    ) as agent:
        told, _ = agent.communicate(timeout=PATIENCE)
    forget(tmp_path)
    assert agent.returncode == 1
    assert 'raise ValueError("told to fail")' in told
    cause = told.partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 (local_rank: 1)" in cause, told
