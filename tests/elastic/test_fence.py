"""The same job started on two nodes that do not know of each other: one goes on, and the other one says why it ends."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.elastic.test_run import go, no_launcher, run_of, state, train
from tests.elastic.test_torchrun import Agents
from ucp.elastic import Memory, fence
from ucp.elastic.records import Records
from ucp.errors import ConflictError

__all__ = ["no_launcher"]

PATIENCE = 200
AGAIN = r"the job was started again, on node m \(epoch 2\): this start \(epoch 1\) ends"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fence, "_GLANCE", 0.01)


def records_of(tmp_path):
    return Records(str(tmp_path / "run"))


def follow(tmp_path, *nodes, trains=True):
    """Another start of the run, on `nodes`."""
    records = records_of(tmp_path)
    start = records.begin(1, nodes, run=records.identity())
    records.alive(replace(start, trains=trains))
    return start


def run_on(tmp_path, **options):
    """A run on a node, of which it leaves traces when it fails."""
    return run_of(tmp_path, memory=Memory(every=10, copies=1, root=str(tmp_path / "memory")), every=1, **options)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def go_until_fenced(run, meanwhile):
    """Train; `meanwhile` comes after step 2, and what it does is seen before step 4."""
    model, optimizer = state()
    run.resume((model, optimizer))
    for step in run.steps(10):
        train(model, optimizer)
        run.step(step, (model, optimizer))
        if step == 2:
            run.save(2, (model, optimizer)).result()
            meanwhile(run)
        if step == 3:
            wait_for(lambda: run._life._fence.later is not None)
    raise AssertionError("it went on")


def taken_over(tmp_path, run):
    with run:
        go_until_fenced(run, lambda _: follow(tmp_path, "m"))


def test_starts_have_numbers_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        starts = list(pool.map(lambda number: Records(str(tmp_path)).begin(3, [f"n{number}", "a"], run="r"), range(8)))
    assert len({one.epoch for one in starts}) == 8
    assert min(one.epoch for one in starts) >= 3
    last = max(starts, key=lambda one: one.epoch)
    assert Records(str(tmp_path)).newest() == last
    assert (last.nodes[0], last.run, last.trains) == ("a", "r", False)
    Records(str(tmp_path)).alive(replace(last, trains=True))
    told = Records(str(tmp_path)).newest()
    assert told.trains
    assert told.alive > last.alive


def test_a_number_is_higher_than_all_that_are_taken(tmp_path, monkeypatch):
    """Also where the nodes know of less than storage."""
    records = Records(str(tmp_path))
    assert [records.begin(epoch, ["a"], run="r").epoch for epoch in (1, 7, 7, 2)] == [1, 7, 8, 9]
    # Some stores list late what is there: it must not try the same number again and again.
    monkeypatch.setattr(records._store, "children", list)
    assert records.begin(7, ["a"], run="r").epoch == 10


def test_the_earlier_start_ends_and_what_it_saved_stays(tmp_path, monkeypatch):
    with pytest.raises(ConflictError, match=AGAIN):
        taken_over(tmp_path, run_on(tmp_path))
    assert (tmp_path / "run" / "step-00000002" / "ucp.json").exists()
    assert not (tmp_path / "run" / "step-00000004").exists()
    # Once more on its own node it would end the other one, and so on for ever.
    with heard_of(tmp_path), pytest.raises(ConflictError, match=r"goes on elsewhere, on node m \(epoch 2\)"):
        run_on(tmp_path).__enter__()
    assert records_of(tmp_path).newest().epoch == 2


def test_a_process_that_keeps_nothing_near_is_told_again_too(tmp_path, monkeypatch):
    monkeypatch.setattr("ucp.elastic.run.shared_memory", lambda: str(tmp_path / "shm"))
    with pytest.raises(ConflictError, match=AGAIN):
        taken_over(tmp_path, run_of(tmp_path, every=1))
    for _ in range(2):
        with heard_of(tmp_path), pytest.raises(ConflictError, match="goes on elsewhere, on node m"):
            run_of(tmp_path, every=1).__enter__()


class heard_of:  # noqa: N801  it reads like a word
    """In the block, the last start says all the time that it is alive."""

    def __init__(self, tmp_path):
        self.records, self.over = records_of(tmp_path), threading.Event()
        self.thread = threading.Thread(target=self.say)

    def say(self):
        while not self.over.wait(0.05):
            self.records.alive(self.records.newest())

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@pytest.mark.parametrize("why", ["silent", "ended"])
def test_it_may_go_on_when_the_other_one_does_not(tmp_path, monkeypatch, why):
    with pytest.raises(ConflictError):
        taken_over(tmp_path, run_on(tmp_path))
    if why == "silent":
        monkeypatch.setattr(fence, "_SILENCE", 0.1)
    else:
        records_of(tmp_path).account(2, {"step": 2, "done": 2})
    with run_on(tmp_path) as run:
        assert run.epoch == 3
        go(run, 4)
    follow(tmp_path, "l")
    with run_on(tmp_path):  # what was given up then is forgotten
        pass


def test_a_start_that_comes_to_nothing_ends_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(fence, "_PERIOD", 0.01)
    with run_on(tmp_path) as run:
        model, optimizer = state()
        run.resume((model, optimizer))
        for step in run.steps(6):
            train(model, optimizer)
            run.step(step, (model, optimizer))
            if step == 2:
                other = follow(tmp_path, "m", trains=False)
                looked_at(run, 2)
        assert run.done == 6
    with run_on(tmp_path) as run:
        assert run.epoch == other.epoch + 1


def looked_at(run, times):
    """Wait until it has looked so often."""
    held, looks = run._life._fence, []
    look = held.look
    held.look = lambda: (look(), looks.append(1))
    wait_for(lambda: len(looks) > times)


def test_a_run_that_was_deleted_and_begun_anew_is_left_alone(tmp_path, monkeypatch):
    def anew(run):
        run._account._thread.join()
        shutil.rmtree(tmp_path / "run")
        assert follow(tmp_path, "m").epoch == 1

    def deleted():
        with run_on(tmp_path) as run:
            go_until_fenced(run, anew)

    for _ in range(3):
        records_of(tmp_path).begin(1, ["n"], run="r")
    told = r"the run was deleted and begun anew, on node m \(epoch 1\): this start \(epoch 4\) ends"
    with pytest.raises(ConflictError, match=told):
        deleted()
    assert [path.name for path in (tmp_path / "run" / "elastic").glob("start-*")] == ["start-00001.json"]
    with heard_of(tmp_path), pytest.raises(ConflictError, match=r"goes on elsewhere, on node m \(epoch 1\)"):
        run_on(tmp_path).__enter__()


def test_a_run_that_was_only_deleted_goes_on(tmp_path, monkeypatch):
    with run_of(tmp_path, every=1) as run:
        model, optimizer = state()
        run.resume((model, optimizer))
        for step in run.steps(5):
            train(model, optimizer)
            run.step(step, (model, optimizer))
            if step == 2:
                run.save(2, (model, optimizer)).result()
                run._account._thread.join()
                shutil.rmtree(tmp_path / "run")
                monkeypatch.setattr(fence, "_PERIOD", 0.01)  # now it only looks for long
                run._life._fence.hurry()
                looked_at(run, 2)
    assert not list((tmp_path / "run" / "elastic").glob("start-*"))


def test_a_start_that_others_follow_at_its_end_keeps_what_it_saved(tmp_path):
    def others_follow():
        with run_of(tmp_path, every=1) as run:
            go(run, 2)
            start = follow(tmp_path, "l", "m")
            records_of(tmp_path).promise(start.epoch, ["l", "m"], 1)

    with pytest.raises(ConflictError, match="started again, on nodes l, m"):
        others_follow()
    assert records_of(tmp_path).past().nodes == ("l", "m")
    assert (tmp_path / "run" / "step-00000002" / "ucp.json").exists()


def test_training_does_not_wait_for_storage_that_does_not_answer(tmp_path, monkeypatch, caplog):
    answer, asked = threading.Event(), threading.Event()
    later = Records.later

    def silent(self, start):
        asked.set()
        assert answer.wait(PATIENCE)
        return later(self, start)

    monkeypatch.setattr(Records, "later", silent)
    with run_of(tmp_path, every=1) as run:
        go(run, 3)
        assert asked.wait(PATIENCE)
        assert run.done == 3
        answer.set()


def test_whatever_a_client_raises_it_is_asked_again(tmp_path, monkeypatch, caplog):
    def fails(self, start):
        asked.append(start)
        raise RuntimeError("no such luck")

    asked = []
    monkeypatch.setattr(fence, "_PERIOD", 0.01)
    monkeypatch.setattr(Records, "later", fails)
    with caplog.at_level(logging.WARNING, "ucp"), run_of(tmp_path, every=1) as run:
        go(run, 3)
        wait_for(lambda: len(asked) > 3)
    assert caplog.text.count("whether the job was started again is not known: no such luck") == 1


def test_a_start_says_that_it_trains_and_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(fence, "_PERIOD", 0.01)
    with run_of(tmp_path) as run:
        begun = records_of(tmp_path).newest()
        assert (begun.epoch, begun.nodes, begun.trains) == (run.epoch, ("n",), False)
        go(run, 1)
        wait_for(lambda: records_of(tmp_path).newest().trains)
        first = records_of(tmp_path).newest().alive
        wait_for(lambda: records_of(tmp_path).newest().alive > first)


@pytest.mark.slow
def test_two_torchruns_on_two_nodes(tmp_path):
    """Torchrun starts the one anew that had to end: it is refused each time, and the other one is left alone."""
    first, second = (Agents(made(tmp_path / name)) for name in ("first", "second"))
    order = {"kind": "ddp", "steps": 1_000_000, "every": 20, "memory": 1, "url": str(tmp_path / "run")}
    try:
        first.start("a", 2, order, restarts=1)
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
