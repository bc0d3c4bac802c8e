"""The same job started on two nodes that do not know of each other: one goes on, and the other one says why it ends."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.elastic.test_run import go, no_launcher, run_of, state, train
from tests.elastic.test_torchrun import Agents
from ucp.elastic import Memory, fence
from ucp.elastic.records import Records
from ucp.errors import ConflictError, StorageError

__all__ = ["no_launcher"]

PATIENCE = 60


def records_of(tmp_path):
    return Records(str(tmp_path / "run"))


def is_fenced(run):
    deadline = time.monotonic() + PATIENCE
    while run._life._fence.later is None:
        assert time.monotonic() < deadline, "it does not look"
        time.sleep(0.01)


def run_on(tmp_path, **options):
    """A run on a node, of which it leaves traces when it fails."""
    return run_of(tmp_path, memory=Memory(every=10, copies=1, root=str(tmp_path / "memory")), every=1, **options)


def taken_over(tmp_path):
    """A run of node n that another start takes over, on node m, after step 2."""
    with run_on(tmp_path) as run:
        model, optimizer = state()
        run.resume((model, optimizer))
        for step in run.steps(10):
            train(model, optimizer)
            if step == 2:
                assert records_of(tmp_path).begin(1, ["m"]).epoch == run.epoch + 1
            if step == 3:
                run.save(2, (model, optimizer)).result()
                is_fenced(run)  # seen when that began
            run.step(step, (model, optimizer))
    raise AssertionError("it went on")


def test_starts_have_numbers_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        starts = list(pool.map(lambda number: Records(str(tmp_path)).begin(3, [f"n{number}", "a"]), range(8)))
    assert sorted(one.epoch for one in starts) == [*range(3, 11)]
    last = max(starts, key=lambda one: one.epoch)
    assert Records(str(tmp_path)).newest() == last
    assert last.nodes == ("a", last.nodes[1])
    Records(str(tmp_path)).alive(last)
    assert Records(str(tmp_path)).newest().alive > last.alive


def test_the_earlier_start_ends_and_what_it_saved_stays(tmp_path):
    told = "the job was started again, on node m .epoch 2.: this start .epoch 1. ends"
    with pytest.raises(ConflictError, match=told):
        taken_over(tmp_path)
    assert (tmp_path / "run" / "step-00000002" / "ucp.json").exists()
    assert not (tmp_path / "run" / "step-00000003").exists()
    # Once more on its own node it would end the other one, and so on for ever.
    refused = pytest.raises(ConflictError, match=r"goes on elsewhere, on node m \(epoch 2, heard of \d+ s ago")
    with refused, run_on(tmp_path):
        raise AssertionError("it began")
    assert records_of(tmp_path).newest().epoch == 2


@pytest.mark.parametrize("why", ["silent", "ended", "here"])
def test_it_may_go_on_when_the_other_one_does_not(tmp_path, monkeypatch, why):
    with pytest.raises(ConflictError):
        taken_over(tmp_path)
    if why == "silent":
        monkeypatch.setattr(fence, "_SILENCE", 0.0)
    if why == "ended":
        records_of(tmp_path).account(2, {"step": 2, "done": 2})
    if why == "here":  # the two have found each other
        records_of(tmp_path).begin(1, ["m", "n"])
    with run_on(tmp_path) as run:
        assert run.epoch == (4 if why == "here" else 3)
        go(run, 3)
        assert run.report.step == 2
    monkeypatch.setattr(fence, "_SILENCE", 120.0)  # and what was given up then is forgotten
    records_of(tmp_path).begin(1, ["l"])
    with run_on(tmp_path):
        pass


def test_a_start_that_others_follow_at_its_end_leaves_what_is_theirs(tmp_path):
    def others_follow():
        with run_of(tmp_path, every=1) as run:
            go(run, 2)
            start = records_of(tmp_path).begin(1, ["l", "m"])
            records_of(tmp_path).promise(start.epoch, ["l", "m"], 1)

    with pytest.raises(ConflictError, match="started again, on nodes l, m"):
        others_follow()
    assert records_of(tmp_path).past().nodes == ("l", "m")


def test_training_does_not_wait_for_storage_that_does_not_answer(tmp_path, monkeypatch, caplog):
    def silent(self):
        asked.append(self)
        raise StorageError("storage does not answer", hint="wait")

    asked = []
    monkeypatch.setattr(fence, "_PERIOD", 0.01)
    with caplog.at_level(logging.WARNING, "ucp"), run_of(tmp_path, every=1) as run:
        monkeypatch.setattr(Records, "newest", silent)
        go(run, 3)
    assert len(asked) > 1


def test_a_start_says_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(fence, "_PERIOD", 0.01)
    with run_of(tmp_path) as run:
        begun, deadline = records_of(tmp_path).newest(), time.monotonic() + PATIENCE
        assert (begun.epoch, begun.nodes) == (run.epoch, ("n",))
        while records_of(tmp_path).newest().alive <= begun.alive:
            assert time.monotonic() < deadline, "it says nothing"
        go(run, 1)


@pytest.mark.slow
def test_two_torchruns_on_two_nodes(tmp_path):
    """Torchrun starts the one anew that had to end: it is refused each time, and the other one is left alone."""
    first, second = (Agents(made(tmp_path / name)) for name in ("first", "second"))
    order = {"kind": "ddp", "steps": 1_000_000, "every": 20, "memory": 1, "url": str(tmp_path / "run")}
    try:
        first.start("a", 2, order, restarts=2)
        wait_for((tmp_path / "run" / "step-00000020" / "ucp.json").exists)
        second.start("b", 2, order)
        assert first.wait("a") != 0
        log = first.log("a")
        assert re.search(r"the job was started again, on node b .epoch \d.: this start .epoch 1. ends", log)
        assert "the job goes on elsewhere, on node b (epoch " in log
        last = records_of(tmp_path).newest()
        assert last.nodes == ("b",)
        after = newest_step(tmp_path) + 40
        wait_for((tmp_path / "run" / f"step-{after:08}" / "ucp.json").exists)
        assert records_of(tmp_path).newest().epoch == last.epoch
    finally:
        for agents in (first, second):
            agents.close()


def newest_step(tmp_path):
    return max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run").glob("step-*[0-9]"))


def made(folder):
    folder.mkdir()
    return folder


def wait_for(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
