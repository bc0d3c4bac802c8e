"""The account of a job that was killed again and again, from its ranks' records, and whether what was promised held.

Only those steps count that the final state descends from, each as the epoch did it that this state took it from: a step
that was done, lost, and done again counts once. They are compared with the records of the same job left alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from ucp.demo.elastic.records import End, History, Record, Recovered, Resume, Start, Step

_R = TypeVar("_R", bound=Record)
_SAME = 1e-6
"""Ranks that have the same samples compute the same loss but for the order of reduction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What was done to the job: `what` (``rank``, ``agent``, ``node``, ``cut``, ``start``, ``heal``) to whom, when.

    `phase` is where the victim was, if the strike waited for that; `step` is the newest step that was done.
    """

    time: float
    what: str
    node: str
    rank: int | None = None
    phase: str | None = None
    step: int = 0

    @property
    def words(self) -> str:
        """What was done, for people: ``rank a.1 killed in forward``."""
        whom = f"rank {self.node}.{self.rank}" if self.what == "rank" else f"node {self.node}"
        done = {
            "rank": f"{whom} killed",
            "agent": f"agent of {whom} killed",
            "node": f"{whom} killed",
            "cut": f"{whom} cut off",
            "start": f"{whom} comes",
            "heal": f"{whom} reachable again",
        }
        return f"{done[self.what]}{f' in {self.phase}' if self.phase else ''}"

    @property
    def kills(self) -> bool:
        """Whether it is a SIGKILL."""
        return self.what in ("rank", "agent", "node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """From the first blow to an epoch until all ranks of a later one have done a step.

    `seconds` is all of it, of which `parts` are as the run tells them, and `seen` as the records show: ``out`` (until
    the last rank is in the new job), ``load`` (until the last one has its state), ``step`` (until it has done a step).
    `attempts` counts epochs that began, more than one where recovery itself was struck.
    """

    epoch: int
    seconds: float
    steps_lost: int
    step: int
    tier: str
    reconfigured: bool
    world_before: int
    world: int
    mesh: Mapping[str, int]
    attempts: int
    seen: Mapping[str, float]
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What came of a job. Steps are numbered from 1; a sample counts as often as it is missing or repeated.

    `worlds` and `meshes` are of the epochs in which a step was done, one after the other.
    """

    steps: int
    kills: int
    cuts: int
    worlds: tuple[int, ...]
    meshes: tuple[Mapping[str, int], ...]
    recoveries: tuple[Recovery, ...]
    steps_lost: int
    samples_missing: int
    samples_repeated: int
    samples_misplaced: int
    loss_difference: float
    problems: tuple[str, ...]

    def broken(self, *, tolerance: float, seconds: float | None = None) -> tuple[str, ...]:
        """Promises that did not hold: losses within `tolerance`, recoveries within `seconds`, and all the others."""
        slow = [one for one in self.recoveries if seconds is not None and one.seconds > seconds]
        checks = {
            f"{self.samples_missing} samples missing": self.samples_missing,
            f"{self.samples_repeated} samples repeated": self.samples_repeated,
            f"{self.samples_misplaced} samples in another step": self.samples_misplaced,
            f"a loss differs by {self.loss_difference:g}": not self.loss_difference <= tolerance,
            f"{len(slow)} recoveries took more than {seconds} s": slow,
        }
        return (*self.problems, *(told for told, wrong in checks.items() if wrong))


@dataclass(frozen=True, slots=True)
class _Done:
    """A step as one epoch did it."""

    samples: Counter[int]
    loss: float


