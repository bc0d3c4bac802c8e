"""The arithmetic behind the figures of docs/elastic.md."""

from __future__ import annotations

from typing import Any

import pytest

from bench.elastic import BEGIN, END, put_between, request_of
from bench.elastic_nodes import Seen, Worker
from bench.elastic_times import cost, recoveries

REQUEST = request_of("memory", "quick", "/nowhere")


def worker(pid: int, ended: float | None, *marks: tuple[str, float, dict[str, Any]]) -> Worker:
    return Worker(pid, [{"what": what, "at": at, **more} for what, at, more in marks], ended)


def waits(step: int) -> float:
    return 0.6 if step % 10 == 0 or step in (5, 35, 55, 65) else 0.2 if step % 5 == 0 else 0.0


def life(pid: int, began: float, first: int, last: int, *, ended: float, taken: int = 0, dies: bool = False) -> Worker:
    """A second until it loads, half a second of loading, a second for each step; rank 1 is slower by a tenth."""
    late = 0.1 * (pid % 2)
    marks: list[tuple[str, float, dict[str, Any]]] = [
        ("began", began + late, {}),
        ("joined", began + late, {"world": 2}),
        ("loading", began + 1 + late, {}),
        ("loaded", began + 1.5 + late, {"step": taken, "tier": "memory"}),
    ]
    for step in range(first, last + 1):
        at = began + 2.5 + step - first + late
        marks.append(("step", at, {"step": step, "train": 0.8, "save": waits(step)}))
        marks.append(("copied", at, {"seconds": 0.05 + late, "bytes": 100}))
    if dies:
        marks.append(("died", ended, {"step": last + 1}))
    return worker(pid, ended, *marks)


SEEN = Seen(
    [
        life(0, 0, 1, 27, ended=31.0),
        life(1, 0, 1, 27, ended=30.0, dies=True),
        worker(2, 34.0, ("began", 33.0, {})),  # a meeting that broke up
        life(4, 35, 26, 48, ended=61.0, taken=25),
        life(5, 35, 26, 48, ended=60.0, taken=25, dies=True),
        life(6, 65, 46, 58, ended=80.5, taken=45),
        life(8, 83, 56, 76, ended=120.0, taken=55),
        life(9, 83, 56, 76, ended=120.0, taken=55),
    ],
    came=78.0,
)


def test_parts_of_a_recovery_follow_each_other() -> None:
    first, second, third = recoveries(REQUEST, SEEN)
    assert dict(first.parts) == pytest.approx({"detect": 1, "rendezvous": 4.1, "start": 1, "load": 0.5, "resume": 1})
    assert first.whole == pytest.approx(35 + 2.5 + 0.1 - 30)
    assert first.again == pytest.approx(35 + 2.5 + 2 + 0.1 - 30)  # step 28, two after the first one
    assert (first.event, first.step, first.taken, first.steps_lost) == ("a process died", 28, 25, 2)
    assert dict(second.parts) == pytest.approx({"detect": 1, "rendezvous": 4, "start": 1, "load": 0.5, "resume": 1})
    assert (second.event, second.step, second.taken, second.steps_lost) == ("a node was lost", 49, 45, 3)
    assert dict(third.parts) == pytest.approx({"detect": 1, "rendezvous": 2.6, "start": 1, "load": 0.5, "resume": 1})
    assert (third.event, third.step, third.taken, third.steps_lost, third.tier) == ("a node came", 59, 55, 3, "memory")


def test_a_job_that_never_goes_on_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="no step was done after all had to begin anew"):
        recoveries(REQUEST, Seen(SEEN.workers[:-2], came=78.0))
    with pytest.raises(RuntimeError, match="another node came: False"):
        recoveries(REQUEST, Seen(SEEN.workers))
    with pytest.raises(RuntimeError, match=r"kills in steps \[28\]"):
        recoveries(REQUEST, Seen(SEEN.workers[:3], came=78.0))


def test_the_slowest_rank_counts_and_neither_first_saves_nor_those_to_storage() -> None:
    found = cost(REQUEST, SEEN)
    assert found.stall == pytest.approx(0.2)
    assert found.train == pytest.approx(0.8)
    assert found.copy == pytest.approx(0.15)
    assert found.bytes == 200
    steps = [*range(2, 28), *range(27, 49), *range(47, 59), *range(57, 77)]
    assert found.step == pytest.approx(0.8 + sum(map(waits, steps)) / len(steps))


def test_figures_go_between_their_marks() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert put_between(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    with pytest.raises(ValueError, match="the page has no"):
        put_between("a page", "new")
