"""What launchers say of the place of a process."""

from __future__ import annotations

import os

import pytest

from tests.support.gloo import spawn
from ucp.elastic import world
from ucp.elastic.world import job_name, world_of
from ucp.errors import UsageError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}


def test_torchrun_tells_the_place_and_is_the_parent(monkeypatch):
    monkeypatch.setenv("UCP_NODE", "b")
    found = world_of(TORCHRUN)
    assert (found.rank, found.size, found.local_rank, found.node, found.alone) == (5, 8, 1, "b", False)
    assert found.agent == os.getppid()


def test_other_launchers_have_no_agent():
    found = world_of({"RANK": "0", "WORLD_SIZE": "2"})
    assert (found.rank, found.size, found.local_rank, found.agent, found.alone) == (0, 2, 0, None, False)


def test_without_a_launcher_the_process_is_alone():
    found = world_of({"LOCAL_RANK": "3"})
    assert (found.rank, found.size, found.local_rank, found.alone) == (0, 1, 0, True)


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"},
    ],
)
def test_a_place_that_there_is_not_is_refused(given):
    with pytest.raises(UsageError):
        world_of(given)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_a_launcher_that_torch_does_not_hear_are_no_jobs_of_their_own(name):
    with pytest.raises(UsageError, match=f"{name}=4, and RANK and WORLD_SIZE are not set") as caught:
        world_of({name: "4"})
    assert "export RANK=$" in caught.value.hint
    assert world_of({name: "1"}).alone
    assert world_of({name: "4", "RANK": "1", "WORLD_SIZE": "4"}).rank == 1


def test_launchers_that_set_ranks_alone_tell_the_gpu_too():
    assert world_of({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "1"}).local_rank == 1
    assert world_of({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "1", "LOCAL_RANK": "3"}).local_rank == 3


def of_the_group(rank, world):
    found = world_of({})
    with pytest.raises(UsageError, match=f"say rank 0 of 7, the process group says {rank} of {world}"):
        world_of({"RANK": "0", "WORLD_SIZE": "7"})
    return found.rank, found.size, found.alone


def test_a_process_group_tells_the_place_where_the_launcher_does_not():
    assert spawn(of_the_group, 2) == [(0, 2, False), (1, 2, False)]


@pytest.mark.parametrize(
    ("command", "gone"), [("/sbin/init splash", True), ("tini --", True), ("python -m torch.distributed.run x", False)]
)
def test_an_orphan_knows_that_its_torchrun_is_gone(monkeypatch, command, gone):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(world, "_command", lambda _: command)
    if gone:
        with pytest.raises(UsageError, match="the torchrun that started this process is gone"):
            world_of(TORCHRUN)
    else:
        assert world_of(TORCHRUN).agent == 1


def test_a_job_is_named_for_where_it_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job_name("runs/7") == job_name(f"{tmp_path}/runs/7") == job_name("runs/7/")
    assert job_name("s3://bucket/runs/7") == job_name("s3://bucket/runs/7/")
    names = {job_name(url) for url in ("runs/7", "other/7", "s3://bucket/runs/7", "s3://bücket/runs/7", "s3://b/..")}
    assert len(names) == 5
    assert all("/" not in name and not name.startswith(".") for name in names)