def account(records: Sequence[Record], reference: Sequence[Record], strikes: Iterable[Strike] = ()) -> Account:
    """The account of `records`, against those of the same job undisturbed, which must have come to its end."""
    records, reference = newest(records), newest(reference)
    struck = sorted(strikes, key=lambda strike: strike.time)
    problems: list[str] = []
    unexpected: list[str] = []
    done, expected = _history(records, problems), _history(reference, unexpected)
    problems += [f"undisturbed: {problem}" for problem in unexpected]
    seen, wanted = _totals(done), _totals(expected)
    trained = {step.epoch for step in _of(records, Step)}
    starts = [start for start in _of(records, Start) if start.rank == 0 and start.epoch in trained]
    recoveries = _recoveries(records, struck)
    return Account(
        steps=len(done),
        kills=sum(strike.kills for strike in struck),
        cuts=sum(strike.what == "cut" for strike in struck),
        worlds=tuple(start.world for start in starts),
        meshes=tuple(start.mesh for start in starts),
        recoveries=recoveries,
        steps_lost=sum(recovery.steps_lost for recovery in recoveries),
        samples_missing=(wanted - seen).total(),
        samples_repeated=(seen - wanted).total(),
        samples_misplaced=_misplaced(done, expected),
        loss_difference=_difference(done, expected),
        problems=tuple(dict.fromkeys(problems)),
    )


def newest(records: Sequence[Record]) -> list[Record]:
    """The records without those of starts that another one of the same epoch followed, as some jobs number theirs."""
    starts: dict[tuple[int, int], Start] = {}
    worlds: dict[int, int] = {}
    for start in sorted(_of(records, Start), key=lambda start: start.time):
        starts[start.epoch, start.rank] = start
        worlds[start.epoch] = start.world
    there = {(start.epoch, start.pid) for start in starts.values() if start.rank < worlds[start.epoch]}
    return [record for record in records if (record.epoch, record.pid) in there]


def lineage(records: Sequence[Record]) -> dict[int, int]:
    """The epoch from which the final state has each step; nothing of a job without an end."""
    ends = _of(records, End)
    last = max(ends, key=lambda end: (end.epoch, end.time), default=None)
    return _epochs(last.history, last.step) if last is not None else {}


def losses(records: Sequence[Record]) -> dict[tuple[int, int], tuple[float, float]]:
    """When each (epoch, step) was done, those that were lost too, and the mean loss of its samples."""
    by_epoch: dict[tuple[int, int], list[Step]] = defaultdict(list)
    for step in _of(records, Step):
        by_epoch[step.epoch, step.step].append(step)
    return {key: (max(step.time for step in steps), _put_together(steps, []).loss) for key, steps in by_epoch.items()}


def _of(records: Iterable[Record], kind: type[_R]) -> list[_R]:
    return [record for record in records if isinstance(record, kind)]


def _history(records: Sequence[Record], problems: list[str]) -> dict[int, _Done]:
    """The steps that the final state descends from."""
    ends = _of(records, End)
    if not ends:
        problems.append("the job has not come to its end")
        return {}
    last = max(ends, key=lambda end: (end.epoch, end.time))
    if any((end.step, end.history) != (last.step, last.history) for end in ends if end.epoch == last.epoch):
        problems.append("ranks end with different histories")
    problems.extend(_mixed(records))
    problems.extend(_disordered(last.history, last.step))
    epochs = _epochs(last.history, last.step)
    by_epoch: dict[tuple[int, int], list[Step]] = defaultdict(list)
    for step in _of(records, Step):
        by_epoch[step.epoch, step.step].append(step)
    found = {step: _put_together(by_epoch[epoch, step], problems) for step, epoch in epochs.items()}
    absent = [step for step, epoch in epochs.items() if (epoch, step) not in by_epoch or not by_epoch[epoch, step]]
    if absent:
        problems.append(f"{len(absent)} steps, {absent[0]} the first, were never done")
    return {step: done for step, done in found.items() if step not in absent}


def _epochs(history: History, last: int) -> dict[int, int]:
    """The epoch that did each step; -1 where none is told."""
    found = dict.fromkeys(range(1, last + 1), -1)
    bounds = [*(step for _, step in history[1:]), last]
    for (epoch, begun), end in zip(history, bounds, strict=False):
        found.update(dict.fromkeys(range(begun + 1, end + 1), epoch))
    return found


def _disordered(history: History, last: int) -> Iterable[str]:
    steps, epochs = [step for _, step in history], [epoch for epoch, _ in history]
    if steps != sorted(steps) or epochs != sorted(set(epochs)) or any(step > last for step in steps):
        yield f"the final state descends from what cannot be: {history}"


