"""Runs of one process, and of ranks whose launcher made the process group."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time

import pytest
import torch
from torch import distributed, nn

import ucp
from tests.support.gloo import RankFailed, spawn
from ucp.elastic import Batch, Feed, Memory, Run, holdings, keep
from ucp.elastic.options import check_alike
from ucp.elastic.versions import Version
from ucp.errors import CorruptError, NotFoundError, StorageError, UsageError
from ucp.train.save.engine import engine_of


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UCP_NODE", "n")


def state(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, optimizer):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def run_of(tmp_path, **options):
    options = {"memory": None, "layouts": keep(), **options}
    return Run(str(tmp_path / "run"), **options)


def go(run, until, *, seed=0, of=0):
    """Train until a step, of a loop that has more; the weights."""
    model, optimizer = state(seed)
    run.resume((model, optimizer))
    for step in run.steps(max(until, of)):
        train(model, optimizer)
        run.step(step, (model, optimizer))
        if step == until:
            break
    return model.weight.detach().clone()


def test_a_run_goes_on_where_it_was(tmp_path):
    with run_of(tmp_path, every=2) as run:
        assert (run.epoch, run.world, run.rank, run.active, run.spare) == (1, 1, 0, True, False)
        assert (str(run.mesh), run.seat, run.done) == ("dp1", (0, 1), 0)
        at_4 = go(run, 4)
        assert run.done == 4
    with run_of(tmp_path, every=2) as run:
        assert run.epoch == 2
        assert torch.equal(go(run, 4, seed=1), at_4)
        assert run.done == 4
        whole = go(run, 6, seed=1)
    with Run(str(tmp_path / "other"), layouts=keep(), memory=None) as run:
        assert torch.equal(go(run, 6), whole)


def test_times_and_layout_are_recorded_beside_the_checkpoints(tmp_path):
    with run_of(tmp_path, every=2) as run:
        assert "resume" not in run.report.parts
        go(run, 2)
        assert run.report.parts.keys() >= {"rendezvous", "start", "agree", "build", "resume"}
    doc = json.loads((tmp_path / "run" / "elastic" / "timeline-00001.json").read_text())
    assert doc == run.report.doc
    assert (doc["epoch"], doc["world"], doc["mesh"], doc["spares"], doc["step"]) == (1, 1, {"dp": 1}, 0, 0)
    assert str(run.report).startswith("epoch 1: dp1 on 1 ranks, from the beginning (seconds: ")


def test_the_process_group_is_there_within_the_block_alone(tmp_path):
    assert not distributed.is_initialized()
    with run_of(tmp_path) as run:
        assert distributed.get_world_size() == run.mesh.size
        mesh = run.device_mesh("cpu")
        assert (mesh.mesh_dim_names, tuple(mesh.shape)) == (("dp",), (1,))
    assert not distributed.is_initialized()


def test_an_exception_goes_on_to_who_catches_it(tmp_path):
    def fails():
        with run_of(tmp_path, every=1) as run:
            go(run, 1)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fails()
    assert not distributed.is_initialized()
    with run_of(tmp_path, every=1) as run:
        go(run, 2)
        assert run.epoch == 2


def test_layouts_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    refused = pytest.raises(UsageError, match=r"no layout fits 1 rank:\n +dp1 tp2: takes 2 ranks")
    with refused, run_of(tmp_path, layouts=keep(tp=2)):
        raise AssertionError("it began")
    assert not distributed.is_initialized()


def test_steps_go_forward(tmp_path):
    with run_of(tmp_path, every=2) as run:
        go(run, 2)
    with run_of(tmp_path) as run:
        held = state()
        run.resume(held)
        with pytest.raises(UsageError, match="step 1 comes after step 2"):
            run.step(1, held)


def test_samples_come_from_a_feed_that_is_saved(tmp_path):
    batch = Batch(4, 2)
    feed = Feed(torch.arange(8), batch)
    for _ in feed.step():  # of no run
        pass
    with run_of(tmp_path, batch=batch) as run:
        held = state()
        run.resume(held)
        run.step(1, held)
        for _ in feed.step():
            pass
        run.step(2, held)  # it has begun to train without one
    with run_of(tmp_path, batch=batch) as run:
        for _ in feed.step():
            pass
        with pytest.raises(UsageError, match="a Feed that is not in the state"):
            run.step(3, held)
    with run_of(tmp_path / "another", batch=batch) as run:
        for _ in feed.step():
            pass
        run.step(1, {"both": held, "feed": feed})


def test_run_and_feed_have_one_batch(tmp_path):
    feed = Feed(torch.arange(8), Batch(4, 1))
    with run_of(tmp_path, batch=Batch(4, 2)) as run, pytest.raises(UsageError, match="its feed Batch"):
        run.resume({"feed": feed})


def test_a_timeout_must_be_one(tmp_path):
    with pytest.raises(UsageError, match="timeout=0"):
        run_of(tmp_path, timeout=0)
    with pytest.raises(UsageError, match="both must be at least 1"):
        Memory(every=0)


def test_a_run_says_which_layout_it_takes(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ucp"), run_of(tmp_path):
        pass
    assert f"{tmp_path}/run: epoch 1: dp1 on 1 rank" in caplog.text


def test_nothing_is_left_on_the_node(tmp_path):
    with run_of(tmp_path, memory=Memory(root=str(tmp_path / "memory")), job="j") as run:
        go(run, 1)
        assert list((tmp_path / "memory").rglob("e00001-00000"))
    assert list((tmp_path / "memory").iterdir()) == []


def in_group(rank, world, url):
    """The launcher made the process group already."""
    with Run(url, layouts=keep(), batch=Batch(6, micro=3), memory=None, every=1, timeout=60) as run:
        assert distributed.get_world_size() == run.mesh.size == world
        assert run.seat == (rank, world)
        go(run, 2)
    return run.epoch, run.done


def test_a_process_group_that_is_there_is_used(tmp_path):
    assert spawn(in_group, 2, str(tmp_path / "run")) == [(1, 2)] * 2
    assert spawn(in_group, 2, str(tmp_path / "run")) == [(2, 2)] * 2


def leaves_over(rank, world, url):
    with Run(url, layouts=keep(at_most=1), memory=None):
        raise AssertionError("it began")


def test_spare_ranks_need_a_process_group_of_the_runs_own(tmp_path):
    with pytest.raises(RankFailed, match="leave init_process_group to the run"):
        spawn(leaves_over, 2, str(tmp_path / "run"))


def breaks_off(tmp_path, until, **options):
    """A run that fails after a step, whose state is in memory by then."""
    memory = Memory(every=1, copies=1, root=str(tmp_path / "memory"), busy="wait")
    with pytest.raises(ValueError, match="no luck"), run_of(tmp_path, memory=memory, **options) as run:  # noqa: PT012
        weights = go(run, until, of=100)
        run.tiers[0].settle()
        settle_storage()
        raise ValueError("no luck")
    return memory, weights


def settle_storage():
    """What is on its way to storage is there."""
    engine_of(None).drain()
    deadline = time.monotonic() + 60
    while any(thread.name in ("ucp-promise", "ucp-timeline") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_that_broke_off_goes_on_from_memory(tmp_path):
    memory, at_3 = breaks_off(tmp_path, 3, every=2)
    with run_of(tmp_path, memory=memory, every=2) as run:
        model, optimizer = state(1)
        found = run.resume((model, optimizer))
        assert torch.equal(model.weight, at_3)
        assert (run.epoch, run.report.step, run.report.tier, run.report.reconfigured) == (2, 3, "memory", False)
        assert run.report.steps_lost == 0
        report = found.report
        assert report.parts.keys() == {"plan", "read", "reshard"}
        assert min(report.parts.values()) >= 0
        assert sum(report.parts.values()) == pytest.approx(report.seconds)
    assert list((tmp_path / "memory").iterdir()) == []
    # What is over is over: only storage is left of it.
    with run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4, seed=1)
        assert (run.report.step, run.report.tier) == (2, "storage")


def test_memory_that_is_lost_leaves_storage(tmp_path):
    memory, _ = breaks_off(tmp_path, 3, every=2)
    shutil.rmtree(tmp_path / "memory")
    with run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4)
        assert (run.report.step, run.report.tier) == (2, "storage")


def test_a_run_that_lost_everything_does_not_begin_anew_unasked(tmp_path):
    memory, _ = breaks_off(tmp_path, 3)
    shutil.rmtree(tmp_path / "memory")
    refused = pytest.raises(NotFoundError, match=r"nothing is left to go on from:\n.*of which none is left: n\n")
    with refused, run_of(tmp_path, memory=memory) as run:
        go(run, 4)
    shutil.rmtree(tmp_path / "run")
    with run_of(tmp_path, memory=memory) as run:
        go(run, 4)
        assert run.report.tier is None


def test_a_damaged_version_is_told_and_the_one_before_taken(tmp_path):
    memory, _ = breaks_off(tmp_path, 3, every=2)
    for shard in (tmp_path / "memory").rglob("rank-*"):
        shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    with run_of(tmp_path, memory=memory, every=2) as run:
        model, optimizer = state()
        found = run.resume((model, optimizer))
        assert (found.step, found.tier) == (2, "storage")
        assert [(version.step, version.tier) for version, _ in found.left] == [(3, "memory")]


def test_what_is_there_is_not_passed_over(tmp_path):
    memory, _ = breaks_off(tmp_path, 3)
    refused = pytest.raises(UsageError, match=r"there is step 3 of epoch 1 in memory, and step 1 is to be saved")
    with refused, run_of(tmp_path, memory=memory) as run:
        run.step(1, state())
    with run_of(tmp_path, memory=memory) as run:
        go(run, 3)
        assert run.report.step == 3


def test_a_job_that_is_told_to_end_stops_when_its_state_is_saved(tmp_path):
    with run_of(tmp_path, every=100) as run:
        model, optimizer = state()
        run.resume((model, optimizer))
        for step in run.steps(50):
            if step == 3:
                run.manager.preempt()
            run.step(step, (model, optimizer))
        assert (run.preempted, run.done) == (True, 3)
        assert [one.step for one in run.manager.saved] == [3]


def test_a_start_that_did_nothing_has_its_number_all_the_same(tmp_path):
    memory = Memory(root=str(tmp_path / "memory"))
    for epoch in (1, 2, 3):
        with pytest.raises(ValueError, match="no luck"), run_of(tmp_path, memory=memory) as run:  # noqa: PT012
            assert run.epoch == epoch
            raise ValueError("no luck")


def loses_a_rank(rank, world, url, memory):
    """Rank 1 dies while all load what is there."""
    with Run(url, layouts=keep(), memory=Memory(every=1, copies=1, root=memory), timeout=60) as run:
        if rank == 1:
            os._exit(3)
        go(run, 3)


def saves(rank, world, url, memory):
    kept = Memory(every=1, copies=1, root=memory, busy="wait")
    run = Run(url, layouts=keep(), memory=kept, timeout=60).__enter__()
    go(run, 2)
    run.tiers[0].settle()
    distributed.barrier()
    return run.epoch


def test_a_rank_that_dies_while_all_load_costs_no_version(tmp_path):
    url, memory = str(tmp_path / "run"), str(tmp_path / "memory")
    assert spawn(saves, 2, url, memory) == [1, 1]
    with pytest.raises(RankFailed):
        spawn(loses_a_rank, 2, url, memory)
    assert [path.parent.name for path in (tmp_path / "memory").rglob("ucp.json")] == ["step-00000002"]
    assert spawn(ends, 2, url, memory) == [("memory", 2)] * 2


def fails_apart(rank, world, url, memory):
    """Loading the newest version once finds damage on rank 1 and no storage on rank 0."""
    real, asked = holdings.load, []

    def load(state, source, **options):
        asked.append(source.step)
        if len(asked) == 1:
            raise StorageError("gone") if rank == 0 else CorruptError("damaged")
        return real(state, source, **options)

    holdings.load = load
    with Run(url, layouts=keep(), memory=Memory(every=1, copies=1, root=memory), timeout=60) as run:
        go(run, 2)
        assert run.report is not None
        return asked, run.report.step


def test_ranks_that_fail_apart_go_on_together(tmp_path):
    url, memory = str(tmp_path / "run"), str(tmp_path / "memory")
    assert spawn(saves, 2, url, memory) == [1, 1]
    assert spawn(fails_apart, 2, url, memory) == [([2, 2], 2)] * 2


def test_another_save_of_the_same_step_is_not_taken(tmp_path):
    ucp.save({"w": torch.arange(3.0)}, tmp_path / "there", step=2)
    there = str(tmp_path / "there")
    known = ucp.open(there).catalog.source.detail["id"]
    assert holdings._opened(Version(2, 1, "memory", there, id=known)).step == 2
    with pytest.raises(CorruptError, match="another save"):
        holdings._opened(Version(2, 1, "memory", there, id="x"))


def ends(rank, world, url, memory):
    with Run(url, layouts=keep(), memory=Memory(every=1, copies=1, root=memory), timeout=60) as run:
        go(run, 3)
        return run.report.tier, run.report.step


def is_given_something_else(rank, world, url, memory):
    kept = Memory(every=2 + rank, copies=1, root=memory)
    with Run(url, layouts=keep(), memory=kept, timeout=200):
        raise AssertionError("it began")


def test_ranks_that_are_given_different_things_hear_of_it_at_once(tmp_path):
    told = r"rank 1 was given memory=every=3, copies=1, busy=skip, and rank 0 memory=every=2"
    with pytest.raises(RankFailed, match=told):
        spawn(is_given_something_else, 2, str(tmp_path / "run"), str(tmp_path / "memory"))


def test_what_ranks_are_given_is_compared():
    check_alike([{"a": 1, "b": None}] * 3)
    with pytest.raises(UsageError, match="rank 2 was given b=4, and rank 0 b=None"):
        check_alike([{"a": 1, "b": None}, {"a": 1, "b": None}, {"a": 1, "b": 4}])
