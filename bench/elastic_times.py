"""What the marks of a job's workers say: how long each recovery took, part by part, and what saving cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.elastic_jobs import Request
from bench.elastic_nodes import Seen, Worker

Parts = Mapping[str, float]
"""Seconds by the part's name."""

NEVER = float("inf")


EVENTS = ("a process died", "a node was lost", "a node came")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What happened (`event`) in `step`; `taken` is the step that the job went on from, of which `tier`.

    `parts` are detect, rendezvous, start, load, resume, which follow each other; `inner` what the run itself tells of
    them (agree, build, plan, read, reshard; nothing of DCP). `again` is the time until `step` was done after all.
    """

    event: str
    step: int
    taken: int
    tier: str
    parts: Parts
    inner: Parts
    again: float

    @property
    def steps_lost(self) -> int:
        """Steps that were done and had to be done again."""
        return self.step - 1 - self.taken

    @property
    def whole(self) -> float:
        """Seconds from the kill to the first step that is done after it, on all ranks."""
        return sum(self.parts.values())


def recoveries(request: Request, seen: Seen) -> list[Recovery]:
    """One for each death and one for the node that came, in order. RuntimeError where the job never went on."""
    died = sorted((worker for worker in seen.workers if worker.at("died") < NEVER), key=lambda one: one.at("died"))
    steps = [worker.first("died")["step"] for worker in died]
    if steps != [request.rank_dies, request.node_dies] or seen.came is None:
        raise RuntimeError(f"{request.how}: kills in steps {steps}, another node came: {seen.came is not None}")
    # Until it is in the job, the others go on: what it interrupts begins with their last step.
    last = [list(worker.steps())[-1] for worker in _there(seen.workers, seen.came)]
    moments = [(worker.at("died"), step) for worker, step in zip(died, steps, strict=True)]
    moments.append((max(mark["at"] for mark in last), max(mark["step"] for mark in last) + 1))
    return [_recovery(event, seen.workers, *moment) for event, moment in zip(EVENTS, moments, strict=True)]


def _there(workers: Sequence[Worker], moment: float) -> list[Worker]:
    return [worker for worker in workers if worker.at("began") < moment <= (worker.ended or NEVER)]


def _recovery(event: str, workers: Sequence[Worker], moment: float, step: int) -> Recovery:
    new = _successors(workers, moment)
    began, loading = max(one.at("began") for one in new), max(one.at("loading") for one in new)
    loaded, done = max(one.at("loaded") for one in new), max(one.at("step") for one in new)
    # A node's agent may start the next worker while the last one of another node still ends.
    ended = min(began, max(worker.ended or NEVER for worker in _there(workers, moment)))
    last = max(new, key=lambda one: one.at("loading"))  # others wait for it, and its parts are within those of all
    taken = last.first("loaded")
    return Recovery(
        event=event,
        step=step,
        taken=taken["step"],
        tier=taken["tier"],
        parts={
            "detect": ended - moment,
            "rendezvous": began - ended,
            "start": loading - began,
            "load": loaded - loading,
            "resume": done - loaded,
        },
        inner=last.first("told")["parts"] if last.at("told") < NEVER else {},
        again=max(_done(one, step) for one in new) - moment,
    )


def _successors(workers: Sequence[Worker], moment: float) -> list[Worker]:
    """Those that made the first step of a new start; a meeting that broke up before is a part of the way there."""
    later = [worker for worker in workers if worker.at("began") > moment]
    first = min((worker.at("step") for worker in later), default=NEVER)
    found = [worker for worker in later if worker.at("loaded") <= first < NEVER and (worker.ended or NEVER) > first]
    if not found:
        raise RuntimeError("no step was done after all had to begin anew")
    return found


def _done(worker: Worker, step: int) -> float:
    return next((float(mark["at"]) for mark in worker.steps() if mark["step"] >= step), NEVER)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a step waits for a save, those of a bare copy of the state, and those of training: medians.

    Each is of the slowest rank; `step` is the mean of whole steps. `bytes` is the state of all ranks together, `sent`
    what a rank sends to other nodes for a save.
    """

    stall: float
    copy: float
    train: float
    step: float
    bytes: int
    sent: float


def cost(request: Request, seen: Seen) -> Cost:
    """What the saves cost that `request.how` is about, but for the first one of a process, for which memory is new.

    Where a save to storage is due at the same time, it is not counted either.
    """
    saves, trains, steps = (dict[tuple[int, int], float]() for _ in range(3))
    for worker in seen.workers:
        for mark in list(worker.steps())[1:]:
            key = (_generation(seen, worker), mark["step"])
            trains[key] = max(trains.get(key, 0.0), mark["train"])
            steps[key] = max(steps.get(key, 0.0), mark["train"] + mark["save"])
        for mark in [mark for mark in worker.steps() if _due(request, mark["step"])][1:]:
            key = (_generation(seen, worker), mark["step"])
            saves[key] = max(saves.get(key, 0.0), mark["save"])
    copies = list(_copies(seen))
    return Cost(
        stall=statistics.median(saves.values()),
        copy=statistics.median(seconds for seconds, _ in copies),
        train=statistics.median(trains.values()),
        step=statistics.mean(steps.values()),
        bytes=max(nbytes for _, nbytes in copies),
        sent=statistics.median(list(_sent(request, seen)) or [0.0]),
    )


def _due(request: Request, step: int) -> bool:
    if request.how in ("storage", "dcp"):
        return step % request.seldom == 0
    return step % request.often == 0 and step % request.seldom != 0


def _generation(seen: Seen, worker: Worker) -> int:
    """How much had happened before it began."""
    moments = [NEVER if seen.came is None else seen.came, *(one.at("died") for one in seen.workers)]
    return sum(moment < worker.at("began") for moment in moments)


def _copies(seen: Seen) -> Iterator[tuple[float, int]]:
    """Seconds of the slowest rank and bytes of all, of each bare copy."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for worker in seen.workers:
        copies = (mark for mark in worker.marks if mark["what"] == "copied")
        for number, mark in enumerate(copies):
            found.setdefault((_generation(seen, worker), number), []).append(mark)
    for marks in found.values():
        yield max(mark["seconds"] for mark in marks), sum(mark["bytes"] for mark in marks)


def _sent(request: Request, seen: Seen) -> Iterator[float]:
    """Bytes that each rank that came to the end sent to other nodes for a save."""
    for worker in seen.workers:
        saves = sum(mark["step"] % request.often == 0 for mark in worker.steps())
        if worker.at("done") < NEVER and saves:
            yield worker.first("done").get("sent", 0) / saves
