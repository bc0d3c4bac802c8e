"""What nodes hold: saves that find no room or no time are left out on all ranks, and training goes on."""

from __future__ import annotations

import json
import logging
import os
import threading

import pytest
from torch import distributed

from tests.elastic.test_run import go, no_launcher, run_of, state, train
from tests.support.gloo import spawn
from ucp.elastic import Local, Memory, Run, keep
from ucp.elastic.nodes import NodeFolder, NodesStore
from ucp.errors import StorageError, UsageError

__all__ = ["no_launcher"]


def held(root):
    """The steps of which a folder of nodes holds anything, and those that are complete."""
    there = {path.name for path in root.rglob("step-*")}
    whole = {path.parent.name for path in root.rglob("ucp.json")}
    return sorted(int(name[5:]) for name in there), sorted(int(name[5:]) for name in whole)


def steps(run, first, last):
    """Do these steps."""
    model, optimizer = state()
    for step in range(first, last + 1):
        train(model, optimizer)
        run.step(step, (model, optimizer))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("tier", ["memory", "local"])
def test_a_save_that_is_due_while_another_is_under_way_is_left_out(tmp_path, monkeypatch, caplog, tier):
    begun, go_on = threading.Event(), threading.Event()
    create = NodeFolder.create

    def slow(self, *args, **options):
        begun.set()
        assert go_on.wait(100)
        return create(self, *args, **options)

    kept = {"memory": Memory, "local": Local}[tier](root=str(tmp_path / tier), every=1, copies=1)
    with run_of(tmp_path, **{tier: kept}) as run:
        steps(run, 1, 1)
        run.tiers[0].settle()
        with monkeypatch.context() as patched:
            patched.setattr(NodeFolder, "create", slow)
            steps(run, 2, 5)
            assert begun.wait(60)
            assert run.report.unsaved == {tier: 3}
            assert run.done == 5
            go_on.set()
            run.tiers[0].settle()
        assert held(tmp_path / tier) == ([2], [2])
        steps(run, 6, 6)
        run.tiers[0].settle()
        assert held(tmp_path / tier) == ([6], [6])
        assert run.report.unsaved == {tier: 3}
    told = warnings(caplog)
    assert told.count(f"{tier}: step 3 is left out, training goes on: the save before it is under way") == 1
    assert f"{tier}: step 6 is saved again; left out before: 3 (the save before it is under way)" in told
    assert json.loads((tmp_path / "run" / "elastic" / "timeline-00001.json").read_text())["unsaved"] == {tier: 3}


def test_one_that_is_waited_for_is_not_left_out(tmp_path):
    with run_of(tmp_path, memory=Memory(root=str(tmp_path / "memory"), every=1, copies=1, busy="wait")) as run:
        steps(run, 1, 5)
        assert run.report.unsaved == {"memory": 0}
    with pytest.raises(UsageError, match="Memory\\(busy='both'\\)"):
        Memory(busy="both")


def test_a_node_that_is_full_costs_versions_and_no_training(tmp_path, monkeypatch, caplog):
    with run_of(tmp_path, memory=Memory(root=str(tmp_path / "memory"), every=1, copies=1, busy="wait")) as run:
        steps(run, 1, 2)
        run.tiers[0].settle()
        with monkeypatch.context() as patched:
            patched.setattr(NodeFolder, "room", lambda self: 100)
            steps(run, 3, 5)
            run.tiers[0].settle()
            assert held(tmp_path / "memory") == ([2], [2])
            assert run.report.unsaved == {"memory": 3}
        steps(run, 6, 6)
        run.tiers[0].settle()
        assert held(tmp_path / "memory") == ([6], [6])
    told = warnings(caplog)
    assert any(
        "memory: step 3 is left out, training goes on: node n " in one and "room for 100 bytes" in one for one in told
    )
    assert "memory: step 6 is saved again; left out before: 3 (no room)" in told


def test_what_a_node_has_no_room_for_all_the_same_leaves_the_version_before(tmp_path, monkeypatch):
    """It said that there was room, or a first save did not know what it would take."""
    create = NodeFolder.create

    def full(self, path, size, **options):
        if path.endswith("ucp.json"):
            raise StorageError(f"{path}: no space left on device")
        return create(self, path, size, **options)

    with run_of(tmp_path, memory=Memory(root=str(tmp_path / "memory"), every=1, copies=1, busy="wait")) as run:
        steps(run, 1, 2)
        run.tiers[0].settle()
        with monkeypatch.context() as patched:
            patched.setattr(NodeFolder, "create", full)
            steps(run, 3, 4)
            run.tiers[0].settle()
            assert held(tmp_path / "memory") == ([2], [2])
        assert run.report.unsaved == {"memory": 2}
        steps(run, 5, 5)
        run.tiers[0].settle()
        assert held(tmp_path / "memory") == ([5], [5])


def one_is_full(rank, world, url, root):
    """Two nodes; for a while the second one has no room, the first one cannot know."""
    os.environ["UCP_NODE"] = f"n{rank}"
    room = NodesStore.room
    kept = Memory(root=root, every=1, copies=1, busy="wait")
    with Run(url, layouts=keep(), memory=kept, timeout=100) as run:
        go(run, 2, of=100)
        NodesStore.room = lambda self: 0 if rank else 1 << 40
        steps(run, 3, 5)
        NodesStore.room = room
        run.tiers[0].settle()
        distributed.barrier()
        found = run.report.unsaved, sorted(part.step for part in run.tiers[0].show().parts)
        distributed.barrier()
        steps(run, 6, 6)
        run.tiers[0].settle()
        return *found, sorted(part.step for part in run.tiers[0].show().parts)


def test_all_ranks_leave_a_save_out_for_which_one_has_no_room(tmp_path):
    found = spawn(one_is_full, 2, str(tmp_path / "run"), str(tmp_path / "memory"))
    assert found == [({"memory": 3}, [2], [6])] * 2
