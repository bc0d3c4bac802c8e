"""What a start knows of the steps that were lost, and what a run that ends makes sure of."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time

import pytest
from torch import distributed

from tests.elastic.test_run import breaks_off, go, no_launcher, run_of, state, train
from tests.support.gloo import spawn
from ucp.elastic import Memory, Run, holdings, keep

__all__ = ["no_launcher"]


def until(told):
    for _ in range(2000):
        if told():
            return
        time.sleep(0.02)
    raise AssertionError("it does not come")


def resumes(tmp_path, memory, **options):
    """What the next start has to tell; it breaks off before it does a step."""
    with pytest.raises(ValueError, match="no luck"), run_of(tmp_path, memory=memory, **options) as run:  # noqa: PT012
        run.resume(state())
        found = run.report
        raise ValueError("no luck")
    return found


def test_steps_lost_are_counted_from_what_a_rank_left(tmp_path):
    memory, _ = breaks_off(tmp_path, 7, every=2)
    shutil.rmtree(next((tmp_path / "memory").rglob("e00001")))
    found = resumes(tmp_path, memory, every=2)
    assert (found.step, found.tier, found.steps_lost, found.at_least) == (6, "storage", 1, False)
    assert ", 1 steps lost" in str(found)


def test_a_start_that_dies_in_recovery_does_not_forget_what_was_lost(tmp_path):
    memory, _ = breaks_off(tmp_path, 7, every=2)
    shutil.rmtree(next((tmp_path / "memory").rglob("e00001")))
    for epoch in (2, 3):
        found = resumes(tmp_path, memory, every=2)
        assert (found.epoch, found.step, found.steps_lost, found.at_least) == (epoch, 6, 1, False)


def test_where_all_nodes_are_lost_the_promise_tells_how_many_at_least(tmp_path, monkeypatch):
    monkeypatch.setattr(holdings, "_PROMISE_SECONDS", 0.0)
    memory, _ = breaks_off(tmp_path, 7, every=4)
    promise = tmp_path / "run" / "elastic" / "epoch-00001.json"
    until(lambda: promise.exists() and json.loads(promise.read_text())["step"] == 7)
    shutil.rmtree(tmp_path / "memory")
    found = resumes(tmp_path, memory, every=4)
    assert (found.step, found.tier, found.steps_lost, found.at_least) == (4, "storage", 3, True)
    assert ", at least 3 steps lost" in str(found)
    assert found.doc["at_least"] is True
    # The next one knows no better, though it has what this one left.
    again = resumes(tmp_path, memory, every=4)
    assert (again.epoch, again.steps_lost, again.at_least) == (3, 3, True)


def test_a_promise_is_not_made_with_every_save(tmp_path):
    breaks_off(tmp_path, 5, every=4)
    promise = tmp_path / "run" / "elastic" / "epoch-00001.json"
    until(promise.exists)
    assert json.loads(promise.read_text()) == {"format": "epoch", "version": 1, "nodes": ["n"], "step": 1}


def node_of(rank, world, url, root, until, lost, copies):
    """Each rank is a node; trains, and breaks off without a word. Returns the report of this start."""
    os.environ["UCP_NODE"] = f"n{rank}"
    kept = Memory(every=3, copies=copies, root=root, busy="wait")
    run = Run(url, layouts=keep(), memory=kept, timeout=100).__enter__()
    go(run, until, of=100)
    run.tiers[0].settle()
    distributed.barrier()
    for name in lost:
        if name == f"n{rank}":
            shutil.rmtree(f"{root}/ucp-{os.geteuid()}/{run.job}/{name}")
    return run.report


def test_steps_are_known_by_the_nodes_that_are_left(tmp_path):
    url, root = str(tmp_path / "run"), str(tmp_path / "memory")
    assert [one.tier for one in spawn(node_of, 2, url, root, 8, ["n1"], 2)] == [None, None]
    (found,) = spawn(node_of, 1, url, root, 9, [], 2)
    assert (found.step, found.tier, found.steps_lost, found.at_least, found.reconfigured) == (
        6,
        "memory",
        2,
        False,
        True,
    )


def test_an_ordinary_end_loses_no_steps(tmp_path):
    with run_of(tmp_path, every=4) as run:
        go(run, 6)
    assert (run.report.done, [one.step for one in run.manager.saved]) == (6, [4, 6])
    record = json.loads((tmp_path / "run" / "elastic" / "timeline-00001.json").read_text())
    assert record == run.report.doc
    with run_of(tmp_path, every=4) as run:
        go(run, 6)
        assert (run.report.step, run.report.steps_lost, run.report.at_least) == (6, 0, False)


def test_steps_that_an_ordinary_end_gave_up_are_counted(tmp_path):
    with run_of(tmp_path, every=4) as run:
        go(run, 6, of=100)
    with run_of(tmp_path, every=4) as run:
        go(run, 7)
        assert (run.report.step, run.report.steps_lost, run.report.at_least) == (4, 2, False)


def ends(tmp_path, caplog, work, **options):
    """What the log warns of when a run ends."""
    with caplog.at_level(logging.WARNING, "ucp"), run_of(tmp_path, **options) as run:
        work(run)
    return [record.getMessage() for record in caplog.records if "the run ends" in record.getMessage()]


def test_a_loop_that_is_left_early_is_warned_of(tmp_path, caplog):
    (told,) = ends(tmp_path, caplog, lambda run: go(run, 6, of=100), every=4)
    assert "the run ends at step 6, and storage has step 4" in told
    assert "run.save(run.done, state)" in told


def test_so_is_a_run_whose_nodes_alone_held_something(tmp_path, caplog):
    memory = Memory(every=1, copies=1, root=str(tmp_path / "memory"))
    (told,) = ends(tmp_path, caplog, lambda run: go(run, 3), memory=memory)
    assert "the run ends at step 3, and storage has none" in told


def test_who_saves_himself_is_not_warned(tmp_path, caplog):
    def work(run):
        model, optimizer = state()
        run.resume((model, optimizer))
        for step in run.steps(100):
            train(model, optimizer)
            run.step(step, (model, optimizer))
            if step == 3:
                break
        run.save(run.done, (model, optimizer))

    assert ends(tmp_path, caplog, work, every=2) == []
    assert [path.name for path in sorted((tmp_path / "run").glob("step-*[0-9]"))] == ["step-00000002", "step-00000003"]
    assert ends(tmp_path / "other", caplog, lambda run: go(run, 3)) == []


def test_who_saves_at_the_end_may_start_again_when_all_is_done(tmp_path):
    for _ in range(3):
        with run_of(tmp_path, every=2) as run:
            model, optimizer = state()
            run.resume((model, optimizer))
            for step in run.steps(3):
                train(model, optimizer)
                run.step(step, (model, optimizer))
            assert run.save(run.done, (model, optimizer)).result().step == 3
    assert [one.step for one in run.manager.saved] == [2, 3]


def test_the_last_step_may_be_saved_again_with_its_metrics(tmp_path):
    with run_of(tmp_path, every=4, best=("loss", "min")) as run:
        model, optimizer = state()
        run.resume((model, optimizer))
        for step in run.steps(6):
            train(model, optimizer)
            run.step(step, (model, optimizer), metrics={"loss": 1.0})
        first = run.save(6, (model, optimizer))
        assert run.save(6, (model, optimizer), metrics={"loss": 0.25}) is first
    assert [(one.step, one.metrics) for one in run.manager.saved] == [(4, {"loss": 1.0}), (6, {"loss": 0.25})]


def test_a_last_step_that_only_nodes_held_goes_to_storage_at_the_next_start(tmp_path):
    """As when somebody is killed between the last step and the end."""
    memory, weights = breaks_off(tmp_path, 3, every=2)
    with run_of(tmp_path, memory=memory, every=2) as run:
        assert (go(run, 3, seed=1) == weights).all()
        assert (run.report.step, run.report.tier) == (3, "memory")
    assert [one.step for one in run.manager.saved] == [2, 3]
    with run_of(tmp_path, memory=memory, every=2) as run:
        assert (go(run, 3, seed=1) == weights).all()
        assert (run.report.tier, run.report.steps_lost) == ("storage", 0)