def _mixed(records: Sequence[Record]) -> Iterable[str]:
    """Ranks of one epoch that went on from different states."""
    went_on: dict[int, set[tuple[int, History]]] = defaultdict(set)
    for resume in _of(records, Resume):
        went_on[resume.epoch].add((resume.step, resume.history))
    return [f"ranks of epoch {epoch} went on from different states" for epoch, all_ in went_on.items() if len(all_) > 1]


def _put_together(steps: Sequence[Step], problems: list[str]) -> _Done:
    """What all ranks did in one step: those with the same samples by number, once."""
    by_place: dict[int, Step] = {}
    for step in steps:
        known = by_place.setdefault(step.dp, step)
        if known is not step and not _same(known, step):
            problems.append(f"ranks with the same part of step {step.step} in epoch {step.epoch} differ")
    samples = Counter(sample for step in by_place.values() for sample in step.samples)
    return _Done(samples, sum(step.loss for step in by_place.values()) / max(1, samples.total()))


def _same(one: Step, other: Step) -> bool:
    return one.samples == other.samples and abs(one.loss - other.loss) <= _SAME * max(1.0, abs(one.loss))


def _totals(done: Mapping[int, _Done]) -> Counter[int]:
    return sum((one.samples for one in done.values()), Counter())


def _misplaced(done: Mapping[int, _Done], expected: Mapping[int, _Done]) -> int:
    """Samples that a step has and should not have."""
    nothing = _Done(Counter(), 0.0)
    return sum((one.samples - expected.get(step, nothing).samples).total() for step, one in done.items())


def _difference(done: Mapping[int, _Done], expected: Mapping[int, _Done]) -> float:
    """The largest difference of a loss; not a number if one is not."""
    differences = [abs(one.loss - expected[step].loss) for step, one in done.items() if step in expected]
    strange = [difference for difference in differences if difference != difference]
    return strange[0] if strange else max(differences, default=0.0)


def _recoveries(records: Sequence[Record], strikes: Sequence[Strike]) -> tuple[Recovery, ...]:
    worked: dict[int, list[Step]] = defaultdict(list)
    for step in _of(records, Step):
        worked[step.epoch].append(step)
    resumed = {record.epoch: record for record in _of(records, Resume)}
    epochs = sorted(epoch for epoch in worked if epoch in resumed)
    return tuple(_recovery(records, strikes, worked, before, after) for before, after in pairwise(epochs))


def _recovery(
    records: Sequence[Record], strikes: Sequence[Strike], worked: Mapping[int, list[Step]], before: int, after: int
) -> Recovery:
    mine = [record for record in records if record.epoch == after]
    resumes, starts, told = _of(mine, Resume), _of(mine, Start), _of(mine, Recovered)
    lead = min(starts, key=lambda start: start.rank)
    first = min(step.step for step in worked[after])
    entered, loaded = max(one.time for one in starts), max(one.time for one in resumes)
    stepped = max(one.time for one in worked[after] if one.step == first)
    struck = _struck(strikes, worked[before], stepped)
    return Recovery(
        epoch=after,
        seconds=stepped - struck,
        steps_lost=max(0, max(step.step for step in worked[before]) - resumes[0].step),
        step=resumes[0].step,
        tier=resumes[0].tier,
        reconfigured=any(resume.reconfigured for resume in resumes),
        world_before=max((one.world for one in _of(records, Start) if one.epoch == before), default=0),
        world=lead.world,
        mesh=lead.mesh,
        attempts=len({one.epoch for one in _of(records, Start) if before < one.epoch <= after}),
        seen={"out": entered - struck, "load": loaded - entered, "step": stepped - loaded},
        parts=told[0].parts if told else {},
    )


def _struck(strikes: Sequence[Strike], before: Sequence[Step], until: float) -> float:
    """When what ended the epoch of `before` happened: the first strike after it began, or its last step."""
    begun, last = min(step.time for step in before), max(step.time for step in before)
    times = [strike.time for strike in strikes if begun <= strike.time <= until]
    # A step may be done, and recorded, after the blow: a rank elsewhere has not noticed yet.
    return min([last, *times]) if times else last
