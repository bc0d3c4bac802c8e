"""What ranks leave of themselves, and what the next start makes of it."""

from __future__ import annotations

import json
import os
import time

import pytest

from ucp.elastic.timeline import (
    PARTS,
    Beat,
    Pulse,
    Reached,
    Timeline,
    failure,
    forget,
    last_start,
    left_behind,
    process_start,
    reached,
)


def beat(rank, alive, *, heard=0.0, size=3, epoch=1, step=0, sure=True):
    return Beat(epoch, rank, size, alive, heard, step, sure)


def test_a_pulse_is_read_as_it_was_left(tmp_path):
    folder = str(tmp_path / "beats")
    before = time.time() - 1
    pulse = Pulse(folder, epoch=3, rank=1, size=4)
    pulse.done(1234)
    pulse.alive(before)
    (found,) = left_behind(folder, take=False)
    assert (found.epoch, found.rank, found.size, found.step, found.heard) == (3, 1, 4, 1234, before)
    assert before < found.alive < time.time() + 1
    pulse.done(7)  # shorter than what stood there
    assert [one.step for one in left_behind(folder, take=True)] == [7]
    assert left_behind(folder, take=False) == []
    pulse.alive(0.0)  # its file is gone, and nothing depends on it
    pulse.close(remove=True)
    pulse.done(8)


def test_what_is_no_pulse_is_left_out(tmp_path):
    good = Pulse(str(tmp_path), epoch=1, rank=0, size=1)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "lacking").write_text(json.dumps({"epoch": 1}))
    (tmp_path / "folder").mkdir()
    assert [one.rank for one in left_behind(str(tmp_path), take=False)] == [0]
    good.close(remove=False)
    assert left_behind(str(tmp_path / "nowhere"), take=True) == []


def test_a_start_that_comes_to_nothing_passes_on_what_was_before_it(tmp_path):
    folder = str(tmp_path)
    pulse = Pulse(folder, epoch=2, rank=0, size=1, before=Reached(9, sure=False))
    assert [(one.step, one.sure) for one in left_behind(folder, take=False)] == [(9, False)]
    pulse.done(7)
    assert [(one.step, one.sure) for one in left_behind(folder, take=False)] == [(7, True)]


def test_only_earlier_starts_are_forgotten(tmp_path):
    for epoch in (3, 4):
        Pulse(str(tmp_path), epoch=epoch, rank=1, size=2)
    (tmp_path / "else").touch()
    forget(str(tmp_path), before=4)
    assert [one.epoch for one in left_behind(str(tmp_path), take=False)] == [4]
    assert (tmp_path / "else").exists()
    forget(str(tmp_path / "nowhere"), before=4)


def test_one_rank_that_is_left_tells_how_far_all_came():
    assert reached([beat(2, 1.0, epoch=3, step=9)], [(3, 8), (1, 20)], last=3) == Reached(9)


def test_where_nobody_is_left_what_was_saved_and_told_says_how_far_at_least():
    assert reached([], [(3, 6), (3, 8), (2, 20)], last=3) == Reached(8, sure=False)
    # Of the last start nothing is left, nor of what it knew.
    assert reached([beat(0, 1.0, epoch=2, step=7)], [(2, 6)], last=3) == Reached(7, sure=False)
    assert reached([beat(0, 1.0, epoch=3, step=7, sure=False)], [], last=3) == Reached(7, sure=False)


def test_a_first_start_and_one_after_an_ordinary_end_know_all():
    assert reached([], [], last=0) == Reached()
    assert reached([], [(3, 5)], last=3, ended=8) == Reached(8)


def test_a_pulse_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").write_text("keep")
    (tmp_path / "e00001-00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Pulse(str(tmp_path), epoch=1, rank=0, size=1)
    assert (tmp_path / "elsewhere").read_text() == "keep"


def test_beats_travel_as_json():
    one = beat(2, 1700000000.25, heard=1700000000.125, step=40)
    assert Beat.of(json.loads(json.dumps(one.doc))) == one


def test_only_the_last_start_counts():
    assert last_start([beat(0, 1.0, epoch=2), beat(1, 2.0, epoch=3), beat(0, 2.5, epoch=3)]) == [
        beat(1, 2.0, epoch=3),
        beat(0, 2.5, epoch=3),
    ]
    assert last_start([]) == []


def test_a_failure_lasts_from_the_first_that_was_gone_to_the_last():
    assert failure([beat(0, 20.0), beat(1, 10.0), beat(2, 20.5)]) == (10.0, 20.5)
    assert failure([]) is None


def test_a_lost_node_is_dated_by_the_rank_before_it():
    # Ranks 2 and 0 took their files along; rank 1 heard rank 2 last at 10.
    assert failure([beat(1, 20.0, heard=10.0)]) == (10.0, 20.0)
    # Whom a rank heard last is not asked where that one tells itself.
    assert failure([beat(0, 20.0, heard=5.0), beat(1, 20.5, heard=19.0)]) == (19.0, 20.5)


def test_parts_follow_each_other_and_leave_out_what_is_not_over():
    times = Timeline(began=100.0, entered=103.0, failed=(90.0, 96.0), met=104.0)
    assert times.parts() == {"detect": 6.0, "rendezvous": 5.0, "start": 3.0}
    times.agreed, times.resuming, times.resumed, times.stepped = 104.5, 106.0, 108.0, 108.25
    times.loading = {"read": 1.0, "plan": 0.5, "reshard": 0.5}
    assert times.parts() == {
        "detect": 6.0,
        "rendezvous": 5.0,
        "start": 3.0,
        "agree": 0.5,
        "build": 1.5,
        "plan": 0.5,
        "read": 1.0,
        "reshard": 0.5,
        "resume": 0.25,
    }
    assert tuple(times.parts()) == PARTS
    assert sum(times.parts().values()) == times.stepped - 90.0


def test_a_first_start_has_no_failure_to_detect():
    assert Timeline(began=100.0, entered=103.0, met=104.0).parts() == {"rendezvous": 1.0, "start": 3.0}


def test_a_process_knows_when_it_began():
    started = process_start()
    assert started <= time.time() + 1
    assert abs(process_start() - started) < 1
    if os.path.exists("/proc/self/stat"):
        assert started <= os.stat("/proc/self").st_mtime + 1
